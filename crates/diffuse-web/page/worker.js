// Loads a model and generates images, one task after the other.

import init, { Model, schedulerNames } from "./diffuse_web.js";

let model;

/** Rejects at a panic of an asynchronous function, whose own promise then never settles. */
const panicked = new Promise((_, reject) => {
  const panic = (event, error) => {
    event.preventDefault();
    reject(String(error?.message ?? error));
  };
  addEventListener("error", (event) => panic(event, event.error ?? event.message));
  addEventListener("unhandledrejection", (event) => panic(event, event.reason));
});
panicked.catch(() => {});

const tasks = {
  async load({ program, builtin, name, paths, files }) {
    await init({ module_or_path: program });
    model = builtin ? Model.builtin(builtin) : Model.fromFiles(name, paths, files);
    return {
      takesPrompt: model.takesPrompt,
      steps: model.numInferenceSteps,
      guidance: model.guidanceScale,
      scheduler: model.scheduler,
      schedulers: schedulerNames(),
      // Whether the program was built with WebGPU.
      gpu: "generateOnGpu" in model,
    };
  },

  async generate({ request, onGpu }) {
    const start = performance.now();
    const seconds = (since) => (performance.now() - since) / 1000;
    const times = [];
    let last = start;
    const onStep = (step, steps, preview) => {
      times.push(seconds(last));
      last = performance.now();
      const image = preview && imageData(preview);
      postMessage({ task: "step", result: { step, steps, seconds: times.at(-1), image } });
    };
    const settings = JSON.stringify(request);
    const generated = onGpu
      ? await Promise.race([model.generateOnGpu(settings, onStep), panicked])
      : model.generate(settings, onStep);
    const image = imageData(generated);
    const stepSeconds = (last - start) / 1000 / times.length;
    return { steps: times.length, stepSeconds, seconds: seconds(start), image };
  },
};

/** The image as `ImageData`; its memory is freed. */
function imageData(image) {
  const data = new ImageData(image.rgba, image.width, image.height);
  image.free();
  return data;
}

onmessage = async ({ data: { task, argument } }) => {
  try {
    postMessage({ task, result: await tasks[task](argument) });
  } catch (error) {
    postMessage({ task, error: described(error) });
  }
};

/** An error of the library, a panic (a text), or a trap, such as that of too little memory. */
function described(error) {
  if (typeof error === "string") return { message: error, broken: true };
  if (!(error instanceof WebAssembly.RuntimeError)) return { message: error.message };
  const advice = "The model may need more memory than a page gets.";
  return { message: `The computation was stopped (${error.message}). ${advice}`, broken: true };
}
