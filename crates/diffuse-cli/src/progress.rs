//! A bar with steps a second and time left.

use std::ops::ControlFlow;

use burn::tensor::backend::Backend;
use diffuse_pipelines::StepEvent;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// The bar of a run; hidden where standard error is not a terminal.
pub struct Progress {
    bar: ProgressBar,
}

impl Progress {
    pub fn new(quiet: bool) -> Self {
        let bar = ProgressBar::no_length().with_style(
            ProgressStyle::with_template(
                "{bar:40.cyan} {pos}/{len} steps, {per_sec:>}, {eta} left",
            )
            .expect("the template is valid"),
        );
        if quiet {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        Self { bar }
    }

    /// Takes note of a step.
    pub fn update<B: Backend>(&self, event: &StepEvent<'_, B>) -> ControlFlow<()> {
        if event.step == 0 {
            self.bar.set_length(event.steps as u64);
        }
        self.bar.set_position(event.step as u64 + 1);
        ControlFlow::Continue(())
    }

    /// Removes the bar.
    pub fn finish(self) {
        self.bar.finish_and_clear();
    }
}
