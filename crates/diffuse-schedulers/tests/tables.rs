//! Noise schedules and timesteps against Diffusers' tables.

mod common;

use burn_flex::Flex;
use common::{Tensors, another_set, check_close, object, read, rows};
use diffuse_schedulers::{
    DDIMConfig, DDIMScheduler, DDPMConfig, DDPMScheduler, EulerDiscreteConfig,
    EulerDiscreteScheduler, FinalSigmasType, NoiseSchedule, PNDMConfig, PNDMScheduler, Scheduler,
    SchedulerConfig, SpacingOptions, TimestepSpacing, UniPCMultistepConfig,
    UniPCMultistepScheduler,
};
use serde_json::Value;

/// The noise schedule of each class that has one.
macro_rules! noise_schedule_of {
    ($($scheduler:ident)*) => {
        fn noise_schedule(class: &str, config: &SchedulerConfig) -> NoiseSchedule {
            match class {
                $(stringify!($scheduler) => {
                    let scheduler = diffuse_schedulers::$scheduler::<Flex>::from_config(config);
                    scheduler.unwrap().noise_schedule().clone()
                })*
                other => panic!("`{other}` is missing here"),
            }
        }
    };
}

noise_schedule_of! {
    DDPMScheduler DDIMScheduler DDIMInverseScheduler PNDMScheduler EulerDiscreteScheduler
    EulerAncestralDiscreteScheduler HeunDiscreteScheduler LMSDiscreteScheduler
    KDPM2DiscreteScheduler KDPM2AncestralDiscreteScheduler DPMSolverMultistepScheduler
    DPMSolverMultistepInverseScheduler DPMSolverSinglestepScheduler DPMSolverSDEScheduler
    DEISMultistepScheduler UniPCMultistepScheduler SASolverScheduler LCMScheduler TCDScheduler
}

#[test]
fn noise_schedules() {
    let tables = Tensors::read("betas.safetensors");
    let mut kinds = std::collections::BTreeSet::new();
    let has_schedule = |case: &Value| case.get("schedule").is_some();
    for case in rows("trajectories.json").into_iter().filter(has_schedule) {
        let schedule = case["schedule"].as_str().unwrap();
        let config = SchedulerConfig::from_values(object(&case["config"]));
        let actual = noise_schedule(case["scheduler"].as_str().unwrap(), &config);
        let expected = |part: &str| tables.get(&format!("{schedule}.{part}"));
        let wide = |numbers: &[f32]| numbers.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let (betas, alphas) = (wide(actual.betas()), wide(actual.alphas_cumprod()));
        let what = format!("{schedule} of {}", case["name"]);
        if case["config"]["rescale_betas_zero_snr"] == true {
            // Diffusers' square root is not correctly rounded, which shows in the last digits
            // of `√ᾱ` and much larger in the betas, differences of neighbours. `ᾱ` is their
            // product.
            let root = |numbers: Vec<f64>| numbers.into_iter().map(f64::sqrt).collect::<Vec<_>>();
            check_close(
                &what,
                &root(alphas),
                &root(expected("alphas_cumprod")),
                |_| 3e-7,
            );
        } else {
            check_close(&what, &alphas, &expected("alphas_cumprod"), |x| 1e-6 * x);
            check_close(&what, &betas, &expected("betas"), |beta| 1e-6 * beta);
        }
        kinds.insert(schedule.to_string());
    }
    if another_set().is_none() {
        assert_eq!(kinds.len(), 14);
    }
}

#[test]
fn straight_tables_are_exact() {
    let tables = Tensors::read("betas.safetensors");
    for case in rows("trajectories.json")
        .into_iter()
        .filter(|case| case.get("schedule").is_some())
    {
        let config = SchedulerConfig::from_values(object(&case["config"]));
        let schedule = noise_schedule(case["scheduler"].as_str().unwrap(), &config);
        let kind = case["config"]["beta_schedule"].as_str().unwrap_or("linear");
        if case["config"]["rescale_betas_zero_snr"] == true || !kind.ends_with("linear") {
            continue;
        }
        let expected = tables.get(&format!(
            "{}.alphas_cumprod",
            case["schedule"].as_str().unwrap()
        ));
        let actual: Vec<f64> = schedule
            .alphas_cumprod()
            .iter()
            .map(|&x| x.into())
            .collect();
        assert_eq!(actual, expected, "{}", case["name"]);
    }
}

