//! `diffuse inpaint`.

use std::ops::ControlFlow;
use std::path::Path;

use anyhow::{Result, bail};
use burn::tensor::backend::Backend;
use diffuse_pipelines::{
    Generated, StableDiffusionInpaintOptions, StableDiffusionInputs, StableDiffusionOptions,
    StableDiffusionPipeline, StepEvent,
};
use image::{Rgb, RgbImage};
use serde_json::{Value, json};

use crate::args::{Inpaint, StableDiffusion};
use crate::generate::{self, Task, display, read_image, read_latents};

pub fn run(args: Inpaint) -> Result<()> {
    let is_stdin = |path: &Path| path == Path::new("-");
    if is_stdin(&args.image) && args.mask.as_deref().is_some_and(is_stdin) {
        bail!("only one of `--image` and `--mask` can be read from standard input");
    }
    let image = read_image(&args.image)?;
    let mask = match (&args.mask, args.mask_box) {
        (Some(path), _) => read_image(path)?,
        (None, area) => draw_mask(&image, area.unwrap_or_default())?,
    };
    generate::run(Inpainting { args, image, mask })
}

/// A mask that is white in the rectangle `[left, top, width, height]`.
fn draw_mask(image: &RgbImage, [left, top, width, height]: [u32; 4]) -> Result<RgbImage> {
    let (columns, rows) = image.dimensions();
    let inside = |start: u32, length: u32, end: u32| start < end && length > 0;
    if !inside(left, width, columns) || !inside(top, height, rows) {
        bail!("`--mask-box {left},{top},{width},{height}` has no pixel of {columns} x {rows}");
    }
    Ok(RgbImage::from_fn(columns, rows, |x, y| {
        let white = |at: u32, start, length| at >= start && at - start < length;
        let level = white(x, left, width) && white(y, top, height);
        Rgb([if level { 255 } else { 0 }; 3])
    }))
}

struct Inpainting {
    args: Inpaint,
    image: RgbImage,
    mask: RgbImage,
}

impl Task for Inpainting {
    const COMMAND: &'static str = "inpaint";
    const EXAMPLE: &'static str =
        "diffuse inpaint \"a boat at sunset\" --image sea.png --mask boat.png";

    fn common(&self) -> &StableDiffusion {
        &self.args.common
    }

    fn common_mut(&mut self) -> &mut StableDiffusion {
        &mut self.args.common
    }

    fn generate<B: Backend>(
        &self,
        pipeline: &StableDiffusionPipeline<B>,
        mut options: StableDiffusionOptions,
        mut inputs: StableDiffusionInputs<'_, B>,
        device: &B::Device,
        on_step: impl FnMut(StepEvent<'_, B>) -> ControlFlow<()>,
    ) -> Result<Generated<B>> {
        let args = &self.args;
        (options.width, options.height) = (args.size.width, args.size.height);
        let options = StableDiffusionInpaintOptions {
            options,
            image: vec![self.image.clone()],
            mask_image: vec![self.mask.clone()],
            strength: args.strength,
            padding_mask_crop: args.padding_mask_crop,
            keep_unmasked: args.keep_unmasked,
        };
        inputs.latents = read_latents(args.init_latents.as_deref(), device)?;
        Ok(pipeline.inpaint_with(&options, inputs, on_step)?)
    }

    fn record(&self) -> Value {
        let args = &self.args;
        json!({
            "width": args.size.width,
            "height": args.size.height,
            "init_image": display(&args.image),
            "mask": args.mask.as_deref().map(display),
            "mask_box": args.mask_box,
            "strength": args.strength,
            "padding_mask_crop": args.padding_mask_crop,
            "keep_unmasked": args.keep_unmasked,
            "init_latents": args.init_latents.as_deref().map(display),
        })
    }
}
