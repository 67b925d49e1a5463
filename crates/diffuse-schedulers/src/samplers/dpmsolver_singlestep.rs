//! DPM-Solver and DPM-Solver++, singlestep.
//!
//! "DPM-Solver" (<https://arxiv.org/abs/2206.00927>), algorithms 4 and 5, and "DPM-Solver++"
//! (<https://arxiv.org/abs/2211.01095>), algorithm 1: a step of order `k` takes `k` model
//! evaluations. The schedule goes through the points within a step, and the first evaluations of a
//! step are steps of lower order from the same start:
//!
//! ```text
//! order 3:  1 2 3  1 2 3  1 2 3 ..
//! ```
//!
//! From the start `s` to `t` with `h = λ_t - λ_s`, the model output `m` at `s`, and `m_p`, `m_q` at
//! the points `p`, `q` within, counted in parts of `h`:
//!
//! ```text
//! x_t = ratio x_s - scale (φ_1 m + φ_2 m' + φ_3 m'')
//! m'  = (m_p - m) / p                                        order 2
//! m'  = (q d_p - p d_q) / (q - p),  m'' = 2 (d_q - d_p) / (q - p)   order 3, d_i = (m_i - m) / i
//! ```
//!
//! `midpoint` takes `φ_1 / 2` for `φ_2` at order 2, and `m' = (m_q - m) / q`, `m'' = 0` at order 3.

use super::dpmsolver_multistep::{DPMAlgorithmType, DPMSolverType};
use super::prelude::*;
use crate::VarianceType;
use crate::schedule::flow::{FlowOptions, ShiftOptions};
use crate::schedule::spacing::check_whole_timesteps;
use crate::step::multistep::{MAX_DPM_ORDER, check_order, check_steps};

options! {
    /// Options of [`DPMSolverSinglestepScheduler`].
    pub struct DPMSolverSinglestepConfig {
        /// What the model predicts.
        pub prediction_type: PredictionType = PredictionType::Epsilon,
        /// The number of model evaluations in a step, 1 to 3.
        pub solver_order: usize = 2,
        /// The equation that is solved.
        pub algorithm_type: DPMAlgorithmType = DPMAlgorithmType::DPMSolverPlusPlus,
        /// The coefficients of the slopes within a step.
        pub solver_type: DPMSolverType = DPMSolverType::Midpoint,
        /// Whether the last step has order 1; turned on if the other options need it.
        pub lower_order_final: bool = false,
        /// The final sigma of a run.
        pub final_sigmas_type: FinalSigmasType = FinalSigmasType::Zero,
        /// The smallest `λ = ln(α / σ)` to visit, for schedules that end in pure noise.
        pub lambda_min_clipped: f64 = f64::NEG_INFINITY,
        /// The variance that the model also predicts; `learned` and `learned_range` drop it from
        /// the output.
        pub variance_type: Option<VarianceType> = None,
    } with {
        pub betas: BetaOptions = BetaOptions::default(),
        pub threshold: ThresholdOptions = ThresholdOptions::default(),
        pub sigmas: SigmaOptions = SigmaOptions::default(),
        pub flow: FlowOptions = FlowOptions::default(),
        pub shift: ShiftOptions = ShiftOptions::default(),
    }
}

/// A singlestep solver of the diffusion ODE or SDE, which uses no earlier steps.
pub type DPMSolverSinglestepScheduler<B> = Driver<B, DPMSolverSinglestepConfig>;

/// The state of a run.
#[derive(Debug, Default)]
pub struct SinglestepHistory<B: Backend> {
    /// The latest model outputs, newest first: at most `solver_order`.
    outputs: Vec<Tensor<B, 4>>,
    /// The sample that the step starts from.
    start: Option<Tensor<B, 4>>,
}

impl DPMSolverSinglestepConfig {
    /// The order of the step at an index.
    fn order_at(&self, index: usize, steps: usize) -> usize {
        let whole = steps.is_multiple_of(self.solver_order);
        let euler_last =
            self.final_sigmas_type == FinalSigmasType::Zero || self.lower_order_final && whole;
        match index + 1 == steps && euler_last {
            true => 1,
            false => index % self.solver_order + 1,
        }
    }

