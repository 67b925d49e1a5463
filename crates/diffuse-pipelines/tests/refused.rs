//! Everything that the reference refuses is refused here, with a message that names what is wrong.

use std::ops::ControlFlow;

use burn::tensor::Tensor;
use burn_flex::Flex;
use diffuse_pipelines::clip::CLIPTextModel;
use diffuse_pipelines::schedulers::{Overrides, scheduler_from_config};
use diffuse_pipelines::unet::{ModelConfig, UNet2DConditionModel, UNet2DModel};
use diffuse_pipelines::vae::AutoencoderKL;
use diffuse_pipelines::{
    DDPMOptions, DDPMPipeline, Pretrained, StableDiffusionInputs, StableDiffusionOptions,
    StableDiffusionPipeline, generators,
};
use diffuse_testing::{read_json, reference};
use serde_json::{Map, Value};

type B = Flex;

/// What this crate's types make impossible: a prompt that is a number, callbacks by name.
const IMPOSSIBLE: [&str; 3] = [
    "pipeline_prompt_is_number",
    "pipeline_callback_steps",
    "pipeline_callback_tensors",
];

/// What the reference refuses and is allowed here: one negative prompt serves all prompts.
const ALLOWED: [&str; 2] = [
    "pipeline_negative_of_other_type",
    "pipeline_negative_of_other_length",
];

#[test]
fn what_the_reference_refuses_is_refused() {
    let path = reference().join("refused.json");
    if !path.is_file() {
        assert!(std::env::var_os("DIFFUSE_REFERENCE").is_some());
        return;
    }
    let rows = read_json(path);
    let rows = rows.as_array().unwrap();
    assert!(rows.len() >= 40);
    for row in rows {
        let name = row["name"].as_str().unwrap();
        if IMPOSSIBLE.contains(&name) || ALLOWED.contains(&name) {
            continue;
        }
        let error = match row["component"].as_str().unwrap() {
            "unet" => config_error::<UNet2DConditionModel<B>>(row),
            "unet_2d" => config_error::<UNet2DModel<B>>(row),
            "vae" => config_error::<AutoencoderKL<B>>(row),
            "text_encoder" => config_error::<CLIPTextModel<B>>(row),
            "pipeline" => call_error(row),
            other => panic!("{name}: {other}"),
        };
        let message = error.unwrap_or_else(|| panic!("{name} is not refused"));
        // Each message names the key or the option that is wrong, in backticks or as a number of
        // seeds.
        assert!(
            message.contains('`') || message.contains("seeds"),
            "{name}: {message}"
        );
    }
}

/// The error of a configuration with the row's changes.
fn config_error<M: Pretrained<B>>(row: &Value) -> Option<String> {
    let base = reference().join(row["base"].as_str().unwrap());
    let config = read_json(base.join("config.json"));
    let mut map: Map<String, Value> = config.as_object().unwrap().clone();
    map.extend(row["config"].as_object().unwrap().clone());
    let invalid = |message| diffuse_nn::config::ConfigError::Parse {
        path: "config.json".into(),
        message,
    };
    let error = M::Config::from_map(map, &invalid).err()?;
    Some(error.to_string())
}

