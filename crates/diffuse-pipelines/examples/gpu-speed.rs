//! Times operations with the sizes of Stable Diffusion v1, and whole networks with random weights,
//! on the GPU, one a line of the input: `cargo xtask bench gpu` runs it and PyTorch in turns.
//!
//! A line is a name, a float type, sizes (networks have none) and a number of calls, as in
//! `conv f16 2 320 320 64 64 3 100` or `unet f16 20`; the answer is the seconds of a call.
//! `versions` is answered with text.

use std::io::{self, BufRead, Write};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Distribution, Int, Tensor, backend::Backend as _};
use diffuse_nn::checkpoint::arrange_weights;
use diffuse_nn::ops::{self, ConvGeometry};
use diffuse_pipelines::clip::CLIPTextConfig;
use diffuse_pipelines::unet::{
    PerLevel, UNet2DConditionConfig, UNet2DConfig, UNet2DDownBlock, UNet2DUpBlock,
};
use diffuse_pipelines::vae::{AutoencoderKLConfig, AutoencoderKLDownBlock, AutoencoderKLUpBlock};

#[cfg(feature = "cuda")]
type Backend = burn::backend::Cuda;
#[cfg(not(feature = "cuda"))]
type Backend = burn::backend::Wgpu;

/// An operation or a network with its inputs.
type Call = Box<dyn FnMut()>;

fn main() -> Result<()> {
    exit_at_first_panic();
    // The one timed last, by its words: it is mostly timed again.
    let mut last: Option<(String, Call)> = None;
    for line in io::stdin().lock().lines() {
        let line = line?;
        if line == "versions" {
            let backend = Backend::name(&Default::default());
            println!("diffuse {} on {backend}", env!("CARGO_PKG_VERSION"));
            continue;
        }
        let (what, calls) = line
            .rsplit_once(' ')
            .context("a line without a number of calls")?;
        let calls = calls
            .parse()
            .with_context(|| format!("`{calls}` is not a number of calls"))?;
        // Its memory is free before the next one needs some.
        let reused = last.take().filter(|(words, _)| words == what);
        let call = match reused {
            Some((_, call)) => call,
            None => call(what)?,
        };
        let (_, call) = last.insert((what.to_string(), call));
        println!("{}", seconds(call, calls)?);
        io::stdout().flush()?;
    }
    Ok(())
}

/// burn's threads catch their panics and go on with buffers that were never written.
fn exit_at_first_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        print(info);
        std::process::exit(1);
    }));
}

/// Seconds of a call, after two that are not counted.
fn seconds(call: &mut Call, calls: u32) -> Result<f64> {
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

fn call(words: &str) -> Result<Call> {
    let words: Vec<&str> = words.split_whitespace().collect();
    let [name, dtype, sizes @ ..] = &words[..] else {
        bail!("`{}` has no float type", words.join(" "));
    };
    let dtype = match *dtype {
        "f16" => DType::F16,
        "f32" => DType::F32,
        _ => bail!("`{dtype}` is no float type"),
    };
    if sizes.is_empty() {
        return network(name, dtype);
    }
    let sizes: Result<Vec<usize>, _> = sizes.iter().map(|size| size.parse()).collect();
    operation(name, dtype, &sizes.context("a size that is no number")?)
}

fn random<const D: usize>(shape: [usize; D], dtype: DType) -> Tensor<Backend, D> {
    let device = Default::default();
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), (&device, dtype))
}

/// An image with its channels last in memory, as networks have it.
fn image([batch, channels, height, width]: [usize; 4], dtype: DType) -> Tensor<Backend, 4> {
    let tokens = random([batch, height * width, channels], dtype);
    ops::tokens_to_image(tokens, [height, width])
}

fn boxed<T>(call: impl Fn() -> T + 'static) -> Call {
    Box::new(move || drop(call()))
}

