//! UniPC: a unified predictor and corrector.
//!
//! "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models"
//! (<https://arxiv.org/abs/2302.04867>), algorithms 5 to 8 and equations 3, 5 and 8, in the time
//! `λ = ln(α / σ)`. A step goes from `s` to `t` with `h = λ_t - λ_s`; `m_i` are the data
//! predictions at points `i`, and `r_i = (λ_i - λ_s) / h`:
//!
//! ```text
//! x_t = (σ_t / σ_s) x_s - α_t (e^-h - 1) m_s
//!       - α_t B(h) [ Σ ρ_i (m_i - m_s) / r_i + ρ_t (m_t - m_s) ]
//! ```
//!
//! The predictor leaves out `m_t`; after the model evaluation at `x_t`, the corrector repeats the
//! step with it. `B(h)` is `-h` (bh1) or `e^-h - 1` (bh2). The
//! `ρ` solve the order conditions `Σ ρ_i r_i^(k-1) = k! φ_(k+1)(-h) (-h) / B(h)`, where
//! `φ_(k+1)(z) = (φ_k(z) - 1/k!) / z` and `φ_0 = exp`. By epsilon prediction, `α` and `σ` exchange
//! their roles and `h` changes its sign. In f32, as Diffusers.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::prelude::*;
use crate::config::{Options, Overrides};
use crate::schedule::flow::{FlowOptions, ShiftOptions};
use crate::step::multistep::check_order;
use crate::step::phi::ExponentialStep;
use crate::{Scheduler, SchedulerConfig, scheduler_from_config};

options! {
    /// Options of [`UniPCMultistepScheduler`].
    pub struct UniPCMultistepConfig {
        /// What the model predicts.
        pub prediction_type: PredictionType = PredictionType::Epsilon,
        /// The order of the predictor; the corrector's is one higher.
        pub solver_order: usize = 2,
        /// Whether the solver integrates the data prediction, not the epsilon prediction.
        pub predict_x0: bool = true,
        /// The function `B(h)`.
        pub solver_type: UniPCSolverType = UniPCSolverType::Bh2,
        /// Whether the order is reduced at the end.
        pub lower_order_final: bool = true,
        /// The steps without correction.
        pub disable_corrector: Vec<usize> = Vec::new(),
        /// The configuration of another sampler as the predictor; UniC still corrects. By default
        /// it has the same noise schedule.
        pub solver_p: Option<Map<String, Value>> = None,
        /// The final sigma of a run.
        pub final_sigmas_type: FinalSigmasType = FinalSigmasType::Zero,
        /// The smallest sigma of a sigma schedule, in place of that of the noise schedule.
        pub sigma_min: Option<f64> = None,
        /// The largest sigma of a sigma schedule, in place of that of the noise schedule.
        pub sigma_max: Option<f64> = None,
        /// Must be null: flow-matching models are not supported.
        pub shift_terminal: Option<f64> = None,
        /// Whether the betas are rescaled to zero terminal SNR.
        pub rescale_betas_zero_snr: bool = false,
    } with {
        pub betas: BetaOptions = BetaOptions::default(),
        pub threshold: ThresholdOptions = ThresholdOptions::default(),
        pub sigmas: SigmaOptions = SigmaOptions::default(),
        pub flow: FlowOptions = FlowOptions::default(),
        pub shift: ShiftOptions = ShiftOptions::default(),
        pub spacing: SpacingOptions = SpacingOptions::default(),
    }
}

/// A multistep predictor and corrector of the diffusion ODE.
pub type UniPCMultistepScheduler<B> = Driver<B, UniPCMultistepConfig>;

/// The function `B(h)` (the key `solver_type`); the other multistep solvers' types are read as
/// `bh2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum UniPCSolverType {
    /// `h`
    Bh1,
    /// `e^h - 1`
    #[serde(alias = "midpoint", alias = "heun", alias = "logrho")]
    Bh2,
}

/// For higher orders, the order conditions cannot be solved in f32.
const MAX_ORDER: usize = 12;