fn call_error(row: &Value) -> Option<String> {
    let base = reference().join(row["base"].as_str().unwrap());
    let call = row["call"].as_object().unwrap();
    let count = |key: &str| {
        call.get(key)
            .and_then(Value::as_u64)
            .map(|count| count as usize)
    };
    let seeds = match count("generators") {
        // A list of one generator is one generator here.
        Some(1) => vec![0, 1, 2],
        Some(count) => (0..count as u64).collect(),
        None => vec![0],
    };
    if row["pipeline"] != "StableDiffusionPipeline" {
        let pipeline = DDPMPipeline::<B>::from_pretrained(base, &Default::default()).unwrap();
        let options = DDPMOptions {
            batch_size: count("batch_size").unwrap(),
            num_inference_steps: 2,
            seeds,
            ..DDPMOptions::default()
        };
        return pipeline
            .generate(&options)
            .err()
            .map(|error| error.to_string());
    }

    let mut pipeline =
        StableDiffusionPipeline::<B>::from_pretrained(base, &Default::default()).unwrap();
    let overrides: Overrides = row["scheduler_options"].as_object().unwrap().clone();
    let config = pipeline.scheduler.config();
    match scheduler_from_config(config, row["scheduler"].as_str(), &overrides) {
        Ok(scheduler) => pipeline.scheduler = scheduler,
        Err(error) => return Some(error.to_string()),
    }
    let texts = |key: &str| match call.get(key) {
        Some(Value::String(text)) => vec![text.clone()],
        Some(Value::Array(texts)) => {
            let texts = texts.iter().map(|text| text.as_str().unwrap().to_string());
            texts.collect()
        }
        _ => Vec::new(),
    };
    let numbers = |key: &str| {
        let numbers = call.get(key)?.as_array()?.iter();
        Some(numbers.map(|number| number.as_f64().unwrap()).collect())
    };
    let zeros = |key: &str| -> Option<Vec<usize>> {
        let shape = call.get(key)?.get("zeros")?.as_array()?.iter();
        Some(shape.map(|size| size.as_u64().unwrap() as usize).collect())
    };
    let embeds = |key: &str| {
        let shape: [usize; 3] = zeros(key)?.try_into().unwrap();
        Some(Tensor::zeros(shape, &Default::default()))
    };
    let start = zeros("latents").map(|shape| {
        let shape: [usize; 4] = shape.try_into().unwrap();
        Tensor::zeros(shape, &Default::default())
    });
    let options = StableDiffusionOptions {
        prompt: texts("prompt"),
        negative_prompt: texts("negative_prompt"),
        height: count("height"),
        width: count("width"),
        num_inference_steps: count("num_inference_steps").unwrap_or(2),
        timesteps: numbers("timesteps"),
        sigmas: numbers("sigmas"),
        num_images_per_prompt: count("num_images_per_prompt").unwrap_or(1),
        seeds,
        ..StableDiffusionOptions::default()
    };
    let inputs = StableDiffusionInputs {
        prompt_embeds: embeds("prompt_embeds"),
        negative_prompt_embeds: embeds("negative_prompt_embeds"),
        latents: start,
        ..StableDiffusionInputs::default()
    };
    let run = pipeline.generate_with(&options, inputs, |_| ControlFlow::Continue(()));
    let error = run.err()?;
    Some(error.to_string())
}

/// The error of a run with these options.
#[track_caller]
fn check(options: StableDiffusionOptions, expected: &str) {
    check_inputs(options, StableDiffusionInputs::default(), expected);
}

/// The error of a run with these options and inputs.
#[track_caller]
fn check_inputs(
    options: StableDiffusionOptions,
    inputs: StableDiffusionInputs<'_, B>,
    expected: &str,
) {
    let folder = reference().join("sd/base");
    let pipeline =
        StableDiffusionPipeline::<B>::from_pretrained(folder, &Default::default()).unwrap();
    let run = pipeline.generate_with(&options, inputs, |_| ControlFlow::Continue(()));
    let message = run.unwrap_err().to_string();
    assert!(message.contains(expected), "{message}");
}

fn options() -> StableDiffusionOptions {
    StableDiffusionOptions {
        num_inference_steps: 1,
        ..StableDiffusionOptions::from("a lighthouse")
    }
}

#[test]
fn options_that_make_no_sense_are_errors() {
    let base = options();
    check(
        StableDiffusionOptions {
            width: Some(0),
            ..base.clone()
        },
        "`width` is 0",
    );
    check(
        StableDiffusionOptions {
            height: Some(12),
            ..base.clone()
        },
        "`height` is 12",
    );
    check(
        StableDiffusionOptions {
            width: Some(1 << 30),
            height: Some(1 << 30),
            ..base.clone()
        },
        "too large",
    );
    check(
        StableDiffusionOptions {
            num_inference_steps: 0,
            ..base.clone()
        },
        "num_inference_steps",
    );
    check(
        StableDiffusionOptions {
            num_inference_steps: 1001,
            ..base.clone()
        },
        "1001",
    );
    check(
        StableDiffusionOptions {
            guidance_scale: f64::NAN,
            ..base.clone()
        },
        "`guidance_scale` is NaN",
    );
    check(
        StableDiffusionOptions {
            eta: -0.5,
            ..base.clone()
        },
        "`eta` is -0.5",
    );
    check(
        StableDiffusionOptions {
            guidance_rescale: 2.0,
            ..base.clone()
        },
        "`guidance_rescale` is 2",
    );
    check(
        StableDiffusionOptions {
            clip_skip: Some(99),
            ..base.clone()
        },
        "`clip_skip` is 99",
    );
    check(
        StableDiffusionOptions {
            num_images_per_prompt: 0,
            ..base.clone()
        },
        "`num_images_per_prompt` is 0",
    );
    check(
        StableDiffusionOptions {
            negative_prompt: vec!["a".into(), "b".into()],
            ..base
        },
        "2 negative prompts for 1 prompts",
    );
}

