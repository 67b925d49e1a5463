//! Errors: everything that Diffusers rejects, everything with which it computes NaN, and invalid
//! input.

mod common;

use burn::prelude::*;
use burn_flex::Flex;
use common::{numbers, object, rows};
use diffuse_schedulers::{
    DDIMConfig, DDIMScheduler, DDPMConfig, DDPMScheduler, EulerDiscreteConfig,
    EulerDiscreteScheduler, Generator, Overrides, PNDMConfig, PNDMScheduler, Scheduler,
    SchedulerConfig, SchedulerError, StepOptions, TimestepRequest, scheduler_from_config,
    scheduler_names,
};
use serde_json::{Value, json};

fn attempt(class: &str, config: &Value, request: &Value) -> Result<(), SchedulerError> {
    let config = SchedulerConfig::from_values(object(config));
    let mut scheduler = scheduler_from_config::<Flex>(&config, Some(class), &Overrides::new())?;
    let request = match (
        &request["num_inference_steps"],
        &request["timesteps"],
        &request["sigmas"],
    ) {
        (Value::Number(steps), ..) => TimestepRequest::Steps(steps.as_u64().unwrap() as usize),
        (_, timesteps @ Value::Array(_), _) => TimestepRequest::Timesteps(numbers(timesteps)),
        (.., sigmas @ Value::Array(_)) => TimestepRequest::Sigmas(numbers(sigmas)),
        _ => return Ok(()),
    };
    scheduler.set_timesteps(&request)
}

#[test]
fn all_that_the_reference_refuses() {
    let mut compared = 0;
    for case in rows("rejected.json") {
        let class = case["scheduler"].as_str().unwrap();
        let request = case["set_timesteps"].as_object().unwrap();
        let known = scheduler_names().any(|(_, known)| known == class);
        // `TimestepRequest` cannot ask for two things at once.
        if !known || request.len() > 1 {
            continue;
        }
        let refused = attempt(class, &case["config"], &case["set_timesteps"]);
        assert!(refused.is_err(), "accepted: {case}");
        compared += 1;
    }
    assert!(compared >= 25, "only {compared} rows");
}

/// Each error names the option, its value, and what to choose.
#[track_caller]
fn check(class: &str, config: Value, request: Value, words: &[&str]) {
    let error = attempt(class, &config, &request)
        .expect_err("accepted")
        .to_string();
    for word in words {
        assert!(error.contains(word), "`{word}` is not in: {error}");
    }
}

#[test]
fn values() {
    check(
        "ddpm",
        json!({"beta_schedule": "quadratic"}),
        json!({}),
        &["`beta_schedule`", "`quadratic`", "`scaled_linear`"],
    );
    check(
        "ddim",
        json!({"beta_schedule": "sigmoid"}),
        json!({}),
        &["`beta_schedule`", "`sigmoid`", "`squaredcos_cap_v2`"],
    );
    check(
        "ddim",
        json!({"beta_start": "a"}),
        json!({}),
        &["`beta_start`", "`a`", "f64"],
    );
    check(
        "ddim",
        json!({"beta_start": null}),
        json!({}),
        &["`beta_start`", "`null`"],
    );
    check(
        "ddim",
        json!({"beta_end": 2}),
        json!({}),
        &["`beta_end`", "`2`", "between 0 and 1"],
    );
    check(
        "ddim",
        json!({"beta_end": "NaN"}),
        json!({}),
        &["`beta_end`", "`NaN`"],
    );
    check(
        "ddim",
        json!({"num_train_timesteps": 0}),
        json!({}),
        &["`num_train_timesteps`", "`0`"],
    );
    check(
        "ddim",
        json!({"num_train_timesteps": 1e18 as u64}),
        json!({}),
        &["`num_train_timesteps`"],
    );
    check(
        "ddim",
        json!({"num_train_timesteps": -5}),
        json!({}),
        &["`num_train_timesteps`", "`-5`"],
    );
    check(
        "ddim",
        json!({"trained_betas": [0.1, 0.2]}),
        json!({}),
        &["`trained_betas`", "a list of 2"],
    );
    check(
        "ddim",
        json!({"num_train_timesteps": 1, "trained_betas": [1.5]}),
        json!({}),
        &["`trained_betas`"],
    );
    check(
        "ddim",
        json!({"clip_sample_range": -1.0}),
        json!({}),
        &["`clip_sample_range`", "`-1`"],
    );
    check(
        "ddim",
        json!({"thresholding": true, "dynamic_thresholding_ratio": 1.5}),
        json!({}),
        &["`dynamic_thresholding_ratio`"],
    );
    check(
        "pndm",
        json!({"prediction_type": "sample"}),
        json!({}),
        &["`prediction_type`", "`sample`", "`v_prediction`"],
    );
    check(
        "unipc",
        json!({"use_flow_sigmas": true}),
        json!({}),
        &["`use_flow_sigmas`", "`true`", "`false`"],
    );
    check(
        "unipc",
        json!({"prediction_type": "flow_prediction"}),
        json!({}),
        &["`prediction_type`", "`epsilon`"],
    );
    check(
        "unipc",
        json!({"solver_order": 0}),
        json!({}),
        &["`solver_order`", "`0`", "1 to 12"],
    );
    check(
        "unipc",
        json!({"solver_p": {"_class_name": "Warp"}}),
        json!({}),
        &["`Warp`"],
    );
    check(
        "euler",
        json!({"use_karras_sigmas": true, "sigma_min": 0.0}),
        json!({"num_inference_steps": 5}),
        &["`sigma_min`", "`0`"],
    );
}

