//! Bars with speed and time left.

use std::ops::ControlFlow;

use burn::tensor::backend::Backend;
use diffuse_pipelines::StepEvent;
#[cfg(feature = "hub")]
use diffuse_pipelines::hub::FetchEvent;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// The bar of a run; hidden where standard error is not a terminal.
pub struct Progress {
    bar: ProgressBar,
}

impl Progress {
    pub fn new(quiet: bool) -> Self {
        let bar = ProgressBar::no_length().with_style(
            ProgressStyle::with_template(
                "{msg}{prefix}{bar:40.cyan} {pos}/{len} steps, {per_sec:>}, {eta} left",
            )
            .expect("the template is valid"),
        );
        if quiet {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        Self { bar }
    }

    /// Says which of several images this is.
    pub fn image(self, image: usize, images: usize) -> Self {
        self.bar.set_prefix(format!("image {image} of {images} "));
        self
    }

    /// Takes note of a step.
    pub fn update<B: Backend>(&self, event: &StepEvent<'_, B>) -> ControlFlow<()> {
        if event.step == 0 {
            self.bar.set_length(event.steps as u64);
        }
        self.bar.set_position(event.step as u64 + 1);
        ControlFlow::Continue(())
    }

    /// Shows lines above the bar.
    pub fn show(&self, lines: &str) {
        self.bar.set_message(lines.to_string());
    }

    /// Removes the bar.
    pub fn finish(self) {
        self.bar.finish_and_clear();
    }
}

/// The bar of a download; hidden where standard error is not a terminal.
#[cfg(feature = "hub")]
pub struct DownloadProgress {
    bar: ProgressBar,
    file: String,
}

#[cfg(feature = "hub")]
impl DownloadProgress {
    pub fn new(quiet: bool) -> Self {
        let bar = ProgressBar::no_length().with_style(
            ProgressStyle::with_template(
                "{bar:30.cyan} {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left  {msg}",
            )
            .expect("the template is valid"),
        );
        if quiet {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        Self {
            bar,
            file: String::new(),
        }
    }

    /// Takes note of what has arrived.
    pub fn update(&mut self, event: &FetchEvent<'_>) -> ControlFlow<()> {
        self.bar.set_length(event.size);
        self.bar.set_position(event.done);
        if event.file != self.file {
            self.file = event.file.to_string();
            self.bar.set_message(self.file.clone());
            // A part may have been here before: that tells nothing about the speed.
            self.bar.reset_eta();
        }
        ControlFlow::Continue(())
    }

    /// Removes the bar.
    pub fn finish(self) {
        self.bar.finish_and_clear();
    }
}
