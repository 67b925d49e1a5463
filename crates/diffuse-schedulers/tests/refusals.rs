//! Errors: everything that Diffusers rejects, everything with which it computes NaN, and invalid
//! input.

mod common;

use std::collections::BTreeMap;

use burn::prelude::*;
use burn_flex::Flex;
use common::{another_set, numbers, object, rows};
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

/// The messages of `rejected.json`, and how many cases have each. CLASS is the case's sampler, A
/// and B are two sigmas.
const REJECTED: [(usize, &str); 34] = [
    (
        10,
        "`rescale_betas_zero_snr` and `prediction_type` `epsilon` do not go together in CLASS: \
         the sample at timestep 999 holds no image to recover, choose `prediction_type` \
         `v_prediction`, or a `timestep_spacing` that does not visit it (`leading`)",
    ),
    (
        36,
        "`prediction_type` is `sample`, which CLASS does not support: expected `epsilon`, \
         `v_prediction`",
    ),
    (
        1,
        "`num_inference_steps` is `1`, CLASS supports at least 4 with `skip_prk_steps` `false`",
    ),
    (
        2,
        "`lower_order_final` `false` and `final_sigmas_type` `zero` do not go together in \
         CLASS: the last step is infinitely long, choose `final_sigmas_type` `sigma_min`",
    ),
    (
        1,
        "`solver_type` `bh1` and `final_sigmas_type` `zero` do not go together in CLASS: the \
         last step is infinitely long, choose `final_sigmas_type` `sigma_min`",
    ),
    (
        2,
        "`predict_x0` `false` and `final_sigmas_type` `zero` do not go together in CLASS: the \
         last step is infinitely long, choose `final_sigmas_type` `sigma_min`",
    ),
    (
        1,
        "`beta_schedule` is `quadratic`, which CLASS does not support: unknown variant \
         `quadratic`, expected one of `linear`, `scaled_linear`, `squaredcos_cap_v2`, \
         `sigmoid`, `laplace`, `exp`",
    ),
    (
        1,
        "`num_inference_steps` is `1001`, CLASS supports 1 to 1000 (`num_train_timesteps`)",
    ),
    (
        2,
        "`timesteps` cannot be used by CLASS: they must be in descending order",
    ),
    (
        1,
        "`timesteps` cannot be used by CLASS: each must be in `0..num_train_timesteps`",
    ),
    (
        1,
        "`timestep_spacing` is `log`, which CLASS does not support: unknown variant `log`, \
         expected one of `linspace`, `leading`, `trailing`",
    ),
    (
        1,
        "`prediction_type` is `flow`, which CLASS does not support: unknown variant `flow`, \
         expected one of `epsilon`, `original_sample`, `sample`, `v_prediction`",
    ),
    (
        2,
        "`use_karras_sigmas`, `use_exponential_sigmas` and `use_beta_sigmas` do not go together \
         in CLASS: only one of them can be true",
    ),
    (
        1,
        "`interpolation_type` is `cubic`, which CLASS does not support: unknown variant \
         `cubic`, expected `linear` or `log_linear`",
    ),
    (
        1,
        "`final_sigmas_type` is `one`, which CLASS does not support: unknown variant `one`, \
         expected `zero` or `sigma_min`",
    ),
    (
        2,
        "`solver_type` is `rk4`, which CLASS does not support: unknown variant `rk4`, expected \
         one of `bh1`, `bh2`, `heun`, `logrho`, `midpoint`",
    ),
    (
        1,
        "`variance_type` `fixed_large_log` and more than the last step do not go together in \
         CLASS: it is the square root of a negative number, choose `fixed_large`",
    ),
    (
        1,
        "`beta_schedule` is `sigmoid`, which CLASS does not support: expected `linear`, \
         `scaled_linear`, `squaredcos_cap_v2`",
    ),
    (
        3,
        "`timesteps` cannot be used by CLASS: they are chosen already, by `use_*_sigmas`, \
         `use_lu_lambdas` or `timestep_type`",
    ),
    (
        1,
        "these options and the number of steps do not go together in CLASS: two neighbouring \
         sigmas are equal, choose fewer steps or `lower_order_final` `true`",
    ),
    (
        7,
        "the sigmas A and B do not go together in CLASS: f32 cannot tell their squares from a \
         sum of both: choose more steps, `use_exponential_sigmas`, or another `beta_schedule`",
    ),
    (
        1,
        "`algorithm_type` `deis` and `final_sigmas_type` `zero` do not go together in CLASS: \
         the last step is infinitely long, choose `final_sigmas_type` `sigma_min`, or \
         `algorithm_type` `dpmsolver++`",
    ),
    (
        9,
        "`algorithm_type` `dpmsolver` and `final_sigmas_type` `zero` do not go together in \
         CLASS: the last step is infinitely long, choose `final_sigmas_type` `sigma_min`, or \
         `algorithm_type` `dpmsolver++`",
    ),
    (
        1,
        "`algorithm_type` is `dpm3`, which CLASS does not support: unknown variant `dpm3`, \
         expected one of `dpmsolver`, `dpmsolver++`, `sde-dpmsolver`, `sde-dpmsolver++`, `deis`",
    ),
    (
        1,
        "`solver_type` is `rk4`, which CLASS does not support: unknown variant `rk4`, expected \
         one of `bh1`, `bh2`, `logrho`, `midpoint`, `heun`",
    ),
    (
        1,
        "`algorithm_type` is `sde-dpmsolver`, which CLASS does not support: expected \
         `dpmsolver`, `dpmsolver++`, `sde-dpmsolver++`, `deis`",
    ),
    (
        1,
        "`algorithm_type` is `sde`, which CLASS does not support: unknown variant `sde`, \
         expected one of `deis`, `dpmsolver`, `dpmsolver++`",
    ),
    (
        1,
        "`num_inference_steps` is `51`, CLASS supports 1 to 50 (`original_inference_steps`)",
    ),
    (
        1,
        "`num_inference_steps` is `2000`, CLASS supports 1 to 50 (`original_inference_steps`)",
    ),
    (
        1,
        "`algorithm_type` is `x`, which CLASS does not support: unknown variant `x`, expected \
         `data_prediction` or `noise_prediction`",
    ),
    (
        5,
        "`timestep_spacing` is `linspace`, which CLASS does not support: expected `leading`, \
         `trailing`",
    ),
    (
        3,
        "`prediction_type` `sample` and `set_alpha_to_one` `true` do not go together in CLASS: \
         an image without noise does not determine the noise, choose `set_alpha_to_one` `false`",
    ),
    (
        4,
        "`algorithm_type` `sde-dpmsolver` and `final_sigmas_type` `zero` do not go together in \
         CLASS: the last step is infinitely long, choose `final_sigmas_type` `sigma_min`, or \
         `algorithm_type` `dpmsolver++`",
    ),
    (
        1,
        "these options and 3 steps do not go together in CLASS: step 3 has no finite result \
         because two neighbouring sigmas are equal, choose fewer steps, a lower order, or \
         another `timestep_spacing`",
    ),
];

