//! Runs on the visitor's GPU, through WebGPU.
//!
//! A browser gives the values of a GPU's tensors only to those who wait (`into_data_async`). The
//! loops of the pipelines read some at once, so the loop is here a second time, made of the
//! pipelines' parts.
//!
//! Browsers report errors of shaders late, and say nothing of wrong results. So the first step is
//! computed on the CPU as well, and the results must agree.

use std::sync::{Arc, Mutex, PoisonError};

use burn::backend::Wgpu;
use burn::backend::wgpu::{RuntimeOptions, WgpuSetup, init_device};
use burn::tensor::{Tensor, backend::Backend};
use burn_flex::Flex;
use diffuse_pipelines::schedulers::{Generator, Scheduler, SchedulerConfig, StepOptions};
use diffuse_pipelines::{
    LatentPreview, ModelPath, PipelineError, PreparedPrompt, StableDiffusionInputs, generators,
    to_images,
};
use image::RgbImage;
use js_sys::Function;
use wasm_bindgen::JsError;

use crate::model::{Pipeline, Request, report};

/// The largest difference between GPU and CPU in the first step, in standard deviations of the
/// CPU's result.
const TOLERANCE: f64 = 1e-3;
/// Height and width of the latents that both decode: a corner of the image.
const CORNER: usize = 8;

/// The models of a pipeline on the GPU.
pub struct Gpu {
    folder: ModelPath,
    /// What the last run used, unless it failed.
    loaded: Option<Loaded>,
}

struct Loaded {
    pipeline: Pipeline<Wgpu>,
    device: wgpu::Device,
    /// The first error of the device.
    failure: Failure,
}

/// What a run needs beside the GPU.
pub struct Run<'a> {
    pub request: &'a Request,
    /// The checkpoint's.
    pub scheduler: &'a SchedulerConfig,
    pub cpu: &'a Pipeline<Flex>,
    pub preview: &'a LatentPreview<Flex>,
    /// See [`report`].
    pub on_step: &'a Function,
}

impl Gpu {
    pub fn new(folder: ModelPath) -> Self {
        let loaded = None;
        Self { folder, loaded }
    }

    /// Generates an image.
    pub async fn generate(&mut self, run: Run<'_>) -> Result<RgbImage, JsError> {
        let mut on_cpu = Denoiser::new(run.cpu, &run)?;
        let loaded = match self.loaded.take() {
            Some(loaded) => loaded,
            None => load(&self.folder).await?,
        };
        let mut on_gpu = Denoiser::new(&loaded.pipeline, &run)?;
        let timesteps = on_gpu.scheduler.timesteps().to_vec();
        for (step, &timestep) in timesteps.iter().enumerate() {
            let output = on_gpu.predict(timestep)?;
            if step == 0 {
                let expected = on_cpu.predict(timestep)?;
                check_agreement(expected, read(output.clone(), &loaded).await?)?;
            }
            let predicted = on_gpu.step(output, timestep)?;
            let predicted = read(predicted, &loaded).await?;
            if step == 0 {
                let expected = on_cpu.decode(corner(predicted.clone()));
                let device = on_gpu.sample.device();
                let latents = Tensor::from_data(corner(predicted.clone()).into_data(), &device);
                check_agreement(expected, read(on_gpu.decode(latents), &loaded).await?)?;
            }
            let preview = match run.cpu {
                Pipeline::StableDiffusion(_) => run.preview.images(&predicted),
                Pipeline::Unconditional(_) => to_images(predicted),
            };
            if report(run.on_step, step, timesteps.len(), preview).is_break() {
                return Err(JsError::new("`on_step` threw an exception"));
            }
        }
        let mut images = to_images(read(on_gpu.decode(on_gpu.sample.clone()), &loaded).await?)?;
        if let Pipeline::StableDiffusion(pipeline) = run.cpu
            && let Some(checker) = &pipeline.safety_checker
        {
            checker.apply(&mut images)?;
        }
        self.loaded = Some(loaded);
        Ok(images.remove(0))
    }
}

