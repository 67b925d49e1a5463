//! Stable Diffusion v1's networks in candle. A line of input has the name of a network, its folder
//! and sizes; the output is the seconds of one call, as in `xtask/bench/cpu.py`.

use std::io::{self, BufRead, Write};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use candle_transformers::models::stable_diffusion::StableDiffusionConfig;

fn main() -> Result<()> {
    for line in io::stdin().lock().lines() {
        println!("{}", time(&line?)?);
        io::stdout().flush()?;
    }
    Ok(())
}

fn time(line: &str) -> Result<f64> {
    let mut words = line.split_whitespace();
    let name = words.next().context("an empty line")?;
    let weights = words.next().context("no folder")?.to_string() + "/diffusion_pytorch_model.safetensors";
    let sizes = words.map(|word| word.parse::<usize>());
    let sizes = sizes.collect::<Result<Vec<_>, _>>()?;
    let device = Device::Cpu;
    let config = StableDiffusionConfig::v1_5(None, None, None);
    let random = |shape: &[usize]| Tensor::randn(0.0_f32, 1.0, shape, &device);
    let run: Box<dyn Fn() -> candle_core::Result<Tensor>> = match (name, &sizes[..]) {
        ("unet", &[batch, height, width, tokens]) => {
            let model = config.build_unet(weights, &device, 4, false, DType::F32)?;
            let (x, context) = (random(&[batch, 4, height, width])?, random(&[batch, tokens, 768])?);
            Box::new(move || model.forward(&x, 500.0, &context))
        }
        ("vae", &[height, width]) => {
            let model = config.build_vae(weights, &device, DType::F32)?;
            let x = random(&[1, 4, height, width])?;
            Box::new(move || model.decode(&x))
        }
        _ => bail!("no network `{name}`"),
    };
    run()?;
    let start = Instant::now();
    run()?;
    Ok(start.elapsed().as_secs_f64())
}