#[test]
fn all_that_the_reference_refuses() {
    let mut cases = rows("rejected.json");
    // `TimestepRequest` cannot ask for two things at once.
    cases.retain(|case| case["set_timesteps"].as_object().unwrap().len() <= 1);
    let mut messages = BTreeMap::new();
    for case in &cases {
        let class = case["scheduler"].as_str().unwrap();
        let refused = attempt(class, &case["config"], &case["set_timesteps"]);
        let message = refused.expect_err(&format!("accepted: {case}")).to_string();
        let mut message = message.replace(&format!("`{class}`"), "CLASS");
        if message.starts_with("the sigmas ") {
            let (_, rest) = message.split_once(" do not").unwrap();
            message = format!("the sigmas A and B do not{rest}");
        }
        *messages.entry(message).or_insert(0) += 1;
    }
    if another_set().is_none() {
        let expected = REJECTED.map(|(count, message)| (message.to_string(), count));
        assert_eq!(messages, BTreeMap::from(expected));
    }
}

/// Each error names the option, its value, and what to choose.
#[track_caller]
fn check(class: &str, config: Value, request: Value, expected: &str) {
    let error = attempt(class, &config, &request).expect_err("accepted");
    assert_eq!(error.to_string(), expected);
}

#[test]
fn values() {
    check(
        "ddpm",
        json!({"beta_schedule": "quadratic"}),
        json!({}),
        "`beta_schedule` is `quadratic`, which `DDPMScheduler` does not support: unknown variant \
         `quadratic`, expected one of `linear`, `scaled_linear`, `squaredcos_cap_v2`, `sigmoid`, \
         `laplace`, `exp`",
    );
    check(
        "ddim",
        json!({"beta_schedule": "sigmoid"}),
        json!({}),
        "`beta_schedule` is `sigmoid`, which `DDIMScheduler` does not support: expected \
         `linear`, `scaled_linear`, `squaredcos_cap_v2`",
    );
    check(
        "ddim",
        json!({"beta_start": "a"}),
        json!({}),
        "`beta_start` is `a`, which `DDIMScheduler` does not support: invalid type: string \
         \"a\", expected f64",
    );
    check(
        "ddim",
        json!({"beta_start": null}),
        json!({}),
        "`beta_start` is `null`, which `DDIMScheduler` does not support: invalid type: null, \
         expected f64",
    );
    check(
        "ddim",
        json!({"beta_end": 2}),
        json!({}),
        "`beta_end` is `2`, which `DDIMScheduler` does not support: expected a number between 0 \
         and 1",
    );
    check(
        "ddim",
        json!({"beta_end": "NaN"}),
        json!({}),
        "`beta_end` is `NaN`, which `DDIMScheduler` does not support: expected a number between \
         0 and 1",
    );
    check(
        "ddim",
        json!({"num_train_timesteps": 0}),
        json!({}),
        "`num_train_timesteps` is `0`, which `DDIMScheduler` does not support: expected 1 to \
         1000000",
    );
    check(
        "ddim",
        json!({"num_train_timesteps": 1e18 as u64}),
        json!({}),
        "`num_train_timesteps` is `1000000000000000000`, which `DDIMScheduler` does not support: \
         expected 1 to 1000000",
    );
    check(
        "ddim",
        json!({"num_train_timesteps": -5}),
        json!({}),
        "`num_train_timesteps` is `-5`, which `DDIMScheduler` does not support: invalid value: \
         integer `-5`, expected usize",
    );
    check(
        "ddim",
        json!({"trained_betas": [0.1, 0.2]}),
        json!({}),
        "`trained_betas` is `a list of 2`, which `DDIMScheduler` does not support: expected one \
         entry for each of `num_train_timesteps`",
    );
    check(
        "ddim",
        json!({"num_train_timesteps": 1, "trained_betas": [1.5]}),
        json!({}),
        "`DDIMScheduler` cannot use these betas (`trained_betas`, a list of 1, \
         `num_train_timesteps` `1`): `β` at timestep 0 is 1.5, not in `0..1`",
    );
    check(
        "ddim",
        json!({"clip_sample_range": -1.0}),
        json!({}),
        "`clip_sample_range` is `-1`, which `DDIMScheduler` does not support: expected a number \
         of at least 0",
    );
    check(
        "ddim",
        json!({"thresholding": true, "dynamic_thresholding_ratio": 1.5}),
        json!({}),
        "`dynamic_thresholding_ratio` is `1.5`, which `DDIMScheduler` does not support: expected \
         a number between 0 and 1",
    );
    check(
        "pndm",
        json!({"prediction_type": "sample"}),
        json!({}),
        "`prediction_type` is `sample`, which `PNDMScheduler` does not support: expected \
         `epsilon`, `v_prediction`",
    );
    check(
        "unipc",
        json!({"use_flow_sigmas": true}),
        json!({}),
        "`use_flow_sigmas` is `true`, which `UniPCMultistepScheduler` does not support: expected \
         `false`",
    );
    check(
        "unipc",
        json!({"prediction_type": "flow_prediction"}),
        json!({}),
        "`prediction_type` is `flow_prediction`, which `UniPCMultistepScheduler` does not \
         support: unknown variant `flow_prediction`, expected one of `epsilon`, \
         `original_sample`, `sample`, `v_prediction`",
    );
    check(
        "unipc",
        json!({"solver_order": 0}),
        json!({}),
        "`solver_order` is `0`, which `UniPCMultistepScheduler` does not support: expected 1 to \
         12",
    );
    check(
        "unipc",
        json!({"solver_p": {"_class_name": "Warp"}}),
        json!({}),
        "unknown scheduler `Warp`, expected one of `ddpm`, `DDPMScheduler`, `ddim`, \
         `DDIMScheduler`, `pndm`, `PNDMScheduler`, `euler`, `EulerDiscreteScheduler`, `euler-a`, \
         `EulerAncestralDiscreteScheduler`, `heun`, `HeunDiscreteScheduler`, `lms`, \
         `LMSDiscreteScheduler`, `dpm2`, `KDPM2DiscreteScheduler`, `dpm2-a`, \
         `KDPM2AncestralDiscreteScheduler`, `dpm++-2m`, `DPMSolverMultistepScheduler`, \
         `dpm++-2m-inverse`, `DPMSolverMultistepInverseScheduler`, `dpm++-2s`, \
         `DPMSolverSinglestepScheduler`, `dpm++-sde`, `DPMSolverSDEScheduler`, `deis`, \
         `DEISMultistepScheduler`, `unipc`, `UniPCMultistepScheduler`, `sa`, \
         `SASolverScheduler`, `lcm`, `LCMScheduler`, `tcd`, `TCDScheduler`, `ipndm`, \
         `IPNDMScheduler`, `ddim-inverse`, `DDIMInverseScheduler`, `edm-euler`, \
         `EDMEulerScheduler`, `edm-dpm++-2m`, `EDMDPMSolverMultistepScheduler`",
    );
    check(
        "euler",
        json!({"use_karras_sigmas": true, "sigma_min": 0.0}),
        json!({"num_inference_steps": 5}),
        "`sigma_min` is `0`, which `EulerDiscreteScheduler` does not support: expected a number \
         greater than 0 (from 1e-18 to 1e18)",
    );
}