/// The state of a run on a backend.
struct Denoiser<'a, B: Backend> {
    pipeline: &'a Pipeline<B>,
    /// None for unconditional models.
    prompt: Option<PreparedPrompt<B>>,
    scheduler: Box<dyn Scheduler<B>>,
    options: StepOptions,
    noise: Vec<Generator>,
    /// `[1, channels, height, width]`
    sample: Tensor<B, 4>,
    request: &'a Request,
}

impl<'a, B: Backend> Denoiser<'a, B> {
    fn new(pipeline: &'a Pipeline<B>, run: &Run<'a>) -> Result<Self, PipelineError> {
        let request = run.request;
        let mut noise = generators(&[request.seed]);
        let mut scheduler = request.scheduler(run.scheduler)?;
        let (prompt, options, sample) = match pipeline {
            Pipeline::StableDiffusion(pipeline) => {
                let options = request.stable_diffusion();
                let inputs = StableDiffusionInputs::default();
                pipeline.check_inputs(&options, &inputs)?;
                scheduler.set_timesteps(&options.num_inference_steps.into())?;
                let sigma = scheduler.init_noise_sigma();
                let sample = pipeline.prepare_latents(&options, &inputs, sigma, &mut noise)?;
                let step = StepOptions {
                    eta: scheduler.capabilities().eta.then_some(options.eta),
                    predict_original: options.predict_original,
                    ..StepOptions::default()
                };
                (
                    Some(pipeline.prepare_prompt(&options, &inputs)?),
                    step,
                    sample,
                )
            }
            Pipeline::Unconditional(pipeline) => {
                let options = request.ddpm();
                scheduler.set_timesteps(&options.num_inference_steps.into())?;
                let sigma = scheduler.init_noise_sigma();
                (
                    None,
                    options.step,
                    pipeline.prepare_sample(1, sigma, &mut noise)?,
                )
            }
        };
        Ok(Self {
            pipeline,
            prompt,
            scheduler,
            options,
            noise,
            sample,
            request,
        })
    }

    /// The UNet's prediction, guided, in `f32`: shaped as the sample.
    fn predict(&mut self, timestep: f64) -> Result<Tensor<B, 4>, PipelineError> {
        let input = self
            .scheduler
            .scale_model_input(self.sample.clone(), timestep)?;
        Ok(match (self.pipeline, &self.prompt) {
            (Pipeline::StableDiffusion(pipeline), Some(prompt)) => {
                pipeline.predict_noise(input, timestep, prompt, &self.request.stable_diffusion())
            }
            (Pipeline::StableDiffusion(_), None) => unreachable!("a prompt was prepared"),
            (Pipeline::Unconditional(pipeline), _) => pipeline.predict(input, timestep),
        })
    }

    /// Computes the next sample; returns the predicted result where there is one, else the sample.
    fn step(&mut self, output: Tensor<B, 4>, timestep: f64) -> Result<Tensor<B, 4>, PipelineError> {
        let (sample, options) = (self.sample.clone(), &self.options);
        let output = self
            .scheduler
            .step(output, timestep, sample, options, &mut self.noise)?;
        self.sample = output.prev_sample;
        Ok(output
            .pred_original_sample
            .unwrap_or_else(|| self.sample.clone()))
    }

    /// The image of a sample, `[1, 3 or 1, height, width]` in `[-1, 1]`.
    fn decode(&self, sample: Tensor<B, 4>) -> Tensor<B, 4> {
        match self.pipeline {
            Pipeline::StableDiffusion(pipeline) => {
                let vae = &pipeline.vae;
                vae.decode(sample / vae.scaling_factor())
            }
            Pipeline::Unconditional(_) => sample,
        }
    }
}

