//! Image to image: a run that starts from a noisy image.
//!
//! "SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations"
//! (<https://arxiv.org/abs/2108.01073>), algorithm 1.

use std::ops::ControlFlow;

use burn::tensor::backend::Backend;
use diffuse_schedulers::{NoiseSource, Scheduler};
use diffuse_vae::{DiagonalGaussian, EncoderOutput};
use image::RgbImage;

use super::denoise::Start;
use super::encode::tile;
use super::{StableDiffusionInputs, StableDiffusionOptions, StableDiffusionPipeline};
use crate::image_processor::{from_images, resize_all, round_down};
use crate::{Generated, PipelineError, StepEvent};

/// Options of [`StableDiffusionPipeline::image_to_image`], by Diffusers' names and with its
/// defaults.
#[derive(Debug, Clone)]
pub struct StableDiffusionImg2ImgOptions {
    /// The options of text to image; `height` and `width` are those of the image.
    pub options: StableDiffusionOptions,
    /// The images to start from: one, or as many as divide the batch. Sides are resized to the
    /// first image's, rounded down to multiples of 8.
    pub image: Vec<RgbImage>,
    /// How much to change the images, from 0 to 1: the part of the steps that are taken.
    pub strength: f64,
}

impl Default for StableDiffusionImg2ImgOptions {
    fn default() -> Self {
        Self {
            options: StableDiffusionOptions::default(),
            image: Vec::new(),
            strength: 0.8,
        }
    }
}

impl<B: Backend> StableDiffusionPipeline<B> {
    /// Generates variants of images.
    ///
    /// # Errors
    /// If an option makes no sense, or the result is not finite.
    pub fn image_to_image(
        &self,
        options: &StableDiffusionImg2ImgOptions,
    ) -> Result<Generated<B>, PipelineError> {
        let inputs = StableDiffusionInputs::default();
        self.image_to_image_with(options, inputs, |_| ControlFlow::Continue(()))
    }

    /// [`image_to_image`](Self::image_to_image) with embeddings or a noise source in place of some
    /// options, and a callback after each step.
    ///
    /// # Errors
    /// As [`image_to_image`](Self::image_to_image).
    pub fn image_to_image_with(
        &self,
        options: &StableDiffusionImg2ImgOptions,
        inputs: StableDiffusionInputs<'_, B>,
        on_step: impl FnMut(StepEvent<'_, B>) -> ControlFlow<()>,
    ) -> Result<Generated<B>, PipelineError> {
        let strength = options.strength;
        let mut run = options.options.clone();
        self.check_unet_for("image to image")?;
        check_strength(strength)?;
        if run.width.is_some() || run.height.is_some() || inputs.latents.is_some() {
            return Err(PipelineError::Options(
                "image to image takes no `width`, `height` or `latents`: they are the image's"
                    .into(),
            ));
        }
        let Some(first) = options.image.first() else {
            return Err(PipelineError::Options("`image` is empty".into()));
        };
        let size = [first.width(), first.height()];
        let downscale = self.vae.downscale();
        let [width, height] = round_down(size, downscale);
        if width == 0 || height == 0 {
            return Err(PipelineError::Options(format!(
                "an image of {} x {} is too small: {downscale} on each side at least",
                size[0], size[1]
            )));
        }
        run.width = Some(width as usize);
        run.height = Some(height as usize);
        self.check_run(&run, &inputs)?;
        let [batch, _, _, _] = self.latent_shape(&run, &inputs)?;
        check_count("image", options.image.len(), batch)?;

        let images = resize_all(&options.image, [width, height]);
        let start =
            |scheduler: &dyn Scheduler<B>, timestep: f64, _: &_, noise: &mut dyn NoiseSource| {
                let device = self.unet.conv_in.weight.device();
                let mut output = self.encode_images(from_images(&images, &device))?;
                // Each generator draws the latents of its own copy.
                if let EncoderOutput::LatentDist(posterior) = &mut output
                    && noise.generators().is_some()
                {
                    *posterior = DiagonalGaussian {
                        mean: tile(posterior.mean.clone(), batch),
                        logvar: tile(posterior.logvar.clone(), batch),
                    };
                }
                let latents = self.draw_latents(output, |shape| self.draw(shape, noise))?;
                let latents = tile(latents, batch);
                let noise = self.draw(latents.dims(), noise)?;
                Ok(Start {
                    latents: scheduler.add_noise(latents, noise, &[timestep])?,
                    inpainting: None,
                })
            };
        self.denoise(&run, inputs, Some(strength), start, on_step)
    }
}

/// Checks that a strength is in its range.
pub(super) fn check_strength(strength: f64) -> Result<(), PipelineError> {
    if (0.0..=1.0).contains(&strength) {
        return Ok(());
    }
    Err(PipelineError::Options(format!(
        "`strength` is {strength}, but has to be in [0, 1]"
    )))
}

/// Checks that a number of images or masks divides the batch.
pub(super) fn check_count(name: &str, count: usize, batch: usize) -> Result<(), PipelineError> {
    if count > 0 && batch.is_multiple_of(count) {
        return Ok(());
    }
    Err(PipelineError::Options(format!(
        "`{name}` has {count} for an effective batch size of {batch}: give one, or as many as \
         divide it"
    )))
}
