//! What multistep solvers share besides their formulas.

use burn::prelude::*;

use super::coefficients::Coefficients;
use crate::config::require_range;
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
    require_range(class, key, order, 1..=most, &format!("1 to {most}"))
}

/// How the order of DPM-Solver and DEIS falls towards the end of a run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FinalOrder {
    /// Whether it falls in short runs, of less than 15 steps.
    pub lower_order_final: bool,
    /// Whether the last step has order 1 in every run.
    pub euler_at_final: bool,
}

impl FinalOrder {
    /// The highest order of the step at an index.
    pub fn limit(self, index: usize, steps: usize) -> usize {
        let lower = self.lower_order_final && steps < 15;
        match steps - index {
            1 if lower || self.euler_at_final => 1,
            2 if lower => 2,
            _ => MAX_DPM_ORDER,
        }
    }
}

/// Refuses a run in which a step has no finite result; else gives the highest order of its steps.
pub(crate) fn check_steps(
    class: &'static str,
    steps: usize,
    coefficients: impl Fn(usize) -> Coefficients,
) -> Result<usize, SchedulerError> {
    let mut highest = 0;
    for index in 0..steps {
        let coefficients = coefficients(index);
        if !coefficients.all_finite() {
            return Err(not_finite(class, index, steps));
        }
        highest = highest.max(coefficients.outputs.len());
    }
    Ok(highest)
}

/// Why the step at an index has no finite result.
pub(crate) fn not_finite(class: &'static str, index: usize, steps: usize) -> SchedulerError {
    SchedulerError::Clash {
        class,
        keys: format!("these options and {steps} steps"),
        advice: format!(
            "step {} has no finite result because two neighbouring sigmas are equal, choose fewer \
             steps, a lower order, or another `timestep_spacing`",
            index + 1
        ),
    }
}

/// The model output `[batch, channels, height, width]` without the variance that some models
/// predict as well.
///
/// # Panics
/// If the output has neither the sample's channels nor, with a learned variance, twice as many.
pub(crate) fn without_variance<B: Backend>(
    model_output: Tensor<B, 4>,
    sample: &Tensor<B, 4>,
    variance_type: Option<VarianceType>,
) -> Tensor<B, 4> {
    let channels = sample.dims()[1];
    let learned = variance_type.is_some_and(VarianceType::is_learned);
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