/// The first rows and columns.
fn corner<B: Backend>(x: Tensor<B, 4>) -> Tensor<B, 4> {
    let [_, _, height, width] = x.dims();
    x.narrow(2, 0, height.min(CORNER))
        .narrow(3, 0, width.min(CORNER))
}

/// Reads a tensor of the GPU, and checks that the device has reported no error and that the values
/// are finite.
async fn read(x: Tensor<Wgpu, 4>, loaded: &Loaded) -> Result<Tensor<Flex, 4>, JsError> {
    let data = x.into_data_async().await;
    // After this answer of the device, all errors of earlier commands are reported.
    let scope = loaded
        .device
        .push_error_scope(wgpu::ErrorFilter::Validation);
    scope.pop().await;
    if let Some(message) = loaded.failure.message() {
        return Err(JsError::new(&message));
    }
    let data = data.map_err(|error| JsError::new(&error.to_string()))?;
    if !data.iter::<f32>().all(f32::is_finite) {
        return Err(JsError::new("a result of the GPU is not finite"));
    }
    Ok(Tensor::from_data(data, &Default::default()))
}

/// An error if the GPU's result differs from the CPU's by more than [`TOLERANCE`].
fn check_agreement(expected: Tensor<Flex, 4>, actual: Tensor<Flex, 4>) -> Result<(), JsError> {
    let [expected, actual] = [expected, actual].map(|x| x.into_data());
    let expected: Vec<f64> = expected.iter().collect();
    let count = expected.len() as f64;
    let mean = expected.iter().sum::<f64>() / count;
    let var = expected.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count;
    let differences = expected
        .iter()
        .zip(actual.iter::<f64>())
        .map(|(a, b)| (a - b).abs());
    let worst = differences.fold(0.0, f64::max) / var.sqrt();
    if worst <= TOLERANCE {
        return Ok(());
    }
    Err(JsError::new(&format!(
        "the GPU's first step differs from the CPU's by {worst:.1e} standard deviations"
    )))
}

/// Asks the browser for a device, and loads the models.
async fn load(folder: &ModelPath) -> Result<Loaded, JsError> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends: wgpu::Backends::BROWSER_WEBGPU,
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    });
    let options = wgpu::RequestAdapterOptions {
        power_preference: wgpu::PowerPreference::HighPerformance,
        ..Default::default()
    };
    let adapter = instance.request_adapter(&options).await;
    let adapter = adapter.map_err(|_| JsError::new("the browser offers no GPU"))?;
    // Without it, CubeCL panics.
    if !adapter.features().contains(wgpu::Features::TIMESTAMP_QUERY) {
        return Err(JsError::new("the GPU has no timestamps"));
    }
    // As CubeCL asks for it, which chooses kernels by what the adapter has.
    let descriptor = wgpu::DeviceDescriptor {
        required_features: adapter.features(),
        required_limits: adapter.limits(),
        ..Default::default()
    };
    let (device, queue) = adapter.request_device(&descriptor).await?;
    let failure = Failure::default();
    let reported = failure.clone();
    device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
        reported.set(&format!("the GPU reports an error, {error}"));
    }));
    let lost = failure.clone();
    device.set_device_lost_callback(move |_, message| {
        lost.set(&format!("the GPU was lost, {message}"));
    });
    let backend = wgpu::Backend::BrowserWebGpu;
    let setup = WgpuSetup {
        instance,
        adapter,
        device: device.clone(),
        queue,
        backend,
    };
    let pipeline = Pipeline::load(folder, &init_device(setup, RuntimeOptions::default()))?;
    Ok(Loaded {
        pipeline,
        device,
        failure,
    })
}

/// The first error that a device reported.
#[derive(Clone, Default)]
struct Failure(Arc<Mutex<Option<String>>>);

impl Failure {
    fn set(&self, message: &str) {
        let mut first = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert_with(|| message.lines().next().unwrap_or_default().into());
    }

    fn message(&self) -> Option<String> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}