#[test]
fn inputs_that_do_not_fit_the_options_are_errors() {
    let inputs = StableDiffusionInputs {
        latents: Some(Tensor::zeros([2, 4, 8, 8], &Default::default())),
        ..StableDiffusionInputs::default()
    };
    check_inputs(
        options(),
        inputs,
        "`latents` has shape [2, 4, 8, 8], but these options need [1, 4, 8, 8]",
    );
    let mut noise = generators(&[3]);
    let inputs = StableDiffusionInputs {
        noise: Some(&mut noise),
        ..StableDiffusionInputs::default()
    };
    let seeded = StableDiffusionOptions {
        seeds: vec![3],
        ..options()
    };
    check_inputs(
        seeded,
        inputs,
        "provide only one of `seeds` and a noise source",
    );
}

#[test]
fn callback_changes_latents_and_stops_the_run() {
    let folder = reference().join("sd/base");
    let pipeline =
        StableDiffusionPipeline::<B>::from_pretrained(folder, &Default::default()).unwrap();
    let options = StableDiffusionOptions {
        num_inference_steps: 5,
        ..options()
    };
    let mut noise = generators(&[3]);
    let inputs = StableDiffusionInputs {
        noise: Some(&mut noise),
        ..StableDiffusionInputs::default()
    };
    let mut seen = Vec::new();
    let generated = pipeline
        .generate_with(&options, inputs, |event| {
            seen.push((event.step, event.timestep));
            *event.latents = event.latents.zeros_like() + 0.25;
            if event.step == 2 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })
        .unwrap();
    assert!(generated.interrupted);
    let timesteps: Vec<f64> = seen.iter().map(|(_, timestep)| *timestep).collect();
    assert_eq!(timesteps, generated.timesteps[..3]);
    assert!(generated.images.is_empty());
    assert_eq!(pipeline.decode(generated.latents.clone()).unwrap().len(), 1);
    let values = generated.latents.into_data();
    assert!(values.iter::<f32>().all(|value| value == 0.25));
}

#[test]
fn one_pipeline_serves_several_threads() {
    let folder = reference().join("sd/base");
    let pipeline =
        StableDiffusionPipeline::<B>::from_pretrained(folder, &Default::default()).unwrap();
    let generate = |steps: usize| {
        let options = StableDiffusionOptions {
            num_inference_steps: steps,
            seeds: vec![5],
            ..options()
        };
        pipeline.generate(&options).unwrap().images
    };
    let alone = [2, 3].map(generate);
    assert_ne!(alone[0], alone[1]);
    let together = std::thread::scope(|scope| {
        let threads = [2, 3].map(|steps| scope.spawn(move || generate(steps)));
        threads.map(|thread| thread.join().unwrap())
    });
    assert_eq!(together, alone);
}

#[test]
fn embeddings_in_place_of_prompts_give_the_same_image() {
    let folder = reference().join("sd/base");
    let pipeline =
        StableDiffusionPipeline::<B>::from_pretrained(folder, &Default::default()).unwrap();
    let by_text = StableDiffusionOptions {
        seeds: vec![5],
        ..options()
    };
    let embeds = |text: &str| {
        pipeline
            .encode_prompt(&[text.to_string()], None)
            .unwrap()
            .embeds
    };
    let by_embeds = StableDiffusionOptions {
        prompt: Vec::new(),
        ..by_text.clone()
    };
    let inputs = StableDiffusionInputs {
        prompt_embeds: Some(embeds("a lighthouse")),
        negative_prompt_embeds: Some(embeds("")),
        ..StableDiffusionInputs::default()
    };
    let expected = pipeline.generate(&by_text).unwrap();
    let got = pipeline.generate_with(&by_embeds, inputs, |_| ControlFlow::Continue(()));
    let got = got.unwrap();
    assert_eq!(got.images, expected.images);
}
