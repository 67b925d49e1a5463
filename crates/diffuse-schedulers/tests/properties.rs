//! Random options, samplers and numbers of steps: a run is finite or an error, and never panics.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::prelude::*;
use burn::tensor::DType;
use burn_flex::Flex;
use common::values;
use diffuse_schedulers::{
    Generator, NoiseSource, Overrides, Scheduler, SchedulerConfig, SchedulerError, StepOptions,
    TimestepRequest, randn_tensor, scheduler_from_config, scheduler_names,
};
use serde_json::{Value, json};

const SHAPE: [usize; 4] = [2, 1, 2, 2];

/// A small deterministic source of choices (Knuth's MMIX linear congruential generator).
struct Choices(u64);

impl Choices {
    fn below(&mut self, count: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % count
    }

    fn of<T: Clone>(&mut self, list: &[T]) -> T {
        list[self.below(list.len())].clone()
    }

    /// A value for an option, sensible or at the edge of sense.
    fn value(&mut self, key: &str) -> Value {
        let list = match key {
            "num_train_timesteps" => json!([1000, 1, 2, 10, 100]),
            "beta_start" => json!([1e-4, 0.00085, 0.02, 0.5, 1e-12, 0, 1, "NaN"]),
            "beta_end" => json!([0.012, 0.02, 0.1, 0.3, 0.9, 1, 1e-4, 1e-9]),
            "beta_schedule" => {
                json!([
                    "linear",
                    "scaled_linear",
                    "squaredcos_cap_v2",
                    "sigmoid",
                    "laplace",
                    "exp"
                ])
            }
            "trained_betas" => return self.betas(),
            "prediction_type" => json!(["epsilon", "sample", "v_prediction"]),
            "clip_sample_range" => json!([1.0, 0.0, 5.0]),
            "dynamic_thresholding_ratio" => json!([0.995, 0.0, 1.0]),
            "sample_max_value" => json!([1.0, 0.25, 100.0, "Infinity"]),
            "timestep_spacing" => json!(["linspace", "leading", "trailing"]),
            "steps_offset" => json!([0, 1, 7, 600]),
            "solver_order" | "predictor_order" | "corrector_order" => json!([1, 2, 3, 4, 12]),
            "algorithm_type" => json!([
                "dpmsolver",
                "dpmsolver++",
                "sde-dpmsolver",
                "sde-dpmsolver++",
                "deis",
                "data_prediction",
                "noise_prediction"
            ]),
            "solver_type" => json!(["midpoint", "heun", "bh1", "bh2", "logrho"]),
            "final_sigmas_type" => json!(["zero", "sigma_min"]),
            "lambda_min_clipped" => json!(["-Infinity", -5.1, 0.0, 4.0, 50.0]),
            "sigma_min" => json!([null, 0.002, 0.1, 10.0, 1e-30, 0.0]),
            "sigma_max" => json!([null, 80.0, 1.0, 0.05, 1e30, 1e300]),
            "sigma_data" => json!([0.5, 1.0, 1e-20, 1e20]),
            "sigma_schedule" => json!(["karras", "exponential"]),
            "rho" => json!([7.0, 1.0, 0.01, 100.0]),
            "variance_type" => json!([
                null,
                "fixed_small",
                "fixed_small_log",
                "fixed_large",
                "fixed_large_log",
                "learned",
                "learned_range"
            ]),
            "original_inference_steps" => json!([50, 1, 1000, 5]),
            "timestep_scaling" => json!([10.0, 0.0, 1e-30, 1e30, "Infinity"]),
            "interpolation_type" => json!(["linear", "log_linear"]),
            "timestep_type" => json!(["discrete", "continuous"]),
            "disable_corrector" => json!([[], [0], [0, 1, 2, 3]]),
            "solver_p" => json!([
                null,
                {"_class_name": "DPMSolverMultistepScheduler"},
                {"_class_name": "DDIMScheduler"},
                {"_class_name": "EulerAncestralDiscreteScheduler"}
            ]),
            "noise_sampler_seed" => json!([null, 5, [1, 2], [1, 2, 3]]),
            "flow_shift" | "shift_terminal" | "tau_func" => json!([null, 1.0]),
            "time_shift_type" => json!(["exponential"]),
            "use_flow_sigmas" | "use_dynamic_shifting" => json!([false, false, false, true]),
            _ => json!([true, false]),
        };
        self.of(list.as_array().unwrap())
    }

    fn betas(&mut self) -> Value {
        let last = self.of(&[0.02, 0.0, 1.0, 0.999]);
        let first = self.of(&[1e-4, 0.0, 1e-8]);
        let between = self.of(&[0.01, 0.0, 1e-7, 0.2]);
        let count = self.of(&[1000, 1000, 10]);
        let mut betas = vec![between; count];
        betas[0] = first;
        betas[count - 1] = last;
        self.of(&[Value::Null, json!(betas)])
    }

