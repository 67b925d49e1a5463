//! The training loop for any backend with gradients: steps, averaged weights, checkpoints, a log.
//!
//! The random numbers of a step depend only on the seed and the step, so a run that continues from
//! its checkpoint sees the same data as an uninterrupted one.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use burn::grad_clipping::GradientClippingConfig;
use burn::module::{AutodiffModule, Param};
use burn::optim::{AdamWConfig, GradientsParams, Optimizer};
use burn::tensor::Tensor;
use burn::tensor::backend::{AutodiffBackend, Backend};
use clap::Args;
use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::ema;

/// The options of every training program.
#[derive(Debug, Clone, Args)]
pub struct Settings {
    /// Folder for checkpoint, log and sample images; a run continues from the checkpoint in it
    #[arg(long, default_value = "training")]
    pub folder: PathBuf,
    /// Number of steps; the learning rate follows a cosine to zero at the last one
    #[arg(long)]
    pub steps: usize,
    /// Batch size
    #[arg(long)]
    pub batch: usize,
    /// Learning rate after the warm-up
    #[arg(long, default_value_t = 1e-3)]
    pub learning_rate: f64,
    /// Seed of the random numbers
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Steps between sample images
    #[arg(long, default_value_t = 500)]
    pub sample_every: usize,
    /// Steps between checkpoints
    #[arg(long, default_value_t = 250)]
    pub save_every: usize,
}

impl Settings {
    /// Warm-up steps of the learning rate.
    const WARM_UP: usize = 200;

    /// The learning rate of a step.
    fn learning_rate(&self, step: usize) -> f64 {
        let warm_up = ((step + 1) as f64 / Self::WARM_UP as f64).min(1.0);
        let progress = step as f64 / self.steps as f64;
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
        self.learning_rate * warm_up * cosine
    }

    /// The seed of a step's random numbers.
    pub fn step_seed(&self, step: usize) -> u64 {
        // Far apart, so that the steps of different seeds have different seeds.
        (self.seed << 32) + step as u64
    }
}

