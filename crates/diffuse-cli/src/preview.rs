//! `--preview`: an image that is replaced after each step.

use std::cell::Cell;
use std::fs;
use std::io::BufWriter;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use burn::tensor::backend::Backend;
use diffuse_pipelines::vae::Autoencoder;
use diffuse_pipelines::{
    LatentPreview, LatentRgb, LoadOptions, PipelineKind, StepEvent, load_vae, replace_file,
};
use image::imageops::{self, FilterType};
use image::{ImageFormat, RgbImage};

use crate::args::{Model, StableDiffusion};
use crate::builtin::builtin;
use crate::output::{self, complain, image_paths};
use crate::stable_diffusion::check_vae;

/// Writes previews.
pub struct Preview<B: Backend> {
    map: LatentPreview<B>,
    path: PathBuf,
    /// Pixels per pixel of a preview, in each direction.
    scale: u32,
    /// Whether one could not be made: then no other is tried.
    failed: Cell<bool>,
}

/// Checks, before anything is computed, that previews of `images` images can be written.
pub fn check(args: &StableDiffusion, images: usize) -> Result<()> {
    let Some(preview) = &args.preview else {
        return Ok(());
    };
    output::check_extension(preview)?;
    // A larger number is refused before anything is computed.
    let images = images.min(1024);
    let mut outputs = image_paths(&args.run.output, images);
    outputs.extend(args.run.output_latents.clone());
    for path in image_paths(preview, images) {
        if outputs.contains(&path) {
            bail!(
                "`{}` is given for a preview and for another output",
                path.display()
            );
        }
        output::check_path(&path)?;
    }
    Ok(())
}

/// The linear map of a model's latents to colors.
pub fn linear(model: &Model) -> LatentRgb {
    match builtin(PipelineKind::StableDiffusion).latent_rgb {
        Some([a, b, c, d, bias]) if model.model.is_none() => LatentRgb {
            factors: [a, b, c, d],
            bias,
        },
        _ => LatentRgb::STABLE_DIFFUSION,
    }
}

impl<B: Backend> Preview<B> {
    /// The preview that the options ask for, of a run with the autoencoder `vae`.
    pub fn new(
        args: &StableDiffusion,
        vae: &Autoencoder<B>,
        load: &LoadOptions,
        device: &B::Device,
    ) -> Result<Option<Self>> {
        let Some(preview) = &args.preview else {
            return Ok(None);
        };
        let (map, scale) = match &args.preview_vae {
            Some(path) => {
                let other = load_vae(path, None, load, device)?;
                check_vae(vae, &other, path)?;
                (LatentPreview::Decoder(other), 1)
            }
            None => (linear(&args.model).into(), vae.downscale() as u32),
        };
        Ok(Some(Self {
            map,
            path: preview.clone(),
            scale,
            failed: Cell::new(false),
        }))
    }

    /// Replaces the previews by those of a step. A failure is one warning, and does not end the
    /// run.
    pub fn update(&self, event: &StepEvent<'_, B>) {
        if self.failed.get() {
            return;
        }
        if let Err(error) = self.write(event) {
            self.failed.set(true);
            complain(format_args!("warning: there is no preview: {error:#}"));
        }
    }

    fn write(&self, event: &StepEvent<'_, B>) -> Result<()> {
        let images = self.map.images(event.preview_latents())?;
        for (image, path) in images.iter().zip(image_paths(&self.path, images.len())) {
            let image = self.enlarge(image);
            replace_file(&path, |temporary| {
                let mut file = BufWriter::new(fs::File::create(temporary)?);
                let written = image.write_to(&mut file, ImageFormat::Png);
                written.map_err(std::io::Error::other)
            })
            .with_context(|| format!("cannot write `{}`", path.display()))?;
        }
        Ok(())
    }

    /// A preview in the size of the run's images.
    fn enlarge(&self, image: &RgbImage) -> RgbImage {
        let [width, height] = [image.width(), image.height()].map(|side| side * self.scale);
        imageops::resize(image, width, height, FilterType::Triangle)
    }
}