#[test]
fn clashes() {
    let zero_snr = json!({
        "rescale_betas_zero_snr": true, "timestep_spacing": "trailing", "clip_sample": false
    });
    check(
        "ddpm",
        zero_snr.clone(),
        json!({"num_inference_steps": 5}),
        "`rescale_betas_zero_snr` and `prediction_type` `epsilon` do not go together in \
         `DDPMScheduler`: the sample at timestep 999 holds no image to recover, choose \
         `prediction_type` `v_prediction`, or a `timestep_spacing` that does not visit it \
         (`leading`)",
    );
    check(
        "ddim",
        zero_snr,
        json!({"num_inference_steps": 5}),
        "`rescale_betas_zero_snr` and `prediction_type` `epsilon` do not go together in \
         `DDIMScheduler`: the sample at timestep 999 holds no image to recover, choose \
         `prediction_type` `v_prediction`, or a `timestep_spacing` that does not visit it \
         (`leading`)",
    );
    let steps = json!({"num_inference_steps": 10});
    check(
        "unipc",
        json!({"solver_type": "bh1"}),
        steps.clone(),
        "`solver_type` `bh1` and `final_sigmas_type` `zero` do not go together in \
         `UniPCMultistepScheduler`: the last step is infinitely long, choose `final_sigmas_type` \
         `sigma_min`",
    );
    check(
        "unipc",
        json!({"predict_x0": false}),
        steps.clone(),
        "`predict_x0` `false` and `final_sigmas_type` `zero` do not go together in \
         `UniPCMultistepScheduler`: the last step is infinitely long, choose `final_sigmas_type` \
         `sigma_min`",
    );
    check(
        "unipc",
        json!({"lower_order_final": false}),
        steps,
        "`lower_order_final` `false` and `final_sigmas_type` `zero` do not go together in \
         `UniPCMultistepScheduler`: the last step is infinitely long, choose `final_sigmas_type` \
         `sigma_min`",
    );
    check(
        "unipc",
        json!({"solver_order": 3}),
        json!({"num_inference_steps": 1000}),
        "these options and the number of steps do not go together in `UniPCMultistepScheduler`: \
         two neighbouring sigmas are equal, choose fewer steps or `lower_order_final` `true`",
    );
    check(
        "unipc",
        json!({"solver_order": 12}),
        json!({"num_inference_steps": 50}),
        "`solver_order` `12` and 50 steps do not go together in `UniPCMultistepScheduler`: f32 \
         cannot solve the order conditions, choose a lower order or fewer steps",
    );
    check(
        "ddpm",
        json!({"variance_type": "fixed_large_log"}),
        json!({"num_inference_steps": 2}),
        "`variance_type` `fixed_large_log` and more than the last step do not go together in \
         `DDPMScheduler`: it is the square root of a negative number, choose `fixed_large`",
    );
}

