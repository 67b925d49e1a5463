//! What all denoising loops share: seeds, events and results.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use burn::tensor::{Tensor, backend::Backend};
use diffuse_schedulers::Generator;
use image::RgbImage;
use web_time::SystemTime;

use crate::PipelineError;

/// What a callback sees after each step. It may change the latents, and stops the run with
/// `ControlFlow::Break`: no further step, and no decoding.
#[derive(Debug)]
pub struct StepEvent<'a, B: Backend> {
    /// Index of the step that has just ended, from zero.
    pub step: usize,
    /// Number of steps: model calls of the whole run.
    pub steps: usize,
    /// The step's timestep.
    pub timestep: f64,
    /// The sample after the step, `[batch, channels, height, width]`.
    pub latents: &'a mut Tensor<B, 4>,
    /// What the scheduler takes the result to be at this point, if it says so; shaped as the
    /// latents.
    pub pred_original_sample: Option<&'a Tensor<B, 4>>,
}

/// How long the stages of a run took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StageTimes {
    /// Text to embeddings, and images to latents.
    pub encode: Duration,
    /// Noise to latents: all steps.
    pub denoise: Duration,
    /// Latents to images.
    pub decode: Duration,
}

/// The result of a run.
#[derive(Debug, Clone)]
pub struct Generated<B: Backend> {
    /// The images, prompt by prompt; none if the callback stopped the run.
    pub images: Vec<RgbImage>,
    /// What the last step left, in `f32`: `[batch, channels, height, width]`. Stable Diffusion's
    /// are not yet divided by the autoencoder's scaling factor; DDPM's are the image before it is
    /// clamped to `[-1, 1]`.
    pub latents: Tensor<B, 4>,
    /// The timesteps of the model calls.
    pub timesteps: Vec<f64>,
    /// For each text that was too long, the part that was cut.
    pub truncated: Vec<String>,
    /// Which images the safety checker flagged and made black; none if the pipeline has no safety
    /// checker.
    pub nsfw_content_detected: Option<Vec<bool>>,
    /// Whether the callback stopped the run early.
    pub interrupted: bool,
    /// How long each stage took.
    pub times: StageTimes,
}

/// One generator for the whole batch if there is one seed, else one an image.
pub fn generators(seeds: &[u64]) -> Vec<Generator> {
    seeds.iter().map(|seed| Generator::new(*seed)).collect()
}

/// A seed from the operating system and the time, below 2³², which is what torch's generator takes
/// of a seed. WebAssembly in a browser has only the time.
pub fn random_seed() -> u64 {
    RandomState::new().hash_one(SystemTime::now()) & 0xffff_ffff
}

/// Checks the number of generators before anything is computed.
pub(crate) fn check_generators(count: usize, batch: usize) -> Result<(), PipelineError> {
    if count <= 1 || count == batch {
        return Ok(());
    }
    Err(PipelineError::Options(format!(
        "{count} seeds for an effective batch size of {batch}: give one for the whole batch, or one an image"
    )))
}

/// The most pixels of a run: 1024 images of 512 x 512.
const MAX_PIXELS: usize = 1 << 28;

/// Checks that a batch of images is not absurdly large.
pub(crate) fn check_pixels(batch: usize, [height, width]: [usize; 2]) -> Result<(), PipelineError> {
    let pixels = height
        .checked_mul(width)
        .and_then(|pixels| pixels.checked_mul(batch));
    if pixels.is_some_and(|pixels| pixels <= MAX_PIXELS) {
        return Ok(());
    }
    Err(PipelineError::Options(format!(
        "{batch} images of {width} x {height} are too large a batch: at most {MAX_PIXELS} pixels at once"
    )))
}

/// The seeds of a run: those given, or one at random.
pub(crate) fn seeds_or_random(seeds: &[u64]) -> Vec<u64> {
    if seeds.is_empty() {
        vec![random_seed()]
    } else {
        seeds.to_vec()
    }
}

/// An error if a value is NaN or infinite.
pub(crate) fn check_finite<B: Backend>(
    what: &'static str,
    x: &Tensor<B, 4>,
) -> Result<(), PipelineError> {
    let sum = x.clone().abs().max().into_data();
    let finite = sum.iter::<f64>().all(f64::is_finite);
    // A maximum does not show NaN on every backend, but a sum does.
    let total = x.clone().mean().into_data();
    if finite && total.iter::<f64>().all(f64::is_finite) {
        Ok(())
    } else {
        Err(PipelineError::NotFinite { what })
    }
}