/// The state of a run.
#[derive(Debug, Default)]
pub struct UniPCHistory<B: Backend> {
    /// The latest model outputs, newest first: at most `solver_order`.
    outputs: Vec<Tensor<B, 4>>,
    /// The sample that the latest step started from, and the order of that step.
    latest: Option<(Tensor<B, 4>, usize)>,
    /// The predictor, if it is not UniP.
    solver_p: Option<Box<dyn Scheduler<B>>>,
}

/// Whether the model output at the end of a step is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    Predict,
    Correct,
}

impl UniPCMultistepConfig {
    /// The order of the step at an index of a run of `steps` steps, after `taken` steps.
    fn order(&self, index: usize, steps: usize, taken: usize) -> usize {
        let left = match self.lower_order_final {
            true => steps - index,
            false => usize::MAX,
        };
        self.solver_order.min(left).min(taken + 1)
    }

    fn corrects(&self, index: usize) -> bool {
        index > 0 && !self.disable_corrector.contains(&(index - 1))
    }

    /// An error for runs in which a step has no finite result.
    fn check_run(&self, run: &Schedule) -> Result<(), SchedulerError> {
        for index in 0..run.steps {
            let order = |index| self.order(index, run.steps, index);
            if self.solver_p.is_none() {
                self.coefficients(run, index, order(index), Method::Predict)?;
            }
            if self.corrects(index) {
                self.coefficients(run, index - 1, order(index - 1), Method::Correct)?;
            }
        }
        Ok(())
    }

    /// The coefficients of the step from index `source` to the next one.
    fn coefficients(
        &self,
        run: &Schedule,
        source: usize,
        order: usize,
        method: Method,
    ) -> Result<Coefficients, SchedulerError> {
        let points: Vec<AlphaSigma> = run.sigmas[source + 1 - order..=source + 1]
            .iter()
            .map(|&sigma| AlphaSigma::of_ratio(sigma))
            .collect();
        let coefficients = self.between(&points, method);
        if !coefficients.all_finite() {
            return Err(self.not_finite(run.sigmas[source + 1]));
        }
        // Sums that cancel to a thousandth of their terms are too imprecise.
        let terms = coefficients.outputs.iter().chain(&coefficients.z);
        if terms.map(|c| c.abs()).sum::<f32>() > 1e3 {
            return Err(SchedulerError::clash(
                Self::CLASS,
                format!(
                    "`solver_order` `{}` and {} steps",
                    self.solver_order, run.steps
                ),
                "f32 cannot solve the order conditions, choose a lower order or fewer steps",
            ));
        }
        Ok(coefficients)
    }

    /// The coefficients of a step between the last two of some points, whose order is one less than
    /// their number.
    fn between(&self, points: &[AlphaSigma], method: Method) -> Coefficients {
        let [earlier @ .., s, t] = points else {
            panic!("a step has two ends, {} points were given", points.len())
        };
        let h = t.lambda() - s.lambda();
        let step = match self.predict_x0 {
            true => ExponentialStep::data_ode(*s, *t),
            false => ExponentialStep::epsilon_ode(*s, *t),
        };
        let (z, scale, expm1) = (step.z, step.scale, step.z.exp_m1());
        let b_of_h = match self.solver_type {
            UniPCSolverType::Bh1 => z,
            UniPCSolverType::Bh2 => expm1,
        };
        let r = earlier
            .iter()
            .rev()
            .map(|point| (point.lambda() - s.lambda()) / h);
        let r: Vec<f32> = r.chain([1.0]).collect();
        let mut rho = match (method, r.len()) {
            (Method::Predict, 1) => Vec::new(),
            // One half is the limit of the order conditions for small `h`.
            (Method::Predict, 2) | (Method::Correct, 1) => vec![0.5],
            (Method::Predict, order) => solve_order_conditions(&r[..order - 1], z, b_of_h),
            (Method::Correct, _) => solve_order_conditions(&r, z, b_of_h),
        };
        let rho_t = match method {
            Method::Predict => None,
            Method::Correct => rho.pop(),
        };
        let shares: Vec<f32> = rho.iter().zip(&r).map(|(rho, r)| rho / r).collect();
        let total = shares.iter().sum::<f32>() + rho_t.unwrap_or(0.0);
        let newest = -scale * expm1 + scale * b_of_h * total;
        let earlier = shares.iter().map(|share| -scale * b_of_h * share);
        Coefficients {
            sample: step.ratio,
            outputs: [newest].into_iter().chain(earlier).collect(),
            z: rho_t.map(|rho| -scale * b_of_h * rho),
        }
    }

