//! Options passed from one sampler to another, against Diffusers' `from_config`.

mod common;

use burn::tensor::Tensor;
use burn_flex::Flex;
use common::{another_set, check_close, numbers, object, read, rows};
use diffuse_schedulers::{
    BetaOptions, ClipOptions, DDIMConfig, DDIMScheduler, Generator, Overrides, Scheduler,
    SchedulerConfig, StepOptions, TimestepRequest, scheduler_catalog, scheduler_from_config,
    scheduler_names,
};
use serde_json::{Map, Value, json};

fn load(config: &SchedulerConfig, class: &str, overrides: &Overrides) -> Box<dyn Scheduler<Flex>> {
    scheduler_from_config(config, Some(class), overrides)
        .unwrap_or_else(|error| panic!("{class}: {error}"))
}

/// Numbers are equal whether they are written with a decimal point or not.
fn same(a: &Value, b: &Value) -> bool {
    a == b || a.as_f64().is_some() && a.as_f64() == b.as_f64()
}

#[track_caller]
fn check_values(what: &str, config: &SchedulerConfig, expected: &Value) {
    for (key, expected) in expected.as_object().unwrap() {
        let actual = config
            .get(key)
            .unwrap_or_else(|| panic!("{what}: `{key}` is missing"));
        assert!(
            same(actual, expected),
            "{what}: `{key}` is {actual}, expected {expected}"
        );
    }
}

#[track_caller]
fn check(case: &Value) {
    let name = case["name"].as_str().unwrap();
    let source = SchedulerConfig::from_values(object(&case["source"]));
    let chain: Vec<&str> = case["chain"]
        .as_array()
        .unwrap()
        .iter()
        .map(|class| class.as_str().unwrap())
        .collect();
    let own = source.class_name().unwrap().to_string();
    let known = |class: &str| scheduler_names().any(|(_, known)| known == class);

    // The source need not be loaded as its own class, if this crate does not have it: that changes
    // no value.
    let mut warnings = 0;
    let mut config = source;
    if known(&own) {
        config = load(&config, &own, &Overrides::new()).config().clone();
        warnings += usize::from(!config.ignored().is_empty());
    }
    let mut overrides = object(&case["overrides_of_first"]);
    let mut last = None;
    for class in &chain {
        let scheduler = load(&config, class, &overrides);
        config = scheduler.config().clone();
        warnings += usize::from(!config.ignored().is_empty());
        overrides = Overrides::new();
        last = Some(scheduler);
    }
    check_values(&format!("{name}: effective"), &config, &case["effective"]);
    check_values(&format!("{name}: retained"), &config, &case["retained"]);
    let expected =
        case["effective"].as_object().unwrap().len() + case["retained"].as_object().unwrap().len();
    let actual = config
        .values()
        .keys()
        .filter(|key| !key.starts_with('_'))
        .count();
    assert_eq!(actual, expected, "{name}: number of keys");
    let defaulted: Vec<Value> = config.defaulted().map(Value::from).collect();
    assert_eq!(
        Value::from(defaulted),
        case["defaulted"],
        "{name}: defaulted"
    );
    let expected = case["warnings"].as_u64().or(case["ignored_with_warning"]
        .as_array()
        .map(|list| list.len() as u64));
    if known(&own) {
        assert_eq!(warnings as u64, expected.unwrap(), "{name}: warnings");
    }
    let mut scheduler = last.unwrap();
    scheduler.set_timesteps(&10.into()).unwrap();
    let timesteps = scheduler.timesteps();
    let whole = timesteps.iter().all(|t| t.fract() == 0.0);
    check_close(
        &format!("{name}: timesteps"),
        timesteps,
        &numbers(&case["timesteps_10"]),
        |t| {
            if whole {
                0.0
            } else {
                2e-6 * t.abs().max(100.0)
            }
        },
    );
}

#[test]
fn chains() {
    let cases = rows("interchange.json");
    cases.iter().for_each(check);
    if another_set().is_none() {
        assert_eq!(cases.len(), 29);
    }
}

