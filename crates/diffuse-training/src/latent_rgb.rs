//! The linear map from the built-in model's latents to colors, `latent_rgb` of `SCENES`: it is
//! fitted again to rendered scenes, and compared.

use crate::grid::to_tensor;
use crate::scenes::{Scene, render::render};
use burn_flex::Flex;
use diffuse_builtin::SCENES;
use diffuse_pipelines::vae::{AutoencoderKL, Pretrained};
use rand::SeedableRng;
use rand::rngs::StdRng;

const SCENE_COUNT: usize = 64;
const SIZE: u32 = 128;
/// Coefficients of a color: four latent channels and a constant.
const COEFFICIENTS: usize = 5;

/// Latents of scenes, which are not divided by the scaling factor, and the mean colors of the same
/// 8 x 8 pixels in `[-1, 1]`.
fn samples() -> Vec<([f64; COEFFICIENTS], [f64; 3])> {
    let folder = tempfile::tempdir().unwrap();
    SCENES.unpack(folder.path()).unwrap();
    let device = Default::default();
    let vae = AutoencoderKL::<Flex>::from_pretrained(folder.path().join("vae"), &device).unwrap();
    let mut rng = StdRng::seed_from_u64(0);
    let mut samples = Vec::new();
    for _ in 0..SCENE_COUNT {
        let scene = Scene::for_training(&mut rng);
        let image = render(&scene, SIZE, &mut rng);
        let latents = vae
            .encode(to_tensor(std::slice::from_ref(&image), &device))
            .mode();
        let latents = latents * vae.config().scaling_factor;
        let latents: Vec<f64> = latents.into_data().iter().collect();
        let side = SIZE / 8;
        let plane = (side * side) as usize;
        for y in 0..side {
            for x in 0..side {
                let position = (y * side + x) as usize;
                let mut row = [1.0; COEFFICIENTS];
                for (channel, value) in row[..4].iter_mut().enumerate() {
                    *value = latents[channel * plane + position];
                }
                let mut colors = [-1.0; 3];
                for (dx, dy) in (0..64).map(|i| (i % 8, i / 8)) {
                    let pixel = image.get_pixel(8 * x + dx, 8 * y + dy);
                    for (color, level) in colors.iter_mut().zip(pixel.0) {
                        *color += f64::from(level) / 127.5 / 64.0;
                    }
                }
                samples.push((row, colors));
            }
        }
    }
    samples
}

/// Least squares by the normal equations, solved by Gauss-Jordan elimination: the matrix is
/// positive definite, so no row is exchanged.
fn fit(samples: &[([f64; COEFFICIENTS], [f64; 3])]) -> [[f64; 3]; COEFFICIENTS] {
    let mut rows = [[0.0; COEFFICIENTS + 3]; COEFFICIENTS];
    for (x, y) in samples {
        for (row, a) in rows.iter_mut().zip(x) {
            for (sum, b) in row.iter_mut().zip(x.iter().chain(y)) {
                *sum += a * b;
            }
        }
    }
    for pivot in 0..COEFFICIENTS {
        let scale = rows[pivot][pivot];
        rows[pivot] = rows[pivot].map(|value| value / scale);
        let own = rows[pivot];
        for (index, row) in rows.iter_mut().enumerate() {
            if index != pivot {
                let factor = row[pivot];
                for (value, own) in row.iter_mut().zip(own) {
                    *value -= factor * own;
                }
            }
        }
    }
    rows.map(|row| [0, 1, 2].map(|color| row[COEFFICIENTS + color]))
}

#[test]
fn the_builtin_models_map_is_the_least_squares_fit() {
    let samples = samples();
    let fitted = fit(&samples);
    let recorded = SCENES.latent_rgb.unwrap();
    let pairs = fitted.iter().flatten().zip(recorded.iter().flatten());
    for (fitted_value, recorded) in pairs {
        let difference = (fitted_value - f64::from(*recorded)).abs();
        assert!(difference < 1e-3, "the fit is {fitted:.4?}");
    }
    // How much of the colors' variance the map explains: skies and grounds, but hardly the colors
    // of small things, which are not linear in these latents.
    let mean = |color: usize| {
        let sum: f64 = samples.iter().map(|(_, y)| y[color]).sum();
        sum / samples.len() as f64
    };
    let means = [0, 1, 2].map(mean);
    let (mut error, mut variance) = (0.0, 0.0);
    for (x, y) in &samples {
        for color in 0..3 {
            let terms = x.iter().zip(&fitted).map(|(x, row)| x * row[color]);
            error += (terms.sum::<f64>() - y[color]).powi(2);
            variance += (y[color] - means[color]).powi(2);
        }
    }
    let explained = 1.0 - error / variance;
    println!("{:.1} % of the variance is explained", 100.0 * explained);
    assert!(explained > 0.65, "{explained}");
}
