// The page: settings, the worker that computes, and the image.

const $ = (id) => document.getElementById(id);

/** The compiled program, which all workers share. */
let program;
let worker;
/** What the worker loads: `{ builtin }`, or the `{ name, paths, files }` of a folder. */
let source = { builtin: $("model").value };
/** The source whose settings the form shows. */
let described;
/** The settings of the last run. */
let request;
/** Whether the last run is on the GPU. */
let onGpu;
/** Whether the last run starts again once the model is loaded. */
let again;

// ---------------------------------------------------------------------------------------------
// The worker

/** Has a new worker load the source. The former one is stopped, whatever it computes. */
function start() {
  worker?.terminate();
  again = false;
  showRunning("Loading the model");
  $("generate").disabled = true;
  worker = new Worker("worker.js", { type: "module" });
  worker.onmessage = ({ data: { task, result, error } }) => {
    if (error) fail(task, error);
    else answers[task](result);
  };
  worker.onerror = () => showError("The browser cannot start the worker.");
  worker.postMessage({ task: "load", argument: { program, ...source } });
}

const answers = {
  load(model) {
    if (again) return generate();
    showIdle();
    $("gpu").hidden = !model.gpu;
    if (described === source) return;
    described = source;
    $("prompted").hidden = !model.takesPrompt;
    $("guidance").disabled = !model.takesPrompt;
    $("steps").value = model.steps;
    $("guidance").value = model.guidance;
    const own = new Option(`${model.scheduler} (default)`, "");
    $("scheduler").replaceChildren(own, ...model.schedulers.map((name) => new Option(name)));
  },

  step({ step, steps, seconds, image }) {
    if (image) show(image);
    $("progress").max = steps;
    $("progress").value = step + 1;
    $("status").textContent = `Step ${step + 1} of ${steps}, ${seconds.toFixed(2)} s a step`;
  },

  async generate({ steps, stepSeconds, seconds, image }) {
    show(image);
    $("shown").setAttribute("aria-label", request.prompt || "The generated image");
    const count = steps === 1 ? "1 step" : `${steps} steps`;
    $("facts").textContent =
      `${image.width} x ${image.height} pixels, seed ${request.seed}. ${count} of ` +
      `${stepSeconds.toFixed(2)} s, ${seconds.toFixed(1)} s in all${onGpu ? ", on the GPU" : ""}.`;
    const blob = await new Promise((resolve) => $("shown").toBlob(resolve));
    URL.revokeObjectURL($("download").href);
    $("download").href = URL.createObjectURL(blob);
    $("download").download = `diffuse-${request.seed}.png`;
    $("about").hidden = false;
    showIdle();
  },
};

/** Shows an error. A worker whose memory is in no known state is replaced. */
function fail(task, { message, broken }) {
  if (task === "generate" && onGpu) return fallBack(message, broken);
  $("note").hidden = true;
  if (task === "load" && !source.builtin) {
    $("model").selectedIndex = 0;
    source = { builtin: $("model").value };
    start();
  } else if (task === "load") {
    $("running").hidden = true;
  } else if (broken) {
    start();
  } else {
    showIdle();
  }
  showError(message);
}

/** Starts the run again, on the CPU. */
function fallBack(message, broken) {
  onGpu = false;
  if (broken) {
    // Of a panic, the text without the place.
    message = `the GPU failed, ${message.split("\n").at(-1)}`;
    start();
    again = true;
  } else {
    generate();
  }
  $("note").textContent = `Computed on the CPU: ${message}`;
  $("note").hidden = false;
}

// ---------------------------------------------------------------------------------------------
// What is shown

function showError(message) {
  $("error").textContent = message;
}

function showRunning(status) {
  showError("");
  $("status").textContent = status;
  $("progress").removeAttribute("value");
  $("running").hidden = false;
  $("cancel").hidden = true;
}

function showIdle() {
  const focused = document.activeElement === $("cancel");
  $("running").hidden = true;
  $("cancel").hidden = true;
  $("generate").hidden = false;
  $("generate").disabled = false;
  if (focused) $("generate").focus();
}