/// Every class to every class, by what differs from the defaults of the class that it becomes.
#[test]
fn all_pairs() {
    let file: Value = serde_json::from_slice(&read("pairs.json")).unwrap();
    let sources = file["sources"].as_array().unwrap();
    let classes: Vec<&str> = scheduler_names().map(|(_, class)| class).collect();
    assert_eq!(sources.len(), classes.len());
    let text = |value: &Value| value.as_str().unwrap().to_string();
    let (mut compared, mut refused) = (0, Vec::new());
    for row in file["rows"].as_array().unwrap() {
        let (from, to) = (text(&row["from"]), text(&row["to"]));
        let what = format!("{from} to {to}");
        let source = sources
            .iter()
            .find(|source| source["_class_name"] == from.as_str());
        let source = SchedulerConfig::from_values(object(source.unwrap()));
        let own = load(&source, &from, &Overrides::new());
        let made = scheduler_from_config::<Flex>(own.config(), Some(&to), &Overrides::new());
        compared += 1;
        if row["refused"] == true {
            let error = made.err().unwrap_or_else(|| panic!("{what} is accepted"));
            refused.push(error.to_string());
            continue;
        }
        let made = made.unwrap_or_else(|error| panic!("{what}: {error}"));
        let mut expected = object(&file["defaults"][&to]);
        expected.extend(object(&row["differs"]));
        let config = made.config();
        check_values(&what, config, &Value::Object(expected.clone()));
        let own_keys = config.values().keys().filter(|key| !key.starts_with('_'));
        assert_eq!(own_keys.count(), expected.len(), "{what}: number of keys");
        let defaulted: Vec<Value> = config.defaulted().map(Value::from).collect();
        assert_eq!(
            Value::from(defaulted),
            row["defaulted"],
            "{what}: defaulted"
        );
        let warnings = u64::from(!config.ignored().is_empty());
        assert_eq!(row["warnings"], warnings, "{what}: warnings");
    }
    assert_eq!(compared, classes.len() * classes.len());
    let unknown = |value: &str, class: &str, known: &str| {
        format!(
            "`algorithm_type` is `{value}`, which `{class}` does not support: unknown variant \
             `{value}`, expected {known}"
        )
    };
    let clash = |class: &str| {
        format!(
            "`algorithm_type` `deis` and `final_sigmas_type` `zero` do not go together in \
             `{class}`: the last step is infinitely long, choose `final_sigmas_type` `sigma_min`, \
             or `algorithm_type` `dpmsolver++`"
        )
    };
    let [deis, sasolver] = [
        "one of `deis`, `dpmsolver`, `dpmsolver++`",
        "`data_prediction` or `noise_prediction`",
    ];
    if another_set().is_none() {
        assert_eq!(
            refused,
            [
                unknown("sde-dpmsolver++", "DEISMultistepScheduler", deis),
                unknown("sde-dpmsolver++", "SASolverScheduler", sasolver),
                clash("DPMSolverMultistepScheduler"),
                clash("DPMSolverSinglestepScheduler"),
                unknown("deis", "SASolverScheduler", sasolver),
                clash("EDMDPMSolverMultistepScheduler"),
            ]
        );
    }
}

#[test]
fn switching_back_restores() {
    let source =
        json!({"_class_name": "PNDMScheduler", "skip_prk_steps": true, "beta_start": 0.00085});
    let source = SchedulerConfig::from_values(object(&source));
    let euler = load(&source, "euler", &Overrides::new());
    let pndm = load(euler.config(), "PNDMScheduler", &Overrides::new());
    assert_eq!(pndm.config().get("skip_prk_steps"), Some(&true.into()));
    assert_eq!(pndm.config().class_name(), Some("PNDMScheduler"));
}

#[test]
fn saved_with_a_bare_infinity() {
    let text = String::from_utf8(read("saved_dpmsolver_multistep.json")).unwrap();
    let config = SchedulerConfig::from_json_str(&text).unwrap();
    assert_eq!(config.to_json_string(), text);
    let unipc = load(&config, "unipc", &Overrides::new());
    assert_eq!(unipc.config().get("solver_type"), Some(&"bh2".into()));
    let saved = unipc.config().to_json_string();
    let mut lines = saved.lines().map(str::trim);
    assert!(lines.any(|line| line == "\"lambda_min_clipped\": -Infinity,"));
    assert!(unipc.config().ignored().is_empty());
}

