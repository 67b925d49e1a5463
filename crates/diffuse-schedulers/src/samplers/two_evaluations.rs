//! The parts that samplers with two model evaluations per step share.

use super::prelude::*;
use crate::schedule::sigmas::LogSigmas;

/// The entries, with each of the first `steps` but the first one twice.
pub(super) fn doubled<T: Copy>(entries: &[T], steps: usize) -> Vec<T> {
    let count = |index| if (1..steps).contains(&index) { 2 } else { 1 };
    entries
        .iter()
        .enumerate()
        .flat_map(|(index, &entry)| std::iter::repeat_n(entry, count(index)))
        .collect()
}

/// The sigma halfway between two in `ln σ`, counted from the second in f32: 0 if the first is 0.
pub(super) fn halfway(a: f32, b: f32) -> f32 {
    let (a, b) = (a.ln(), b.ln());
    (b - (b - a) * 0.5).exp()
}

/// The sigmas of DPM2, and the logarithms of the table. Diffusers' quirk: the timesteps of Karras's
/// schedule are rounded, the others are not.
pub(super) fn dpm2_grid(
    class: &'static str,
    timesteps: Vec<f64>,
    sigmas: &SigmaOptions,
    noise_schedule: &NoiseSchedule,
) -> Result<(SigmaGrid, LogSigmas), SchedulerError> {
    let (table, schedule) = (noise_schedule.sigmas(), sigmas.sigma_schedule(class)?);
    let grid = SigmaGrid::at(timesteps, &table).respaced(schedule, &table);
    let grid = match schedule {
        Some(SigmaSchedule::Karras) => grid.map_timesteps(f64::round_ties_even),
        _ => grid,
    };
    Ok((grid, LogSigmas::new(&table)))
}

/// The schedule of DPM2, whose steps evaluate the model at a sigma and then at `σ_mid`. `mids` has
/// the `σ_mid` of each step; the last one is the sigma of the result. The final sigma of a step
/// occurs twice, as in Diffusers.
pub(super) fn interleaved(grid: &SigmaGrid, mids: &[f32], logs: &LogSigmas) -> Schedule {
    let steps = grid.timesteps.len();
    let mut timesteps = vec![grid.timesteps[0]];
    for (&mid, &timestep) in mids.iter().zip(&grid.timesteps[1..]) {
        timesteps.extend([logs.timestep_all_f32(mid), timestep]);
    }
    let sigmas = grid.sigmas_to(0.0);
    let twice = sigmas[1..].iter().flat_map(|&sigma| [sigma, sigma]);
    let twice = [sigmas[0]].into_iter().chain(twice).chain([sigmas[steps]]);
    let evaluated = sigmas
        .iter()
        .zip(mids)
        .flat_map(|(&sigma, &mid)| [sigma, mid]);
    Schedule {
        steps,
        model_sigmas: Some(evaluated.collect()),
        ..Schedule::new(timesteps, twice.collect())
    }
}

/// `start + dt d`, with the derivative `d = (x - x0) / σ`; tensors are
/// `[batch, channels, height, width]`.
pub(super) fn along<B: Backend>(
    start: Tensor<B, 4>,
    dt: f32,
    x: Tensor<B, 4>,
    original: Tensor<B, 4>,
    sigma: f32,
) -> Tensor<B, 4> {
    let share = dt / sigma;
    combine([(1.0, start), (share, x), (-share, original)])
}
