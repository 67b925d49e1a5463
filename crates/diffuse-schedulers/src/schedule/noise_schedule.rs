//! The noise schedule: the noise of the forward process at each training timestep.
//!
//! "Denoising Diffusion Probabilistic Models" (<https://arxiv.org/abs/2006.11239>), equation 4:
//! with `α_t = 1 - β_t` and `ᾱ_t = α_0 α_1 … α_t`,
//!
//! ```text
//! x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε
//! ```
//!
//! The tables are f32, with the roundings of torch, because samplers amplify them: `linspace` is
//! computed from both ends with one rounding per point, and the running product is f64 and rounded
//! when it is stored.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::config::{options, require, require_range};
use crate::step::clipping::Clipping;
use crate::{PredictionType, SchedulerError};

/// The shape of `β_t` between `beta_start` and `beta_end` (the key `beta_schedule`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum BetaSchedule {
    /// `β` grows linearly (DDPM).
    Linear,
    /// `√β` grows linearly (latent diffusion, Stable Diffusion).
    ScaledLinear,
    /// `ᾱ` falls as a squared cosine, `β` stays below 0.999
    /// (<https://arxiv.org/abs/2102.09672>, equation 17).
    #[serde(rename = "squaredcos_cap_v2")]
    SquaredcosCapV2,
    /// `β` grows as a sigmoid over `-6..=6` (GeoDiff).
    Sigmoid,
    /// The signal-to-noise ratio follows a Laplace distribution
    /// (<https://arxiv.org/abs/2407.03297>).
    Laplace,
    /// `ᾱ` falls as `exp(-12 t)`.
    Exp,
}

impl BetaSchedule {
    /// The kinds that every sampler supports.
    pub(crate) const COMMON: &[Self] = &[Self::Linear, Self::ScaledLinear, Self::SquaredcosCapV2];
}

options! {
    /// The noise schedule of the forward process.
    pub struct BetaOptions {
        /// The number of timesteps that the model was trained on.
        pub num_train_timesteps: usize = 1000,
        /// `β` of the first training timestep.
        pub beta_start: f64 = 0.0001,
        /// `β` of the last training timestep.
        pub beta_end: f64 = 0.02,
        /// How `β` grows between the two.
        pub beta_schedule: BetaSchedule = BetaSchedule::Linear,
        /// `β` of every training timestep, instead of the three options above.
        pub trained_betas: Option<Vec<f64>> = None,
    }
}

/// A thousand times more training timesteps than any published model; a file with more is broken.
const MAX_TRAIN_TIMESTEPS: usize = 1_000_000;

impl BetaOptions {
    /// The betas of latent diffusion.
    pub(crate) fn latent(beta_schedule: BetaSchedule) -> Self {
        Self {
            beta_start: 0.00085,
            beta_end: 0.012,
            beta_schedule,
            ..Self::default()
        }
    }

    /// The noise schedule of these options, for the kinds that every sampler supports.
    pub(crate) fn noise_schedule(
        &self,
        class: &'static str,
    ) -> Result<NoiseSchedule, SchedulerError> {
        self.noise_schedule_of(class, BetaSchedule::COMMON, false)
    }

    /// The same, with betas rescaled to zero terminal SNR if the option says so
    /// (`rescale_betas_zero_snr`).
    pub(crate) fn rescaled_noise_schedule(
        &self,
        class: &'static str,
        rescale: bool,
    ) -> Result<NoiseSchedule, SchedulerError> {
        self.noise_schedule_of(class, BetaSchedule::COMMON, rescale)
    }

    /// The noise schedule of these options; an error if no sampler can use it.
    pub(crate) fn noise_schedule_of(
        &self,
        class: &'static str,
        supported: &[BetaSchedule],
        rescale: bool,
    ) -> Result<NoiseSchedule, SchedulerError> {
        require(class, "beta_schedule", &self.beta_schedule, supported)?;
        let (count, start, end) = (self.num_train_timesteps, self.beta_start, self.beta_end);
        let counts = 1..=MAX_TRAIN_TIMESTEPS;
        require_range(class, "num_train_timesteps", count, counts, "1 to 1000000")?;
        for (key, beta) in [("beta_start", start), ("beta_end", end)] {
            require_range(class, key, beta, 0.0..=1.0, "a number between 0 and 1")?;
        }
        let mut betas = match &self.trained_betas {
            Some(betas) if betas.len() < count => {
                return Err(SchedulerError::Value {
                    class,
                    key: "trained_betas",
                    value: format!("a list of {}", betas.len()),
                    expected: "expected one entry for each of `num_train_timesteps`".into(),
                });
            }
            Some(betas) => betas.iter().map(|&beta| beta as f32).collect(),
            None => draw(self.beta_schedule, start, end, count),
        };
        if rescale {
            betas = rescale_zero_terminal_snr(&betas);
        }
        let alphas_cumprod = running_product(&betas);
        match fault(&betas, &alphas_cumprod, rescale) {
            None => Ok(NoiseSchedule {
                betas,
                alphas_cumprod,
            }),
            Some(reason) => Err(SchedulerError::NoiseSchedule {
                class,
                betas: self.describe(rescale),
                reason,
            }),
        }
    }

