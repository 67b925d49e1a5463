//! Loading a model and generating an image, for JavaScript.

use std::error::Error;
use std::ops::ControlFlow;
use std::panic;

use burn_flex::Flex;
use diffuse_builtin::MODELS;
use diffuse_pipelines::schedulers::{
    Overrides, SchedulerConfig, scheduler_catalog, scheduler_from_config,
};
use diffuse_pipelines::{
    DDPMOptions, DDPMPipeline, Generated, LatentPreview, LatentRgb, ModelIndex, ModelPath,
    PipelineError, PipelineKind, StableDiffusionInputs, StableDiffusionOptions,
    StableDiffusionPipeline, StepEvent, to_images,
};
use image::{DynamicImage, RgbImage};
use js_sys::Function;
use serde::Deserialize;
use wasm_bindgen::prelude::*;
use wasm_bindgen::{Clamped, throw_str};
use web_sys::File;

use crate::file::BrowserFile;

/// Turns a panic into an exception with its message, after which nothing here may be called.
#[wasm_bindgen(start)]
fn start() {
    panic::set_hook(Box::new(|info| throw_str(&info.to_string())));
}

/// A pipeline and its recommended settings.
#[wasm_bindgen]
pub struct Model {
    pipeline: Pipeline,
    /// The checkpoint's.
    scheduler: SchedulerConfig,
    preview: LatentPreview<Flex>,
    num_inference_steps: usize,
    guidance_scale: f64,
}

enum Pipeline {
    StableDiffusion(Box<StableDiffusionPipeline<Flex>>),
    Unconditional(Box<DDPMPipeline<Flex>>),
}

/// What to generate, as JSON.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    /// Not used by unconditional models.
    prompt: String,
    seed: u64,
    num_inference_steps: usize,
    guidance_scale: f64,
    /// A name of [`scheduler_catalog`]; the checkpoint's own by default.
    scheduler: Option<String>,
}

#[wasm_bindgen]
impl Model {
    /// Loads a built-in model: `scenes` or `scenes-ddpm`.
    pub fn builtin(name: &str) -> Result<Model, JsError> {
        let Some(builtin) = MODELS.iter().find(|model| model.name == name) else {
            return Err(JsError::new(&format!("there is no model `{name}`")));
        };
        let files = builtin.files.iter().copied();
        let mut model = Self::load(&ModelPath::in_memory(name, files))?;
        model.num_inference_steps = builtin.num_inference_steps;
        model.guidance_scale = builtin.guidance_scale;
        if let Some([a, b, c, d, bias]) = builtin.latent_rgb {
            let factors = [a, b, c, d];
            model.preview = LatentRgb { factors, bias }.into();
        }
        Ok(model)
    }

    /// Loads a folder in Diffusers' format. `paths` are the paths of `files` from the folder.
    #[wasm_bindgen(js_name = fromFiles)]
    pub fn from_files(name: &str, paths: Vec<String>, files: Vec<File>) -> Result<Model, JsError> {
        let files = files.into_iter().map(BrowserFile::new);
        Self::load(&ModelPath::in_memory(name, paths.into_iter().zip(files)))
    }

    fn load(folder: &ModelPath) -> Result<Model, JsError> {
        let device = Default::default();
        let index = ModelIndex::read(folder).map_err(js_error)?;
        let (pipeline, scheduler) = match PipelineKind::of(&index) {
            Some(PipelineKind::Unconditional) => {
                let pipeline = DDPMPipeline::from_pretrained(folder, &device);
                let pipeline = Box::new(pipeline.map_err(js_error)?);
                let scheduler = pipeline.scheduler.config().clone();
                (Pipeline::Unconditional(pipeline), scheduler)
            }
            // Any other: the error names its class.
            _ => {
                let pipeline = StableDiffusionPipeline::from_pretrained(folder, &device);
                let pipeline = Box::new(pipeline.map_err(js_error)?);
                let scheduler = pipeline.scheduler.config().clone();
                (Pipeline::StableDiffusion(pipeline), scheduler)
            }
        };
        let (num_inference_steps, guidance_scale) = match pipeline {
            Pipeline::StableDiffusion(_) => {
                let defaults = StableDiffusionOptions::default();
                (defaults.num_inference_steps, defaults.guidance_scale)
            }
            Pipeline::Unconditional(_) => (DDPMOptions::default().num_inference_steps, 1.0),
        };
        Ok(Self {
            pipeline,
            scheduler,
            preview: LatentRgb::STABLE_DIFFUSION.into(),
            num_inference_steps,
            guidance_scale,
        })
    }

