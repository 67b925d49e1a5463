//! Options of flow-matching models, which are not supported; files may have their defaults.

use crate::SchedulerError;
use crate::config::{options, require};

options! {
    /// Sigmas of flow-matching models.
    pub struct FlowOptions {
        /// Must be `false`: flow-matching models are not supported.
        pub use_flow_sigmas: bool = false,
        /// An option of flow-matching models, without effect.
        pub flow_shift: f64 = 1.0,
    }
}

impl FlowOptions {
    pub(crate) fn refuse(&self, class: &'static str) -> Result<(), SchedulerError> {
        require(class, "use_flow_sigmas", &self.use_flow_sigmas, &[false])
    }
}

options! {
    /// Timestep shifts of flow-matching models.
    pub struct ShiftOptions {
        /// Must be `false`: flow-matching models are not supported.
        pub use_dynamic_shifting: bool = false,
        /// An option of flow-matching models, without effect.
        pub time_shift_type: String = "exponential".to_string(),
    }
}

impl ShiftOptions {
    pub(crate) fn refuse(&self, class: &'static str) -> Result<(), SchedulerError> {
        require(
            class,
            "use_dynamic_shifting",
            &self.use_dynamic_shifting,
            &[false],
        )
    }
}