    /// The options that the betas come from, for an error.
    fn describe(&self, rescale: bool) -> String {
        let betas = match &self.trained_betas {
            Some(betas) => format!("`trained_betas`, a list of {}", betas.len()),
            None => {
                let kind = serde_json::to_value(self.beta_schedule).unwrap_or_default();
                format!(
                    "`beta_schedule` `{}`, `beta_start` `{}`, `beta_end` `{}`",
                    kind.as_str().unwrap_or_default(),
                    self.beta_start,
                    self.beta_end
                )
            }
        };
        let rescaled = match rescale {
            true => ", `rescale_betas_zero_snr` `true`",
            false => "",
        };
        let count = self.num_train_timesteps;
        format!("{betas}, `num_train_timesteps` `{count}`{rescaled}")
    }
}

/// `β_t` and `ᾱ_t` for every training timestep `t`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NoiseSchedule {
    betas: Vec<f32>,
    alphas_cumprod: Vec<f32>,
}

impl NoiseSchedule {
    /// `β_t` for each training timestep.
    pub fn betas(&self) -> &[f32] {
        &self.betas
    }

    /// `ᾱ_t` for each training timestep.
    pub fn alphas_cumprod(&self) -> &[f32] {
        &self.alphas_cumprod
    }

    /// `ᾱ_t`, for an integer timestep of the table.
    pub(crate) fn alpha_bar(&self, timestep: f64) -> Result<f32, SchedulerError> {
        let known =
            timestep.fract() == 0.0 && (0.0..self.alphas_cumprod.len() as f64).contains(&timestep);
        match known {
            true => Ok(self.alphas_cumprod[timestep as usize]),
            false => Err(SchedulerError::TimestepRange {
                timestep,
                num_train_timesteps: self.alphas_cumprod.len(),
            }),
        }
    }

    /// `ᾱ_t`, or below the first timestep the final value: 1, or `ᾱ_0`.
    pub(crate) fn alpha_bar_or_end(
        &self,
        timestep: f64,
        end_at_one: bool,
    ) -> Result<f32, SchedulerError> {
        match (timestep < 0.0, end_at_one) {
            (false, _) => self.alpha_bar(timestep),
            (true, true) => Ok(1.0),
            (true, false) => Ok(self.alphas_cumprod[0]),
        }
    }

    /// An error for a timestep with `ᾱ_t = 0` (`rescale_betas_zero_snr`): the sample is pure noise,
    /// and the predicted image infinite unless it is clipped.
    pub(crate) fn check_visited(
        &self,
        class: &'static str,
        timesteps: &[f64],
        prediction_type: PredictionType,
        clipping: Clipping,
    ) -> Result<(), SchedulerError> {
        let divides = prediction_type == PredictionType::Epsilon;
        let clips = matches!(clipping, Clipping::Clip(_));
        for &timestep in timesteps {
            if self.alpha_bar(timestep)? == 0.0 && divides && !clips {
                return Err(SchedulerError::clash(
                    class,
                    "`rescale_betas_zero_snr` and `prediction_type` `epsilon`",
                    format!(
                        "the sample at timestep {timestep} holds no image to recover, choose \
                         `prediction_type` `v_prediction`, or a `timestep_spacing` that does not \
                         visit it (`leading`)"
                    ),
                ));
            }
        }
        Ok(())
    }

    /// The noise-to-signal ratio `σ_t = √((1 - ᾱ_t) / ᾱ_t)` for each training timestep.
    pub(crate) fn sigmas(&self) -> Vec<f32> {
        self.alphas_cumprod
            .iter()
            .map(|alpha_bar| ((1.0 - alpha_bar) / alpha_bar).sqrt())
            .collect()
    }

    /// Replaces a last `ᾱ` of zero by the smallest half-precision number, so that its sigma (4096)
    /// is finite.
    pub(crate) fn with_finite_last_sigma(mut self, rescaled: bool) -> Self {
        if rescaled && let Some(last) = self.alphas_cumprod.last_mut() {
            *last = 2f32.powi(-24);
        }
        self
    }
}

