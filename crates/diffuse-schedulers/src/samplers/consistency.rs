//! The timesteps of consistency models.
//!
//! Such a model was distilled at `original_inference_steps` timesteps, `⌊T / n⌋ i - 1`. A run uses
//! some of them, from the noisiest one down, evenly by index.

use super::prelude::*;
use crate::config::require_range;
use crate::schedule::spacing::check_whole_timesteps;

/// The timesteps of a run.
pub(super) fn timesteps(
    class: &'static str,
    request: &TimestepRequest,
    num_train_timesteps: usize,
    original_steps: usize,
) -> Result<Vec<f64>, SchedulerError> {
    if let TimestepRequest::Timesteps(timesteps) = request {
        check_whole_timesteps(class, timesteps, num_train_timesteps, false)?;
        return Ok(timesteps.clone());
    }
    let steps = request.steps(class)?;
    if !(1..=original_steps).contains(&steps) {
        return Err(SchedulerError::Steps {
            class,
            steps,
            supported: format!("1 to {original_steps} (`original_inference_steps`)"),
        });
    }
    let stride = num_train_timesteps / original_steps;
    let index = |i: usize| (i as f64 * (original_steps as f64 / steps as f64)) as usize;
    let timestep = |i: usize| (original_steps - index(i)) * stride - 1;
    Ok((0..steps).map(|i| timestep(i) as f64).collect())
}

/// An error for more original steps than training timesteps.
pub(super) fn check(
    class: &'static str,
    num_train_timesteps: usize,
    original_steps: usize,
) -> Result<(), SchedulerError> {
    let (range, most) = (1..=num_train_timesteps, num_train_timesteps);
    let expected = format!("1 to {most} (`num_train_timesteps`)");
    require_range(
        class,
        "original_inference_steps",
        original_steps,
        range,
        &expected,
    )
}