#[test]
fn clashes() {
    let zero_snr = json!({
        "rescale_betas_zero_snr": true, "timestep_spacing": "trailing", "clip_sample": false
    });
    let words = [
        "`rescale_betas_zero_snr`",
        "`prediction_type`",
        "`v_prediction`",
        "`leading`",
    ];
    check(
        "ddpm",
        zero_snr.clone(),
        json!({"num_inference_steps": 5}),
        &words,
    );
    check("ddim", zero_snr, json!({"num_inference_steps": 5}), &words);
    let steps = json!({"num_inference_steps": 10});
    check(
        "unipc",
        json!({"solver_type": "bh1"}),
        steps.clone(),
        &["`solver_type` `bh1`", "`final_sigmas_type` `sigma_min`"],
    );
    check(
        "unipc",
        json!({"predict_x0": false}),
        steps.clone(),
        &["`predict_x0` `false`", "`sigma_min`"],
    );
    check(
        "unipc",
        json!({"lower_order_final": false}),
        steps,
        &["`lower_order_final` `false`", "`sigma_min`"],
    );
    check(
        "unipc",
        json!({"solver_order": 3}),
        json!({"num_inference_steps": 1000}),
        &["equal", "fewer steps"],
    );
    check(
        "unipc",
        json!({"solver_order": 12}),
        json!({"num_inference_steps": 50}),
        &["`solver_order` `12` and 50 steps", "lower order"],
    );
    check(
        "ddpm",
        json!({"variance_type": "fixed_large_log"}),
        json!({"num_inference_steps": 2}),
        &["`fixed_large`"],
    );
}

