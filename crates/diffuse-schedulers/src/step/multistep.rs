//! What multistep solvers share besides their formulas.

use super::coefficients::Coefficients;
use crate::SchedulerError;
use crate::config::require_range;

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
