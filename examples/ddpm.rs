//! An image from a DDPM in four lines.
//!
//! `cargo run --release -p diffuse-examples --example ddpm -- FOLDER`, where FOLDER is a checkpoint
//! such as `google/ddpm-cat-256`; without one, a tiny checkpoint of the tests is used.

use anyhow::Result;
use diffuse_examples::{Backend, default_device, tiny_model};
use diffuse_pipelines::{DDPMOptions, DDPMPipeline};

fn main() -> Result<()> {
    let model = std::env::args()
        .nth(1)
        .unwrap_or_else(|| tiny_model("ddpm/cat"));
    let pipeline = DDPMPipeline::<Backend>::from_pretrained(model, &default_device())?;
    let options = DDPMOptions {
        num_inference_steps: 25,
        seeds: vec![0],
        ..Default::default()
    };
    pipeline.generate(&options)?.images[0].save("ddpm.png")?;
    println!("ddpm.png");
    Ok(())
}