/// Diffusers loads what is saved here, and what it saves then is loaded here, without a change
/// of any option.
#[test]
fn saved_here_loads_there_and_back() {
    let cases = rows("saved.json");
    assert_eq!(cases.len(), scheduler_names().count());
    for case in &cases {
        let (class, text) = (
            case["scheduler"].as_str().unwrap(),
            case["text"].as_str().unwrap(),
        );
        let none = SchedulerConfig::default();
        let ours = load(&none, class, &object(&case["options"]));
        assert_eq!(ours.config().to_json_string(), text, "{class}");
        let again = SchedulerConfig::from_json_str(case["saved_again"].as_str().unwrap()).unwrap();
        let mut back = load(&again, class, &Overrides::new());
        check_values(
            class,
            back.config(),
            &Value::Object(ours.config().values().clone()),
        );
        let keys = |config: &SchedulerConfig| {
            let public = config.values().keys().filter(|key| !key.starts_with('_'));
            public.count()
        };
        assert_eq!(keys(back.config()), keys(ours.config()), "{class}");
        back.set_timesteps(&10.into()).unwrap();
        let expected = numbers(&case["timesteps_10"]);
        check_close(class, back.timesteps(), &expected, |t| match t.fract() {
            0.0 => 0.0,
            _ => 2e-6 * t.abs().max(100.0),
        });
    }
}

