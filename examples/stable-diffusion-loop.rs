//! The parts of Stable Diffusion: tokenizer, text encoder, UNet, autoencoder, and a UniPC scheduler
//! made from the configuration of the checkpoint's scheduler.
//!
//! `cargo run --release -p diffuse-examples --example stable-diffusion-loop -- FOLDER "PROMPT"`;
//! without a checkpoint, a tiny one of the tests is used.

use std::path::PathBuf;

use anyhow::Result;
use burn::tensor::{DType, Int, Tensor, TensorData};
use diffuse_examples::{Backend, default_device, tiny_model};
use diffuse_pipelines::clip::{CLIPTextModel, CLIPTokenizer};
use diffuse_pipelines::schedulers::{
    Generator, Scheduler, SchedulerConfig, StepOptions, UniPCMultistepScheduler, randn_tensor,
};
use diffuse_pipelines::to_images;
use diffuse_pipelines::unet::{Pretrained, UNet2DConditionModel};
use diffuse_pipelines::vae::AutoencoderKL;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let model = PathBuf::from(arguments.next().unwrap_or_else(|| tiny_model("sd/base")));
    let prompt = arguments
        .next()
        .unwrap_or("a photograph of an astronaut riding a horse".into());
    let guidance_scale = 7.5;

    // The parts.
    let device = default_device();
    let tokenizer = CLIPTokenizer::from_pretrained(model.join("tokenizer"))?;
    let text_encoder =
        CLIPTextModel::<Backend>::from_pretrained(model.join("text_encoder"), &device)?;
    let unet = UNet2DConditionModel::<Backend>::from_pretrained(model.join("unet"), &device)?;
    let vae = AutoencoderKL::<Backend>::from_pretrained(model.join("vae"), &device)?;
    let config = SchedulerConfig::from_file(model.join("scheduler"))?;
    let mut scheduler = UniPCMultistepScheduler::<Backend>::from_config(&config)?;

    // Text embeddings: of the empty text for the unconditional half, then of the prompt.
    let mut ids = Vec::new();
    for text in ["", &prompt] {
        ids.extend(tokenizer.encode(text)?.ids.into_iter().map(i64::from));
    }
    let ids = TensorData::new(ids, [2, tokenizer.max_length()]);
    let ids = Tensor::<Backend, 2, Int>::from_data(ids, &device);
    let embeddings = text_encoder.forward(ids).last_hidden_state;

    // Noise.
    scheduler.set_timesteps(&25.into())?;
    let [height, width] = unet.config().sample_size.expect("a fixed size").dims();
    let shape = [1, unet.config().in_channels, height, width];
    let mut noise = Generator::new(0);
    let mut latents = randn_tensor(&mut noise, shape, DType::F32, &device)?;
    latents = latents * scheduler.init_noise_sigma();

    // Both halves go through the UNet as one batch.
    for timestep in scheduler.timesteps().to_vec() {
        let input = scheduler.scale_model_input(latents.clone(), timestep)?;
        let input = Tensor::cat(vec![input.clone(), input], 0);
        let predicted = unet.forward(input, timestep, &embeddings);
        let unconditional = predicted.clone().narrow(0, 0, 1);
        let conditional = predicted.narrow(0, 1, 1);
        let guided = unconditional.clone() + (conditional - unconditional) * guidance_scale;
        latents = scheduler
            .step(
                guided,
                timestep,
                latents,
                &StepOptions::default(),
                &mut noise,
            )?
            .prev_sample;
    }

    // The image.
    let image = vae.decode(latents / vae.config().scaling_factor);
    to_images(image)?[0].save("stable-diffusion-loop.png")?;
    println!("stable-diffusion-loop.png");
    Ok(())
}
