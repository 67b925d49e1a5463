//! Unconditional images (Ho et al. 2020, <https://arxiv.org/abs/2006.11239>, algorithm 2; with
//! [`DDIMPipeline`]: Song et al. 2020, <https://arxiv.org/abs/2010.02502>).

use std::ops::ControlFlow;

use burn::tensor::{DType, Tensor, backend::Backend};
use diffuse_nn::ModelPath;
use diffuse_nn::checkpoint::float_dtype;
use diffuse_schedulers::{
    NoiseSource, Overrides, Scheduler, StepOptions, TimestepRequest, randn_tensor,
    scheduler_from_config,
};
use diffuse_unet::{LoadOptions, Pretrained, PretrainedError, UNet2DConfig, UNet2DModel};
use web_time::Instant;

use crate::components::{check_class_labels, component_path};
use crate::folder::{ModelIndex, PipelineKind, load_scheduler, pipeline_folder};
use crate::generation::{
    StageTimes, check_finite, check_generators, check_pixels, seeds_or_random,
};
use crate::{Generated, PipelineError, StepEvent, generators, to_images};

/// Options of [`DDPMPipeline`], by the reference's names and with its defaults.
#[derive(Debug, Clone)]
pub struct DDPMOptions {
    /// Number of images.
    pub batch_size: usize,
    /// Number of steps.
    pub num_inference_steps: usize,
    /// None: one at random. One: a generator for the whole batch. As many as images: a generator
    /// each.
    pub seeds: Vec<u64>,
    /// What the scheduler's steps take: `eta` and `use_clipped_model_output` of DDIM, for example.
    pub step: StepOptions,
}

impl Default for DDPMOptions {
    fn default() -> Self {
        Self {
            batch_size: 1,
            num_inference_steps: 1000,
            seeds: Vec::new(),
            step: StepOptions::default(),
        }
    }
}

/// Unconditional generation with a UNet and any scheduler.
pub struct DDPMPipeline<B: Backend> {
    /// Predicts the noise in an image.
    pub unet: UNet2DModel<B>,
    /// Takes the noise out, step by step.
    pub scheduler: Box<dyn Scheduler<B>>,
}

impl<B: Backend> DDPMPipeline<B> {
    /// Loads a published folder, such as that of `google/ddpm-cat-256`. With the crate's feature
    /// `hub` that name will do: what is not in the cache is fetched.
    ///
    /// # Errors
    /// If a file is missing or damaged, or asks for something that is not computed here.
    pub fn from_pretrained(
        folder: impl Into<ModelPath>,
        device: &B::Device,
    ) -> Result<Self, PipelineError> {
        Self::from_pretrained_with(folder, &LoadOptions::default(), device)
    }

    /// [`from_pretrained`](Self::from_pretrained) with a variant or a float type.
    ///
    /// # Errors
    /// As [`from_pretrained`](Self::from_pretrained).
    pub fn from_pretrained_with(
        folder: impl Into<ModelPath>,
        options: &LoadOptions,
        device: &B::Device,
    ) -> Result<Self, PipelineError> {
        let kind = PipelineKind::Unconditional;
        let folder = pipeline_folder(folder.into(), kind, options.variant.as_deref(), true)?;
        let index = ModelIndex::read(&folder)?;
        kind.check(&index)?;
        let scheduler = load_scheduler(&folder, &index)?;
        let folder = component_path(&folder, "unet");
        let (config, weights) = UNet2DModel::<B>::open(folder, options)?;
        check_unet(&config)?;
        let unet = UNet2DModel::from_checkpoint(&config, &weights, options, device)?;
        Ok(Self { unet, scheduler })
    }

    /// Generates images.
    ///
    /// # Errors
    /// If an option makes no sense, or the result is not finite.
    pub fn generate(&self, options: &DDPMOptions) -> Result<Generated<B>, PipelineError> {
        self.generate_with(options, None, |_| ControlFlow::Continue(()))
    }

