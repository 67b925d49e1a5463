//! Inpainting: a run that repaints the white part of a mask.
//!
//! With a UNet of text to image, the known latents replace the others after each step
//! (<https://arxiv.org/abs/2201.09865>, equation 8). A UNet for inpainting takes the mask and the
//! latents of the masked image as five more channels (<https://arxiv.org/abs/2112.10752>, section
//! 4.5).

use std::ops::ControlFlow;

use burn::tensor::{DType, Tensor, TensorData, backend::Backend};
use diffuse_schedulers::{NoiseSource, Scheduler};
use diffuse_vae::Autoencoder;
use image::RgbImage;

use super::denoise::Start;
use super::encode::tile;
use super::image_to_image::{check_count, check_strength};
use super::{StableDiffusionInputs, StableDiffusionOptions, StableDiffusionPipeline};
use crate::image_processor::{from_images, resize_all};
use crate::mask::{self, Region};
use crate::{Generated, PipelineError, StepEvent};

/// Options of [`StableDiffusionPipeline::inpaint`], by Diffusers' names and with its defaults.
#[derive(Debug, Clone)]
pub struct StableDiffusionInpaintOptions {
    /// The options of text to image. Images and masks are resized to `height` and `width`, which
    /// by default are those the UNet was made for.
    pub options: StableDiffusionOptions,
    /// The images to repaint: one, or as many as divide the batch.
    pub image: Vec<RgbImage>,
    /// White where an image is repainted, black where it is kept; from a level of 128 on. One, or
    /// as many as images.
    pub mask_image: Vec<RgbImage>,
    /// How much to change the white part, from 0 to 1: the part of the steps that are taken. At 1
    /// the run starts from noise alone.
    pub strength: f64,
    /// Run on the part of the image around the white part of the mask, with this margin in pixels,
    /// and put the result into the whole image.
    pub padding_mask_crop: Option<u32>,
    /// Put the pixels of the image back where the mask is black. Without it these pass through the
    /// autoencoder and change a little, as in Diffusers. Implied by `padding_mask_crop`.
    pub keep_unmasked: bool,
}

impl Default for StableDiffusionInpaintOptions {
    fn default() -> Self {
        Self {
            options: StableDiffusionOptions::default(),
            image: Vec::new(),
            mask_image: Vec::new(),
            strength: 1.0,
            padding_mask_crop: None,
            keep_unmasked: false,
        }
    }
}

/// What inpainting adds to the denoising loop.
pub(super) enum Inpainting<B: Backend> {
    /// For a UNet of text to image: known latents are put back after each step.
    Blend {
        /// 1 where the image is repainted, else 0: `[batch, 1, height, width]`.
        mask: Tensor<B, 4>,
        /// The latents of the image: `[batch, channels, height, width]`.
        image: Tensor<B, 4>,
        /// The noise that the run starts from: `[batch, channels, height, width]`.
        noise: Tensor<B, 4>,
    },
    /// For a UNet for inpainting: mask and latents of the masked image,
    /// `[batch, 1 + channels, height, width]`.
    Channels(Tensor<B, 4>),
}

impl<B: Backend> Inpainting<B> {
    /// The UNet's input for scaled latents.
    pub fn model_input(&self, latents: Tensor<B, 4>) -> Tensor<B, 4> {
        match self {
            Self::Blend { .. } => latents,
            Self::Channels(channels) => Tensor::cat(vec![latents, channels.clone()], 1),
        }
    }

    /// The latents after a step; `next` is the timestep of the next one.
    pub fn blend(
        &self,
        latents: Tensor<B, 4>,
        scheduler: &dyn Scheduler<B>,
        next: Option<f64>,
    ) -> Result<Tensor<B, 4>, PipelineError> {
        let Self::Blend { mask, image, noise } = self else {
            return Ok(latents);
        };
        let known = match next {
            Some(timestep) => scheduler.add_noise(image.clone(), noise.clone(), &[timestep])?,
            None => image.clone(),
        };
        Ok((mask.ones_like() - mask.clone()) * known + mask.clone() * latents)
    }
}

