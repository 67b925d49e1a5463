//! ControlNets of a run.

use burn::tensor::{DType, Tensor, backend::Backend};
use diffuse_nn::checkpoint::float_dtype;
use diffuse_unet::{ControlNetModel, ControlNetOutput, Pretrained};
use image::RgbImage;

use super::{PreparedPrompt, StableDiffusionOptions, StableDiffusionPipeline};
use crate::PipelineError;
use crate::image_processor::{resize_all, unit_images};

/// A ControlNet, and the images that it sees; by Diffusers' names.
#[derive(Debug)]
pub struct StableDiffusionControl<'a, B: Backend> {
    /// The network.
    pub model: &'a ControlNetModel<B>,
    /// One image, or one for each prompt; resized to the size of the run.
    pub image: Vec<RgbImage>,
    /// What the network's output is multiplied by; Diffusers' defaults are 1 for text to image, 0.8
    /// for image to image and 0.5 for inpainting.
    pub conditioning_scale: f64,
    /// Where the network begins, as a part of the run, from 0.
    pub guidance_start: f64,
    /// Where the network ends, as a part of the run, up to 1.
    pub guidance_end: f64,
}

impl<'a, B: Backend> StableDiffusionControl<'a, B> {
    /// A ControlNet in all steps at full scale.
    pub fn new(model: &'a ControlNetModel<B>, image: Vec<RgbImage>) -> Self {
        Self {
            model,
            image,
            conditioning_scale: 1.0,
            guidance_start: 0.0,
            guidance_end: 1.0,
        }
    }

    /// Whether the network takes part in a step. `steps` are timesteps, of which some samplers have
    /// more than steps.
    fn takes_part(&self, step: usize, steps: usize) -> bool {
        let [begin, end] = [step, step + 1].map(|step| step as f64 / steps as f64);
        begin >= self.guidance_start && end <= self.guidance_end
    }

    fn check(&self, name: &str) -> Result<(), String> {
        for (key, value) in [
            ("guidance_start", self.guidance_start),
            ("guidance_end", self.guidance_end),
        ] {
            if !(0.0..=1.0).contains(&value) {
                return Err(format!(
                    "`{key}` of {name} is {value}, but has to be in [0, 1]"
                ));
            }
        }
        if self.guidance_start >= self.guidance_end {
            return Err(format!(
                "`guidance_start` of {name} is {}, but has to be below `guidance_end`, which is {}",
                self.guidance_start, self.guidance_end
            ));
        }
        if !self.conditioning_scale.is_finite() {
            let scale = self.conditioning_scale;
            return Err(format!("`conditioning_scale` of {name} is {scale}"));
        }
        Ok(())
    }
}

/// The ControlNets of a run, their images embedded.
pub(super) struct Controls<'a, B: Backend> {
    controls: Vec<(StableDiffusionControl<'a, B>, Tensor<B, 4>)>,
    guess_mode: bool,
}

impl<B: Backend> StableDiffusionPipeline<B> {
    /// Checks ControlNets against the options and the parts.
    pub(super) fn check_controls(
        &self,
        controls: &[StableDiffusionControl<'_, B>],
        texts: usize,
    ) -> Result<(), PipelineError> {
        for (index, control) in controls.iter().enumerate() {
            let name = match controls.len() {
                1 => "the ControlNet".to_string(),
                _ => format!("ControlNet {}", index + 1),
            };
            control.check(&name).map_err(PipelineError::Options)?;
            let count = control.image.len();
            if count != 1 && count != texts {
                return Err(PipelineError::Options(format!(
                    "{name} has {count} images for {texts} prompts: give one, or one for each"
                )));
            }
            let config = control.model.config();
            let (unet, vae) = (self.unet.config(), &self.vae);
            let text = self.text_encoder.config().hidden_size;
            let message = if config.cross_attention_dim != text {
                format!(
                    "the text encoder gives embeddings of {text}, {name} takes {}",
                    config.cross_attention_dim
                )
            } else if config.in_channels != vae.latent_channels() {
                format!(
                    "the autoencoder's latents have {} channels, {name} takes {}",
                    vae.latent_channels(),
                    config.in_channels
                )
            } else if config.downscale() != vae.downscale() {
                format!(
                    "a latent is {} pixels on each side, for {name} {}",
                    vae.downscale(),
                    config.downscale()
                )
            } else if config.conditioning_channels != 3 {
                format!(
                    "an image has 3 channels, {name} takes {}",
                    config.conditioning_channels
                )
            } else if !config.fits(unet) {
                format!("{name} is for another UNet: its blocks differ")
            } else {
                continue;
            };
            return Err(PipelineError::Parts(message));
        }
        Ok(())
    }

    /// Embeds the images of ControlNets, a row for each image of the run.
    pub(super) fn prepare_controls<'a>(
        &self,
        controls: Vec<StableDiffusionControl<'a, B>>,
        options: &StableDiffusionOptions,
        [batch, _, height, width]: [usize; 4],
    ) -> Controls<'a, B> {
        let downscale = self.vae.downscale();
        let size = [width, height].map(|side| (side * downscale) as u32);
        let device = self.unet.conv_in.weight.device();
        let embed = |control: StableDiffusionControl<'a, B>| {
            let images = unit_images::<B>(&resize_all(&control.image, size), &device);
            let images = images.cast(float_dtype(control.model));
            let condition = control.model.embed_condition(images);
            let repeat = batch / control.image.len();
            let condition = match repeat {
                1 => condition,
                _ => {
                    let rows = condition.iter_dim(0);
                    Tensor::cat(rows.map(|row| row.repeat_dim(0, repeat)).collect(), 0)
                }
            };
            (control, condition)
        };
        Controls {
            controls: controls.into_iter().map(embed).collect(),
            guess_mode: options.guess_mode,
        }
    }
}

impl<B: Backend> Controls<'_, B> {
    /// What is added to the UNet in a step; nothing, if no network takes part.
    pub fn residuals(
        &self,
        latents: &Tensor<B, 4>,
        [step, steps]: [usize; 2],
        timestep: f64,
        prompt: &PreparedPrompt<B>,
        dtype: DType,
    ) -> Option<ControlNetOutput<B>> {
        let taking_part = self.controls.iter();
        let taking_part = taking_part.filter(|(control, _)| control.takes_part(step, steps));
        let outputs = taking_part.map(|(control, condition)| {
            let model = control.model;
            let pools = model.config().global_pool_conditions;
            // Without the unconditional half: the prompt is not what counts.
            let conditional = prompt.guided && (self.guess_mode || pools);
            let embeddings = prompt.context.embeddings();
            let [rows, _, _] = embeddings.dims();
            let (context, copies) = match (conditional, prompt.guided) {
                (true, _) => (embeddings.clone().narrow(0, rows / 2, rows / 2), 1),
                (false, true) => (embeddings.clone(), 2),
                (false, false) => (embeddings.clone(), 1),
            };
            let own = float_dtype(model);
            let latents = latents.clone().cast(own).repeat_dim(0, copies);
            let condition = condition.clone().repeat_dim(0, copies);
            let output = model.forward(latents, timestep, &context.cast(own), condition);
            let output = if self.guess_mode && !pools {
                output.scale_for_guess_mode()
            } else {
                output
            };
            let output = output.scale(control.conditioning_scale);
            let output = output.map(|_, x| x.cast(dtype));
            if conditional {
                output.with_unconditional_zeros()
            } else {
                output
            }
        });
        outputs.reduce(|sum, output| sum + output)
    }
}
