//! A run down a ladder of noise levels, for samplers that count their steps.
//!
//! Rung `i` has a timestep for the model and a noise level; the last level, without a timestep, is that of the result.
//! A run begins where [`Ladder::begin_at`] says, or at the first timestep that is asked for, and goes one rung a step.

use crate::SchedulerError;

/// Timesteps, noise levels, and the place among them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ladder {
    timesteps: Vec<f64>,
    sigmas: Vec<f32>,
    /// The level of the sample that the model sees at each rung, where that is not `sigmas`.
    seen: Option<Vec<f32>>,
    begin: Option<usize>,
    rung: Option<usize>,
}

impl Ladder {
    /// A ladder to be run from the top.
    pub fn new(timesteps: Vec<f64>, sigmas: Vec<f32>) -> Self {
        Self {
            timesteps,
            sigmas,
            seen: None,
            begin: None,
            rung: None,
        }
    }

    /// A ladder on which the model sees samples at other levels than those of the rungs.
    pub fn with_seen(self, seen: Vec<f32>) -> Self {
        Self {
            seen: Some(seen),
            ..self
        }
    }

    /// The level of the sample that the model sees at a rung.
    pub fn seen(&self, rung: usize) -> f32 {
        self.seen.as_ref().unwrap_or(&self.sigmas)[rung]
    }

    pub fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    pub fn sigmas(&self) -> &[f32] {
        &self.sigmas
    }

    /// The largest noise level.
    pub fn max_sigma(&self) -> f32 {
        self.sigmas.iter().copied().fold(0.0, f32::max)
    }

    /// Lets the next run begin at a rung.
    pub fn begin_at(&mut self, rung: usize) {
        self.begin = Some(rung);
    }

    /// The rung of the current step: counted in a run that has begun, else where it begins.
    pub fn rung(&self, timestep: f64) -> Result<usize, SchedulerError> {
        let steps = self.timesteps.len();
        let rung = match self.rung.or(self.begin) {
            Some(rung) => rung,
            None => self.find(timestep)?,
        };
        match (steps, rung) {
            (0, _) => Err(SchedulerError::NoTimesteps),
            (steps, rung) if rung >= steps => Err(SchedulerError::Finished { steps }),
            _ => Ok(rung),
        }
    }

    /// Ends the step at a rung.
    pub fn descend(&mut self, rung: usize) {
        self.rung = Some(rung + 1);
    }

    /// The noise levels at which images are noised: those of the timesteps, or of the run's current rung if the run
    /// was told where to begin.
    pub fn noising_levels(&self, timesteps: &[f64]) -> Result<Vec<f32>, SchedulerError> {
        let here = self.begin.map(|begin| self.rung.unwrap_or(begin));
        let rungs = timesteps
            .iter()
            .map(|&timestep| here.map_or_else(|| self.find(timestep), Ok));
        rungs
            .map(|rung| {
                let steps = self.timesteps.len();
                self.sigmas
                    .get(rung?)
                    .copied()
                    .ok_or(SchedulerError::Finished { steps })
            })
            .collect()
    }

    /// The rung of a timestep: the first one for the first timestep, where a run from the beginning
    /// starts; else of the second one if it occurs twice, as in the reference, so that a run that
    /// begins inside the schedule skips no level.
    pub fn find(&self, timestep: f64) -> Result<usize, SchedulerError> {
        if self.timesteps.is_empty() {
            return Err(SchedulerError::NoTimesteps);
        }
        if self.timesteps[0] == timestep {
            return Ok(0);
        }
        let mut found = (0..self.timesteps.len()).filter(|&rung| self.timesteps[rung] == timestep);
        let first = found
            .next()
            .ok_or(SchedulerError::NotInSchedule { timestep })?;
        Ok(found.next().unwrap_or(first))
    }
}

/// The methods of a [`Scheduler`](crate::Scheduler) whose run is `self.ladder`, with samples of one kind of
/// [`Mixture`](crate::mixture::Mixture).
macro_rules! ladder_methods {
    ($mixture:ident) => {
        $crate::ladder::ladder_methods!();

        fn sigmas(&self) -> Option<&[f32]> {
            Some(self.ladder.sigmas())
        }

        fn add_noise(
            &self,
            original: Tensor<B, 4>,
            noise: Tensor<B, 4>,
            timesteps: &[f64],
        ) -> Result<Tensor<B, 4>, SchedulerError> {
            let levels = self.ladder.noising_levels(timesteps)?;
            let mixtures: Vec<_> = levels
                .into_iter()
                .map($crate::mixture::Mixture::$mixture)
                .collect();
            $crate::mixture::add_noise(&mixtures, original, noise)
        }
    };
    () => {
        fn config(&self) -> &$crate::SchedulerConfig {
            &self.resolved.config
        }

        fn timesteps(&self) -> &[f64] {
            self.ladder.timesteps()
        }

        fn set_begin_index(&mut self, begin_index: usize) {
            self.ladder.begin_at(begin_index);
        }
    };
}
pub(crate) use ladder_methods;

/// The methods of a [`Scheduler`](crate::Scheduler) whose samples are `x0 + σ ε`, and whose model sees `x / √(σ² + 1)`.
macro_rules! noise_level_methods {
    () => {
        fn init_noise_sigma(&self) -> f64 {
            let max = self.ladder.max_sigma();
            match self.resolved.options.timestep_spacing {
                $crate::TimestepSpacing::Leading => (max * max + 1.0).sqrt().into(),
                $crate::TimestepSpacing::Linspace | $crate::TimestepSpacing::Trailing => max.into(),
            }
        }

        fn scale_model_input(
            &self,
            sample: Tensor<B, 4>,
            timestep: f64,
        ) -> Result<Tensor<B, 4>, SchedulerError> {
            let rung = self.ladder.rung(timestep)?;
            let sigma = self.ladder.seen(rung);
            let dtype = sample.dtype();
            let seen = $crate::tensor::widen(sample).div_scalar((sigma * sigma + 1.0).sqrt());
            Ok($crate::tensor::cast(seen, dtype))
        }
    };
}
pub(crate) use noise_level_methods;