#[test]
fn every_number_of_steps() {
    let spacing: Value = serde_json::from_slice(&read("spacing.json")).unwrap();
    for timestep_spacing in [
        TimestepSpacing::Linspace,
        TimestepSpacing::Leading,
        TimestepSpacing::Trailing,
    ] {
        let key = serde_json::to_value(timestep_spacing).unwrap();
        let row = |class: &str| {
            spacing[format!("{class}.{}", key.as_str().unwrap())]["weighted_sums"].clone()
        };
        let spacing = SpacingOptions {
            timestep_spacing,
            ..Default::default()
        };
        let mut ddim = DDIMScheduler::<Flex>::new(DDIMConfig {
            spacing: spacing.clone(),
            ..Default::default()
        })
        .unwrap();
        let mut unipc = UniPCMultistepScheduler::<Flex>::new(UniPCMultistepConfig {
            spacing,
            final_sigmas_type: FinalSigmasType::SigmaMin,
            ..Default::default()
        })
        .unwrap();
        check_every(&mut ddim, &row("DDIMScheduler"), 1000);
        // With more steps than intervals, neighbouring timesteps are equal and need not make sense.
        check_every(&mut unipc, &row("UniPCMultistepScheduler"), 998);
    }
}

/// Compares the count of timesteps and the sum of each times its place.
#[track_caller]
fn check_every(scheduler: &mut dyn Scheduler<Flex>, weighted_sums: &Value, most: usize) {
    for (steps, expected) in (1..=most).zip(weighted_sums.as_array().unwrap()) {
        scheduler.set_timesteps(&steps.into()).unwrap();
        let timesteps = scheduler.timesteps();
        assert_eq!(timesteps.len(), steps);
        let sum: f64 = timesteps
            .iter()
            .zip(1..)
            .map(|(timestep, place)| timestep * f64::from(place))
            .sum();
        assert_eq!(
            sum,
            expected.as_f64().unwrap(),
            "{scheduler:?} with {steps} steps",
            scheduler = scheduler.config().class_name()
        );
    }
}

/// Diffusers' trailing spacing has one entry too many, -1, for 62 numbers of steps.
#[test]
fn as_many_timesteps_as_steps() {
    let spacing: Value = serde_json::from_slice(&read("spacing.json")).unwrap();
    let extra = spacing["DDIMScheduler.trailing"]["extra_entry"]
        .as_array()
        .unwrap()
        .clone();
    assert_eq!(extra.len(), 62);
    assert_eq!(extra[..3], [61, 103, 121]);
    let spacing = SpacingOptions {
        timestep_spacing: TimestepSpacing::Trailing,
        ..Default::default()
    };
    let config = DDPMConfig {
        spacing,
        ..Default::default()
    };
    let mut scheduler = DDPMScheduler::<Flex>::new(config).unwrap();
    for steps in extra {
        let steps = steps.as_u64().unwrap() as usize;
        scheduler.set_timesteps(&steps.into()).unwrap();
        assert_eq!(scheduler.timesteps().len(), steps);
        assert!(scheduler.timesteps().last().unwrap() >= &0.0);
    }
}

#[test]
fn fifty_steps_of_ddpm_cat_256() {
    let config = SchedulerConfig::from_json_str(
        r#"{"_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "beta_end": 0.02,
            "beta_schedule": "linear", "beta_start": 0.0001, "clip_sample": true,
            "num_train_timesteps": 1000, "trained_betas": null, "variance_type": "fixed_small"}"#,
    )
    .unwrap();
    let mut scheduler = DDPMScheduler::<Flex>::from_config(&config).unwrap();
    scheduler.set_timesteps(&50.into()).unwrap();
    let expected: Vec<f64> = (0..50).rev().map(|i| f64::from(20 * i)).collect();
    assert_eq!(scheduler.timesteps(), expected);
    assert_eq!(expected[..2], [980.0, 960.0]);
}

/// The first step is taken twice: 50 steps are 51 model calls.
#[test]
fn pndm_evaluates_once_more_than_it_steps() {
    let config = PNDMConfig {
        skip_prk_steps: true,
        spacing: SpacingOptions {
            steps_offset: 1,
            ..SpacingOptions::LEADING
        },
        ..Default::default()
    };
    let mut scheduler = PNDMScheduler::<Flex>::new(config).unwrap();
    scheduler.set_timesteps(&50.into()).unwrap();
    assert_eq!(scheduler.timesteps().len(), 51);
    assert_eq!(scheduler.timesteps()[..4], [981.0, 961.0, 961.0, 941.0]);
}

#[test]
fn euler_timesteps_are_not_rounded() {
    let mut scheduler =
        EulerDiscreteScheduler::<Flex>::new(EulerDiscreteConfig::default()).unwrap();
    scheduler.set_timesteps(&50.into()).unwrap();
    assert_eq!(
        scheduler.timesteps()[1],
        f64::from((999.0 * 48.0 / 49.0) as f32)
    );
}