    /// The reason why a step to this sigma has no finite result.
    fn not_finite(&self, sigma: f32) -> SchedulerError {
        let infinite = "the last step is infinitely long, choose `final_sigmas_type` `sigma_min`";
        let (keys, advice) = match sigma == 0.0 {
            true if !self.predict_x0 => (
                "`predict_x0` `false` and `final_sigmas_type` `zero`",
                infinite,
            ),
            true if self.solver_type == UniPCSolverType::Bh1 => (
                "`solver_type` `bh1` and `final_sigmas_type` `zero`",
                infinite,
            ),
            true => (
                "`lower_order_final` `false` and `final_sigmas_type` `zero`",
                infinite,
            ),
            false => (
                "these options and the number of steps",
                "two neighbouring sigmas are equal, choose fewer steps or `lower_order_final` \
                 `true`",
            ),
        };
        SchedulerError::clash(Self::CLASS, keys, advice)
    }
}

impl Sampler for UniPCMultistepConfig {
    const CLASS: &'static str = "UniPCMultistepScheduler";
    const NAMES: Names = Names {
        short: "unipc",
        about: "multistep predictor and corrector: 10 to 25 steps",
        popular: &[("UniPC", &[])],
    };

    type History<B: Backend> = UniPCHistory<B>;

    fn process(&self) -> Process {
        Process::SigmaGrid
    }

    fn check(&mut self) -> Result<(), SchedulerError> {
        self.flow.refuse(Self::CLASS)?;
        self.shift.refuse(Self::CLASS)?;
        self.sigmas.sigma_schedule(Self::CLASS)?;
        self.threshold.clipping(Self::CLASS)?;
        require(Self::CLASS, "shift_terminal", &self.shift_terminal, &[None])?;
        check_order(Self::CLASS, "solver_order", self.solver_order, MAX_ORDER)
    }

    fn noise_schedule(&self) -> Result<NoiseSchedule, SchedulerError> {
        let rescale = self.rescale_betas_zero_snr;
        let noise_schedule = self.betas.rescaled_noise_schedule(Self::CLASS, rescale)?;
        Ok(noise_schedule.with_finite_last_sigma(rescale))
    }

    fn place(
        &self,
        request: &TimestepRequest,
        noise_schedule: &NoiseSchedule,
    ) -> Result<Schedule, SchedulerError> {
        let table = noise_schedule.sigmas();
        let schedule = self.sigmas.sigma_schedule(Self::CLASS)?;
        let spacing = self.spacing.over(Self::CLASS, &self.betas);
        let range = SigmaRange::of_table(&table);
        let range = range.with(Self::CLASS, self.sigma_min, self.sigma_max)?;
        let steps = request.steps(Self::CLASS)?;
        let grid = SigmaGrid::between(spacing, steps, schedule, range, &table)?;
        let last = grid.final_sigma(schedule, &table);
        let run = grid.to(self.final_sigmas_type.sigma(last));
        self.check_run(&run)?;
        Ok(run)
    }

    fn history<B: Backend>(
        &self,
        request: Option<&TimestepRequest>,
    ) -> Result<UniPCHistory<B>, SchedulerError> {
        let mut history = UniPCHistory::default();
        let Some(given) = &self.solver_p else {
            return Ok(history);
        };
        let mut values = self.betas.to_values();
        values.extend(given.clone());
        let config = SchedulerConfig::from_values(values);
        let mut solver_p = scheduler_from_config(&config, None, &Overrides::new())?;
        if let Some(request) = request {
            solver_p.set_timesteps(request)?;
        }
        history.solver_p = Some(solver_p);
        Ok(history)
    }

