// The page of `diffuse serve`: settings, a start image with a mask, runs, and the gallery.

const $ = (id) => document.getElementById(id);

// ---------------------------------------------------------------------------------------------
// The server

const KEY = "diffuse-api-key";

/** An answer that is not a success, with the server's message. */
class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Sends a request with the key, if there is one. A body makes it a POST of JSON. */
async function request(path, body, signal) {
  const headers = {};
  const key = localStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, signal };
  if (body) options.body = JSON.stringify(body);
  const response = await fetch(path, options).catch(lost("The server cannot be reached."));
  if (response.ok) return response;
  const text = await response.text();
  throw new Refused(response.status, message(text) || `The server answers ${response.status}.`);
}

/** What became of a connection, unless the page itself ended it. */
const lost = (text) => (error) => {
  throw error.name === "AbortError" ? error : new Error(text);
};

/** The message of an error of either API; `detail` may be a list, as FastAPI has it. */
function message(text) {
  try {
    const { detail, error } = JSON.parse(text);
    if (!detail) return error.message;
    return Array.isArray(detail) ? detail.map(({ msg }) => msg).join("\n") : detail;
  } catch {
    return text;
  }
}

const getJson = async (path) => (await request(path)).json();

/** The values of a response that has one on each line, as they arrive. */
async function* jsonLines(response) {
  let rest = "";
  for await (const text of chunks(response.body.pipeThrough(new TextDecoderStream()))) {
    const lines = (rest + text).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

/** Not every browser iterates over streams. */
async function* chunks(stream) {
  const reader = stream.getReader();
  for (;;) {
    const { done, value } = await reader.read().catch(lost("The connection has ended."));
    if (done) return;
    yield value;
  }
}

// ---------------------------------------------------------------------------------------------
// Settings

/** What `/internal/v1/info` says. */
let info;

/** Asks for the model, its defaults and its lists, and fills the form. */
async function begin() {
  try {
    const [about, samplers, loras] = await Promise.all([
      getJson("internal/v1/info"),
      getJson("sdapi/v1/samplers"),
      getJson("sdapi/v1/loras"),
    ]);
    $("key-form").hidden = true;
    $("main").hidden = false;
    showError("");
    if (info) return;
    info = about;
    $("prompt").focus();
    listSchedulers(samplers.map(({ name }) => name));
    listLoras(loras.map(({ name }) => name));
  } catch (error) {
    showError(error);
    return;
  }
  $("model").textContent = info.model;
  $("steps").max = info.limits.steps;
  $("images").max = info.limits.images;
  $("steps").value = info.steps;
  $("guidance").value = info.guidance_scale;
  info.size ??= [512, 512];
  setSize(info.size);
}

function listSchedulers(names) {
  const own = info.scheduler.replace(/Scheduler$/, "");
  const options = names.map((name) => new Option(name, name));
  $("scheduler").replaceChildren(new Option(`${own} (default)`, ""), ...options);
}

/** A button for each LoRA: it puts the LoRA into the prompt, or takes it out. */
function listLoras(names) {
  const escape = (text) => text.replace(/[^\w\s]/g, "\\$&");
  const tag = (name) => new RegExp(`\\s*<lora:${escape(name)}(:[^>]*)?>`);
  const buttons = names.map((name) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = name;
    button.title = "Add this LoRA to the prompt, or remove it";
    button.addEventListener("click", () => {
      const text = $("prompt").value;
      const without = text.replace(tag(name), "");
      $("prompt").value = without === text ? `${text} <lora:${name}:1>`.trimStart() : without;
      press();
    });
    return button;
  });
  const press = () => {
    buttons.forEach((button, index) => {
      button.ariaPressed = String(tag(names[index]).test($("prompt").value));
    });
  };
  $("loras").replaceChildren(...buttons);
  $("loras").hidden = names.length === 0;
  $("prompt").addEventListener("input", press);
  press();
}

function setSize([width, height]) {
  $("width").value = width;
  $("height").value = height;
  sizeChanged();
}

const size = () => [$("width").valueAsNumber || 8, $("height").valueAsNumber || 8];

/** The frame and the start image have the proportions of the result. */
function sizeChanged() {
  start.draw();
  if (!shown && !run) setFrame(size());
}

function seedChanged() {
  $("random").ariaPressed = String($("seed").value === "");
}

function readSettings() {
  const [width, height] = size();
  return {
    prompt: $("prompt").value,
    negative: $("negative").value,
    steps: $("steps").valueAsNumber,
    guidance: $("guidance").valueAsNumber,
    width,
    height,
    // The page draws it: larger ones than a number holds would come back rounded.
    seed: $("seed").value === ""
      ? crypto.getRandomValues(new Uint32Array(1))[0]
      : $("seed").valueAsNumber,
    scheduler: $("scheduler").value,
    start: start.state(),
  };
}

/** Fills the form with the settings of an image. */
function writeSettings(settings) {
  for (const name of ["prompt", "negative", "steps", "guidance", "seed", "scheduler"]) {
    $(name).value = settings[name];
  }
  $("images").value = 1;
  start.restore(settings.start);
  setSize([settings.width, settings.height]);
  seedChanged();
  $("prompt").dispatchEvent(new Event("input"));
}

/** The fields of AUTOMATIC1111's API. */
function fields(settings, images) {
  const { prompt, steps, seed, width, height } = settings;
  const body = {
    prompt,
    negative_prompt: settings.negative,
    steps,
    cfg_scale: settings.guidance,
    seed,
    width,
    height,
    n_iter: images,
    sampler_name: settings.scheduler,
  };
  if (!settings.start) return body;
  body.init_images = [start.imageUrl([width, height])];
  body.denoising_strength = settings.start.strength;
  const mask = start.maskUrl([width, height]);
  if (mask) body.mask = mask;
  return body;
}

// ---------------------------------------------------------------------------------------------
// The start image and its mask

const canvas = $("canvas");
/** Larger images are scaled to this side first, so that painting is quick. */
const MOST = 2048;

const sidesOf = ({ width, height }, change) => [width, height].map((side) => change(side));

/**
 * An image, and a mask as strokes in the image's pixels: `{ erases, width, points }`. So the mask
 * stays in its place if the size of the result changes, which crops the image at its centre.
 */
const start = {
  image: null,
  strokes: [],
  /** Where the brush is, if it is over the image. */
  brush: null,
  /** The stroke that is being painted. */
  stroke: null,

  /** Takes an image from a file. The size of the result follows it, or is its own. */
  async load(file, keepsSize) {
    let image;
    try {
      image = await createImageBitmap(file);
      const scale = MOST / Math.max(image.width, image.height);
      if (scale < 1) {
        const [resizeWidth, resizeHeight] = sidesOf(image, (side) => Math.ceil(side * scale));
        const options = { resizeWidth, resizeHeight, resizeQuality: "high" };
        image = await createImageBitmap(image, options);
      }
    } catch {
      showError("The browser cannot read this file as an image.");
      return;
    }
    showError("");
    this.restore({ image, strokes: [], masked: false, strength: $("strength").valueAsNumber });
    const [width, height] = info?.size ?? [512, 512];
    const scale = Math.sqrt((width * height) / (image.width * image.height));
    const round = (side) => Math.max(8, Math.round((side * scale) / 8) * 8);
    setSize(sidesOf(image, keepsSize ? (side) => side : round));
  },

  /** What is needed to have this image and mask again. */
  state() {
    if (!this.image) return null;
    const { image, strokes } = this;
    const masked = $("masked").checked;
    return { image, strokes: [...strokes], masked, strength: $("strength").valueAsNumber };
  },

  restore(state) {
    this.image = state?.image ?? null;
    this.strokes = [...(state?.strokes ?? [])];
    this.brush = this.stroke = null;
    $("masked").checked = state?.masked ?? false;
    if (state) $("strength").value = state.strength;
    $("editor").hidden = !state;
    $("drop").hidden = Boolean(state);
    $("file").value = "";
    maskedChanged();
    showOutputs();
  },

  /** Scale and offset from the image to a canvas of this size, which it covers. */
  placement(width, height) {
    const scale = Math.max(width / this.image.width, height / this.image.height);
    return [
      scale,
      (width - this.image.width * scale) / 2,
      (height - this.image.height * scale) / 2,
    ];
  },

  /** The image, or the strokes in one colour, on a new canvas. */
  layer([width, height], color) {
    const context = new OffscreenCanvas(width, height).getContext("2d");
    const [scale, x, y] = this.placement(width, height);
    context.setTransform(scale, 0, 0, scale, x, y);
    if (!color) {
      context.imageSmoothingQuality = "high";
      context.drawImage(this.image, 0, 0);
      return context;
    }
    context.strokeStyle = color;
    context.lineCap = context.lineJoin = "round";
    for (const { erases, width, points } of this.strokes) {
      context.globalCompositeOperation = erases ? "destination-out" : "source-over";
      context.lineWidth = width;
      context.beginPath();
      context.moveTo(...points[0]);
      // A line of no length would be a dot in some browsers only.
      for (const [x, y] of points) context.lineTo(x + 0.01, y);
      context.stroke();
    }
    return context;
  },

  /** Shows the image, the mask and the brush. */
  draw() {
    if (!this.image) return;
    const [width, height] = size();
    canvas.style.aspectRatio = `${width} / ${height}`;
    const wide = Math.round(Math.max(1, canvas.clientWidth) * devicePixelRatio);
    const high = Math.max(1, Math.round((wide * height) / width));
    [canvas.width, canvas.height] = [wide, high];
    const context = canvas.getContext("2d");
    context.drawImage(this.layer([wide, high]).canvas, 0, 0);
    if (!$("masked").checked) return;
    context.globalAlpha = 0.6;
    context.drawImage(this.layer([wide, high], "#e0457b").canvas, 0, 0);
    context.globalAlpha = 1;
    if (this.brush) this.drawBrush(context, wide, high);
  },

  /** A ring that is seen on light and on dark; it is thick while the brush paints. */
  drawBrush(context, wide, high) {
    const [scale, x, y] = this.placement(wide, high);
    const [column, row] = this.brush;
    const thin = devicePixelRatio * (this.stroke ? 2 : 1);
    context.beginPath();
    context.arc(column * scale + x, row * scale + y, (brushWidth() / 2) * scale, 0, 7);
    for (const [color, width] of [["#000", 3 * thin], ["#fff", thin]]) {
      context.strokeStyle = color;
      context.lineWidth = width;
      context.stroke();
    }
  },

  /** Where an event is, in the image's pixels. */
  position(event) {
    const box = canvas.getBoundingClientRect();
    const [scale, x, y] = this.placement(box.width, box.height);
    return [(event.clientX - box.left - x) / scale, (event.clientY - box.top - y) / scale];
  },

  lower() {
    const erases = $("erase").ariaPressed === "true";
    this.stroke = { erases, width: brushWidth(), points: [this.brush] };
    this.strokes.push(this.stroke);
    this.draw();
  },

  move(position) {
    this.brush = position;
    this.stroke?.points.push(position);
    this.draw();
  },

  lift() {
    this.stroke = null;
    this.draw();
  },

  imageUrl(size) {
    return dataUrl(this.layer(size));
  },

  /** White where the image is repainted; nothing if that is nowhere. */
  maskUrl([width, height]) {
    if (!$("masked").checked) return null;
    const context = this.layer([width, height], "#fff");
    const pixels = context.getImageData(0, 0, width, height).data;
    if (!pixels.some((value) => value > 0)) return null;
    context.resetTransform();
    context.globalCompositeOperation = "destination-over";
    context.fillRect(0, 0, width, height);
    return dataUrl(context);
  },
};

/** The canvas of a context as a PNG. */
function dataUrl(context) {
  const copy = document.createElement("canvas");
  [copy.width, copy.height] = [context.canvas.width, context.canvas.height];
  copy.getContext("2d").drawImage(context.canvas, 0, 0);
  return copy.toDataURL("image/png");
}

/** In the image's pixels. */
function brushWidth() {
  const { width, height } = start.image;
  return ($("brush-size").valueAsNumber / 100) * Math.min(width, height);
}

function maskedChanged() {
  const masked = $("masked").checked;
  $("brush").hidden = !masked;
  canvas.classList.toggle("painting", masked);
  canvas.tabIndex = masked ? 0 : -1;
  canvas.role = masked ? "application" : "img";
  canvas.ariaLabel = masked ? "Mask of the start image" : "Start image";
  start.lift();
}

/** The arrow keys move the brush, the space bar lowers and lifts it. */
function paintByKey(event) {
  if (!$("masked").checked) return;
  const { width, height } = start.image;
  const [x, y] = start.brush ?? [width / 2, height / 2];
  const far = brushWidth() / (event.shiftKey ? 1 : 4);
  const moves = {
    ArrowLeft: [-far, 0],
    ArrowRight: [far, 0],
    ArrowUp: [0, -far],
    ArrowDown: [0, far],
    " ": [0, 0],
  };
  const by = moves[event.key];
  if (!by || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  const clamp = (value, most) => Math.min(Math.max(value, 0), most);
  start.move([clamp(x + by[0], width), clamp(y + by[1], height)]);
  if (event.key === " ") start.stroke ? start.lift() : start.lower();
}

// ---------------------------------------------------------------------------------------------
// Runs

/** The run that is under way: its settings, and what ends it. */
let run = null;

async function generate() {
  if (run) return;
  showError("");
  const settings = readSettings();
  run = { settings, abort: new AbortController(), preview: null, tile: runTile() };
  setRunning(true);
  show(null);
  try {
    const body = fields(settings, $("images").valueAsNumber);
    const response = await request("internal/v1/generate", body, run.abort.signal);
    const result = await follow(jsonLines(response));
    const images = result.images.map((image, index) => addImage(image, index, result, settings));
    const { length } = images;
    announce(length === 1 ? "The image is finished." : `${length} images are finished.`);
    const wasWatched = !shown;
    endRun();
    if (wasWatched) show(images[0]);
  } catch (error) {
    const cancelled = run.abort.signal.aborted;
    endRun();
    show(shown ?? gallery[0] ?? null);
    if (cancelled) announce("Cancelled.");
    else showError(error);
  }
}

function endRun() {
  run.tile.remove();
  run = null;
  $("gallery").hidden = gallery.length === 0;
  setRunning(false);
}

/** Shows the steps of a run, and returns its end. */
async function follow(lines) {
  let began;
  let quarter = 0;
  for await (const line of lines) {
    if (line.error) throw new Error(line.error);
    if (line.images) return line;
    const { step, steps } = line;
    began ??= { step, time: performance.now() };
    const rate = (performance.now() - began.time) / (step - began.step);
    const left = Math.round(((steps - step) * rate) / 1000);
    const rest = step < steps && left >= 1 && left < Infinity ? ` · ${left} s left` : "";
    $("status").textContent = `Step ${step} of ${steps}${rest}`;
    $("progress").value = step / steps;
    document.title = `${Math.round((100 * step) / steps)} % · diffuse`;
    if (Math.floor((4 * step) / steps) > quarter && step < steps) {
      quarter = Math.floor((4 * step) / steps);
      announce(`${25 * quarter} %`);
    }
    if (line.preview) {
      run.preview = `data:image/png;base64,${line.preview}`;
      run.tile.querySelector("button").replaceChildren(thumbnail(run.preview, ""));
      if (!shown) showLive();
    }
  }
  throw new Error("The connection has ended.");
}

/** Swaps the buttons; the focus goes along. */
function setRunning(running) {
  const focused = document.activeElement;
  $("running").hidden = !running;
  $("cancel").hidden = !running;
  $("generate").disabled = running;
  document.title = "diffuse";
  if (running) {
    $("progress").removeAttribute("value");
    $("status").textContent = "Waiting for the first step";
    announce("Generating.");
    if (focused === $("generate")) $("cancel").focus();
    const smooth = !matchMedia("(prefers-reduced-motion: reduce)").matches;
    $("stage").scrollIntoView({ block: "nearest", behavior: smooth ? "smooth" : "auto" });
  } else if (focused === $("cancel")) {
    $("generate").focus();
  }
}

/** Shows what went wrong. Without a key, or with a wrong one, asks for it. */
function showError(error) {
  const text = error?.message ?? error;
  const asks = error instanceof Refused && error.status === 401;
  $("error").textContent = asks ? "" : text;
  if (!asks) return;
  const tried = localStorage.getItem(KEY) !== null;
  $("key-error").textContent = tried ? text : "";
  $("key-form").hidden = false;
  $("main").hidden = !info;
  $("key").focus();
}

/** Says something to screen readers. */
function announce(text) {
  $("announce").textContent = text;
}

// ---------------------------------------------------------------------------------------------
// Gallery

/** The images of this session, the newest first: `{ url, blob, settings, facts, button }`. */
const gallery = [];
/** The image that is shown large; none shows the run that is under way. */
let shown = null;

function thumbnail(url, text) {
  const image = new Image();
  image.src = url;
  image.alt = text;
  return image;
}

function tile(content, label, onClick) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  button.type = "button";
  button.ariaLabel = label;
  button.append(content);
  button.addEventListener("click", onClick);
  item.append(button);
  $("thumbs").prepend(item);
  $("gallery").hidden = false;
  return item;
}

/** The place of the run that is under way. */
const runTile = () => tile("…", "The image that is being generated", () => show(null));

/** Puts an image of an answer into the gallery. */
function addImage(base64, index, result, settings) {
  const about = JSON.parse(result.info);
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const blob = new Blob([bytes], { type: "image/png" });
  const seed = about.all_seeds[index];
  const facts = [
    `seed ${seed}`,
    `${about.steps} steps`,
    `guidance ${about.cfg_scale}`,
    about.sampler_name.replace(/Scheduler$/, ""),
    `${about.width} × ${about.height}`,
  ];
  if (settings.start) facts.push(`strength ${settings.start.strength}`);
  const image = {
    blob,
    url: URL.createObjectURL(blob),
    settings: { ...settings, seed, width: about.width, height: about.height },
    facts: facts.join(" · "),
  };
  const label = `${settings.prompt || "No prompt"}, seed ${seed}`;
  const item = tile(thumbnail(image.url, ""), label, () => show(image));
  image.button = item.firstChild;
  gallery.unshift(image);
  return image;
}

function setFrame([width, height]) {
  $("frame").style.setProperty("--ratio", width / height);
  $("frame").style.setProperty("--pixels", `${width}px`);
}

/** Shows an image of the gallery, or without one the run that is under way. */
function show(image) {
  shown = image;
  $("about").hidden = !image;
  $("frame").disabled = !image;
  for (const { button } of gallery) button.ariaCurrent = String(button === image?.button);
  if (run) run.tile.firstChild.ariaCurrent = String(!image);
  if (!image) {
    showLive();
    return;
  }
  const { prompt, width, height } = image.settings;
  setFrame([width, height]);
  setShown(image.url, prompt);
  $("caption").textContent = prompt;
  $("facts").textContent = image.facts;
  $("download").href = image.url;
  $("download").download = `diffuse-${image.settings.seed}.png`;
  if ($("large").open) showLarge();
}

/** The preview of the run that is under way, or what is there instead. */
function showLive() {
  setFrame(run ? [run.settings.width, run.settings.height] : size());
  setShown(run?.preview, "Preview");
  $("empty").textContent = run ? "Generating …" : "Your image appears here.";
}

function setShown(url, text) {
  $("shown").hidden = !url;
  $("empty").hidden = Boolean(url);
  if (!url) return;
  $("shown").src = url;
  $("shown").alt = text;
}

function showLarge() {
  $("large-image").src = shown.url;
  $("large-image").alt = shown.settings.prompt;
  if (!$("large").open) $("large").showModal();
}

// ---------------------------------------------------------------------------------------------
// Events

function on(id, event, listener) {
  $(id).addEventListener(event, listener);
}

function showOutputs() {
  for (const output of document.querySelectorAll("output")) {
    const input = $(output.htmlFor.value);
    output.textContent = input.id === "brush-size" ? `${input.value} %` : input.value;
  }
}

on("key-form", "submit", (event) => {
  event.preventDefault();
  localStorage.setItem(KEY, $("key").value);
  begin();
});

on("form", "submit", (event) => {
  event.preventDefault();
  generate();
});
// A field that is not seen could not say what is wrong with it.
$("form").addEventListener("invalid", () => ($("options").open = true), true);
on("cancel", "click", () => run?.abort.abort());
on("seed", "input", seedChanged);
on("random", "click", () => {
  $("seed").value = "";
  seedChanged();
});
on("width", "input", sizeChanged);
on("height", "input", sizeChanged);
on("swap", "click", () => setSize(size().reverse()));

on("file", "change", () => {
  const [file] = $("file").files;
  if (file) start.load(file);
});
on("remove", "click", () => {
  start.restore(null);
  $("file").focus();
});
on("masked", "change", maskedChanged);
on("brush-size", "input", showOutputs);
on("strength", "input", showOutputs);
on("erase", "click", () => {
  $("erase").ariaPressed = String($("erase").ariaPressed !== "true");
});
on("undo", "click", () => {
  start.strokes.pop();
  start.lift();
});
on("clear", "click", () => {
  start.strokes = [];
  start.lift();
});
new ResizeObserver(() => start.draw()).observe($("editor"));

on("canvas", "pointerdown", (event) => {
  if (!$("masked").checked || event.button !== 0 || !event.isPrimary) return;
  canvas.setPointerCapture(event.pointerId);
  start.brush = start.position(event);
  start.lower();
});
on("canvas", "pointermove", (event) => {
  if (!$("masked").checked || !event.isPrimary) return;
  start.move(start.position(event));
});
for (const end of ["pointerup", "pointercancel"]) on("canvas", end, () => start.lift());
on("canvas", "pointerleave", () => {
  start.brush = null;
  start.draw();
});
on("canvas", "keydown", paintByKey);
on("canvas", "focus", () => {
  if (!canvas.matches(":focus-visible") || !$("masked").checked) return;
  start.brush ??= [start.image.width / 2, start.image.height / 2];
  start.draw();
});
on("canvas", "blur", () => {
  start.brush = null;
  start.lift();
});

/** The image of a drop or of the clipboard. */
const imageOf = ({ files }) => [...files].find(({ type }) => type.startsWith("image/"));

addEventListener("dragover", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
addEventListener("drop", (event) => {
  document.body.classList.remove("dropping");
  const [file] = event.dataTransfer.files;
  if (!file) return;
  event.preventDefault();
  start.load(imageOf(event.dataTransfer) ?? file);
});
addEventListener("paste", (event) => {
  const file = imageOf(event.clipboardData);
  if (!file) return;
  event.preventDefault();
  start.load(file);
});

on("frame", "click", showLarge);
on("reuse", "click", () => writeSettings(shown.settings));
on("as-start", "click", () => start.load(shown.blob, true));
on("large", "click", () => $("large").close());
on("large", "keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const image = by && gallery[gallery.indexOf(shown) + by];
  if (image) show(image);
});

addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("large").open) {
    event.preventDefault();
    if (!run) $("form").requestSubmit();
  } else if (event.key === "Escape" && !$("large").open) {
    run?.abort.abort();
  }
});

// On a phone the image is nearer then.
if (matchMedia("(max-width: 699px)").matches) $("options").open = false;
showOutputs();
begin();