fn operation(name: &str, dtype: DType, sizes: &[usize]) -> Result<Call> {
    Ok(match (name, sizes) {
        ("conv" | "conv_stride_2", &[batch, channels, outputs, height, width, kernel]) => {
            let x = image([batch, channels, height, width], dtype);
            let weight = random([outputs, channels, kernel, kernel], dtype);
            let weight = ops::convolution_weight(weight);
            let bias = random([outputs], dtype);
            let geometry = ConvGeometry {
                stride: if name == "conv" { 1 } else { 2 },
                ..ConvGeometry::same(kernel)
            };
            boxed(move || ops::conv2d(x.clone(), weight.clone(), Some(bias.clone()), geometry))
        }
        ("linear", &[rows, inputs, outputs]) => {
            let (x, weight) = (
                random([rows, inputs], dtype),
                random([outputs, inputs], dtype),
            );
            let bias = random([outputs], dtype);
            boxed(move || ops::linear(x.clone(), weight.clone(), Some(bias.clone())))
        }
        ("linear_geglu", &[rows, inputs, outputs]) => {
            let x = random([1, rows, inputs], dtype);
            let weight = random([2 * outputs, inputs], dtype);
            let bias = random([2 * outputs], dtype);
            boxed(move || ops::linear_geglu(x.clone(), weight.clone(), Some(bias.clone())))
        }
        ("attention", &[batch, tokens, context, heads, d]) => {
            let query = random([batch, tokens, heads * d], dtype);
            let [key, value] = [0; 2].map(|_| random([batch, context, heads * d], dtype));
            boxed(move || ops::attention(query.clone(), key.clone(), value.clone(), heads))
        }
        ("group_norm_silu", &[batch, channels, height, width]) => {
            let x = image([batch, channels, height, width], dtype);
            let [weight, bias] = [0; 2].map(|_| random([channels], dtype));
            boxed(move || ops::group_norm_silu(x.clone(), weight.clone(), bias.clone(), 32, 1e-5))
        }
        ("layer_norm", &[rows, width]) => {
            let x = random([rows, width], dtype);
            let [weight, bias] = [0; 2].map(|_| random([width], dtype));
            boxed(move || ops::layer_norm(x.clone(), weight.clone(), bias.clone(), 1e-5))
        }
        _ => bail!("unknown operation `{name}` with {} sizes", sizes.len()),
    })
}

fn network(name: &str, dtype: DType) -> Result<Call> {
    let device = Default::default();
    Ok(match name {
        "unet" => {
            let config = UNet2DConditionConfig {
                cross_attention_dim: PerLevel::Same(768),
                ..Default::default()
            };
            let model = with_random_weights(config.init(&device), dtype);
            let (x, context) = (random([2, 4, 64, 64], dtype), random([2, 77, 768], dtype));
            boxed(move || model.forward(x.clone(), 500.0, &context))
        }
        "vae" => {
            let config = AutoencoderKLConfig {
                block_out_channels: vec![128, 256, 512, 512],
                down_block_types: vec![AutoencoderKLDownBlock::DownEncoderBlock2D; 4],
                up_block_types: vec![AutoencoderKLUpBlock::UpDecoderBlock2D; 4],
                layers_per_block: 2,
                ..Default::default()
            };
            let model = with_random_weights(config.init(&device), dtype);
            let x = random([1, 4, 64, 64], dtype);
            boxed(move || model.decode(x.clone()))
        }
        "text" => {
            let config = CLIPTextConfig {
                hidden_size: 768,
                intermediate_size: 3072,
                num_attention_heads: 12,
                ..Default::default()
            };
            let model = with_random_weights(config.init(&device), dtype);
            let ids = Tensor::<Backend, 2, Int>::ones([2, 77], &device);
            boxed(move || model.forward(ids.clone()))
        }
        "ddpm" => {
            use {UNet2DDownBlock::*, UNet2DUpBlock::*};
            let mut down = vec![DownBlock2D; 6];
            down[4] = AttnDownBlock2D;
            let mut up = vec![UpBlock2D; 6];
            up[1] = AttnUpBlock2D;
            let config = UNet2DConfig {
                block_out_channels: vec![128, 128, 256, 256, 512, 512],
                down_block_types: down,
                up_block_types: up,
                attention_head_dim: None,
                downsample_padding: 0,
                ..Default::default()
            };
            let model = with_random_weights(config.init(&device), dtype);
            let x = random([1, 3, 256, 256], dtype);
            boxed(move || model.forward(x.clone(), 500.0))
        }
        _ => bail!("`{name}` is no network"),
    })
}

/// Fills a module that has not drawn its weights yet, and lays them out as loading does.
///
/// One launch a weight, in its final type: a profiler counts these launches too.
fn with_random_weights<M: Module<Backend>>(module: M, dtype: DType) -> M {
    struct Fill(DType);
    impl ModuleMapper<Backend> for Fill {
        fn map_float<const D: usize>(
            &mut self,
            param: Param<Tensor<Backend, D>>,
        ) -> Param<Tensor<Backend, D>> {
            let shape = param.lazy_shape();
            let fan_in: usize = shape.iter().skip(1).product();
            let bound = (fan_in as f64).powf(-0.5);
            let range = Distribution::Uniform(-bound, bound);
            let device = Default::default();
            let value = Tensor::random(shape, range, (&device, self.0));
            Param::initialized(param.id, value)
        }
    }
    arrange_weights(module.map(&mut Fill(dtype)))
}