    /// Whether the model is conditioned on a prompt.
    #[wasm_bindgen(getter, js_name = takesPrompt)]
    pub fn takes_prompt(&self) -> bool {
        matches!(self.pipeline, Pipeline::StableDiffusion(_))
    }

    /// Recommended number of denoising steps.
    #[wasm_bindgen(getter, js_name = numInferenceSteps)]
    pub fn num_inference_steps(&self) -> usize {
        self.num_inference_steps
    }

    /// Recommended scale of classifier-free guidance.
    #[wasm_bindgen(getter, js_name = guidanceScale)]
    pub fn guidance_scale(&self) -> f64 {
        self.guidance_scale
    }

    /// Name of the checkpoint's scheduler.
    #[wasm_bindgen(getter)]
    pub fn scheduler(&self) -> Option<String> {
        let class = self.scheduler.class_name();
        let info = scheduler_catalog().find(|info| Some(info.class) == class);
        info.map(|info| info.name.into())
    }

    /// Generates an image. `request` is JSON: `prompt`, `seed`, `num_inference_steps`,
    /// `guidance_scale`, `scheduler` (a name of [`scheduler_names`], or null). After each step,
    /// `on_step` is called with its index, the number of steps, and a preview or undefined.
    pub fn generate(&mut self, request: &str, on_step: &Function) -> Result<Image, JsError> {
        let request: Request = serde_json::from_str(request)?;
        let name = request.scheduler.as_deref();
        let scheduler = scheduler_from_config(&self.scheduler, name, &Overrides::new());
        let scheduler = scheduler.map_err(js_error)?;
        let report = |event: &StepEvent<'_, Flex>, images: Result<Vec<RgbImage>, PipelineError>| {
            let preview = images.ok().and_then(|mut images| images.pop());
            let preview = preview.map(Image::from);
            let (step, steps) = (event.step as u32, event.steps as u32);
            let called =
                on_step.call3(&JsValue::NULL, &step.into(), &steps.into(), &preview.into());
            match called {
                Ok(_) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            }
        };
        let Generated { mut images, .. } = match &mut self.pipeline {
            Pipeline::StableDiffusion(pipeline) => {
                pipeline.scheduler = scheduler;
                let options = StableDiffusionOptions {
                    num_inference_steps: request.num_inference_steps,
                    guidance_scale: request.guidance_scale,
                    seeds: vec![request.seed],
                    predict_original: true,
                    ..StableDiffusionOptions::from(request.prompt.as_str())
                };
                let preview = &self.preview;
                pipeline.generate_with(&options, StableDiffusionInputs::default(), |event| {
                    report(&event, preview.images(event.preview_latents()))
                })
            }
            Pipeline::Unconditional(pipeline) => {
                pipeline.scheduler = scheduler;
                let options = DDPMOptions {
                    num_inference_steps: request.num_inference_steps,
                    seeds: vec![request.seed],
                    ..DDPMOptions::default()
                };
                pipeline.generate_with(&options, None, |event| {
                    report(&event, to_images(event.preview_latents().clone()))
                })
            }
        }
        .map_err(js_error)?;
        let image = images.pop().map(Image::from);
        image.ok_or_else(|| JsError::new("`on_step` threw an exception"))
    }
}

/// The names of the schedulers.
#[wasm_bindgen(js_name = schedulerNames)]
pub fn scheduler_names() -> Vec<String> {
    scheduler_catalog().map(|info| info.name.into()).collect()
}

/// An image as JavaScript's `ImageData` takes it.
#[wasm_bindgen]
pub struct Image(RgbImage);

impl From<RgbImage> for Image {
    fn from(image: RgbImage) -> Self {
        Self(image)
    }
}

#[wasm_bindgen]
impl Image {
    /// Width in pixels.
    #[wasm_bindgen(getter)]
    pub fn width(&self) -> u32 {
        self.0.width()
    }

    /// Height in pixels.
    #[wasm_bindgen(getter)]
    pub fn height(&self) -> u32 {
        self.0.height()
    }

    /// Red, green, blue and opacity of each pixel, row by row.
    #[wasm_bindgen(getter)]
    pub fn rgba(&self) -> Clamped<Vec<u8>> {
        Clamped(DynamicImage::from(self.0.clone()).into_rgba8().into_raw())
    }
}

/// An exception with the message of an error and of its causes.
fn js_error(error: impl Error) -> JsError {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        message += &format!(": {error}");
        cause = error.source();
    }
    JsError::new(&message)
}
