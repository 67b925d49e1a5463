//! UniPC: a unified predictor and corrector.
//!
//! "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models"
//! (<https://arxiv.org/abs/2302.04867>), algorithms 5 to 8. Time is `λ = ln(α / σ)`; a step goes from `s` to `t` with
//! `h = λ_t - λ_s`. `m_i` are the model's images at earlier points, `r_i = (λ_i - λ_s) / h`, and `m_t` that at `t`:
//!
//! ```text
//! x_t = (σ_t / σ_s) x_s - α_t (e^-h - 1) m_s - α_t B(h) [ Σ ρ_i (m_i - m_s) / r_i  +  ρ_t (m_t - m_s) ]
//! ```
//!
//! The predictor (UniP) leaves out `m_t`. When the model has seen its result, the corrector (UniC) takes the same step
//! again, now with `m_t`, before the next one. `B(h)` is `-h` (bh1) or `e^-h - 1` (bh2); the `ρ` solve the equations
//! (order conditions) `Σ ρ_i r_i^(k-1) = k! φ_k / B(h)`. When noise is predicted instead of the image, `α` and `σ`
//! change places and `h` its sign.

use burn::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::config::{ClassConfig, Overrides, Resolved, require, scheduler_config};
use crate::ladder::Ladder;
use crate::mixture::{self, Mixture};
use crate::prediction::{Bound, Prediction};
use crate::sigmas::{LogSigmas, SigmaCurve, SigmaRange, sigma_at};
use crate::tensor::combine;
use crate::{
    BetaSchedule, Capabilities, FinalSigmasType, NoiseSchedule, Scheduler, SchedulerConfig,
    SchedulerError, Step, StepOutput, TimestepRequest, scheduler_from_config,
};

/// The function `B(h)` (the key `solver_type`); the other multistep solvers' types are read as `bh2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UniPCSolverType {
    /// `h`
    Bh1,
    /// `e^h - 1`
    #[serde(alias = "midpoint", alias = "heun", alias = "logrho")]
    Bh2,
}

scheduler_config! {
    /// Options of [`UniPCMultistepScheduler`].
    pub struct UniPCMultistepConfig for "UniPCMultistepScheduler" [
        noise(0.0001, 0.02, Linear), thresholding, sigmas, flow, spacing(Linspace), zero_snr
    ] {
        /// The order of the predictor; the corrector's is one higher.
        pub solver_order: usize = 2,
        /// Whether the solver works on predicted images, instead of predicted noise.
        pub predict_x0: bool = true,
        /// The function `B(h)`.
        pub solver_type: UniPCSolverType = UniPCSolverType::Bh2,
        /// Whether the order goes down towards the end.
        pub lower_order_final: bool = true,
        /// The steps whose result is not corrected.
        pub disable_corrector: Vec<usize> = Vec::new(),
        /// The configuration of another sampler that predicts instead of UniP; UniC still corrects.
        pub solver_p: Option<Map<String, Value>> = None,
        /// The noise level that a run ends at.
        pub final_sigmas_type: FinalSigmasType = FinalSigmasType::Zero,
        /// The smallest level of a sigma curve, instead of the schedule's.
        pub sigma_min: Option<f64> = None,
        /// The largest level of a sigma curve, instead of the schedule's.
        pub sigma_max: Option<f64> = None,
        /// Must be null: flow-matching models are not supported.
        pub shift_terminal: Option<f64> = None,
    }
}

/// A multistep solver that corrects each step once the next model call shows where it led.
#[derive(Debug)]
pub struct UniPCMultistepScheduler<B: Backend> {
    resolved: Resolved<UniPCMultistepConfig>,
    noise_schedule: NoiseSchedule,
    bound: Bound,
    solver_p: Option<Box<dyn Scheduler<B>>>,
    ladder: Ladder,
    /// The latest images or noises from the model, newest first: at most `solver_order`.
    outputs: Vec<Tensor<B, 4>>,
    /// The sample that the latest step started from, and the order of that step.
    latest: Option<(Tensor<B, 4>, usize)>,
}

