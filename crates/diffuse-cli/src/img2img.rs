//! `diffuse img2img`.

use std::ops::ControlFlow;

use anyhow::Result;
use burn::tensor::backend::Backend;
use diffuse_pipelines::{
    Generated, StableDiffusionImg2ImgOptions, StableDiffusionInputs, StableDiffusionOptions,
    StableDiffusionPipeline, StepEvent,
};
use image::RgbImage;
use serde_json::{Value, json};

use crate::args::{Img2img, StableDiffusion};
use crate::generate::{self, Task, display, read_image};

pub fn run(args: Img2img) -> Result<()> {
    let image = read_image(&args.image)?;
    generate::run(ImageToImage { args, image })
}

struct ImageToImage {
    args: Img2img,
    image: RgbImage,
}

impl Task for ImageToImage {
    const COMMAND: &'static str = "img2img";
    const EXAMPLE: &'static str = "diffuse img2img \"a boat at sunset\" --image boat.png";

    fn common(&self) -> &StableDiffusion {
        &self.args.common
    }

    fn common_mut(&mut self) -> &mut StableDiffusion {
        &mut self.args.common
    }

    fn generate<B: Backend>(
        &self,
        pipeline: &StableDiffusionPipeline<B>,
        options: StableDiffusionOptions,
        inputs: StableDiffusionInputs<'_, B>,
        _device: &B::Device,
        on_step: impl FnMut(StepEvent<'_, B>) -> ControlFlow<()>,
    ) -> Result<Generated<B>> {
        let options = StableDiffusionImg2ImgOptions {
            options,
            image: vec![self.image.clone()],
            strength: self.args.strength,
        };
        Ok(pipeline.image_to_image_with(&options, inputs, on_step)?)
    }

    fn record(&self) -> Value {
        json!({
            "init_image": display(&self.args.image),
            "strength": self.args.strength,
        })
    }
}