    fn request(&mut self) -> TimestepRequest {
        let few = [0, 1, 2, 3, 4, 5, 7, 10, 14, 15, 20, 1001];
        let steps = match self.below(20) {
            0 => self.of(&[50, 100, 999, 1000]),
            _ => self.of(&few),
        };
        let lists: [&[f64]; 6] = [
            &[999.0, 500.0, 20.0],
            &[9.0, 3.5, 0.0],
            &[500.0, 500.0, 1.0],
            &[1.0, 2.0],
            &[f64::NAN],
            &[],
        ];
        let list = self.of(&lists).to_vec();
        match self.below(8) {
            0 => TimestepRequest::Timesteps(list),
            1 => TimestepRequest::Sigmas(list),
            _ => TimestepRequest::Steps(steps),
        }
    }

    fn step_options(&mut self) -> StepOptions {
        StepOptions {
            eta: self.of(&[None, Some(0.0), Some(0.5), Some(1.0), Some(1.5)]),
            use_clipped_model_output: self.of(&[true, false]),
            s_churn: self.of(&[0.0, 0.0, 5.0, 1e9]),
            order: self.of(&[4, 1, 2, 0]),
            ..StepOptions::default()
        }
    }
}

/// A model whose outputs are bounded, with a variance where one is expected.
fn model(input: Tensor<Flex, 4>, config: &SchedulerConfig) -> Tensor<Flex, 4> {
    let output = input.cos().mul_scalar(0.5);
    let variance = config.get("variance_type").and_then(Value::as_str);
    match variance {
        Some("learned" | "learned_range") => {
            let variance = output.ones_like().mul_scalar(0.3);
            Tensor::cat(vec![output, variance], 1)
        }
        _ => output,
    }
}

fn run(
    scheduler: &mut dyn Scheduler<Flex>,
    begin: Option<usize>,
    options: &StepOptions,
    noise: &mut dyn NoiseSource,
) -> Result<Vec<f64>, SchedulerError> {
    let device = Default::default();
    let start = randn_tensor::<Flex>(noise, SHAPE, DType::F32, &device)?;
    let timesteps = scheduler.timesteps().to_vec();
    let (mut sample, begin) = match begin {
        None => (start * scheduler.init_noise_sigma(), 0),
        // Inside the schedule, or beyond it.
        Some(begin) => {
            scheduler.set_begin_index(begin);
            let timestep = timesteps.get(begin).copied().unwrap_or(7.0);
            let image = start.clone().cos();
            let noisy = scheduler.add_noise(image.clone(), start, &[timestep]);
            (noisy.unwrap_or(image), begin)
        }
    };
    for &timestep in timesteps.iter().skip(begin) {
        let input = scheduler.scale_model_input(sample.clone(), timestep)?;
        let output = model(input, scheduler.config());
        sample = scheduler
            .step(output, timestep, sample, options, noise)?
            .prev_sample;
    }
    Ok(values(&sample))
}

/// Whether a run is finite; errors are fine.
fn attempt(
    class: &str,
    overrides: &Overrides,
    requests: &[TimestepRequest],
    begin: Option<usize>,
    options: &StepOptions,
) -> Result<bool, SchedulerError> {
    let none = SchedulerConfig::default();
    let mut scheduler = scheduler_from_config::<Flex>(&none, Some(class), overrides)?;
    let scheduler = scheduler.as_mut();
    let mut finite = true;
    let mut last = Ok(true);
    for request in requests {
        let before = scheduler.timesteps().to_vec();
        let (timesteps, result) = match scheduler.set_timesteps(request) {
            Ok(()) => {
                let mut noise = Generator::new(0);
                (None, run(scheduler, begin, options, &mut noise))
            }
            // An error changes nothing.
            Err(error) => (Some(before), Err(error)),
        };
        if let Some(before) = timesteps {
            assert_eq!(scheduler.timesteps(), before);
        }
        finite &= scheduler.timesteps().iter().all(|t| t.is_finite());
        let mut sigmas = scheduler.sigmas().unwrap_or_default().iter();
        finite &= sigmas.all(|sigma| sigma.is_finite());
        last = result.map(|values| values.iter().all(|x| x.is_finite()));
    }
    last.map(|finite_end| finite && finite_end)
}