    /// The coefficients of a step of a run, after `taken` steps.
    fn coefficients(&self, schedule: &Schedule, index: usize, taken: usize) -> Coefficients {
        let order = self.order_at(index, schedule.timesteps.len());
        let order = order.min(taken + 1);
        let points: Vec<AlphaSigma> = schedule.sigmas[index + 1 - order..=index + 1]
            .iter()
            .map(|&sigma| AlphaSigma::of_ratio(sigma))
            .collect();
        self.between(&points[..order], points[order])
    }

    /// The coefficients of a step from the first of some points to `t`.
    fn between(&self, points: &[AlphaSigma], t: AlphaSigma) -> Coefficients {
        let [s, within @ ..] = points else {
            panic!("a step starts at a point")
        };
        let step = self.algorithm_type.exponential_step(*s, t);
        let h = t.lambda() - s.lambda();
        let mut r = within.iter().map(|p| (p.lambda() - s.lambda()) / h);
        let whole = -step.scale * step.phi_1();
        let slope = |phi: f32, r: f32| -step.scale * phi / r;
        let mut outputs = match (r.next(), r.next(), self.solver_type) {
            (None, ..) => vec![whole],
            (Some(p), None, DPMSolverType::Midpoint) => {
                let at_p = slope(0.5 * step.phi_1(), p);
                vec![whole - at_p, at_p]
            }
            (Some(p), None, DPMSolverType::Heun) => {
                let at_p = slope(step.phi_2(), p);
                vec![whole - at_p, at_p]
            }
            (Some(_), Some(q), DPMSolverType::Midpoint) => {
                let at_q = slope(step.phi_2(), q);
                vec![whole - at_q, 0.0, at_q]
            }
            (Some(p), Some(q), DPMSolverType::Heun) => {
                let first = -step.scale * step.phi_2();
                let second = -step.scale * self.algorithm_type.phi_3(step) * 2.0;
                let at_p = (first * q - second) / (q - p) / p;
                let at_q = (second - first * p) / (q - p) / q;
                vec![whole - at_p - at_q, at_p, at_q]
            }
        };
        outputs.reverse();
        Coefficients {
            sample: step.ratio,
            outputs,
            z: step.noise,
        }
    }
}

impl Sampler for DPMSolverSinglestepConfig {
    const CLASS: &'static str = "DPMSolverSinglestepScheduler";
    const NAMES: Names = Names {
        short: "dpm++-2s",
        about: "DPM-Solver++, singlestep: 15 to 25 model evaluations",
        popular: &[("DPM++ 2S", &[]), ("DPM++ 2S Karras", &[KARRAS])],
    };

