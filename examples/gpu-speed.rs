//! Times the networks of Stable Diffusion v1 and of ddpm-cat-256 in full size with random weights on the GPU, one a line
//! of the input: `cargo xtask bench gpu` asks it and PyTorch in turns.
//!
//! A line is a network, a float type and a number of calls, as in `unet f16 20`; the answer is the seconds of a call.

use std::io::{self, BufRead, Write};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Distribution, Int, Tensor, backend::Backend as _};
use diffuse_examples::{Backend, default_device};
use diffuse_nn::checkpoint::arrange_weights;
use diffuse_pipelines::clip::CLIPTextConfig;
use diffuse_pipelines::unet::{
    PerLevel, UNet2DConditionConfig, UNet2DConfig, UNet2DDownBlock, UNet2DUpBlock,
};
use diffuse_pipelines::vae::{AutoencoderKLConfig, AutoencoderKLDownBlock, AutoencoderKLUpBlock};

fn main() -> Result<()> {
    for line in io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let [network, dtype, calls] = words[..] else {
            bail!("`{line}` is no network, type and number of calls");
        };
        let dtype = match dtype {
            "f16" => DType::F16,
            "f32" => DType::F32,
            _ => bail!("`{dtype}` is no float type"),
        };
        println!("{}", time(&mut *network_call(network, dtype)?, calls.parse().context("calls")?)?);
        io::stdout().flush()?;
    }
    Ok(())
}

/// Seconds of a call, after two that are not counted.
fn time(call: &mut dyn FnMut(), calls: u32) -> Result<f64> {
    let wait = || Backend::sync(&Default::default()).context("the device stopped");
    call();
    call();
    wait()?;
    let start = Instant::now();
    for _ in 0..calls {
        call();
    }
    wait()?;
    Ok(start.elapsed().as_secs_f64() / f64::from(calls))
}

fn random<const D: usize>(shape: [usize; D], dtype: DType) -> Tensor<Backend, D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), (&default_device(), dtype))
}

fn network_call(name: &str, dtype: DType) -> Result<Box<dyn FnMut()>> {
    let device = default_device();
    Ok(match name {
        "unet" => {
            let config = UNet2DConditionConfig {
                cross_attention_dim: PerLevel::Same(768),
                ..Default::default()
            };
            let model = prepared(config.init::<Backend>(&device), dtype);
            let (x, context) = (random([2, 4, 64, 64], dtype), random([2, 77, 768], dtype));
            Box::new(move || drop(model.forward(x.clone(), 500.0, &context)))
        }
        "vae" => {
            let config = AutoencoderKLConfig {
                block_out_channels: vec![128, 256, 512, 512],
                down_block_types: vec![AutoencoderKLDownBlock::DownEncoderBlock2D; 4],
                up_block_types: vec![AutoencoderKLUpBlock::UpDecoderBlock2D; 4],
                layers_per_block: 2,
                ..Default::default()
            };
            let model = prepared(config.init::<Backend>(&device), dtype);
            let x = random([1, 4, 64, 64], dtype);
            Box::new(move || drop(model.decode(x.clone())))
        }
        "text" => {
            let config = CLIPTextConfig {
                hidden_size: 768,
                intermediate_size: 3072,
                num_attention_heads: 12,
                ..Default::default()
            };
            let model = prepared(config.init::<Backend>(&device), dtype);
            let ids = Tensor::<Backend, 2, Int>::ones([2, 77], &device);
            Box::new(move || drop(model.forward(ids.clone())))
        }
        "ddpm" => {
            use {UNet2DDownBlock::*, UNet2DUpBlock::*};
            let config = UNet2DConfig {
                block_out_channels: vec![128, 128, 256, 256, 512, 512],
                down_block_types: vec![
                    DownBlock2D,
                    DownBlock2D,
                    DownBlock2D,
                    DownBlock2D,
                    AttnDownBlock2D,
                    DownBlock2D,
                ],
                up_block_types: vec![
                    UpBlock2D,
                    AttnUpBlock2D,
                    UpBlock2D,
                    UpBlock2D,
                    UpBlock2D,
                    UpBlock2D,
                ],
                attention_head_dim: None,
                downsample_padding: 0,
                ..Default::default()
            };
            let model = prepared(config.init::<Backend>(&device), dtype);
            let x = random([1, 3, 256, 256], dtype);
            Box::new(move || drop(model.forward(x.clone(), 500.0)))
        }
        _ => bail!("`{name}` is no network"),
    })
}

/// A module without gradients, in a type and laid out as loading does.
fn prepared<M: Module<Backend>>(module: M, dtype: DType) -> M {
    struct Cast(DType);
    impl ModuleMapper<Backend> for Cast {
        fn map_float<const D: usize>(
            &mut self,
            param: Param<Tensor<Backend, D>>,
        ) -> Param<Tensor<Backend, D>> {
            param.map(|tensor| tensor.cast(self.0))
        }
    }
    arrange_weights(module.no_grad().map(&mut Cast(dtype)))
}