#[test]
fn schedules() {
    for (class, _) in scheduler_names() {
        let most = match class {
            "lcm" | "tcd" => "1 to 50 (`original_inference_steps`)",
            _ => "1 to 1000 (`num_train_timesteps`)",
        };
        let steps = |steps: usize| json!({"num_inference_steps": steps});
        check(
            class,
            json!({}),
            steps(0),
            &["`num_inference_steps` is `0`", most],
        );
        check(class, json!({}), steps(1001), &["`1001`", most]);
    }
    check(
        "pndm",
        json!({}),
        json!({"num_inference_steps": 3}),
        &["`3`", "at least 4", "`skip_prk_steps`"],
    );
    check(
        "ddpm",
        json!({"steps_offset": 1}),
        json!({"num_inference_steps": 1000}),
        &["`1000`", "0..1000"],
    );
    check(
        "ddim",
        json!({}),
        json!({"timesteps": [5, 3]}),
        &["`timesteps`", "number of steps"],
    );
    check(
        "unipc",
        json!({}),
        json!({"sigmas": [5, 0]}),
        &["`sigmas`", "number of steps"],
    );
    check(
        "ddpm",
        json!({}),
        json!({"timesteps": [10, 20]}),
        &["descending"],
    );
    check("ddpm", json!({}), json!({"timesteps": []}), &["none"]);
    check("ddpm", json!({}), json!({"timesteps": [7.5]}), &["`7.5`"]);
    check(
        "euler",
        json!({}),
        json!({"timesteps": [1000, 1]}),
        &["`timesteps`", "0..num_train_timesteps"],
    );
    check("euler", json!({}), json!({"sigmas": [1.0]}), &["`sigmas`"]);
    for class in [
        "euler", "heun", "ddpm", "dpm++-2m", "dpm++-2s", "lcm", "tcd",
    ] {
        for timesteps in [json!([9, 9, 1]), json!([1, 9])] {
            let request = json!({"timesteps": timesteps});
            check(class, json!({}), request, &["`timesteps`", "descending"]);
        }
    }
    for sigmas in [
        json!([5.0, 5.0, 0.0]),
        json!([1.0, 5.0, 0.0]),
        json!([5.0, 1.0, 2.0]),
    ] {
        let request = json!({"sigmas": sigmas});
        check("euler", json!({}), request, &["`sigmas`", "descending"]);
    }
    check(
        "euler",
        json!({}),
        json!({"sigmas": [1.0, 0.0, 0.0]}),
        &["`sigmas`", "greater than 0"],
    );
    check(
        "euler",
        json!({"use_beta_sigmas": true}),
        json!({"timesteps": [9]}),
        &["`timesteps`", "`use_*_sigmas`"],
    );
}

/// Betas that leave no image in the noisiest samples are an error when the schedule is built, with
/// the same message in every sampler.
#[test]
fn betas() {
    let message = |class: &str, config: Value| {
        let error = attempt(class, &config, &json!({})).expect_err("accepted");
        assert!(
            matches!(error, SchedulerError::NoiseSchedule { .. }),
            "{class}: {error}"
        );
        error.to_string()
    };
    for (short, class) in scheduler_names() {
        if short == "ipndm" || short.starts_with("edm") {
            continue;
        }
        let end = json!({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.9});
        assert_eq!(
            message(class, end),
            format!(
                "`{class}` cannot use these betas (`beta_schedule` `scaled_linear`, `beta_start` \
                 `0.00085`, `beta_end` `0.9`, `num_train_timesteps` `1000`): from timestep 618 of \
                 999 on nothing is left of the image (`ᾱ` underflows), choose smaller betas"
            )
        );
        let trained = json!({"num_train_timesteps": 100, "trained_betas": vec![1.0; 100]});
        assert_eq!(
            message(class, trained),
            format!(
                "`{class}` cannot use these betas (`trained_betas`, a list of 100, \
                 `num_train_timesteps` `100`): `β` at timestep 0 is 1, not in `0..1`"
            )
        );
    }
    message("ddim", json!({"beta_start": 0.0}));
    message(
        "ddim",
        json!({"num_train_timesteps": 1, "rescale_betas_zero_snr": true}),
    );
}

/// A `set_timesteps` that fails changes neither the run nor that of an inner sampler.
#[test]
fn a_refused_run_goes_on() {
    let options = json!({"solver_p": {"_class_name": "PNDMScheduler"}});
    let config = SchedulerConfig::default();
    let mut unipc =
        scheduler_from_config::<Flex>(&config, Some("unipc"), &object(&options)).unwrap();
    unipc.set_timesteps(&10.into()).unwrap();
    // PNDM needs at least four steps.
    assert!(unipc.set_timesteps(&2.into()).is_err());
    assert_eq!(unipc.timesteps().len(), 10);
    for timestep in unipc.timesteps().to_vec() {
        step(unipc.as_mut(), timestep, StepOptions::default()).unwrap();
    }
}

