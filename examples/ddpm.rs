//! A picture from a DDPM in four lines.
//!
//! `cargo run --release -p diffuse-examples --example ddpm -- FOLDER`, where FOLDER is a checkpoint such as
//! `google/ddpm-cat-256`; without one, a tiny checkpoint of the tests is used.

use anyhow::Result;
use burn_flex::Flex;
use diffuse_pipelines::{DDPMOptions, DDPMPipeline};

fn main() -> Result<()> {
    let model = std::env::args().nth(1).unwrap_or_else(tiny_model);
    let mut pipeline = DDPMPipeline::<Flex>::from_pretrained(model, &Default::default())?;
    let options = DDPMOptions {
        num_inference_steps: 25,
        seeds: vec![0],
        ..Default::default()
    };
    pipeline.generate(&options)?.images[0].save("ddpm.png")?;
    println!("ddpm.png");
    Ok(())
}

fn tiny_model() -> String {
    concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../crates/diffuse-pipelines/tests/reference/ddpm/cat"
    )
    .into()
}
