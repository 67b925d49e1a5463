//! The timesteps of models that were distilled to few steps.
//!
//! Such a model was trained at `original_inference_steps` timesteps, `⌊T / n⌋ i - 1`. A run visits some of them, from the
//! noisiest one down, evenly by place.

use crate::spacing::Spacing;
use crate::{SchedulerError, TimestepRequest};

/// The timesteps of a run.
pub(crate) fn timesteps(
    request: &TimestepRequest,
    spacing: Spacing,
    original_steps: usize,
) -> Result<Vec<f64>, SchedulerError> {
    if let TimestepRequest::Timesteps(timesteps) = request {
        spacing.check_whole_list(timesteps, false)?;
        return Ok(timesteps.clone());
    }
    let steps = request.steps(spacing.class)?;
    if !(1..=original_steps).contains(&steps) {
        let supported = format!("1 to {original_steps} (`original_inference_steps`)");
        return Err(SchedulerError::Steps {
            class: spacing.class,
            steps,
            supported,
        });
    }
    let stride = spacing.num_train_timesteps / original_steps;
    let place = |i: usize| (i as f64 * (original_steps as f64 / steps as f64)) as usize;
    let timestep = |i: usize| (original_steps - place(i)) * stride - 1;
    Ok((0..steps).map(|i| timestep(i) as f64).collect())
}

/// Refuses more original steps than there are training timesteps.
pub(crate) fn check(spacing: Spacing, original_steps: usize) -> Result<(), SchedulerError> {
    match (1..=spacing.num_train_timesteps).contains(&original_steps) {
        true => Ok(()),
        false => Err(SchedulerError::Value {
            class: spacing.class,
            key: "original_inference_steps",
            value: original_steps.to_string(),
            expected: format!(
                "expected 1 to {} (`num_train_timesteps`)",
                spacing.num_train_timesteps
            ),
        }),
    }
}
