//! How fast errors fall as steps double, on an equation whose solution is known.
//!
//! If images are normally distributed with deviation 1, the best model sees `x0 = x / (1 + σ²)` in `x = x0 + σ ε`, and the
//! ODE from `σ` to `σ'` takes `x` to `x √((1 + σ'²) / (1 + σ²))`. The last step, to level 0, is left out.

use burn::prelude::*;
use burn_flex::Flex;
use diffuse_schedulers::{Generator, SchedulerConfig, StepOptions, scheduler_from_config};
use serde_json::{Value, json};

/// The error at the last level before 0, relative to the solution, after so many steps.
fn error(name: &str, options: &Value, steps: usize) -> f64 {
    let mut options = options.as_object().unwrap().clone();
    options.insert("use_exponential_sigmas".into(), true.into());
    let config = SchedulerConfig::default();
    let mut scheduler = scheduler_from_config::<Flex>(&config, Some(name), &options).unwrap();
    scheduler.set_timesteps(&steps.into()).unwrap();
    let sigmas: Vec<f64> = scheduler
        .sigmas()
        .unwrap()
        .iter()
        .map(|&s| s.into())
        .collect();
    let scaled = scheduler.init_noise_sigma() == 1.0;
    let in_levels = |x: f64, sigma: f64| {
        if scaled {
            x * (1.0 + sigma * sigma).sqrt()
        } else {
            x
        }
    };
    let spread = |sigma: f64| (1.0 + sigma * sigma).sqrt();

    let device = Default::default();
    let ones = Tensor::<Flex, 4>::ones([1, 1, 1, 1], &device);
    let mut sample = ones * scheduler.init_noise_sigma();
    let start = in_levels(1.0, sigmas[0]) * scheduler.init_noise_sigma();
    let timesteps = scheduler.timesteps().to_vec();
    let mut generator = Generator::new(0);
    let calls = timesteps.len() - 1;
    for (call, &timestep) in timesteps.iter().take(calls).enumerate() {
        let input = scheduler
            .scale_model_input(sample.clone(), timestep)
            .unwrap();
        // A sample scaled to the level it is at has the model's variance; a second call inside a step is at the level
        // that its scaling gives away.
        let level = match scaled {
            true => sigmas[call],
            false => {
                let ratio: f32 = (sample.clone() / input.clone()).into_scalar();
                (f64::from(ratio).powi(2) - 1.0).max(0.0).sqrt()
            }
        };
        // ε = σ x / (1 + σ²), and the model sees x / √(1 + σ²).
        let output = input * (level / spread(level));
        sample = scheduler
            .step(
                output,
                timestep,
                sample,
                &StepOptions::default(),
                &mut generator,
            )
            .unwrap()
            .prev_sample;
    }
    let last = match scaled {
        true => sigmas[calls],
        false => sigmas
            .iter()
            .copied()
            .filter(|&sigma| sigma > 0.0)
            .fold(f64::INFINITY, f64::min),
    };
    let end: f32 = sample.into_scalar();
    let end = in_levels(end.into(), last);
    let solution = start * spread(last) / spread(sigmas[0]);
    (end / solution - 1.0).abs()
}

/// The order that halving the steps shows must be at least the stated one, with some room.
#[track_caller]
fn check(name: &str, options: Value, order: f64) {
    let errors = [16, 32].map(|steps| error(name, &options, steps));
    let seen = (errors[0] / errors[1]).log2();
    assert!(errors[0] < 0.2, "{name} {options}: error {}", errors[0]);
    assert!(
        seen > order - 0.3,
        "{name} {options}: order {seen:.2}, not {order}"
    );
}

#[test]
fn first() {
    check("euler", json!({}), 1.0);
    check("dpm++-2m", json!({"solver_order": 1}), 1.0);
    check("dpm++-2s", json!({"solver_order": 1}), 1.0);
    check("deis", json!({"solver_order": 1}), 1.0);
}

#[test]
fn second() {
    check("heun", json!({}), 2.0);
    check("dpm2", json!({}), 2.0);
    check("dpm++-2m", json!({}), 2.0);
    check("dpm++-2m", json!({"solver_type": "heun"}), 2.0);
    check(
        "dpm++-2m",
        json!({"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
        2.0,
    );
    check("deis", json!({}), 2.0);
    check("unipc", json!({}), 2.0);
}

#[test]
fn higher() {
    check("lms", json!({}), 3.0);
    check("deis", json!({"solver_order": 3}), 3.0);
    check("unipc", json!({"solver_order": 3}), 3.0);
    // The reference's third order takes half the curvature (see `dpm_weights.rs`), and the rest is of order 2.
    check("dpm++-2m", json!({"solver_order": 3}), 2.0);
}
