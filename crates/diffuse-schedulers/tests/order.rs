//! The order of convergence, on an equation with a known solution.
//!
//! If images are normally distributed with deviation 1, the best model predicts `x0 = x / (1 + σ²)`
//! from `x = x0 + σ ε`, and the ODE from `σ` to `σ'` takes `x` to `x √((1 + σ'²) / (1 + σ²))`. The
//! last step, to sigma 0, is left out; of samplers whose steps are even in time, all below the
//! middle of the schedule.
//!
//! Not covered: samplers that draw noise (`ddpm`, `euler-a`, `dpm2-a`, `dpm++-sde`, `sa`) or are
//! for consistency models (`lcm`, `tcd`).

use burn::prelude::*;
use burn_flex::Flex;
use diffuse_schedulers::{
    DDIMScheduler, Generator, SchedulerConfig, StepOptions, scheduler_from_config,
};
use serde_json::{Value, json};

/// The error at the last sigma before 0, relative to the solution, after so many steps.
fn error(name: &str, options: &Value, steps: usize) -> f64 {
    let options = options.as_object().unwrap().clone();
    let exponential = json!({"use_exponential_sigmas": true});
    let config = SchedulerConfig::from_values(exponential.as_object().unwrap().clone());
    let mut scheduler = scheduler_from_config::<Flex>(&config, Some(name), &options).unwrap();
    scheduler.set_timesteps(&steps.into()).unwrap();
    let timesteps = scheduler.timesteps().to_vec();
    let (sigmas, calls): (Vec<f64>, usize) = match scheduler.sigmas() {
        Some(sigmas) => (
            sigmas.iter().map(|&sigma| sigma.into()).collect(),
            timesteps.len() - 1,
        ),
        // Even in time.
        None => {
            let upwards = timesteps[0] < timesteps[1];
            let schedule = DDIMScheduler::<Flex>::from_config(&config).unwrap();
            let table = schedule.noise_schedule().alphas_cumprod();
            let sigma_of = |&t: &f64| (1.0 / f64::from(table[t as usize]) - 1.0).sqrt();
            (
                timesteps.iter().map(sigma_of).collect(),
                timesteps
                    .iter()
                    .filter(|&&t| (t > 499.0) != upwards)
                    .count(),
            )
        }
    };
    let scaled = scheduler.init_noise_sigma() == 1.0;
    let in_sigma = |x: f64, sigma: f64| {
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
    let start = in_sigma(1.0, sigmas[0]) * scheduler.init_noise_sigma();
    let mut generator = Generator::new(0);
    for (call, &timestep) in timesteps.iter().take(calls).enumerate() {
        let input = scheduler
            .scale_model_input(sample.clone(), timestep)
            .unwrap();
        // A sample that was scaled by its own sigma has the model's variance; a second call inside
        // a step has the sigma that its scaling gives away.
        let sigma = match scaled {
            true => sigmas[call],
            false => {
                let ratio: f32 = (sample.clone() / input.clone()).into_scalar();
                (f64::from(ratio).powi(2) - 1.0).max(0.0).sqrt()
            }
        };
        // ε = σ x / (1 + σ²), and the model sees x / √(1 + σ²). EDM's preconditioning, with data of
        // deviation 1, leaves nothing to the model.
        let output = match name.starts_with("edm") {
            true => input.zeros_like(),
            false => input * (sigma / spread(sigma)),
        };
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
    let end = in_sigma(end.into(), last);
    let solution = start * spread(last) / spread(sigmas[0]);
    (end / solution - 1.0).abs()
}

/// The order that more steps show must be at least the stated one, with some room.
#[track_caller]
fn check_between(steps: [usize; 2], name: &str, options: Value, order: f64) {
    let errors = steps.map(|steps| error(name, &options, steps));
    check_errors(steps, errors, &format!("{name} {options}"), order);
}

#[track_caller]
fn check_errors(steps: [usize; 2], errors: [f64; 2], name: &str, order: f64) {
    let seen = (errors[0] / errors[1]).ln() / (steps[1] as f64 / steps[0] as f64).ln();
    assert!(errors[0] < 0.2, "{name}: error {}", errors[0]);
    // Below, what is left is the rounding of the tables, which shows any order.
    assert!(errors[1] > 1e-5, "{name}: error {}", errors[1]);
    assert!(seen > order - 0.3, "{name}: order {seen:.2}, not {order}");
}

#[track_caller]
fn check(name: &str, options: Value, order: f64) {
    check_between([16, 32], name, options, order);
}

/// The error of `ipndm` from angle 1.3 to 0.2 in equal steps, for images of deviation 2 (for
/// deviation 1 its solution stands still, and every step is exact): at the angle `φ`,
/// `x ∝ √(4 cos²φ + sin²φ)`.
fn ipndm_error(steps: usize) -> f64 {
    let [start, end] = [1.3, 0.2];
    let angle = |step: usize| start + (end - start) * step as f64 / steps as f64;
    let betas: Vec<f64> = (0..=steps).map(|step| angle(step).sin()).collect();
    let options = json!({"trained_betas": betas});
    let options = options.as_object().unwrap();
    let config = SchedulerConfig::from_values(serde_json::Map::new());
    let mut scheduler = scheduler_from_config::<Flex>(&config, Some("ipndm"), options).unwrap();
    scheduler.set_timesteps(&steps.into()).unwrap();

    let variance = |angle: f64| 4.0 * angle.cos().powi(2) + angle.sin().powi(2);
    let mut sample = Tensor::<Flex, 4>::ones([1, 1, 1, 1], &Default::default());
    let mut generator = Generator::new(0);
    for (step, timestep) in scheduler.timesteps().to_vec().into_iter().enumerate() {
        let angle = angle(step);
        assert!((timestep - angle / std::f64::consts::FRAC_PI_2).abs() < 1e-6);
        let velocity = sample.clone() * (-3.0 * angle.cos() * angle.sin() / variance(angle));
        let options = StepOptions::default();
        sample = scheduler
            .step(velocity, timestep, sample, &options, &mut generator)
            .unwrap()
            .prev_sample;
    }
    let end_at: f32 = sample.into_scalar();
    let solution = (variance(end) / variance(start)).sqrt();
    (f64::from(end_at) / solution - 1.0).abs()
}

#[test]
fn first() {
    check("euler", json!({}), 1.0);
    check("dpm++-2m", json!({"solver_order": 1}), 1.0);
    check("dpm++-2s", json!({"solver_order": 1}), 1.0);
    check("deis", json!({"solver_order": 1}), 1.0);
    check("edm-euler", json!({"sigma_data": 1.0}), 1.0);
    let in_time = json!({"timestep_spacing": "trailing", "clip_sample": false});
    check_between([20, 40], "ddim", in_time, 1.0);
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
    check("dpm++-2s", json!({}), 2.0);
    check("edm-dpm++-2m", json!({"sigma_data": 1.0}), 2.0);
    check("deis", json!({}), 2.0);
    check("unipc", json!({}), 2.0);
    // Fewer steps show less (0.9 to 1.7 from 20 to 40 and from 25 to 50), more end in the rounding
    // of the tables.
    for spacing in ["leading", "trailing"] {
        let in_time = json!({"timestep_spacing": spacing, "skip_prk_steps": true});
        check_between([50, 100], "pndm", in_time, 2.0);
    }
}

#[test]
fn second_whatever_its_estimates() {
    // Up to four estimates, but the first step is of order 1, and so is each in a variable that the
    // steps are not even in.
    check_errors([20, 40], [20, 40].map(ipndm_error), "ipndm", 2.0);
}

#[test]
fn upwards() {
    let in_time = json!({"timestep_spacing": "trailing", "clip_sample": false});
    check_between([20, 40], "ddim-inverse", in_time, 1.0);
    // Its sigma schedules lose steps (docs/schedulers.md), so the sigmas are even in the noise
    // schedule itself.
    let squares = |t: usize| (0.05_f64 * 100_f64.powf(t as f64 / 999.0)).powi(2);
    let betas: Vec<f64> = (0..1000)
        .map(|t| match t {
            0 => 1.0 - 1.0 / (1.0 + squares(0)),
            _ => 1.0 - (1.0 + squares(t - 1)) / (1.0 + squares(t)),
        })
        .collect();
    for (order, shown) in [(1, 1.0), (2, 2.0), (3, 2.0)] {
        let options = json!({
            "use_exponential_sigmas": false, "trained_betas": betas, "solver_order": order,
        });
        check("dpm++-2m-inverse", options, shown);
    }
}

#[test]
fn higher() {
    check("lms", json!({}), 3.0);
    check("deis", json!({"solver_order": 3}), 3.0);
    // Whole blocks of three steps and one to sigma 0.
    check_between([31, 61], "dpm++-2s", json!({"solver_order": 3}), 3.0);
    check("unipc", json!({"solver_order": 3}), 3.0);
    // Diffusers' third order takes half of the second derivative, and the rest is of order 2.
    check("dpm++-2m", json!({"solver_order": 3}), 2.0);
}