    type History<B: Backend> = SinglestepHistory<B>;

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            custom_timesteps: true,
            noise: self.algorithm_type.adds_noise(),
            ..Capabilities::COUNTED
        }
    }

    fn process(&self) -> Process {
        Process::SigmaGrid
    }

    fn check(&mut self) -> Result<(), SchedulerError> {
        use DPMAlgorithmType::*;
        self.flow.refuse(Self::CLASS)?;
        self.shift.refuse(Self::CLASS)?;
        self.sigmas.sigma_schedule(Self::CLASS)?;
        self.threshold.clipping(Self::CLASS)?;
        check_order(
            Self::CLASS,
            "solver_order",
            self.solver_order,
            MAX_DPM_ORDER,
        )?;
        let supported = &[DPMSolver, DPMSolverPlusPlus, SDEDPMSolverPlusPlus, DEIS];
        require(
            Self::CLASS,
            "algorithm_type",
            &self.algorithm_type,
            supported,
        )?;
        self.algorithm_type
            .check_end(Self::CLASS, self.final_sigmas_type)?;
        self.algorithm_type.settle();
        if self.algorithm_type == DPMSolver && self.threshold.thresholding {
            return Err(SchedulerError::clash(
                Self::CLASS,
                "`algorithm_type` `dpmsolver` and `thresholding` `true`",
                "only predicted images are clipped, choose `algorithm_type` `dpmsolver++`",
            ));
        }
        Ok(())
    }

    fn noise_schedule(&self) -> Result<NoiseSchedule, SchedulerError> {
        self.betas.noise_schedule(Self::CLASS)
    }

    fn place(
        &self,
        request: &TimestepRequest,
        noise_schedule: &NoiseSchedule,
    ) -> Result<Schedule, SchedulerError> {
        let (table, train) = (noise_schedule.sigmas(), self.betas.num_train_timesteps);
        let schedule = self.sigmas.sigma_schedule(Self::CLASS)?;
        let grid = match request {
            TimestepRequest::Timesteps(timesteps) => {
                check_whole_timesteps(Self::CLASS, timesteps, train, schedule.is_some())?;
                SigmaGrid::at(timesteps.clone(), &table)
            }
            other => {
                let spacing = SpacingOptions::default().over(Self::CLASS, &self.betas);
                let spacing = spacing.clipped(noise_schedule, self.lambda_min_clipped)?;
                let range = SigmaRange::of_table(&table);
                SigmaGrid::between(spacing, other.steps(Self::CLASS)?, schedule, range, &table)?
            }
        };
        let run = grid.to(self.final_sigmas_type.sigma(table[0]));
        let mut settled = self.clone();
        settled.settle(&run);
        check_steps(Self::CLASS, run.steps, |index| {
            settled.coefficients(&run, index, index)
        })?;
        Ok(run)
    }

    /// As in Diffusers, the option changes permanently if a run needs it.
    fn settle(&mut self, schedule: &Schedule) {
        self.lower_order_final |= !schedule.steps.is_multiple_of(self.solver_order)
            || self.final_sigmas_type == FinalSigmasType::Zero;
    }

    fn step<B: Backend>(
        &self,
        mut step: Step<'_, B>,
        place: Place<'_>,
        history: &mut SinglestepHistory<B>,
    ) -> Result<StepOutput<B>, SchedulerError> {
        let (kind, variance_type) = (self.prediction_type, self.variance_type);
        let prediction = Prediction::without_variance(kind, &step, variance_type);
        let clipping = self.threshold.clipping(Self::CLASS)?;
        let integrand = self.algorithm_type.integrand();
        let output = prediction.integrand(place.alpha_sigma(), clipping, integrand);
        let noise = match self.algorithm_type.adds_noise() {
            true => Some(step.noise.like(&output)?),
            false => None,
        };
        let taken = history.outputs.len();
        let coefficients = self.coefficients(place.schedule, place.index, taken);
        remember(&mut history.outputs, output, self.solver_order);
        let start = match (coefficients.outputs.len(), history.start.take()) {
            (2.., Some(start)) => start,
            _ => step.sample,
        };
        history.start = Some(start.clone());
        Ok(StepOutput {
            prev_sample: coefficients.apply(start, &history.outputs, noise),
            pred_original_sample: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::dpmsolver_multistep::check_constant;
    use super::*;

    /// A model that predicts the same image, or the same noise, everywhere is integrated exactly.
    #[test]
    fn constant_outputs_are_exact() {
        use DPMAlgorithmType::*;
        let points: Vec<AlphaSigma> = [14.0, 9.0, 5.0, 3.0].map(AlphaSigma::of_ratio).to_vec();
        for algorithm_type in [
            DPMSolver,
            DPMSolverPlusPlus,
            SDEDPMSolver,
            SDEDPMSolverPlusPlus,
        ] {
            for solver_type in [DPMSolverType::Midpoint, DPMSolverType::Heun] {
                for first in 0..3 {
                    let options = DPMSolverSinglestepConfig {
                        algorithm_type,
                        solver_type,
                        ..Default::default()
                    };
                    let (t, before) = points[first..].split_last().unwrap();
                    let coefficients = options.between(before, *t);
                    check_constant(&coefficients, algorithm_type, before[0], *t);
                    assert_eq!(coefficients.outputs.len(), before.len());
                }
            }
        }
    }
}