#[test]
fn runs_are_finite_or_refused() {
    let cases = std::env::var("DIFFUSE_SCHEDULER_CASES");
    let cases = cases.map_or(60, |count| count.parse().unwrap());
    let mut failed = Vec::new();
    let mut finished = 0;
    for (name, class) in scheduler_names() {
        let none = SchedulerConfig::default();
        let plain = scheduler_from_config::<Flex>(&none, Some(name), &Overrides::new()).unwrap();
        let keys: Vec<String> = plain.config().values().keys().cloned().collect();
        let mut choices = Choices(class.bytes().map(u64::from).sum());
        for _ in 0..cases {
            let count = choices.below(6);
            let overrides: Overrides = (0..count)
                .map(|_| {
                    let key = choices.of(&keys);
                    let value = choices.value(&key);
                    (key, value)
                })
                .collect();
            let requests = [choices.request(), choices.request()];
            let begin = choices.of(&[None, None, Some(0), Some(1), Some(2), Some(9)]);
            let options = choices.step_options();
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                attempt(class, &overrides, &requests, begin, &options)
            }));
            finished += usize::from(matches!(outcome, Ok(Ok(true))));
            if !matches!(outcome, Ok(Ok(true) | Err(_))) {
                let mut text = Value::from(overrides).to_string();
                text.truncate(300);
                let panicked = outcome.is_err();
                failed.push(format!(
                    "{class} {text} {requests:?} begin {begin:?} eta {:?} s_churn {} order {}: \
                     panicked {panicked}",
                    options.eta, options.s_churn, options.order
                ));
            }
        }
    }
    assert!(
        failed.is_empty(),
        "{}:\n{}",
        failed.len(),
        failed.join("\n")
    );
    assert!(
        finished > 6 * cases,
        "only {finished} runs came to their end"
    );
}

/// A list of `noise_sampler_seed` is one path for each image.
#[test]
fn a_list_of_noise_sampler_seeds() {
    let run = |seeds: Value, batch: usize| {
        let overrides = json!({"noise_sampler_seed": seeds});
        let (config, overrides) = (SchedulerConfig::default(), overrides.as_object().unwrap());
        let made = scheduler_from_config::<Flex>(&config, Some("dpm++-sde"), overrides);
        let mut scheduler = made?;
        scheduler.set_timesteps(&3.into())?;
        let mut sample = Tensor::<Flex, 4>::ones([batch, 1, 4, 5], &Default::default());
        for timestep in scheduler.timesteps().to_vec() {
            let (output, options) = (sample.clone().cos(), StepOptions::default());
            let mut noise = Generator::new(0);
            let step = scheduler.step(output, timestep, sample, &options, &mut noise);
            sample = step?.prev_sample;
        }
        Ok::<_, SchedulerError>(values(&sample))
    };
    let both = run(json!([9, 10]), 2).unwrap();
    assert_eq!(both[..20], run(json!(9), 1).unwrap());
    assert_eq!(both[20..], run(json!([10]), 1).unwrap());
    let message = |result: Result<Vec<f64>, SchedulerError>| result.unwrap_err().to_string();
    assert_eq!(
        message(run(json!([9, 10, 11]), 2)),
        "`noise_sampler_seed` is `a list of 3`, which `DPMSolverSDEScheduler` does not support: \
         expected one for each of the 2 images"
    );
    assert_eq!(
        message(run(json!("nine"), 1)),
        "`noise_sampler_seed` is `nine`, which `DPMSolverSDEScheduler` does not support: \
         expected a seed or a list of seeds"
    );
}

/// Row `i` of a batch is the image that its seed gives alone.
#[test]
fn rows_of_a_batch_are_images_of_their_own() {
    let mut drawn = 0;
    for (name, _) in scheduler_names() {
        for overrides in [
            json!({}),
            json!({"algorithm_type": "sde-dpmsolver++"}),
            json!({"solver_p": {"_class_name": "EulerAncestralDiscreteScheduler"}}),
            json!({"use_karras_sigmas": true}),
        ] {
            let overrides = overrides.as_object().unwrap().clone();
            let rows = |seeds: &[u64]| {
                let none = SchedulerConfig::default();
                let mut scheduler =
                    scheduler_from_config::<Flex>(&none, Some(name), &overrides).ok()?;
                if !scheduler.capabilities().noise && !overrides.contains_key("solver_p") {
                    return None;
                }
                scheduler.set_timesteps(&6.into()).unwrap();
                let mut noise: Vec<Generator> = seeds.iter().map(|s| Generator::new(*s)).collect();
                let options = StepOptions {
                    eta: scheduler.capabilities().eta.then_some(1.0),
                    s_churn: 2.0,
                    ..StepOptions::default()
                };
                let shape = [seeds.len(), 4, 3, 3];
                let device = Default::default();
                let start = randn_tensor::<Flex>(&mut noise, shape, DType::F32, &device).unwrap();
                let mut sample = start * scheduler.init_noise_sigma();
                for timestep in scheduler.timesteps().to_vec() {
                    let input = scheduler
                        .scale_model_input(sample.clone(), timestep)
                        .unwrap();
                    let output = input.cos().mul_scalar(0.5);
                    let step = scheduler.step(output, timestep, sample, &options, &mut noise);
                    sample = step.unwrap().prev_sample;
                }
                Some(values(&sample))
            };
            let Some(batch) = rows(&[5, 6, 7]) else {
                continue;
            };
            drawn += 1;
            for (row, seed) in [5, 6, 7].into_iter().enumerate() {
                let alone = rows(&[seed]).unwrap();
                assert_eq!(
                    batch[36 * row..][..36],
                    alone,
                    "{name} {overrides:?}: row {row}"
                );
            }
        }
    }
    assert_eq!(drawn, 18);
}
