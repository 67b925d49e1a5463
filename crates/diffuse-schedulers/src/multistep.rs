//! What multistep solvers share besides their formulas.

use burn::prelude::*;

use crate::weights::Weights;
use crate::{SchedulerError, VarianceType};

/// The highest order of DPM-Solver and DEIS.
pub(crate) const MAX_DPM_ORDER: usize = 3;

/// Refuses an order that there is no formula for.
pub(crate) fn check_order(
    class: &'static str,
    key: &'static str,
    order: usize,
    most: usize,
) -> Result<(), SchedulerError> {
    match (1..=most).contains(&order) {
        true => Ok(()),
        false => Err(SchedulerError::Value {
            class,
            key,
            value: order.to_string(),
            expected: format!("expected 1 to {most}"),
        }),
    }
}

/// How the order goes down towards the end of a run of DPM-Solver or DEIS.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LastSteps {
    /// Whether it does in short runs, of less than 15 steps.
    pub lower_order_final: bool,
    /// Whether the last step has order 1 in every run.
    pub always_euler: bool,
}

impl LastSteps {
    /// The highest order of the step at a rung.
    pub fn most(self, rung: usize, steps: usize) -> usize {
        let lower = self.lower_order_final && steps < 15;
        match steps - rung {
            1 if lower || self.always_euler => 1,
            2 if lower => 2,
            _ => MAX_DPM_ORDER,
        }
    }
}

/// Refuses a run in which a step has no finite result; else gives the highest order of its steps.
pub(crate) fn check_steps(
    class: &'static str,
    steps: usize,
    weights: impl Fn(usize) -> Weights,
) -> Result<usize, SchedulerError> {
    let mut highest = 0;
    for rung in 0..steps {
        let weights = weights(rung);
        if !weights.all_finite() {
            return Err(explain(class, rung, steps));
        }
        highest = highest.max(weights.outputs.len());
    }
    Ok(highest)
}

/// Why the step at a rung has no finite result.
pub(crate) fn explain(class: &'static str, rung: usize, steps: usize) -> SchedulerError {
    SchedulerError::Clash {
        class,
        keys: format!("these options and {steps} steps"),
        advice: format!(
            "step {} has no finite result because two neighbouring noise levels are equal, choose fewer steps, a lower \
             order, or another `timestep_spacing`",
            rung + 1
        ),
    }
}

/// The model's output `[batch, channels, height, width]` without the variance that some models predict along.
///
/// # Panics
/// If the output has neither the sample's channels nor, with a learned variance, twice as many.
pub(crate) fn image_channels<B: Backend>(
    model_output: Tensor<B, 4>,
    sample: &Tensor<B, 4>,
    variance_type: Option<VarianceType>,
) -> Tensor<B, 4> {
    let channels = sample.dims()[1];
    let learned = matches!(
        variance_type,
        Some(VarianceType::Learned | VarianceType::LearnedRange)
    );
    let expected = if learned { 2 * channels } else { channels };
    assert_eq!(
        model_output.dims()[1],
        expected,
        "channels of the model output for `{variance_type:?}`"
    );
    match learned {
        true => model_output.narrow(1, 0, channels),
        false => model_output,
    }
}
