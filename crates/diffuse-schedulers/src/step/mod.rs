//! The parts of a step.

pub(crate) mod adams;
pub(crate) mod alpha_sigma;
pub(crate) mod ancestral;
pub(crate) mod clipping;
pub(crate) mod coefficients;
pub(crate) mod multistep;
pub(crate) mod phi;
pub(crate) mod prediction;
pub(crate) mod process;
pub(crate) mod tensor;
