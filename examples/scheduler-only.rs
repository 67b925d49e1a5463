//! The scheduler crate alone: a denoising loop with a "model" that knows the image.
//!
//! `cargo run --release -p diffuse-examples --example scheduler-only`

use anyhow::Result;
use burn::tensor::Tensor;
use diffuse_examples::Backend;
use diffuse_schedulers::{
    Generator, Scheduler, StepOptions, UniPCMultistepConfig, UniPCMultistepScheduler, randn_tensor,
};

fn main() -> Result<()> {
    let device = Default::default();
    let mut scheduler = UniPCMultistepScheduler::<Backend>::new(UniPCMultistepConfig::default())?;
    scheduler.set_timesteps(&10.into())?;

    // The image that the perfect network finds in any noise: 0.5 everywhere.
    let answer = Tensor::<Backend, 4>::full([1, 3, 8, 8], 0.5, &device);
    let alphas_cumprod = scheduler.noise_schedule().alphas_cumprod().to_vec();

    let mut noise = Generator::new(0);
    let dtype = burn::tensor::DType::F32;
    let mut sample = randn_tensor::<Backend>(&mut noise, answer.dims(), dtype, &device)?;
    sample = sample * scheduler.init_noise_sigma();
    for timestep in scheduler.timesteps().to_vec() {
        let input = scheduler.scale_model_input(sample.clone(), timestep)?;
        // The noise in `input`, from input = √ᾱ · image + √(1 - ᾱ) · noise.
        let alpha = f64::from(alphas_cumprod[timestep as usize]);
        let predicted = (input - answer.clone() * alpha.sqrt()) / (1.0 - alpha).sqrt();
        sample = scheduler
            .step(
                predicted,
                timestep,
                sample,
                &StepOptions::default(),
                &mut noise,
            )?
            .prev_sample;
        let error: f32 = (sample.clone() - answer.clone()).abs().max().into_scalar();
        println!("timestep {timestep:>3}: at most {error:.4} from the answer");
    }
    Ok(())
}
