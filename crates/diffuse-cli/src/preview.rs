//! `--preview`: an image that is replaced after each step, in a file or in the terminal.

use std::cell::Cell;
use std::fs;
use std::io::BufWriter;
use std::path::Path;

use anyhow::{Context, Result, bail};
use burn::tensor::backend::Backend;
use console::Term;
use diffuse_pipelines::vae::Autoencoder;
use diffuse_pipelines::{
    LatentPreview, LatentRgb, LoadOptions, PipelineKind, StepEvent, load_vae, replace_file,
};
use image::imageops::{self, FilterType};
use image::{ImageFormat, RgbImage};

use crate::args::{Model, PreviewTarget, StableDiffusion};
use crate::builtin::builtin;
use crate::grid;
use crate::output::{self, complain, image_paths};
use crate::progress::Progress;
use crate::stable_diffusion::check_vae;
use crate::terminal;

/// Shows previews.
pub struct Preview<B: Backend> {
    map: LatentPreview<B>,
    target: PreviewTarget,
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
    let PreviewTarget::File(preview) = preview else {
        if args.run.quiet {
            bail!("`--preview terminal` shows nothing with `--quiet`");
        }
        if !terminal::has_colors(&Term::stderr()) {
            bail!("`--preview terminal`: standard error is not a terminal with colors");
        }
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
fn linear(model: &Model) -> LatentRgb {
    match builtin(PipelineKind::StableDiffusion).latent_rgb {
        Some([a, b, c, d, bias]) if model.model.is_none() => LatentRgb {
            factors: [a, b, c, d],
            bias,
        },
        _ => LatentRgb::STABLE_DIFFUSION,
    }
}

/// What makes previews for a model with the autoencoder `own`: the autoencoder at a path, or else
/// the linear map.
pub fn load<B: Backend>(
    model: &Model,
    path: Option<&Path>,
    own: &Autoencoder<B>,
    options: &LoadOptions,
    device: &B::Device,
) -> Result<LatentPreview<B>> {
    let Some(path) = path else {
        return Ok(linear(model).into());
    };
    let other = load_vae(path, None, options, device)?;
    check_vae(own, &other, path)?;
    Ok(LatentPreview::Decoder(other))
}

impl<B: Backend> Preview<B> {
    /// The preview that the options ask for, of a run with the autoencoder `vae`.
    pub fn new(
        args: &StableDiffusion,
        vae: &Autoencoder<B>,
        options: &LoadOptions,
        device: &B::Device,
    ) -> Result<Option<Self>> {
        let Some(target) = &args.preview else {
            return Ok(None);
        };
        let map = load(
            &args.model,
            args.preview_vae.as_deref(),
            vae,
            options,
            device,
        )?;
        let scale = match map {
            LatentPreview::Decoder(_) => 1,
            LatentPreview::Linear(_) => vae.downscale() as u32,
        };
        Ok(Some(Self {
            map,
            target: target.clone(),
            scale,
            failed: Cell::new(false),
        }))
    }

    /// Replaces the previews by those of a step. A failure is one warning, and does not end the
    /// run.
    pub fn update(&self, event: &StepEvent<'_, B>, progress: &Progress) {
        if self.failed.get() {
            return;
        }
        if let Err(error) = self.show(event, progress) {
            self.failed.set(true);
            complain(format_args!("warning: there is no preview: {error:#}"));
        }
    }

    fn show(&self, event: &StepEvent<'_, B>, progress: &Progress) -> Result<()> {
        let images = self.map.images(event.preview_latents())?;
        let images: Vec<_> = images.iter().map(|image| self.enlarge(image)).collect();
        match &self.target {
            PreviewTarget::Terminal => {
                let sheet = grid::grid(&images, grid::columns(images.len()));
                progress.show(&terminal::text(&sheet, &Term::stderr()));
                Ok(())
            }
            PreviewTarget::File(path) => {
                let paths = image_paths(path, images.len());
                let mut both = images.iter().zip(paths);
                both.try_for_each(|(image, path)| write(image, &path))
            }
        }
    }

    /// A preview in the size of the run's images.
    fn enlarge(&self, image: &RgbImage) -> RgbImage {
        let [width, height] = [image.width(), image.height()].map(|side| side * self.scale);
        imageops::resize(image, width, height, FilterType::Triangle)
    }
}

fn write(image: &RgbImage, path: &Path) -> Result<()> {
    replace_file(path, |temporary| {
        let mut file = BufWriter::new(fs::File::create(temporary)?);
        let written = image.write_to(&mut file, ImageFormat::Png);
        written.map_err(std::io::Error::other)
    })
    .with_context(|| format!("cannot write `{}`", path.display()))
}