#[test]
fn files() {
    assert!(matches!(
        SchedulerConfig::from_json_str("{"),
        Err(SchedulerError::Json { .. })
    ));
    assert!(matches!(
        SchedulerConfig::from_json_str("[]"),
        Err(SchedulerError::NotAnObject { .. })
    ));
    assert!(matches!(
        SchedulerConfig::from_json_str(&"[".repeat(100_000)),
        Err(SchedulerError::Json { .. })
    ));
    let missing = SchedulerConfig::from_file("no/such/scheduler_config.json").unwrap_err();
    assert!(
        missing
            .to_string()
            .contains("no/such/scheduler_config.json")
    );
    assert!(std::error::Error::source(&missing).is_some());
    let not_json =
        SchedulerConfig::from_file(file!().replace("crates/diffuse-schedulers/", "")).unwrap_err();
    assert!(not_json.to_string().contains("refusals.rs"), "{not_json}");
    let SchedulerError::File { source, .. } = not_json else {
        panic!("{not_json}");
    };
    assert!(matches!(*source, SchedulerError::Json { .. }));
    let config = SchedulerConfig::default();
    assert!(matches!(
        config.save("no/such/folder/a.json"),
        Err(SchedulerError::Write { .. })
    ));
}

fn step(
    scheduler: &mut dyn Scheduler<Flex>,
    timestep: f64,
    options: StepOptions,
) -> Result<(), SchedulerError> {
    let x = Tensor::ones([1, 2, 2, 2], &Default::default());
    scheduler
        .step(x.clone(), timestep, x, &options, &mut Generator::new(0))
        .map(|_| ())
}

#[test]
fn steps() {
    let default = StepOptions::default();
    for (class, _) in scheduler_names() {
        let mut scheduler = scheduler_from_config::<Flex>(
            &SchedulerConfig::default(),
            Some(class),
            &Overrides::new(),
        )
        .unwrap();
        let scheduler = scheduler.as_mut();
        assert!(
            matches!(
                step(scheduler, 0.0, default),
                Err(SchedulerError::NoTimesteps)
            ),
            "{class}"
        );
        scheduler.set_timesteps(&4.into()).unwrap();
        let not_there = step(scheduler, 123.25, default);
        assert!(
            matches!(not_there, Err(SchedulerError::NotInSchedule { .. })),
            "{class}"
        );
        let first = scheduler.timesteps()[0];
        for options in [
            StepOptions {
                eta: Some(f64::NAN),
                ..default
            },
            StepOptions {
                s_churn: f64::INFINITY,
                ..default
            },
            StepOptions {
                s_tmin: f64::NAN,
                ..default
            },
        ] {
            assert!(
                matches!(
                    step(scheduler, first, options),
                    Err(SchedulerError::StepOption { .. })
                ),
                "{class}"
            );
        }
        step(scheduler, first, default).unwrap();
    }
}

#[test]
fn too_much_noise() {
    let mut ddim = DDIMScheduler::<Flex>::new(DDIMConfig::default()).unwrap();
    ddim.set_timesteps(&4.into()).unwrap();
    let error = step(
        &mut ddim,
        250.0,
        StepOptions {
            eta: Some(3.0),
            ..Default::default()
        },
    )
    .unwrap_err();
    assert!(matches!(
        error,
        SchedulerError::StepOption { name: "eta", .. }
    ));
}

#[test]
fn past_the_end() {
    let mut euler = EulerDiscreteScheduler::<Flex>::new(EulerDiscreteConfig::default()).unwrap();
    euler.set_timesteps(&2.into()).unwrap();
    step(&mut euler, 999.0, StepOptions::default()).unwrap();
    step(&mut euler, 0.0, StepOptions::default()).unwrap();
    let error = step(&mut euler, 0.0, StepOptions::default()).unwrap_err();
    assert!(matches!(error, SchedulerError::Finished { steps: 2 }));
    euler.set_timesteps(&2.into()).unwrap();
    euler.set_begin_index(7);
    assert!(matches!(
        step(&mut euler, 0.0, StepOptions::default()),
        Err(SchedulerError::Finished { .. })
    ));
}