impl<B: Backend> StableDiffusionPipeline<B> {
    /// Repaints parts of images.
    ///
    /// # Errors
    /// If an option makes no sense, or the result is not finite.
    pub fn inpaint(
        &self,
        options: &StableDiffusionInpaintOptions,
    ) -> Result<Generated<B>, PipelineError> {
        let inputs = StableDiffusionInputs::default();
        self.inpaint_with(options, inputs, |_| ControlFlow::Continue(()))
    }

    /// [`inpaint`](Self::inpaint) with tensors or a noise source in place of some options, and a
    /// callback after each step. `latents` are also the noise of the kept part.
    ///
    /// # Errors
    /// As [`inpaint`](Self::inpaint).
    pub fn inpaint_with(
        &self,
        options: &StableDiffusionInpaintOptions,
        inputs: StableDiffusionInputs<'_, B>,
        on_step: impl FnMut(StepEvent<'_, B>) -> ControlFlow<()>,
    ) -> Result<Generated<B>, PipelineError> {
        let run = &options.options;
        let strength = options.strength;
        check_strength(strength)?;
        self.check_run(run, &inputs)?;
        let shape = self.latent_shape(run, &inputs)?;
        let batch = shape[0];
        check_count("image", options.image.len(), batch)?;
        check_count("mask_image", options.mask_image.len(), batch)?;
        let prepared = Prepared::new(options, shape, self.vae.downscale())?;

        let start = |scheduler: &dyn Scheduler<B>,
                     timestep: f64,
                     inputs: &StableDiffusionInputs<'_, B>,
                     source: &mut dyn NoiseSource| {
            let device = self.unet.conv_in.weight.device();
            let blends = !self.is_for_inpainting();
            let from_noise = strength == 1.0 || inputs.latents.is_some();
            let images = from_images::<B>(&prepared.images, &device);
            let image = if blends || !from_noise {
                let latents = self.encode_first(images.clone(), source)?;
                Some(tile(latents, batch))
            } else {
                None
            };
            let noise = match &inputs.latents {
                Some(latents) => latents.clone().cast(DType::F32),
                None => self.draw(shape, source)?,
            };
            let latents = match &image {
                Some(image) if !from_noise => {
                    scheduler.add_noise(image.clone(), noise.clone(), &[timestep])?
                }
                _ => noise.clone() * scheduler.init_noise_sigma(),
            };
            let mask = tile(prepared.latent_mask(&device), batch);
            let masked = prepared.masked(images);
            let inpainting = match image {
                Some(image) if blends => {
                    // Diffusers encodes the masked image and leaves it unused.
                    if matches!(self.vae, Autoencoder::KL(_)) {
                        let [rows, _, _, _] = masked.dims();
                        let [_, channels, height, width] = shape;
                        self.draw_first([rows, channels, height, width], source)?;
                    }
                    Inpainting::Blend { mask, image, noise }
                }
                _ => {
                    let masked = tile(self.encode_first(masked, source)?, batch);
                    Inpainting::Channels(Tensor::cat(vec![mask, masked], 1))
                }
            };
            Ok(Start {
                latents,
                inpainting: Some(inpainting),
            })
        };
        let mut generated = self.denoise(run, inputs, Some(strength), start, on_step)?;
        prepared.restore(options, &mut generated.images);
        Ok(generated)
    }

    /// The latents of images; of several generators the first ones draw them.
    fn encode_first(
        &self,
        images: Tensor<B, 4>,
        source: &mut dyn NoiseSource,
    ) -> Result<Tensor<B, 4>, PipelineError> {
        let output = self.encode_images(images)?;
        self.draw_latents(output, |shape| self.draw_first(shape, source))
    }

    /// Noise for images; of several generators the first ones draw it.
    fn draw_first(
        &self,
        shape: [usize; 4],
        source: &mut dyn NoiseSource,
    ) -> Result<Tensor<B, 4>, PipelineError> {
        let Some(generators) = source.generators() else {
            return self.draw(shape, source);
        };
        let [images, channels, height, width] = shape;
        let draws = generators[..images]
            .iter_mut()
            .map(|generator| self.draw([1, channels, height, width], generator));
        Ok(Tensor::cat(draws.collect::<Result<Vec<_>, _>>()?, 0))
    }
}

/// Images and masks of a run's size.
struct Prepared {
    /// The part of the image that is run on.
    region: Option<Region>,
    images: Vec<RgbImage>,
    masks: Vec<RgbImage>,
    /// Pixels per latent position in each direction.
    downscale: usize,
}

impl Prepared {
    fn new(
        options: &StableDiffusionInpaintOptions,
        [_, _, height, width]: [usize; 4],
        downscale: usize,
    ) -> Result<Self, PipelineError> {
        let (images, masks) = (&options.image, &options.mask_image);
        if images.len() != 1 && masks.len() != 1 && images.len() != masks.len() {
            return Err(PipelineError::Options(format!(
                "{} masks for {} images: give one for all, or one for each",
                masks.len(),
                images.len()
            )));
        }
        let size = [width, height].map(|side| (side * downscale) as u32);
        let Some(padding) = options.padding_mask_crop else {
            return Ok(Self {
                region: None,
                images: resize_all(images, size),
                masks: resize_all(masks, size),
                downscale,
            });
        };
        let ([image], [mask]) = (&images[..], &masks[..]) else {
            return Err(PipelineError::Options(
                "`padding_mask_crop` is for one image and one mask".into(),
            ));
        };
        if image.dimensions() != mask.dimensions() {
            let ((width, height), (mask_width, mask_height)) =
                (image.dimensions(), mask.dimensions());
            return Err(PipelineError::Options(format!(
                "with `padding_mask_crop` the mask has the size of the image, but they are \
                 {mask_width} x {mask_height} and {width} x {height}"
            )));
        }
        let Some(region) = Region::around(mask, size, padding) else {
            return Err(PipelineError::Options(
                "the mask is black: there is nothing to repaint".into(),
            ));
        };
        let part = |image| mask::resize_and_fill(&region.crop(image), size);
        Ok(Self {
            images: vec![part(image)],
            masks: vec![part(mask)],
            region: Some(region),
            downscale,
        })
    }