/// The reason why no sampler can use these betas, if any. `ᾱ_t` must stay in the normal range of
/// f32, where `σ_t` and its square are finite; rescaled betas may end at 0.
fn fault(betas: &[f32], alphas_cumprod: &[f32], rescaled: bool) -> Option<String> {
    let last = betas.len() - 1;
    let may_be_one = |t: usize| rescaled && t == last && t > 0;
    let valid = |t: usize| (0.0..1.0).contains(&betas[t]) || betas[t] == 1.0 && may_be_one(t);
    if let Some(t) = (0..=last).find(|&t| !valid(t)) {
        let beta = betas[t];
        return Some(format!("`β` at timestep {t} is {beta}, not in `0..1`"));
    }
    if 1.0 - betas[0] == 1.0 {
        return Some("`β` at timestep 0 adds no noise: it must be greater than 0".into());
    }
    let gone = |t: usize| alphas_cumprod[t] < f32::MIN_POSITIVE && !may_be_one(t);
    (0..=last).find(|&t| gone(t)).map(|t| {
        format!(
            "from timestep {t} of {last} on nothing is left of the image (`ᾱ` underflows), choose \
             smaller betas"
        )
    })
}

/// `β_t` of each kind, for `t` in `0..count`.
fn draw(kind: BetaSchedule, start: f64, end: f64, count: usize) -> Vec<f32> {
    match kind {
        BetaSchedule::Linear => linspace(start, end, count),
        BetaSchedule::ScaledLinear => linspace(start.sqrt(), end.sqrt(), count)
            .into_iter()
            .map(|root| root * root)
            .collect(),
        BetaSchedule::Sigmoid => {
            let (start, range) = (start as f32, (end - start) as f32);
            let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
            linspace(-6.0, 6.0, count)
                .into_iter()
                .map(|x| sigmoid(x) * range + start)
                .collect()
        }
        BetaSchedule::SquaredcosCapV2 => {
            from_alpha_bar(count, |t| ((t + 0.008) / 1.008 * PI / 2.0).cos().powi(2))
        }
        BetaSchedule::Laplace => from_alpha_bar(count, |t| {
            let side = if t <= 0.5 { 1.0 } else { -1.0 };
            let snr = (-0.5 * side * (1.0 - 2.0 * (0.5 - t).abs() + 1e-6).ln()).exp();
            (snr / (1.0 + snr)).sqrt()
        }),
        BetaSchedule::Exp => from_alpha_bar(count, |t| (-12.0 * t).exp()),
    }
}

/// `β_i = 1 - ᾱ((i + 1) / n) / ᾱ(i / n)`, at most 0.999, for a function `ᾱ` of time in `0..=1`.
fn from_alpha_bar(count: usize, alpha_bar: impl Fn(f64) -> f64) -> Vec<f32> {
    let at = |i: usize| alpha_bar(i as f64 / count as f64);
    (0..count)
        .map(|i| (1.0 - at(i + 1) / at(i)).min(0.999) as f32)
        .collect()
}

/// `linspace` in f32: each point from the nearer end with one rounding (a fused multiply-add).
pub(crate) fn linspace(start: f64, end: f64, count: usize) -> Vec<f32> {
    let (start, end) = (start as f32, end as f32);
    let step = if count > 1 {
        (end - start) / (count - 1) as f32
    } else {
        0.0
    };
    let point = |i: usize| match i < count / 2 {
        true => step.mul_add(i as f32, start),
        false => (-step).mul_add((count - 1 - i) as f32, end),
    };
    if count == 1 {
        vec![start]
    } else {
        (0..count).map(point).collect()
    }
}

/// `ᾱ_t`: each `1 - β` is rounded to f32, their product only when it is stored.
fn running_product(betas: &[f32]) -> Vec<f32> {
    let product = |product: &mut f64, beta: &f32| {
        *product *= f64::from(1.0 - beta);
        Some(*product as f32)
    };
    betas.iter().scan(1.0, product).collect()
}

/// Algorithm 1 of "Common Diffusion Noise Schedules and Sample Steps are Flawed"
/// (<https://arxiv.org/abs/2305.08891>): shifts and scales `√ᾱ` so that the last value is 0 and the
/// first one does not change.
fn rescale_zero_terminal_snr(betas: &[f32]) -> Vec<f32> {
    let roots: Vec<f32> = running_product(betas).into_iter().map(f32::sqrt).collect();
    let (first, last) = (roots[0], roots[roots.len() - 1]);
    let scale = first / (first - last);
    let alpha_bars: Vec<f32> = roots
        .into_iter()
        .map(|root| ((root - last) * scale).powi(2))
        .collect();
    let alphas = alpha_bars.windows(2).map(|pair| pair[1] / pair[0]);
    std::iter::once(alpha_bars[0])
        .chain(alphas)
        .map(|alpha| 1.0 - alpha)
        .collect()
}
