//! Orders of multistep solvers.

use super::coefficients::Coefficients;
use crate::SchedulerError;
use crate::config::require_range;

/// The highest order of DPM-Solver and DEIS.
pub(crate) const MAX_DPM_ORDER: usize = 3;

/// An error for an unsupported order.
pub(crate) fn check_order(
    class: &'static str,
    key: &'static str,
    order: usize,
    most: usize,
) -> Result<(), SchedulerError> {
    require_range(class, key, order, 1..=most, &format!("1 to {most}"))
}

/// The reduction of the order of DPM-Solver and DEIS at the end of a run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FinalOrder {
    /// Whether it is reduced in runs of fewer than 15 steps.
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

/// The highest order of the steps of a run; an error if a step has no finite result.
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

/// The reason why the step at an index has no finite result.
pub(crate) fn not_finite(class: &'static str, index: usize, steps: usize) -> SchedulerError {
    SchedulerError::clash(
        class,
        format!("these options and {steps} steps"),
        format!(
            "step {} has no finite result because two neighbouring sigmas are equal, choose fewer \
             steps, a lower order, or another `timestep_spacing`",
            index + 1
        ),
    )
}
