//! The image of the README: twelve prompts with the built-in model, each with seed 0.
//!
//! `cargo run --release -p diffuse-training --bin image-grid -- docs/scenes.png`

use anyhow::Result;
use diffuse_builtin::SCENES;
use diffuse_pipelines::{StableDiffusionOptions, StableDiffusionPipeline};
use diffuse_training::grid::grid;
use diffuse_training::{Backend, default_device};

const PROMPTS: [&str; 12] = [
    "a small red house on snow at night",
    "two trees and a moon over the sea",
    "a blue boat at sea at sunset",
    "a large mountain in a meadow by day",
    "a yellow house on the left and a tree on the right on the sand",
    "a purple boat and the moon at sea at night",
    "a big tree in a meadow at sunset",
    "two blue houses in the snow by day",
    "a mountain over the sea under the stars",
    "the sun and a tree on the sand at dusk",
    "a large purple house in a meadow by day",
    "a red sailboat and a mountain on the water by day",
];

fn main() -> Result<()> {
    let path = std::env::args().nth(1).unwrap_or("scenes.png".into());
    let device = default_device();
    let folder = tempfile::tempdir()?;
    SCENES.unpack(&folder)?;
    let pipeline = StableDiffusionPipeline::<Backend>::from_pretrained(folder.path(), &device)?;
    let mut images = Vec::new();
    for prompt in PROMPTS {
        let options = StableDiffusionOptions {
            num_inference_steps: SCENES.num_inference_steps,
            guidance_scale: SCENES.guidance_scale,
            seeds: vec![0],
            ..StableDiffusionOptions::from(prompt)
        };
        println!("{prompt}");
        images.extend(pipeline.generate(&options)?.images);
    }
    grid(&images, 6).save(&path)?;
    println!("{path}");
    Ok(())
}
