//! What the midpoint methods in `ln σ` share: a schedule with a second call inside each step.

use burn::prelude::*;

use crate::ladder::Ladder;
use crate::levels::Levels;
use crate::sigmas::LogSigmas;
use crate::tensor::combine;

/// The level halfway between two in `ln σ`, counted from the second in f32: if the first is 0, it is 0.
pub(crate) fn between_logs(a: f32, b: f32) -> f32 {
    let (a, b) = (a.ln(), b.ln());
    (b - (b - a) * 0.5).exp()
}

/// The run whose steps call the model at a level and then at the one within the step: `mids` has that of each step, the
/// last one's being the level of the result. The level of a step's end stands twice, as in the reference.
pub(crate) fn interleave(levels: &Levels, mids: &[f32], logs: &LogSigmas) -> Ladder {
    let steps = levels.timesteps.len();
    let mut timesteps = vec![levels.timesteps[0]];
    for (&mid, &timestep) in mids.iter().zip(&levels.timesteps[1..]) {
        timesteps.extend([logs.timestep_all_f32(mid), timestep]);
    }
    let sigmas = levels.sigmas_down_to(0.0);
    let twice = sigmas[1..].iter().flat_map(|&sigma| [sigma, sigma]);
    let twice = [sigmas[0]].into_iter().chain(twice).chain([sigmas[steps]]);
    let seen = sigmas
        .iter()
        .zip(mids)
        .flat_map(|(&sigma, &mid)| [sigma, mid]);
    Ladder::new(timesteps, twice.collect()).with_seen(seen.collect())
}

/// `start + dt d`, with the derivative `d = (x - x0) / σ`; all tensors are `[batch, channels, height, width]`.
pub(crate) fn along<B: Backend>(
    start: Tensor<B, 4>,
    dt: f32,
    x: Tensor<B, 4>,
    original: Tensor<B, 4>,
    sigma: f32,
) -> Tensor<B, 4> {
    let share = dt / sigma;
    combine([(1.0, start), (share, x), (-share, original)])
}