impl<B: Backend> UniPCMultistepScheduler<B> {
    pub(crate) fn build(resolved: Resolved<UniPCMultistepConfig>) -> Result<Self, SchedulerError> {
        const CLASS: &str = UniPCMultistepConfig::CLASS;
        let options = &resolved.options;
        options.refuse_flow()?;
        options.sigma_curve()?;
        require(CLASS, "shift_terminal", &options.shift_terminal, &[None])?;
        if options.solver_order == 0 {
            let expected = "expected a number of at least 1".to_string();
            return Err(SchedulerError::Value {
                class: CLASS,
                key: "solver_order",
                value: "0".into(),
                expected,
            });
        }
        let zero_snr = options.rescale_betas_zero_snr;
        let mut noise_schedule = options.noise_schedule(BetaSchedule::COMMON, zero_snr)?;
        if zero_snr {
            noise_schedule = noise_schedule.with_finite_last_sigma();
        }
        let bound = match options.predict_x0 {
            true => options.threshold_or(Bound::None)?,
            false => Bound::None,
        };
        let solver_p = options.solver_p.clone().map(|values| {
            let config = SchedulerConfig::from_values(values);
            scheduler_from_config(&config, None, &Overrides::new())
        });
        let solver_p = solver_p.transpose()?;
        let (ladder, outputs) = (Ladder::default(), Vec::new());
        Ok(Self {
            bound,
            noise_schedule,
            solver_p,
            resolved,
            ladder,
            outputs,
            latest: None,
        })
    }

    /// The noise schedule of the forward process.
    pub fn noise_schedule(&self) -> &NoiseSchedule {
        &self.noise_schedule
    }

    /// Timesteps and noise levels for a number of steps.
    fn place(&self, steps: usize) -> Result<Ladder, SchedulerError> {
        let options = &self.resolved.options;
        let table = self.noise_schedule.sigmas();
        let tops = options.spacing().interval_tops(steps)?;
        let (timesteps, levels, smallest) = match options.sigma_curve()? {
            None => {
                let levels: Vec<f64> = tops
                    .iter()
                    .map(|&timestep| sigma_at(&table, timestep))
                    .collect();
                (tops, levels, f64::from(table[0]))
            }
            Some(curve) => {
                let range = SigmaRange {
                    min: table[0].into(),
                    max: table[table.len() - 1].into(),
                };
                let range = range.with(
                    UniPCMultistepConfig::CLASS,
                    options.sigma_min,
                    options.sigma_max,
                )?;
                let levels = curve.levels(range, steps);
                let logs = LogSigmas::new(&table);
                let whole = if curve == SigmaCurve::Karras {
                    f64::round_ties_even
                } else {
                    f64::trunc
                };
                let smallest = levels[steps - 1];
                (
                    levels
                        .iter()
                        .map(|&sigma| whole(logs.timestep(sigma)))
                        .collect(),
                    levels,
                    smallest,
                )
            }
        };
        let last = match options.final_sigmas_type {
            FinalSigmasType::Zero => 0.0,
            FinalSigmasType::SigmaMin => smallest,
        };
        Ok(Ladder::new(
            timesteps,
            levels
                .into_iter()
                .chain([last])
                .map(|sigma| sigma as f32)
                .collect(),
        ))
    }

    /// The order of the step at a rung, after so many steps.
    fn order(&self, rung: usize, taken: usize) -> usize {
        let options = &self.resolved.options;
        let left = if options.lower_order_final {
            self.ladder.timesteps().len() - rung
        } else {
            usize::MAX
        };
        options.solver_order.min(left).min(taken + 1)
    }

    /// Refuses runs in which a step has no finite result, before the first one is taken.
    fn check_run(&self) -> Result<(), SchedulerError> {
        for rung in 0..self.ladder.timesteps().len() {
            if self.solver_p.is_none() {
                self.weights(rung, self.order(rung, rung), Method::Predict)?;
            }
            if rung > 0 && self.corrects(rung) {
                self.weights(rung - 1, self.order(rung - 1, rung - 1), Method::Correct)?;
            }
        }
        Ok(())
    }

    fn corrects(&self, rung: usize) -> bool {
        rung > 0
            && !self
                .resolved
                .options
                .disable_corrector
                .contains(&(rung - 1))
    }