#[test]
fn saving_spells_out_defaults() {
    let folder = std::env::temp_dir().join(format!("diffuse-schedulers-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let betas = BetaOptions {
        beta_start: 0.00085,
        ..Default::default()
    };
    let options = DDIMConfig {
        betas,
        clip: ClipOptions::OFF,
        ..Default::default()
    };
    let ddim = DDIMScheduler::<Flex>::new(options).unwrap();
    assert!(
        ddim.config()
            .defaulted()
            .any(|key| key == "timestep_spacing")
    );
    ddim.config().save(&folder).unwrap();
    let saved = SchedulerConfig::from_file(&folder).unwrap();
    assert_eq!(
        saved,
        SchedulerConfig::from_file(folder.join("scheduler_config.json")).unwrap()
    );
    std::fs::remove_dir_all(&folder).unwrap();
    // Now `leading` is given and goes along; before, it was a default of DDIM and did not.
    let spacing = |config: &SchedulerConfig| {
        load(config, "euler", &Overrides::new())
            .config()
            .get("timestep_spacing")
            .cloned()
    };
    assert_eq!(spacing(&saved), Some("leading".into()));
    assert_eq!(spacing(ddim.config()), Some("linspace".into()));
}

#[test]
fn patches_do_not_count_as_given() {
    let source = json!({"_class_name": "PNDMScheduler", "skip_prk_steps": true});
    let pndm = load(
        &SchedulerConfig::from_values(object(&source)),
        "pndm",
        &Overrides::new(),
    );
    let mut config = pndm.config().clone();
    config.patch("steps_offset", 1);
    let mut patched = load(&config, "pndm", &Overrides::new());
    patched.set_timesteps(&50.into()).unwrap();
    assert_eq!(patched.timesteps()[0], 981.0);
    assert_eq!(
        load(patched.config(), "ddim", &Overrides::new())
            .config()
            .get("steps_offset"),
        Some(&0.into())
    );
    config.set("steps_offset", 1);
    assert_eq!(
        load(&config, "ddim", &Overrides::new())
            .config()
            .get("steps_offset"),
        Some(&1.into())
    );
}

#[test]
fn names() {
    let none = SchedulerConfig::default();
    let fail = |config: &SchedulerConfig, name: Option<&str>, overrides: Map<String, Value>| {
        scheduler_from_config::<Flex>(config, name, &overrides).unwrap_err()
    };
    let missing = fail(&none, None, Map::new()).to_string();
    let unknown = fail(&none, Some("warp"), Map::new()).to_string();
    let known: Vec<String> = scheduler_names()
        .map(|(short, class)| format!("`{short}`, `{class}`"))
        .collect();
    let known = known.join(", ");
    assert_eq!(
        missing,
        format!(
            "`_class_name` is missing from the scheduler configuration: name a sampler, one of \
             {known}"
        )
    );
    assert_eq!(
        unknown,
        format!("unknown scheduler `warp`, expected one of {known}")
    );
    let misspelt = fail(&none, Some("ddim"), object(&json!({"clip_samples": true}))).to_string();
    assert_eq!(
        misspelt,
        "`DDIMScheduler` has no option `clip_samples`, it has `num_train_timesteps`, `beta_start`, \
         `beta_end`, `beta_schedule`, `trained_betas`, `clip_sample`, `clip_sample_range`, \
         `thresholding`, `dynamic_thresholding_ratio`, `sample_max_value`, `timestep_spacing`, \
         `steps_offset`, `prediction_type`, `set_alpha_to_one`, `rescale_betas_zero_snr`"
    );
}

/// A name of another program is a class and options; the caller's options take precedence.
#[test]
fn popular_names() {
    let none = SchedulerConfig::default();
    let check = |name: &str, class: &str, options: Value| {
        let made = load(&none, name, &Overrides::new());
        assert_eq!(made.config().class_name(), Some(class), "{name}");
        check_values(name, made.config(), &options);
    };
    let karras = json!({"use_karras_sigmas": true});
    check(
        "DPM++ 2M",
        "DPMSolverMultistepScheduler",
        json!({"use_karras_sigmas": false}),
    );
    check(
        "dpm++ 2m karras",
        "DPMSolverMultistepScheduler",
        karras.clone(),
    );
    let both = json!({"use_karras_sigmas": true, "algorithm_type": "sde-dpmsolver++"});
    check("DPM++ 2M SDE Karras", "DPMSolverMultistepScheduler", both);
    check("DPM++ SDE Karras", "DPMSolverSDEScheduler", karras.clone());
    check("DPM2 Karras", "KDPM2DiscreteScheduler", karras.clone());
    check("LMS Karras", "LMSDiscreteScheduler", karras);
    check("PLMS", "PNDMScheduler", json!({"skip_prk_steps": true}));
    check("Euler a", "EulerAncestralDiscreteScheduler", json!({}));
    check("EULER-A", "EulerAncestralDiscreteScheduler", json!({}));
    let own = object(&json!({"use_karras_sigmas": false}));
    let made = load(&none, "DPM++ 2M Karras", &own);
    assert_eq!(made.config().get("use_karras_sigmas"), Some(&false.into()));
    for info in scheduler_catalog() {
        assert!(!info.about.is_empty(), "{} is not described", info.name);
        for name in info.popular.iter().chain([&info.name, &info.class]) {
            let made = load(&none, name, &Overrides::new());
            assert_eq!(made.config().class_name(), Some(info.class), "{name}");
        }
    }
}

/// With noise that is predicted exactly, the predicted image is the one that it was added to.
#[test]
fn every_sampler_predicts_the_image_if_asked() {
    let text = r#"{"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "clip_sample": false, "steps_offset": 1,
        "skip_prk_steps": true}"#;
    let config = SchedulerConfig::from_json_str(text).unwrap();
    let device = Default::default();
    let image = Tensor::<Flex, 4>::from_data([[[[0.5, -1.25], [2.0, 0.125]]]], &device);
    let noise = Tensor::<Flex, 4>::from_data([[[[-0.7, 0.3], [1.1, -1.9]]]], &device);
    let mut predicted = 0;
    for name in [
        "pndm", "dpm++-2m", "dpm++-2s", "deis", "unipc", "sa", "ddim", "euler",
    ] {
        for asked in [false, true] {
            let mut scheduler = load(&config, name, &Overrides::new());
            scheduler
                .set_timesteps(&TimestepRequest::Steps(10))
                .unwrap();
            let timestep = scheduler.timesteps()[0];
            let sample = scheduler
                .add_noise(image.clone(), noise.clone(), &[timestep])
                .unwrap();
            let options = StepOptions {
                predict_original: asked,
                ..StepOptions::default()
            };
            let mut source = Generator::new(0);
            let output = scheduler
                .step(noise.clone(), timestep, sample, &options, &mut source)
                .unwrap();
            let own = matches!(name, "ddim" | "euler");
            assert_eq!(
                output.pred_original_sample.is_some(),
                own || asked,
                "{name}"
            );
            if let Some(original) = output.pred_original_sample {
                let error = (original - image.clone()).abs().max().into_scalar();
                assert!(error < 1e-4, "{name}: {error}");
                predicted += 1;
            }
        }
    }
    assert_eq!(predicted, 10);
}
