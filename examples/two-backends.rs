//! One function on two backends makes the same image.
//!
//! `cargo run --release -p diffuse-examples --example two-backends`; with `--features wgpu` or
//! `--features cuda`, the GPU is the second backend.

use anyhow::Result;
use burn::tensor::backend::Backend;
use burn_flex::Flex;
use diffuse_examples::{default_device, tiny_model};
use diffuse_pipelines::{StableDiffusionOptions, StableDiffusionPipeline};
use image::RgbImage;

#[cfg(any(feature = "wgpu", feature = "cuda"))]
type Second = diffuse_examples::Backend;
#[cfg(not(any(feature = "wgpu", feature = "cuda")))]
type Second = burn_ndarray::NdArray;

/// Generic over the backend.
fn image<B: Backend>(model: &str, device: &B::Device) -> Result<RgbImage> {
    let pipeline = StableDiffusionPipeline::<B>::from_pretrained(model, device)?;
    let options = StableDiffusionOptions {
        num_inference_steps: 10,
        seeds: vec![0],
        ..StableDiffusionOptions::from("two boats on a lake at sunset")
    };
    Ok(pipeline.generate(&options)?.images.remove(0))
}

fn main() -> Result<()> {
    let model = std::env::args()
        .nth(1)
        .unwrap_or_else(|| tiny_model("sd/base"));
    let first = image::<Flex>(&model, &default_device())?;
    let second = image::<Second>(&model, &default_device())?;
    let differences = first.as_raw().iter().zip(second.as_raw());
    let largest = differences
        .map(|(first, second)| first.abs_diff(*second))
        .max();
    first.save("first.png")?;
    second.save("second.png")?;
    println!(
        "first.png ({}) and second.png ({}) differ by at most {} of 255",
        Flex::name(&Default::default()),
        Second::name(&Default::default()),
        largest.unwrap_or(0)
    );
    Ok(())
}