    /// The factors of a step from rung `source` to the next one. In f32, as the reference's are.
    fn weights(
        &self,
        source: usize,
        order: usize,
        method: Method,
    ) -> Result<Weights, SchedulerError> {
        let options = &self.resolved.options;
        let at = |rung: usize| Mixture::of_ratio(self.ladder.sigmas()[rung]);
        let (s, t) = (at(source), at(source + 1));
        let h = t.lambda() - s.lambda();
        // Where images are predicted, sample and model output exchange the roles of α and σ.
        let (h_signed, ratio, scale) = match options.predict_x0 {
            true => (-h, t.sigma / s.sigma, t.alpha),
            false => (h, t.alpha / s.alpha, t.sigma),
        };
        let phi_1 = h_signed.exp_m1();
        let b_of_h = match options.solver_type {
            UniPCSolverType::Bh1 => h_signed,
            UniPCSolverType::Bh2 => phi_1,
        };
        let mut r: Vec<f32> = (1..order)
            .map(|back| (at(source - back).lambda() - s.lambda()) / h)
            .collect();
        r.push(1.0);
        let mut rho = match (method, order) {
            (Method::Predict, 1) => Vec::new(),
            (Method::Predict, 2) | (Method::Correct, 1) => vec![0.5],
            (Method::Predict, _) => solve_order_conditions(&r[..order - 1], h_signed, b_of_h),
            (Method::Correct, _) => solve_order_conditions(&r, h_signed, b_of_h),
        };

        let new = if method == Method::Correct {
            rho.pop()
        } else {
            None
        };
        let shares: Vec<f32> = rho.iter().zip(&r).map(|(rho, r)| rho / r).collect();
        let newest =
            -scale * phi_1 + scale * b_of_h * (shares.iter().sum::<f32>() + new.unwrap_or(0.0));
        let earlier = shares.iter().map(|share| -scale * b_of_h * share);
        let weights = Weights {
            sample: ratio,
            outputs: std::iter::once(newest).chain(earlier).collect(),
            new: new.map(|rho| -scale * b_of_h * rho),
        };
        match weights.all_finite() {
            true => Ok(weights),
            false => Err(self.explain(self.ladder.sigmas()[source + 1])),
        }
    }

    /// Why a step to this level has no finite result.
    fn explain(&self, sigma: f32) -> SchedulerError {
        let options = &self.resolved.options;
        let clash = |keys: &str, advice: &str| SchedulerError::Clash {
            class: UniPCMultistepConfig::CLASS,
            keys: keys.into(),
            advice: advice.into(),
        };
        let infinite = "the last step is infinitely long, choose `final_sigmas_type` `sigma_min`";
        match sigma == 0.0 {
            true if !options.predict_x0 => clash(
                "`predict_x0` `false` and `final_sigmas_type` `zero`",
                infinite,
            ),
            true if options.solver_type == UniPCSolverType::Bh1 => clash(
                "`solver_type` `bh1` and `final_sigmas_type` `zero`",
                infinite,
            ),
            true => clash(
                "`lower_order_final` `false` and `final_sigmas_type` `zero`",
                infinite,
            ),
            false => clash(
                "these options and the number of steps",
                "two neighbouring noise levels are equal, choose fewer steps or `lower_order_final` `true`",
            ),
        }
    }
}

/// Whether the model's answer at the end of a step is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    Predict,
    Correct,
}

/// The factors of `x_s`, of `m_s` and those before, and of `m_t`.
struct Weights {
    sample: f32,
    outputs: Vec<f32>,
    new: Option<f32>,
}

impl Weights {
    fn all_finite(&self) -> bool {
        self.outputs
            .iter()
            .chain([&self.sample])
            .chain(&self.new)
            .all(|factor| factor.is_finite())
    }

    fn apply<B: Backend>(
        &self,
        sample: Tensor<B, 4>,
        outputs: &[Tensor<B, 4>],
        new: Option<Tensor<B, 4>>,
    ) -> Tensor<B, 4> {
        let known = self.outputs.iter().copied().zip(outputs.iter().cloned());
        combine(
            std::iter::once((self.sample, sample))
                .chain(known)
                .chain(self.new.zip(new)),
        )
    }
}