#[test]
fn a_refused_schedule_changes_nothing() {
    let mut ddpm = DDPMScheduler::<Flex>::new(DDPMConfig::default()).unwrap();
    ddpm.set_timesteps(&4.into()).unwrap();
    assert!(ddpm.set_timesteps(&0.into()).is_err());
    assert_eq!(ddpm.timesteps(), [750.0, 500.0, 250.0, 0.0]);
}

#[test]
fn runge_kutta_starts_at_the_top() {
    let mut pndm = PNDMScheduler::<Flex>::new(PNDMConfig::default()).unwrap();
    pndm.set_timesteps(&10.into()).unwrap();
    assert_eq!(pndm.timesteps()[..5], [900.0, 850.0, 850.0, 800.0, 800.0]);
    step(&mut pndm, 900.0, StepOptions::default()).unwrap();
}

#[test]
#[should_panic(expected = "channels of the model output")]
fn shapes_are_checked() {
    let mut ddpm = DDPMScheduler::<Flex>::new(DDPMConfig::default()).unwrap();
    ddpm.set_timesteps(&4.into()).unwrap();
    let (output, sample) = (
        Tensor::ones([1, 6, 2, 2], &Default::default()),
        Tensor::ones([1, 3, 2, 2], &Default::default()),
    );
    let _ = ddpm.step(
        output,
        0.0,
        sample,
        &StepOptions::default(),
        &mut Generator::new(0),
    );
}

/// A run does not begin inside a step.
#[test]
fn steps_of_two_evaluations() {
    for name in ["heun", "dpm2", "dpm2-a", "dpm++-sde"] {
        let config = SchedulerConfig::default();
        let mut scheduler =
            scheduler_from_config::<Flex>(&config, Some(name), &Overrides::new()).unwrap();
        scheduler.set_timesteps(&4.into()).unwrap();
        let timesteps = scheduler.timesteps().to_vec();
        scheduler.set_begin_index(1);
        let inside = step(scheduler.as_mut(), timesteps[1], StepOptions::default());
        assert!(
            matches!(inside, Err(SchedulerError::WarmUp { .. })),
            "{name}"
        );
        scheduler.set_begin_index(2);
        for &timestep in &timesteps[2..] {
            step(scheduler.as_mut(), timestep, StepOptions::default()).unwrap();
        }
    }
}

/// A run goes in the order of its schedule; samplers without history go where the timestep says.
#[test]
fn order_of_the_steps() {
    for (name, _) in scheduler_names() {
        let config = SchedulerConfig::default();
        let mut scheduler =
            scheduler_from_config::<Flex>(&config, Some(name), &Overrides::new()).unwrap();
        scheduler.set_timesteps(&6.into()).unwrap();
        let timesteps = scheduler.timesteps().to_vec();
        let default = StepOptions::default();
        step(scheduler.as_mut(), timesteps[0], default).unwrap();
        let last = timesteps[timesteps.len() - 1];
        let skipped = step(scheduler.as_mut(), last, default);
        match (scheduler.capabilities().begin_index, skipped) {
            (false, Ok(())) => {}
            (true, Err(SchedulerError::OutOfOrder { timestep, expected })) => {
                assert_eq!([timestep, expected], [last, timesteps[1]], "{name}");
            }
            (_, skipped) => panic!("{name}: {skipped:?}"),
        }
        // An error changes nothing.
        step(scheduler.as_mut(), timesteps[1], default).unwrap();
    }
}

/// Several of the noisiest sigmas share a timestep: a run from the beginning takes all of them.
#[test]
fn doubled_timesteps_at_the_start() {
    let options = json!({"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": true});
    let mut refused = Vec::<&str>::new();
    for (name, _) in scheduler_names() {
        let config = SchedulerConfig::from_values(object(&options));
        let mut scheduler =
            scheduler_from_config::<Flex>(&config, Some(name), &Overrides::new()).unwrap();
        if scheduler.set_timesteps(&20.into()).is_err() {
            refused.push(name);
            continue;
        }
        for timestep in scheduler.timesteps().to_vec() {
            step(scheduler.as_mut(), timestep, StepOptions::default())
                .unwrap_or_else(|error| panic!("{name}: {error}"));
        }
    }
    assert!(refused.is_empty(), "{refused:?}");
}
