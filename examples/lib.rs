//! What the training examples share: the scenes they learn from, and the training itself.

// Names such as `Sky::Night` say what they are.
#![allow(missing_docs)]

pub mod scenes;
pub mod training;