/// A loss, and its parts by name for the log.
pub type Loss<B> = (Tensor<B, 1>, Vec<(&'static str, Tensor<B, 1>)>);

/// A training task.
pub trait Task<B: AutodiffBackend> {
    /// The trained weights.
    type Model: AutodiffModule<B>;

    /// The loss of a step, and its parts by name for the log.
    fn loss(&self, model: &Self::Model, seed: u64) -> Result<Loss<B>>;

    /// Makes a sample image with averaged weights.
    fn sample(
        &self,
        model: <Self::Model as AutodiffModule<B>>::InnerModule,
    ) -> Result<image::RgbImage>;
}

/// Trains, and returns the averaged weights.
///
/// # Errors
/// If the task fails, or a file of the run's folder cannot be read or written.
pub fn train<B: AutodiffBackend, T: Task<B>>(
    task: &T,
    model: T::Model,
    settings: &Settings,
    device: &B::Device,
) -> Result<<T::Model as AutodiffModule<B>>::InnerModule> {
    let folder = &settings.folder;
    fs::create_dir_all(folder).with_context(|| format!("cannot make `{}`", folder.display()))?;
    let optimizer = AdamWConfig::new()
        .with_beta_2(0.99)
        // burn's default is too large for the small gradients of a text encoder.
        .with_epsilon(1e-8)
        .with_weight_decay(0.01)
        .with_grad_clipping(Some(GradientClippingConfig::Norm(1.0)))
        .init::<B, T::Model>();
    let mut state = Checkpoint::resume(folder, model, optimizer, device)?;
    let mut log = Log::open(folder, state.step)?;

    while state.step < settings.steps {
        let step = state.step;
        let (loss, parts) = task.loss(&state.model, settings.step_seed(step))?;
        log.add(&loss, &parts);
        let gradients = GradientsParams::from_grads(loss.backward(), &state.model);
        let rate = settings.learning_rate(step);
        state.model = state.optimizer.step(rate, state.model, gradients);
        // Averages few steps at the beginning, and about a thousand later.
        let decay = ((step + 1) as f64 / (step + 10) as f64).min(0.999);
        state.average = ema::update::<B, _>(state.average, &state.model, decay);
        state.step += 1;

        if state.step.is_multiple_of(50) {
            log.write(state.step, rate)?;
        }
        if state.step.is_multiple_of(settings.sample_every) || state.step == settings.steps {
            let path = folder.join(format!("sample-{:06}.png", state.step));
            task.sample(state.average.clone())?.save(path)?;
        }
        if state.step.is_multiple_of(settings.save_every) || state.step == settings.steps {
            state.save(folder)?;
        }
    }
    Ok(state.average)
}

/// Initial weights times a factor, as trainable parameters.
pub fn scaled<B: Backend, const D: usize>(
    weight: Param<Tensor<B, D>>,
    factor: f64,
) -> Param<Tensor<B, D>> {
    // The result of a computation is no parameter, and would not be trained.
    weight.map(|weight| (weight * factor).detach().require_grad())
}

/// Writes the configuration files of a pipeline's folder, by name.
pub fn write_configs(folder: &Path, configs: [(&str, Value); 2]) -> Result<()> {
    for (name, config) in configs {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap_or(folder))?;
        fs::write(path, serde_json::to_string_pretty(&config)? + "\n")?;
    }
    Ok(())
}

/// `log.csv`: means of the losses since the last line.
struct Log {
    path: PathBuf,
    since: Instant,
    steps: usize,
    sums: Vec<(&'static str, f64)>,
}

impl Log {
    /// Continues the log of a run after `step` steps; later lines are removed, since these steps
    /// will be repeated.
    fn open(folder: &Path, step: usize) -> Result<Self> {
        let path = folder.join("log.csv");
        if let Ok(text) = fs::read_to_string(&path) {
            let is_before = |line: &&str| {
                let number = line.split(',').next().and_then(|step| step.parse().ok());
                number.is_none_or(|number: usize| number <= step && step > 0)
            };
            let kept: Vec<&str> = text.lines().filter(is_before).collect();
            fs::write(&path, kept.join("\n") + "\n")?;
        }
        Ok(Self {
            path,
            since: Instant::now(),
            steps: 0,
            sums: Vec::new(),
        })
    }

    fn add<B: AutodiffBackend>(
        &mut self,
        loss: &Tensor<B, 1>,
        parts: &[(&'static str, Tensor<B, 1>)],
    ) {
        let mut add = |index: usize, name, value: &Tensor<B, 1>| {
            let value: f64 = value.clone().into_data().iter().next().unwrap_or(f64::NAN);
            match self.sums.get_mut(index) {
                Some((_, sum)) => *sum += value,
                None => self.sums.push((name, value)),
            }
        };
        add(0, "loss", loss);
        for (index, (name, value)) in parts.iter().enumerate() {
            add(index + 1, name, value);
        }
        self.steps += 1;
    }

    fn write(&mut self, step: usize, rate: f64) -> Result<()> {
        let seconds = self.since.elapsed().as_secs_f64() / self.steps as f64;
        let mut file = OpenOptions::new()
            .append(true)
            .create(true)
            .open(&self.path)?;
        if file.metadata()?.len() == 0 {
            let names: Vec<&str> = self.sums.iter().map(|(name, _)| *name).collect();
            writeln!(file, "step,{},learning_rate,seconds", names.join(","))?;
        }
        let means: Vec<String> = self
            .sums
            .iter()
            .map(|(_, sum)| format!("{:.6}", sum / self.steps as f64))
            .collect();
        let line = format!("{step},{},{rate:.6},{seconds:.4}", means.join(","));
        writeln!(file, "{line}")?;
        println!("{line}");
        (self.since, self.steps, self.sums) = (Instant::now(), 0, Vec::new());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::ensure;
    use burn::tensor::{TensorData, Tolerance};
    use burn_flex::Flex;
    use diffuse_pipelines::unet::{
        Pretrained, SampleSize, UNet2DConfig, UNet2DDownBlock, UNet2DModel, UNet2DUpBlock,
    };
    use image::RgbImage;

    type B = burn::backend::Autodiff<Flex>;

    /// The noise in a constant image.
    struct Noise {
        fails_at: Option<u64>,
    }

    impl Task<B> for Noise {
        type Model = UNet2DModel<B>;

        fn loss(&self, model: &UNet2DModel<B>, seed: u64) -> Result<Loss<B>> {
            ensure!(self.fails_at != Some(seed), "as if the machine went down");
            let device = Default::default();
            let shape = [2, 3, 8, 8];
            let waves = (0..3 * 64).map(|i| (i as f32 / 5.0).sin()).collect();
            let image = Tensor::<B, 4>::from_data(TensorData::new(waves, [1, 3, 8, 8]), &device);
            let mut generator = diffuse_pipelines::schedulers::Generator::new(seed);
            let dtype = burn::tensor::DType::F32;
            let noise = TensorData::new(generator.normal(2 * 3 * 64, dtype), shape);
            let noise = Tensor::<B, 4>::from_data(noise, &device);
            let predicted = model.forward(image + noise.clone(), 500.0);
            Ok(((predicted - noise).powi_scalar(2).mean(), vec![]))
        }

        fn sample(&self, _: UNet2DModel<Flex>) -> Result<RgbImage> {
            Ok(RgbImage::new(1, 1))
        }
    }

    fn run(folder: &Path, fails_at: Option<u64>) -> Result<UNet2DModel<Flex>> {
        use {UNet2DDownBlock::*, UNet2DUpBlock::*};
        let config = UNet2DConfig {
            sample_size: Some(SampleSize::Square(8)),
            block_out_channels: vec![8, 16],
            down_block_types: vec![DownBlock2D, AttnDownBlock2D],
            up_block_types: vec![AttnUpBlock2D, UpBlock2D],
            layers_per_block: 1,
            norm_num_groups: 4,
            ..UNet2DConfig::default()
        };
        let device = Default::default();
        // The same initial weights for both runs.
        let start = folder.join("start");
        if !start.exists() {
            UNet2DModel::<B>::from_config(&config, &device).save_pretrained(&start)?;
        }
        let mut model = UNet2DModel::<B>::from_pretrained(&start, &device)?;
        model.conv_out.weight = scaled(model.conv_out.weight, 0.0);
        let settings = Settings {
            folder: folder.join(if fails_at.is_none() {
                "whole"
            } else {
                "stopped"
            }),
            steps: 100,
            batch: 2,
            learning_rate: 1e-2,
            seed: 7,
            sample_every: 100,
            save_every: 40,
        };
        let task = Noise { fails_at };
        match train(&task, model.clone(), &settings, &device) {
            Err(error) if fails_at.is_some() => {
                assert_eq!(error.to_string(), "as if the machine went down");
                train(&Noise { fails_at: None }, model, &settings, &device)
            }
            other => other,
        }
    }

    fn first_weights(model: &UNet2DModel<Flex>) -> TensorData {
        model.conv_in.weight.val().into_data()
    }

    #[test]
    fn the_blocks_learn_and_a_stopped_run_goes_on_as_if_it_had_not_stopped() {
        let folder = tempfile::tempdir().unwrap();
        let whole = run(folder.path(), None).unwrap();
        let stopped = run(folder.path(), Some((7 << 32) + 61)).unwrap();
        let [whole, stopped] = [first_weights(&whole), first_weights(&stopped)];
        whole.assert_approx_eq::<f32>(&stopped, Tolerance::absolute(1e-5));

        let log = fs::read_to_string(folder.path().join("stopped/log.csv")).unwrap();
        let losses: Vec<f64> = log
            .lines()
            .skip(1)
            .map(|line| line.split(',').nth(1).unwrap().parse().unwrap())
            .collect();
        assert_eq!(losses.len(), 2, "{log}");
        // Predicting nothing has an error of 1.
        assert!(losses[1] < 0.7 && losses[1] < losses[0], "{log}");
    }
}