#[test]
fn schedules() {
    for (short, class) in scheduler_names() {
        let most = match short {
            "lcm" | "tcd" => "1 to 50 (`original_inference_steps`)",
            _ => "1 to 1000 (`num_train_timesteps`)",
        };
        for steps in [0, 1001] {
            check(
                short,
                json!({}),
                json!({"num_inference_steps": steps}),
                &format!("`num_inference_steps` is `{steps}`, `{class}` supports {most}"),
            );
        }
    }
    check(
        "pndm",
        json!({}),
        json!({"num_inference_steps": 3}),
        "`num_inference_steps` is `3`, `PNDMScheduler` supports at least 4 with `skip_prk_steps` \
         `false`",
    );
    check(
        "ddpm",
        json!({"steps_offset": 1}),
        json!({"num_inference_steps": 1000}),
        "`num_inference_steps` `1000` and `steps_offset` `1` do not go together in \
         `DDPMScheduler`: the first timestep is `1000`, which is not in `0..1000`, choose fewer \
         steps",
    );
    check(
        "ddim",
        json!({}),
        json!({"timesteps": [5, 3]}),
        "`timesteps` cannot be used by `DDIMScheduler`: its `set_timesteps` takes a number of \
         steps",
    );
    check(
        "unipc",
        json!({}),
        json!({"sigmas": [5, 0]}),
        "`sigmas` cannot be used by `UniPCMultistepScheduler`: its `set_timesteps` takes a \
         number of steps",
    );
    check(
        "ddpm",
        json!({}),
        json!({"timesteps": [10, 20]}),
        "`timesteps` cannot be used by `DDPMScheduler`: they must be in descending order",
    );
    check(
        "ddpm",
        json!({}),
        json!({"timesteps": []}),
        "`timesteps` cannot be used by `DDPMScheduler`: there is none",
    );
    check(
        "ddpm",
        json!({}),
        json!({"timesteps": [7.5]}),
        "timestep `7.5` is not a whole number in `0..1000`",
    );
    check(
        "euler",
        json!({}),
        json!({"timesteps": [1000, 1]}),
        "`timesteps` cannot be used by `EulerDiscreteScheduler`: each must be in \
         `0..num_train_timesteps`",
    );
    check(
        "euler",
        json!({}),
        json!({"sigmas": [1.0]}),
        "`sigmas` cannot be used by `EulerDiscreteScheduler`: there must be one for each step \
         and one for the result",
    );
    let short_names = [
        "euler", "heun", "ddpm", "dpm++-2m", "dpm++-2s", "lcm", "tcd",
    ];
    let mut compared = 0;
    for (short, class) in scheduler_names().filter(|(short, _)| short_names.contains(short)) {
        for timesteps in [json!([9, 9, 1]), json!([1, 9])] {
            check(
                short,
                json!({}),
                json!({"timesteps": timesteps}),
                &format!(
                    "`timesteps` cannot be used by `{class}`: they must be in descending order"
                ),
            );
            compared += 1;
        }
    }
    assert_eq!(compared, 14);
    for sigmas in [
        json!([5.0, 5.0, 0.0]),
        json!([1.0, 5.0, 0.0]),
        json!([5.0, 1.0, 2.0]),
    ] {
        let request = json!({"sigmas": sigmas});
        check(
            "euler",
            json!({}),
            request,
            "`sigmas` cannot be used by `EulerDiscreteScheduler`: they must be in descending order",
        );
    }
    check(
        "euler",
        json!({}),
        json!({"sigmas": [1.0, 0.0, 0.0]}),
        "`sigmas` cannot be used by `EulerDiscreteScheduler`: each must be a number greater than \
         0, the last may be 0",
    );
    check(
        "euler",
        json!({"use_beta_sigmas": true}),
        json!({"timesteps": [9]}),
        "`timesteps` cannot be used by `EulerDiscreteScheduler`: they are chosen already, by \
         `use_*_sigmas`, `use_lu_lambdas` or `timestep_type`",
    );
}