function show(image) {
  const canvas = $("shown");
  [canvas.width, canvas.height] = [image.width, image.height];
  canvas.getContext("2d").putImageData(image, 0, 0);
  canvas.hidden = false;
  $("empty").hidden = true;
  $("frame").style.setProperty("--ratio", image.width / image.height);
}

// ---------------------------------------------------------------------------------------------
// What the visitor does

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if ($("generate").disabled || $("generate").hidden) return;
  const random = crypto.getRandomValues(new Uint32Array(1))[0];
  request = {
    prompt: $("prompted").hidden ? "" : $("prompt").value,
    seed: $("seed").value === "" ? random : Number($("seed").value),
    num_inference_steps: Number($("steps").value),
    guidance_scale: Number($("guidance").value),
    scheduler: $("scheduler").value || null,
  };
  onGpu = $("on-gpu").checked;
  $("note").hidden = true;
  generate();
});

/** Has the worker compute the last run. */
function generate() {
  showRunning("Starting");
  $("about").hidden = true;
  $("generate").hidden = true;
  $("cancel").hidden = false;
  $("cancel").focus();
  worker.postMessage({ task: "generate", argument: { request, onGpu } });
}

$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});

function cancel() {
  if ($("cancel").hidden) return;
  $("note").hidden = true;
  $("generate").hidden = false;
  start();
}
$("cancel").addEventListener("click", cancel);
document.addEventListener("keydown", ({ key }) => key === "Escape" && cancel());

$("model").addEventListener("change", () => {
  const { value } = $("model");
  source = folders.get(value) ?? { builtin: value };
  start();
});

/** Folders that were opened, by their names. */
const folders = new Map();

/** Loads the files of a folder; their paths start with its name. */
function open(files) {
  if (files.length === 0) return;
  const name = files[0].path.split("/")[0];
  source = {
    name,
    paths: files.map(({ path }) => path.slice(name.length + 1)),
    files: files.map(({ file }) => file),
  };
  if (!folders.has(name)) $("model").append(new Option(name));
  folders.set(name, source);
  $("model").value = name;
  start();
}

$("folder").addEventListener("change", () => {
  open([...$("folder").files].map((file) => ({ path: file.webkitRelativePath, file })));
  $("folder").value = "";
});

document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", ({ relatedTarget }) => {
  if (!relatedTarget) document.body.classList.remove("dropping");
});
document.addEventListener("drop", async (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  const entry = event.dataTransfer.items[0]?.webkitGetAsEntry();
  if (!entry?.isDirectory) return showError("Drop the folder of a model, not a file.");
  try {
    open(await filesOf(entry));
  } catch (error) {
    showError(`The folder cannot be read: ${error.message}`);
  }
});

/** All files below an entry of the file system. */
async function filesOf(entry) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    return [{ path: entry.fullPath.slice(1), file }];
  }
  const reader = entry.createReader();
  const files = [];
  // Each call gives some of the entries, and none after the last.
  for (;;) {
    const entries = await new Promise((...settle) => reader.readEntries(...settle));
    if (entries.length === 0) return files;
    for (const inner of entries) files.push(...(await filesOf(inner)));
  }
}

// ---------------------------------------------------------------------------------------------
// Start

/** Fetches and compiles the program, which has the models in it; it is compressed by gzip. */
async function fetchProgram() {
  const response = await fetch("diffuse_web.bin");
  if (!response.ok) throw new Error(`the server answers ${response.status}`);
  const length = Number(response.headers.get("Content-Length"));
  let received = 0;
  const counted = new TransformStream({
    transform(chunk, controller) {
      received += chunk.length;
      // The server may have compressed it again, and then the length is another.
      if (received <= length) $("progress").value = received / length;
      $("status").textContent = `Fetching the program, ${(received / 1e6).toFixed(1)} MB`;
      controller.enqueue(chunk);
    },
  });
  const headers = { "Content-Type": "application/wasm" };
  const body = response.body.pipeThrough(counted).pipeThrough(new DecompressionStream("gzip"));
  return WebAssembly.compileStreaming(new Response(body, { headers }));
}

try {
  program = await fetchProgram();
  start();
} catch (error) {
  $("running").hidden = true;
  showError(`The program cannot be loaded: ${error.message}`);
}