    /// The masks at the latents' size, 1 where an image is repainted: `[masks, 1, height, width]`.
    /// A position has the level of the first of its pixels, as in Diffusers.
    fn latent_mask<B: Backend>(&self, device: &B::Device) -> Tensor<B, 4> {
        mask_tensor(&self.masks, self.downscale, device)
    }

    /// Images that are grey where they are repainted: `[images, 3, height, width]`.
    fn masked<B: Backend>(&self, images: Tensor<B, 4>) -> Tensor<B, 4> {
        let mask = mask_tensor::<B>(&self.masks, 1, &images.device());
        images * (mask.ones_like() - mask)
    }

    /// Puts the results into the images, where that is asked for.
    fn restore(&self, options: &StableDiffusionInpaintOptions, results: &mut [RgbImage]) {
        if let Some(region) = &self.region {
            let (image, mask) = (&options.image[0], &options.mask_image[0]);
            for result in results {
                let whole = region.paste(result, image.dimensions());
                *result = mask::overlay(image, mask, &whole);
            }
        } else if options.keep_unmasked {
            for (index, result) in results.iter_mut().enumerate() {
                let image = &self.images[index % self.images.len()];
                let mask = &self.masks[index % self.masks.len()];
                *result = mask::overlay(image, mask, result);
            }
        }
    }
}

/// The masks at every `stride`th pixel, 1 or 0: `[masks, 1, height / stride, width / stride]`.
fn mask_tensor<B: Backend>(masks: &[RgbImage], stride: usize, device: &B::Device) -> Tensor<B, 4> {
    let (width, height) = masks[0].dimensions();
    let values: Vec<f32> = masks
        .iter()
        .flat_map(|mask| {
            let rows = (0..height).step_by(stride);
            rows.flat_map(move |y| {
                let columns = (0..width).step_by(stride);
                columns.map(move |x| f32::from(u8::from(mask::level(mask.get_pixel(x, y)) >= 128)))
            })
        })
        .collect();
    let [width, height] = [width, height].map(|side| side as usize / stride);
    let data = TensorData::new(values, [masks.len(), 1, height, width]);
    Tensor::from_data(data, (device, DType::F32))
}
