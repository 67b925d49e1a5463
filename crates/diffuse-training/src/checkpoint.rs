//! The state of a run: weights, averaged weights, the optimizer's state, and the number of steps.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use burn::module::{AutodiffModule, Module};
use burn::optim::Optimizer;
use burn::record::{BinFileRecorder, FullPrecisionSettings, Recorder};
use burn::tensor::backend::AutodiffBackend;

type File = BinFileRecorder<FullPrecisionSettings>;

/// A run in progress.
pub struct Checkpoint<B: AutodiffBackend, M: AutodiffModule<B>, O> {
    pub step: usize,
    pub model: M,
    pub average: M::InnerModule,
    pub optimizer: O,
}

impl<B: AutodiffBackend, M: AutodiffModule<B>, O: Optimizer<M, B>> Checkpoint<B, M, O> {
    /// Reads the checkpoint in a run's folder; without one, the run starts from these weights.
    pub fn resume(folder: &Path, model: M, optimizer: O, device: &B::Device) -> Result<Self> {
        let folder = folder.join("checkpoint");
        let Ok(step) = fs::read_to_string(folder.join("step")) else {
            return Ok(Self {
                step: 0,
                average: model.valid(),
                model,
                optimizer,
            });
        };
        let file = File::new();
        let average = file.load(folder.join("average"), device)?;
        let weights = file.load(folder.join("model"), device)?;
        let state = file.load(folder.join("optimizer"), device)?;
        Ok(Self {
            step: step.trim().parse().context("a checkpoint's step")?,
            average: model.valid().load_record(average),
            model: model.load_record(weights),
            optimizer: optimizer.load_record(state),
        })
    }

    /// Writes the checkpoint; the earlier one stays until the new one is complete.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let (new, current) = (folder.join("checkpoint-new"), folder.join("checkpoint"));
        let _ = fs::remove_dir_all(&new);
        fs::create_dir_all(&new)?;
        let file = File::new();
        file.record(self.average.clone().into_record(), new.join("average"))?;
        file.record(self.model.clone().into_record(), new.join("model"))?;
        file.record(self.optimizer.to_record(), new.join("optimizer"))?;
        fs::write(new.join("step"), self.step.to_string())?;
        let _ = fs::remove_dir_all(&current);
        fs::rename(new, current).context("cannot put the checkpoint in its place")
    }
}