/// `ρ` with `Σ ρ_i r_i^(k-1) = k! φ_k(h) / B(h)` for `k` from 1 to their number.
fn solve_order_conditions(r: &[f32], h: f32, b_of_h: f32) -> Vec<f32> {
    let mut phi = h.exp_m1() / h - 1.0;
    let mut factorial = 1.0;
    let mut rows: Vec<Vec<f64>> = Vec::new();
    for k in 1..=r.len() {
        let powers = r.iter().map(|r| f64::from(r.powi(k as i32 - 1)));
        rows.push(
            powers
                .chain([f64::from(phi * factorial / b_of_h)])
                .collect(),
        );
        factorial *= (k + 1) as f32;
        phi = phi / h - 1.0 / factorial;
    }
    solve(rows)
}

/// Gaussian elimination with row exchange; the right-hand side is the last column.
fn solve(mut rows: Vec<Vec<f64>>) -> Vec<f32> {
    let count = rows.len();
    for column in 0..count {
        let largest = (column..count)
            .max_by(|&a, &b| rows[a][column].abs().total_cmp(&rows[b][column].abs()));
        rows.swap(column, largest.unwrap_or(column));
        let pivot = rows[column].clone();
        for (_, row) in rows
            .iter_mut()
            .enumerate()
            .filter(|(index, _)| *index != column)
        {
            let factor = row[column] / pivot[column];
            row.iter_mut()
                .zip(&pivot)
                .for_each(|(entry, pivot)| *entry -= factor * pivot);
        }
    }
    rows.iter()
        .enumerate()
        .map(|(i, row)| (row[count] / row[i]) as f32)
        .collect()
}

impl<B: Backend> Scheduler<B> for UniPCMultistepScheduler<B> {
    fn config(&self) -> &SchedulerConfig {
        &self.resolved.config
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            begin_index: true,
            ..Capabilities::default()
        }
    }

    fn set_timesteps(&mut self, request: &TimestepRequest) -> Result<(), SchedulerError> {
        let steps = request.steps(UniPCMultistepConfig::CLASS)?;
        let ladder = self.place(steps)?;
        let before = std::mem::replace(&mut self.ladder, ladder);
        if let Err(error) = self.check_run() {
            self.ladder = before;
            return Err(error);
        }
        if let Some(solver_p) = &mut self.solver_p {
            solver_p.set_timesteps(request)?;
        }
        self.outputs.clear();
        self.latest = None;
        Ok(())
    }

    fn timesteps(&self) -> &[f64] {
        self.ladder.timesteps()
    }

    fn sigmas(&self) -> Option<&[f32]> {
        Some(self.ladder.sigmas())
    }

    fn set_begin_index(&mut self, begin_index: usize) {
        self.ladder.begin_at(begin_index);
    }

    fn advance(&mut self, step: Step<'_, B>) -> Result<StepOutput<B>, SchedulerError> {
        let rung = self.ladder.rung(step.timestep)?;
        let options = &self.resolved.options;
        let mixture = Mixture::of_ratio(self.ladder.sigmas()[rung]);
        let prediction = Prediction {
            kind: options.prediction_type,
            output: step.model_output.clone(),
            sample: step.sample.clone(),
        };
        let output = match options.predict_x0 {
            true => self.bound.apply(prediction.original(mixture)),
            false => prediction.epsilon(mixture),
        };
        let sample = match self.latest.take() {
            Some((start, order)) if self.corrects(rung) => self
                .weights(rung - 1, order, Method::Correct)?
                .apply(start, &self.outputs, Some(output.clone())),
            _ => step.sample,
        };
        let order = self.order(rung, self.outputs.len());
        self.outputs.insert(0, output);
        self.outputs.truncate(options.solver_order);
        self.latest = Some((sample.clone(), order));
        let prev_sample = match &mut self.solver_p {
            Some(solver_p) => solver_p.advance(Step { sample, ..step })?.prev_sample,
            None => self
                .weights(rung, order, Method::Predict)?
                .apply(sample, &self.outputs, None),
        };
        self.ladder.descend();
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: None,
        })
    }

    fn add_noise(
        &self,
        original: Tensor<B, 4>,
        noise: Tensor<B, 4>,
        timesteps: &[f64],
    ) -> Result<Tensor<B, 4>, SchedulerError> {
        let levels = self.ladder.noising_levels(timesteps)?;
        let mixtures: Vec<Mixture> = levels.into_iter().map(Mixture::of_ratio).collect();
        mixture::add_noise(&mixtures, original, noise)
    }
}