/// Betas that leave no image in the noisiest samples are an error when the schedule is built, with
/// the same message in every sampler.
#[test]
fn betas() {
    let message = |class: &str, config: Value| {
        let error = attempt(class, &config, &json!({})).expect_err("accepted");
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
    assert_eq!(
        message("ddim", json!({"beta_start": 0.0})),
        "`DDIMScheduler` cannot use these betas (`beta_schedule` `linear`, `beta_start` `0`, \
         `beta_end` `0.02`, `num_train_timesteps` `1000`): `β` at timestep 0 adds no noise: it \
         must be greater than 0"
    );
    let rescaled = json!({"num_train_timesteps": 1, "rescale_betas_zero_snr": true});
    assert_eq!(
        message("ddim", rescaled),
        "`DDIMScheduler` cannot use these betas (`beta_schedule` `linear`, `beta_start` `0.0001`, \
         `beta_end` `0.02`, `num_train_timesteps` `1`, `rescale_betas_zero_snr` `true`): `β` at \
         timestep 0 is NaN, not in `0..1`"
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
    let error = unipc.set_timesteps(&2.into()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "`num_inference_steps` is `2`, `PNDMScheduler` supports at least 4 with `skip_prk_steps` \
         `false`"
    );
    assert_eq!(unipc.timesteps().len(), 10);
    for timestep in unipc.timesteps().to_vec() {
        step(unipc.as_mut(), timestep, StepOptions::default()).unwrap();
    }
}

#[test]
fn files() {
    for (text, expected) in [
        ("{", "the scheduler configuration is not valid JSON"),
        (
            "[]",
            "a scheduler configuration is a JSON object, not a list",
        ),
        (
            &"[".repeat(100_000),
            "the scheduler configuration is not valid JSON",
        ),
    ] {
        let error = SchedulerConfig::from_json_str(text).unwrap_err();
        assert_eq!(error.to_string(), expected);
    }
    let missing = SchedulerConfig::from_file("no/such/scheduler_config.json").unwrap_err();
    assert_eq!(
        missing.to_string(),
        "cannot read `no/such/scheduler_config.json`"
    );
    // The source is the system's.
    assert!(std::error::Error::source(&missing).is_some());
    let not_json =
        SchedulerConfig::from_file(file!().replace("crates/diffuse-schedulers/", "")).unwrap_err();
    assert_eq!(not_json.to_string(), "cannot use `tests/refusals.rs`");
    let SchedulerError::File { source, .. } = not_json else {
        panic!("{not_json}");
    };
    assert_eq!(
        source.to_string(),
        "the scheduler configuration is not valid JSON"
    );
    let saved = SchedulerConfig::default().save("no/such/folder/a.json");
    assert_eq!(
        saved.unwrap_err().to_string(),
        "cannot write `no/such/folder/a.json`"
    );
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
        let check = |scheduler: &mut dyn Scheduler<Flex>, timestep, options, expected: &str| {
            let error = step(scheduler, timestep, options).unwrap_err();
            assert_eq!(error.to_string(), expected, "{class}");
        };
        check(
            scheduler,
            0.0,
            default,
            "the scheduler has no timesteps yet: call `set_timesteps` first",
        );
        scheduler.set_timesteps(&4.into()).unwrap();
        check(
            scheduler,
            123.25,
            default,
            "timestep `123.25` is not in the schedule: pass the entries of `timesteps()`",
        );
        let first = scheduler.timesteps()[0];
        let (mut eta, mut s_churn, mut s_tmin) = (default, default, default);
        eta.eta = Some(f64::NAN);
        s_churn.s_churn = f64::INFINITY;
        s_tmin.s_tmin = f64::NAN;
        for (options, expected) in [
            (eta, "step option `eta` is `NaN`, expected a finite number"),
            (
                s_churn,
                "step option `s_churn` is `inf`, expected a finite number",
            ),
            (s_tmin, "step option `s_tmin` is `NaN`, expected a number"),
        ] {
            check(scheduler, first, options, expected);
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
    assert_eq!(
        error.to_string(),
        "step option `eta` is `3`, expected a number between 0 and 1"
    );
}

#[test]
fn past_the_end() {
    let mut euler = EulerDiscreteScheduler::<Flex>::new(EulerDiscreteConfig::default()).unwrap();
    euler.set_timesteps(&2.into()).unwrap();
    step(&mut euler, 999.0, StepOptions::default()).unwrap();
    step(&mut euler, 0.0, StepOptions::default()).unwrap();
    let finished = "all 2 steps have been taken: call `set_timesteps` to start again";
    let error = step(&mut euler, 0.0, StepOptions::default()).unwrap_err();
    assert_eq!(error.to_string(), finished);
    euler.set_timesteps(&2.into()).unwrap();
    euler.set_begin_index(7);
    let error = step(&mut euler, 0.0, StepOptions::default()).unwrap_err();
    assert_eq!(error.to_string(), finished);
}

#[test]
fn a_refused_schedule_changes_nothing() {
    let mut ddpm = DDPMScheduler::<Flex>::new(DDPMConfig::default()).unwrap();
    ddpm.set_timesteps(&4.into()).unwrap();
    let error = ddpm.set_timesteps(&0.into()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "`num_inference_steps` is `0`, `DDPMScheduler` supports 1 to 1000 (`num_train_timesteps`)"
    );
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
    for (name, class) in [
        ("heun", "HeunDiscreteScheduler"),
        ("dpm2", "KDPM2DiscreteScheduler"),
        ("dpm2-a", "KDPM2AncestralDiscreteScheduler"),
        ("dpm++-sde", "DPMSolverSDEScheduler"),
    ] {
        let config = SchedulerConfig::default();
        let mut scheduler =
            scheduler_from_config::<Flex>(&config, Some(name), &Overrides::new()).unwrap();
        scheduler.set_timesteps(&4.into()).unwrap();
        let timesteps = scheduler.timesteps().to_vec();
        scheduler.set_begin_index(1);
        let inside = step(scheduler.as_mut(), timesteps[1], StepOptions::default());
        assert_eq!(
            inside.unwrap_err().to_string(),
            format!("`{class}` cannot start here: a step has 2 evaluations, this is not the first")
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
