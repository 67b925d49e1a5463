//! A sheet of the scenes that the models are trained on, and their captions.
//!
//! `cargo run --release -p diffuse-training --bin scene-sheet`

use anyhow::Result;
use diffuse_training::grid::grid;
use diffuse_training::scenes::{
    Scene,
    caption::{Detail, caption},
    checker,
    render::render,
};
use rand::SeedableRng;
use rand::rngs::StdRng;

fn main() -> Result<()> {
    let mut rng = StdRng::seed_from_u64(0);
    let mut images = Vec::new();
    for _ in 0..24 {
        let scene = Scene::random(&mut rng);
        let image = render(&scene, 128, &mut rng);
        let verdict = checker::check(&image, &scene.combination());
        let note = if verdict.is_right() {
            ""
        } else {
            " (the checker reads it wrong)"
        };
        println!("{}{note}", caption(&scene, Detail::Casual, &mut rng));
        images.push(image);
    }
    grid(&images, 6).save("scenes.png")?;
    println!("scenes.png");
    Ok(())
}
