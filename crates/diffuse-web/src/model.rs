//! Loading a model and generating an image, for JavaScript.

use std::error::Error;
use std::ops::ControlFlow;
use std::panic;

use burn::tensor::backend::Backend;
use burn_flex::Flex;
use diffuse_builtin::MODELS;
use diffuse_pipelines::schedulers::{
    Overrides, Scheduler, SchedulerConfig, SchedulerError, scheduler_catalog, scheduler_from_config,
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
    pipeline: Pipeline<Flex>,
    /// The checkpoint's.
    scheduler: SchedulerConfig,
    preview: LatentPreview<Flex>,
    num_inference_steps: usize,
    guidance_scale: f64,
    #[cfg(feature = "webgpu")]
    gpu: crate::webgpu::Gpu,
}

pub enum Pipeline<B: Backend> {
    StableDiffusion(Box<StableDiffusionPipeline<B>>),
    Unconditional(Box<DDPMPipeline<B>>),
}

impl<B: Backend> Pipeline<B> {
    /// Loads a folder in Diffusers' format.
    pub fn load(folder: &ModelPath, device: &B::Device) -> Result<Self, PipelineError> {
        let index = ModelIndex::read(folder)?;
        Ok(match PipelineKind::of(&index) {
            Some(PipelineKind::Unconditional) => {
                Self::Unconditional(Box::new(DDPMPipeline::from_pretrained(folder, device)?))
            }
            // Any other: the error names its class.
            _ => {
                let pipeline = StableDiffusionPipeline::from_pretrained(folder, device)?;
                Self::StableDiffusion(Box::new(pipeline))
            }
        })
    }
}

/// What to generate, as JSON.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Not used by unconditional models.
    prompt: String,
    pub seed: u64,
    num_inference_steps: usize,
    guidance_scale: f64,
    /// A name of [`scheduler_catalog`]; the checkpoint's own by default.
    scheduler: Option<String>,
}

impl Request {
    /// The options of text to image.
    pub fn stable_diffusion(&self) -> StableDiffusionOptions {
        StableDiffusionOptions {
            num_inference_steps: self.num_inference_steps,
            guidance_scale: self.guidance_scale,
            seeds: vec![self.seed],
            predict_original: true,
            ..StableDiffusionOptions::from(self.prompt.as_str())
        }
    }

    /// The options of an unconditional model.
    pub fn ddpm(&self) -> DDPMOptions {
        DDPMOptions {
            num_inference_steps: self.num_inference_steps,
            seeds: vec![self.seed],
            ..DDPMOptions::default()
        }
    }

    /// The scheduler of a run, made from the checkpoint's.
    pub fn scheduler<B: Backend>(
        &self,
        checkpoint: &SchedulerConfig,
    ) -> Result<Box<dyn Scheduler<B>>, SchedulerError> {
        scheduler_from_config(checkpoint, self.scheduler.as_deref(), &Overrides::new())
    }
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
        let pipeline = Pipeline::load(folder, &Default::default()).map_err(js_error)?;
        let scheduler = match &pipeline {
            Pipeline::StableDiffusion(pipeline) => pipeline.scheduler.config().clone(),
            Pipeline::Unconditional(pipeline) => pipeline.scheduler.config().clone(),
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
            #[cfg(feature = "webgpu")]
            gpu: crate::webgpu::Gpu::new(folder.clone()),
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
        let scheduler = request.scheduler(&self.scheduler).map_err(js_error)?;
        let report =
            |event: &StepEvent<'_, Flex>, images| report(on_step, event.step, event.steps, images);
        let Generated { mut images, .. } = match &mut self.pipeline {
            Pipeline::StableDiffusion(pipeline) => {
                pipeline.scheduler = scheduler;
                let options = request.stable_diffusion();
                let preview = &self.preview;
                pipeline.generate_with(&options, StableDiffusionInputs::default(), |event| {
                    report(&event, preview.images(event.preview_latents()))
                })
            }
            Pipeline::Unconditional(pipeline) => {
                pipeline.scheduler = scheduler;
                pipeline.generate_with(&request.ddpm(), None, |event| {
                    report(&event, to_images(event.preview_latents().clone()))
                })
            }
        }
        .map_err(js_error)?;
        let image = images.pop().map(Image::from);
        image.ok_or_else(|| JsError::new("`on_step` threw an exception"))
    }
}

/// Tells the page of a step; it stops the run by an exception.
pub fn report(
    on_step: &Function,
    step: usize,
    steps: usize,
    images: Result<Vec<RgbImage>, PipelineError>,
) -> ControlFlow<()> {
    let preview = images.ok().and_then(|mut images| images.pop());
    let preview = preview.map(Image::from);
    let (step, steps) = (step as u32, steps as u32);
    let called = on_step.call3(&JsValue::NULL, &step.into(), &steps.into(), &preview.into());
    match called {
        Ok(_) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    }
}

#[cfg(feature = "webgpu")]
#[wasm_bindgen]
impl Model {
    /// [`generate`](Self::generate) on the visitor's GPU. After an error the run may be repeated on
    /// the CPU.
    #[wasm_bindgen(js_name = generateOnGpu)]
    pub async fn generate_on_gpu(
        &mut self,
        request: String,
        on_step: Function,
    ) -> Result<Image, JsError> {
        let request: Request = serde_json::from_str(&request)?;
        let run = crate::webgpu::Run {
            request: &request,
            scheduler: &self.scheduler,
            cpu: &self.pipeline,
            preview: &self.preview,
            on_step: &on_step,
        };
        Ok(self.gpu.generate(run).await?.into())
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
