//! `diffuse txt2img`.

use std::ops::ControlFlow;

use anyhow::Result;
use burn::tensor::backend::Backend;
use diffuse_pipelines::{
    Generated, StableDiffusionInputs, StableDiffusionOptions, StableDiffusionPipeline, StepEvent,
};
use serde_json::{Value, json};

use crate::args::{StableDiffusion, Txt2img};
use crate::generate::{self, Task, display, read_latents};

pub fn run(args: Txt2img) -> Result<()> {
    generate::run(args)
}

impl Task for Txt2img {
    const COMMAND: &'static str = "txt2img";
    const EXAMPLE: &'static str = "diffuse \"a boat at sunset\" --seed 0";

    fn common(&self) -> &StableDiffusion {
        &self.common
    }

    fn common_mut(&mut self) -> &mut StableDiffusion {
        &mut self.common
    }

    fn generate<B: Backend>(
        &self,
        pipeline: &StableDiffusionPipeline<B>,
        mut options: StableDiffusionOptions,
        mut inputs: StableDiffusionInputs<'_, B>,
        device: &B::Device,
        on_step: impl FnMut(StepEvent<'_, B>) -> ControlFlow<()>,
    ) -> Result<Generated<B>> {
        (options.width, options.height) = (self.size.width, self.size.height);
        inputs.latents = read_latents(self.init_latents.as_deref(), device)?;
        Ok(pipeline.generate_with(&options, inputs, on_step)?)
    }

    fn record(&self) -> Value {
        json!({
            "width": self.size.width,
            "height": self.size.height,
            "init_latents": self.init_latents.as_deref().map(display),
        })
    }
}