    fn step<B: Backend>(
        &self,
        step: Step<'_, B>,
        place: Place<'_>,
        history: &mut UniPCHistory<B>,
    ) -> Result<StepOutput<B>, SchedulerError> {
        let (run, index) = (place.schedule, place.index);
        let prediction = Prediction::of(self.prediction_type, &step);
        let output = match self.predict_x0 {
            true => {
                let clipping = self.threshold.clipping(Self::CLASS)?;
                clipping.apply(prediction.original(place.alpha_sigma()))
            }
            false => prediction.epsilon(place.alpha_sigma()),
        };
        let sample = match history.latest.take() {
            Some((start, order)) if self.corrects(index) => {
                let corrector = self.coefficients(run, index - 1, order, Method::Correct)?;
                corrector.apply(start, &history.outputs, Some(output.clone()))
            }
            _ => step.sample.clone(),
        };
        let order = self.order(index, run.steps, history.outputs.len());
        remember(&mut history.outputs, output, self.solver_order);
        history.latest = Some((sample.clone(), order));
        let prev_sample = match &mut history.solver_p {
            Some(solver_p) => solver_p.advance(Step { sample, ..step })?.prev_sample,
            None => {
                let predictor = self.coefficients(run, index, order, Method::Predict)?;
                predictor.apply(sample, &history.outputs, None)
            }
        };
        Ok(StepOutput {
            prev_sample,
            pred_original_sample: None,
        })
    }
}

/// The `ρ` of the order conditions, one for each `r`.
fn solve_order_conditions(r: &[f32], z: f32, b_of_h: f32) -> Vec<f32> {
    let mut phi = z.exp_m1() / z - 1.0;
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
        phi = phi / z - 1.0 / factorial;
    }
    solve(rows)
}

/// Gaussian elimination with row exchange; the right-hand side is the last column.
fn solve(mut rows: Vec<Vec<f64>>) -> Vec<f32> {
    let count = rows.len();
    for column in 0..count {
        let size = |rows: &[Vec<f64>], row: usize| rows[row][column].abs();
        let largest = (column..count).max_by(|&a, &b| size(&rows, a).total_cmp(&size(&rows, b)));
        rows.swap(column, largest.unwrap_or(column));
        let pivot = rows[column].clone();
        for (_, row) in rows
            .iter_mut()
            .enumerate()
            .filter(|(place, _)| *place != column)
        {
            let factor = row[column] / pivot[column];
            row.iter_mut()
                .zip(&pivot)
                .for_each(|(entry, pivot)| *entry -= factor * pivot);
        }
    }
    rows.iter()
        .enumerate()
        .map(|(place, row)| (row[count] / row[place]) as f32)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equations_are_solved() {
        // The first pivot is zero: rows must be exchanged.
        let rows = vec![
            vec![0.0, 2.0, 1.0, 7.0],
            vec![1.0, 1.0, 1.0, 6.0],
            vec![2.0, -1.0, 3.0, 9.0],
        ];
        assert_eq!(solve(rows), [1.0, 2.0, 3.0]);
    }

    /// A model that predicts the same image everywhere is integrated exactly, by every order and
    /// method.
    #[test]
    fn a_constant_image_is_exact() {
        let points: Vec<AlphaSigma> = [14.0, 9.0, 5.0, 3.0, 1.5]
            .map(AlphaSigma::of_ratio)
            .to_vec();
        for method in [Method::Predict, Method::Correct] {
            for solver_type in [UniPCSolverType::Bh1, UniPCSolverType::Bh2] {
                for first in 0..points.len() - 1 {
                    let points = &points[first..];
                    let options = UniPCMultistepConfig {
                        solver_type,
                        ..Default::default()
                    };
                    let c = options.between(points, method);
                    let [.., s, t] = points else { unreachable!() };
                    let of_image = c.outputs.iter().sum::<f32>() + c.z.unwrap_or(0.0);
                    // x_s = α_s m + σ_s ε becomes x_t = α_t m + σ_t ε.
                    assert!((c.sample * s.alpha + of_image - t.alpha).abs() < 1e-5);
                    assert!((c.sample * s.sigma - t.sigma).abs() < 1e-6);
                }
            }
        }
    }
}
