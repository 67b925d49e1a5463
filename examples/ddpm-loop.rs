//! A denoising loop by hand: a UNet and a scheduler make the same image as the pipeline.
//!
//! `cargo run --release -p diffuse-examples --example ddpm-loop -- FOLDER`; without a checkpoint, a
//! tiny one of the tests is used.

use std::path::PathBuf;

use anyhow::Result;
use burn::tensor::DType;
use diffuse_examples::{Backend, default_device, tiny_model};
use diffuse_pipelines::schedulers::{
    DDPMScheduler, Generator, Scheduler, SchedulerConfig, StepOptions, randn_tensor,
};
use diffuse_pipelines::unet::{Pretrained, UNet2DModel};
use diffuse_pipelines::{component_folder, to_images};

fn main() -> Result<()> {
    let device = default_device();
    let model = PathBuf::from(
        std::env::args()
            .nth(1)
            .unwrap_or_else(|| tiny_model("ddpm/cat")),
    );
    // DDPM repositories have all files in the top folder.
    let unet = UNet2DModel::<Backend>::from_pretrained(component_folder(&model, "unet"), &device)?;
    let config = SchedulerConfig::from_file(component_folder(&model, "scheduler"))?;
    let mut scheduler = DDPMScheduler::<Backend>::from_config(&config)?;

    scheduler.set_timesteps(&25.into())?;
    let [height, width] = unet.config().sample_size.expect("a fixed size").dims();
    let mut noise = Generator::new(0);
    let mut sample = randn_tensor(&mut noise, [1, 3, height, width], DType::F32, &device)?;
    for timestep in scheduler.timesteps().to_vec() {
        let residual = unet.forward(sample.clone(), timestep);
        sample = scheduler
            .step(
                residual,
                timestep,
                sample,
                &StepOptions::default(),
                &mut noise,
            )?
            .prev_sample;
    }
    to_images(sample)?[0].save("ddpm-loop.png")?;
    println!("ddpm-loop.png");
    Ok(())
}