    /// [`generate`](Self::generate) with noise of any source, in place of seeds, and a callback
    /// after each step.
    ///
    /// # Errors
    /// As [`generate`](Self::generate).
    pub fn generate_with(
        &self,
        options: &DDPMOptions,
        noise: Option<&mut dyn NoiseSource>,
        mut on_step: impl FnMut(StepEvent<'_, B>) -> ControlFlow<()>,
    ) -> Result<Generated<B>, PipelineError> {
        if noise.is_some() && !options.seeds.is_empty() {
            let message = "provide only one of `seeds` and a noise source";
            return Err(PipelineError::Options(message.into()));
        }
        if options.batch_size == 0 {
            return Err(PipelineError::Options("`batch_size` is 0".into()));
        }
        self.check_parts()?;
        let [height, width] = self.sample_size()?;
        check_pixels(options.batch_size, [height, width])?;
        check_generators(options.seeds.len(), options.batch_size)?;
        let mut seeded;
        let noise = match noise {
            Some(noise) => noise,
            None => {
                seeded = generators(&seeds_or_random(&options.seeds));
                &mut seeded
            }
        };
        let mut scheduler = self.scheduler.fresh()?;
        scheduler.set_timesteps(&TimestepRequest::Steps(options.num_inference_steps))?;
        let timesteps = scheduler.timesteps().to_vec();

        let start = Instant::now();
        let sigma = scheduler.init_noise_sigma();
        let mut sample = self.prepare_sample(options.batch_size, sigma, noise)?;
        let mut interrupted = false;
        for (step, &timestep) in timesteps.iter().enumerate() {
            let input = scheduler.scale_model_input(sample.clone(), timestep)?;
            let output = self.predict(input, timestep);
            let output = scheduler.step(output, timestep, sample, &options.step, noise)?;
            sample = output.prev_sample;
            let event = StepEvent {
                step,
                steps: timesteps.len(),
                timestep,
                latents: &mut sample,
                pred_original_sample: output.pred_original_sample.as_ref(),
            };
            if on_step(event).is_break() {
                interrupted = true;
                break;
            }
        }
        check_finite("latents", &sample)?;
        let denoised = Instant::now();
        let images = if interrupted {
            Vec::new()
        } else {
            to_images(sample.clone())?
        };
        Ok(Generated {
            images,
            latents: sample,
            timesteps,
            truncated: Vec::new(),
            nsfw_content_detected: None,
            interrupted,
            times: StageTimes {
                denoise: denoised - start,
                decode: denoised.elapsed(),
                ..StageTimes::default()
            },
        })
    }

    /// The noise that a run starts from, in `f32`: `[batch, channels, height, width]`, as the
    /// UNet's configuration says, with the standard deviation of the scheduler.
    ///
    /// # Errors
    /// If the configuration has no `sample_size`, or the noise source fails.
    pub fn prepare_sample(
        &self,
        batch: usize,
        init_noise_sigma: f64,
        noise: &mut dyn NoiseSource,
    ) -> Result<Tensor<B, 4>, PipelineError> {
        let [height, width] = self.sample_size()?;
        let shape = [batch, self.unet.config().in_channels, height, width];
        let device = self.unet.conv_in.weight.device();
        let sample = randn_tensor::<B>(noise, shape, float_dtype(&self.unet), &device)?;
        // One for Diffusers' DDPM and DDIM; its loop leaves it out, and so is for no other
        // scheduler.
        Ok(sample.cast(DType::F32) * init_noise_sigma)
    }

    /// `[height, width]`
    fn sample_size(&self) -> Result<[usize; 2], PipelineError> {
        let size = self.unet.config().sample_size.ok_or_else(|| {
            PipelineError::Parts("the UNet's configuration has no `sample_size`".into())
        })?;
        Ok(size.dims())
    }

    /// What a UNet gives must be what the scheduler takes, and an image.
    fn check_parts(&self) -> Result<(), PipelineError> {
        let config = self.unet.config();
        check_unet(config)?;
        let [from, to] = [config.in_channels, config.out_channels];
        let variance = self.scheduler.config().get("variance_type");
        let learned = variance
            .and_then(|value| value.as_str())
            .is_some_and(|kind| matches!(kind, "learned" | "learned_range"));
        let expected = if learned { 2 * from } else { from };
        if from != 3 && from != 1 {
            Err(PipelineError::Parts(format!(
                "an image has 3 channels or 1, but the UNet's `in_channels` is {from}"
            )))
        } else if to != expected {
            Err(PipelineError::Parts(format!(
                "the scheduler needs {expected} channels of the UNet, but its `out_channels` is {to}"
            )))
        } else {
            Ok(())
        }
    }

    /// The UNet's prediction in `f32`; shaped as the sample.
    pub fn predict(&self, sample: Tensor<B, 4>, timestep: f64) -> Tensor<B, 4> {
        let sample = sample.cast(float_dtype(&self.unet));
        self.unet.forward(sample, timestep).cast(DType::F32)
    }
}

fn check_unet(config: &UNet2DConfig) -> Result<(), PretrainedError> {
    check_class_labels::<UNet2DConfig>(config.class_embed_type, config.num_class_embeds)?;
    Ok(())
}

/// Options of [`DDIMPipeline`], by the reference's names and with its defaults.
#[derive(Debug, Clone)]
pub struct DDIMOptions {
    /// Number of images.
    pub batch_size: usize,
    /// Number of steps.
    pub num_inference_steps: usize,
    /// None: one at random. One: a generator for the whole batch. As many as images: a generator
    /// each.
    pub seeds: Vec<u64>,
    /// How much noise each step adds, from 0 (none) to 1 (as DDPM).
    pub eta: f64,
    /// Whether the noise is computed again from the clipped image.
    pub use_clipped_model_output: bool,
}

impl Default for DDIMOptions {
    fn default() -> Self {
        Self {
            batch_size: 1,
            num_inference_steps: 50,
            seeds: Vec::new(),
            eta: 0.0,
            use_clipped_model_output: false,
        }
    }
}

impl From<&DDIMOptions> for DDPMOptions {
    fn from(options: &DDIMOptions) -> Self {
        Self {
            batch_size: options.batch_size,
            num_inference_steps: options.num_inference_steps,
            seeds: options.seeds.clone(),
            step: StepOptions {
                eta: Some(options.eta),
                use_clipped_model_output: options.use_clipped_model_output,
                ..StepOptions::default()
            },
        }
    }
}

/// Unconditional generation with DDIM, whatever scheduler the UNet was published with.
pub struct DDIMPipeline<B: Backend> {
    /// The loop, with a DDIM scheduler.
    pub inner: DDPMPipeline<B>,
}

impl<B: Backend> DDIMPipeline<B> {
    /// Gives a pipeline a DDIM scheduler, made from its own scheduler's configuration.
    ///
    /// # Errors
    /// If the configuration does not fit DDIM.
    pub fn new(pipeline: DDPMPipeline<B>) -> Result<Self, PipelineError> {
        let config = pipeline.scheduler.config();
        let scheduler = scheduler_from_config(config, Some("DDIMScheduler"), &Overrides::new())?;
        Ok(Self {
            inner: DDPMPipeline {
                scheduler,
                ..pipeline
            },
        })
    }

    /// Loads a published folder, such as that of `google/ddpm-cat-256`. With the crate's feature
    /// `hub` that name will do: what is not in the cache is fetched.
    ///
    /// # Errors
    /// If a file is missing or damaged, or asks for something that is not computed here.
    pub fn from_pretrained(
        folder: impl Into<ModelPath>,
        device: &B::Device,
    ) -> Result<Self, PipelineError> {
        Self::new(DDPMPipeline::from_pretrained(folder, device)?)
    }

    /// Generates images.
    ///
    /// # Errors
    /// If an option makes no sense, or the result is not finite.
    pub fn generate(&self, options: &DDIMOptions) -> Result<Generated<B>, PipelineError> {
        self.generate_with(options, None, |_| ControlFlow::Continue(()))
    }

    /// [`generate`](Self::generate) with noise of any source, in place of seeds, and a callback
    /// after each step.
    ///
    /// # Errors
    /// As [`generate`](Self::generate).
    pub fn generate_with(
        &self,
        options: &DDIMOptions,
        noise: Option<&mut dyn NoiseSource>,
        on_step: impl FnMut(StepEvent<'_, B>) -> ControlFlow<()>,
    ) -> Result<Generated<B>, PipelineError> {
        if !(0.0..=1.0).contains(&options.eta) {
            return Err(PipelineError::Options(format!(
                "`eta` is {}, but has to be in [0, 1]",
                options.eta
            )));
        }
        self.inner.generate_with(&options.into(), noise, on_step)
    }
}
