//! Whole runs against the reference's: latents and images of every recorded case.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use burn::tensor::TensorData;
use burn_flex::Flex;
use diffuse_pipelines::schedulers::{
    Overrides, StepOptions, scheduler_from_config, scheduler_names,
};
use diffuse_pipelines::unet::{ControlNetModel, UNet2DConditionModel};
use diffuse_pipelines::{
    DDIMPipeline, DDPMOptions, DDPMPipeline, Generated, LoadOptions, Pretrained,
    StableDiffusionControl, StableDiffusionImg2ImgOptions, StableDiffusionInpaintOptions,
    StableDiffusionInputs, StableDiffusionPipeline, StepEvent, latents, load_image, load_vae,
};
use diffuse_testing::{Values, assert_close, is_another_set, read_json, reference};
use image::RgbImage;
use serde_json::Value;

use crate::common::Case;

type B = Flex;

/// The recorded tensors of a case.
fn expected(case: &Case<'_>) -> Values {
    let tensors = case.values["expected"]["tensors"].as_str().unwrap();
    Values::open(case.folder.join(tensors))
}

fn check(case: &Case<'_>, generated: &Generated<B>, tensor: &str) {
    let atol = case.tolerance(&format!("{tensor}_atol"));
    let data = expected(case).data(tensor);
    assert_close(case.name(), generated.latents.clone(), &data, atol, 0.0);

    let images = case.values["expected"]["images"].as_array().unwrap();
    let images: Vec<RgbImage> = images
        .iter()
        .map(|path| case.folder.join(path.as_str().unwrap()))
        .map(|path| image::open(path).unwrap().to_rgb8())
        .collect();
    case.check_images(&generated.images, &images);
}

fn scheduler_options(case: &Case<'_>) -> Overrides {
    let options = case.get("scheduler_options", |value| value.as_object().cloned());
    options.unwrap_or_default()
}

fn path(case: &Case<'_>, key: &str) -> Option<PathBuf> {
    case.get(key, |value| {
        value.as_str().map(|path| case.folder.join(path))
    })
}

/// One image or a list of them.
fn images(case: &Case<'_>, key: &str) -> Vec<RgbImage> {
    let paths = case.texts(key).into_iter();
    let read = |path| load_image(&fs::read(case.folder.join(path)).unwrap()).unwrap();
    paths.map(read).collect()
}

fn implemented(scheduler: &str) -> bool {
    scheduler_names().any(|(_, class)| class == scheduler)
}

#[test]
fn unconditional_runs_give_the_references_images() {
    let folder = reference().join("ddpm");
    let cases = read_json(folder.join("cases.json"));
    let device = Default::default();
    for values in cases.as_array().unwrap() {
        let case = Case {
            folder: &folder,
            values,
        };
        let model = folder.join(values["model"].as_str().unwrap());
        let mut pipeline = DDPMPipeline::<B>::from_pretrained(model, &device).unwrap();
        let config = pipeline.scheduler.config();
        pipeline.scheduler =
            scheduler_from_config(config, None, &scheduler_options(&case)).unwrap();
        if values["pipeline"] == "DDIMPipeline" {
            pipeline = DDIMPipeline::new(pipeline).unwrap().inner;
        }
        let clipped = case.get("use_clipped_model_output", Value::as_bool);
        let options = DDPMOptions {
            batch_size: case.count("batch_size").unwrap_or(1),
            num_inference_steps: case.steps().unwrap(),
            seeds: case.list("seed", Value::as_u64),
            step: StepOptions {
                eta: case.number("eta"),
                use_clipped_model_output: clipped.unwrap_or(false),
                ..StepOptions::default()
            },
        };
        check(&case, &pipeline.generate(&options).unwrap(), "sample");
    }
    if !is_another_set() {
        assert_eq!(cases.as_array().unwrap().len(), 12);
    }
}

/// Runs the cases of a manifest of one pipeline. Returns how many they were, and how many of them
/// have the latents after each step.
fn check_cases(folder: &Path, pipeline: &str) -> (usize, usize) {
    let manifest = folder.join("cases.json");
    if !manifest.is_file() {
        return (0, 0);
    }
    let (mut checked, mut traces) = (0, 0);
    for values in read_json(manifest).as_array().unwrap() {
        if values["pipeline"] != pipeline
            || values.get("single_file").is_some()
            || !values["scheduler"].as_str().is_none_or(implemented)
        {
            continue;
        }
        check_stable_diffusion(&Case { folder, values });
        checked += 1;
        traces += usize::from(values.get("trace").is_some());
    }
    (checked, traces)
}

#[test]
fn text_to_image_runs_give_the_references_images() {
    let found = check_cases(&reference().join("sd"), "StableDiffusionPipeline");
    if !is_another_set() {
        assert_eq!(found, (41, 4));
    }
}

/// Cases of a pipeline that may be in either folder.
fn check_both(pipeline: &str) -> usize {
    let folders = ["image_to_image", "sd"].map(|name| reference().join(name));
    let counts = folders.map(|folder| check_cases(&folder, pipeline).0);
    counts.iter().sum()
}

#[test]
fn image_to_image_runs_give_the_references_images() {
    let found = check_both("StableDiffusionImg2ImgPipeline");
    if !is_another_set() {
        assert_eq!(found, 20);
    }
}

#[test]
fn inpainting_runs_give_the_references_images() {
    let found = check_both("StableDiffusionInpaintPipeline");
    if !is_another_set() {
        assert_eq!(found, 24);
    }
}

#[test]
fn runs_with_other_autoencoders_and_tiling_give_the_references_images() {
    let folder = reference().join("autoencoders");
    let found = [
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
    ]
    .map(|pipeline| check_cases(&folder, pipeline).0);
    if !is_another_set() {
        assert_eq!(found, [2, 3, 3]);
    }
}

#[test]
fn runs_with_controlnets_freeu_and_deep_cache_give_the_references_images() {
    let folder = reference().join("denoising");
    let found = [
        "StableDiffusionPipeline",
        "StableDiffusionControlNetPipeline",
        "StableDiffusionControlNetImg2ImgPipeline",
        "StableDiffusionControlNetInpaintPipeline",
    ]
    .map(|pipeline| check_cases(&folder, pipeline).0);
    if !is_another_set() {
        assert_eq!(found, [6, 14, 1, 2]);
    }
}

/// The networks of a case.
fn controlnets(case: &Case<'_>) -> Vec<ControlNetModel<B>> {
    let names = case.texts("controlnet").into_iter();
    let open = |name| {
        let folder = case.folder.join(name);
        ControlNetModel::from_pretrained(folder, &Default::default()).unwrap()
    };
    names.map(open).collect()
}

/// What the networks of a case see: several networks an image each, one network all.
fn controls<'a>(
    case: &Case<'_>,
    networks: &'a [ControlNetModel<B>],
) -> Vec<StableDiffusionControl<'a, B>> {
    let mut images = images(case, "control_image");
    let number = |key: &str, index: usize, default: f64| {
        let numbers = case.list(key, Value::as_f64);
        let number = numbers.get(index).or(numbers.first());
        number.copied().unwrap_or(default)
    };
    let control = |(index, model)| StableDiffusionControl {
        conditioning_scale: number("controlnet_conditioning_scale", index, 1.0),
        guidance_start: number("control_guidance_start", index, 0.0),
        guidance_end: number("control_guidance_end", index, 1.0),
        ..StableDiffusionControl::new(
            model,
            match networks.len() {
                1 => std::mem::take(&mut images),
                _ => vec![images.remove(0)],
            },
        )
    };
    networks.iter().enumerate().map(control).collect()
}

/// The pipeline of a case, with its scheduler.
fn load_pipeline(case: &Case<'_>) -> StableDiffusionPipeline<B> {
    let device = Default::default();
    let load = LoadOptions {
        variant: case.get("variant", |value| value.as_str().map(String::from)),
        ..LoadOptions::default()
    };
    let model = path(case, "model").unwrap();
    let mut pipeline =
        StableDiffusionPipeline::<B>::from_pretrained_with(model, &load, &device).unwrap();
    if let Some(unet) = path(case, "unet") {
        pipeline.unet = UNet2DConditionModel::from_pretrained(unet, &device).unwrap();
    }
    if let Some(vae) = path(case, "vae") {
        pipeline.vae = load_vae(vae, None, &load, &device).unwrap();
    }
    if case.get("vae_tiling", Value::as_bool) == Some(true) {
        pipeline.vae.enable_tiling();
    }
    if let Some(scheduler) = case.values["scheduler"].as_str() {
        let config = pipeline.scheduler.config();
        let options = scheduler_options(case);
        pipeline.scheduler = scheduler_from_config(config, Some(scheduler), &options).unwrap();
    }
    pipeline
}

fn check_stable_diffusion(case: &Case<'_>) {
    let device = Default::default();
    let pipeline = load_pipeline(case);
    let options = case.text_to_image_options();
    let mut trace = Vec::new();
    let networks = controlnets(case);
    let inputs = StableDiffusionInputs {
        latents: path(case, "latents").map(|path| latents::read(path, &device).unwrap()),
        control: controls(case, &networks),
        ..StableDiffusionInputs::default()
    };
    let on_step = |event: StepEvent<'_, B>| {
        trace.push(event.latents.clone());
        ControlFlow::Continue(())
    };
    let strength = case.number("strength");
    let generated = match case.values["pipeline"].as_str().unwrap() {
        "StableDiffusionImg2ImgPipeline" | "StableDiffusionControlNetImg2ImgPipeline" => {
            let defaults = StableDiffusionImg2ImgOptions::default();
            let options = StableDiffusionImg2ImgOptions {
                options,
                image: images(case, "image"),
                strength: strength.unwrap_or(defaults.strength),
            };
            pipeline.image_to_image_with(&options, inputs, on_step)
        }
        "StableDiffusionInpaintPipeline" | "StableDiffusionControlNetInpaintPipeline" => {
            let defaults = StableDiffusionInpaintOptions::default();
            let options = StableDiffusionInpaintOptions {
                options,
                image: images(case, "image"),
                mask_image: images(case, "mask_image"),
                strength: strength.unwrap_or(defaults.strength),
                padding_mask_crop: case.count("padding_mask_crop").map(|crop| crop as u32),
                ..defaults
            };
            pipeline.inpaint_with(&options, inputs, on_step)
        }
        _ => pipeline.generate_with(&options, inputs, on_step),
    };
    let generated = generated.unwrap_or_else(|error| panic!("{}: {error}", case.name()));
    if case.values.get("trace").is_some() {
        let expected = expected(case);
        // Some record the timesteps that a run leaves out as well.
        let timesteps = expected.list("timesteps");
        let first = timesteps.len() - generated.timesteps.len();
        assert_eq!(generated.timesteps, timesteps[first..], "{}", case.name());
        let steps: TensorData = expected.data("latents_after_each_step");
        // A step early in the run is checked at the tolerance of the last, scaled to its own
        // values.
        let largest = |data: &TensorData| data.iter::<f64>().fold(0.0, |a, b| f64::max(a, b.abs()));
        let relative = case.tolerance("latents_atol") / largest(&expected.data("latents"));
        let rows = steps.shape[0];
        let steps: Vec<f32> = steps.iter().collect();
        assert_eq!(trace.len(), rows, "{}", case.name());
        for (step, (got, expected)) in trace
            .into_iter()
            .zip(steps.chunks_exact(steps.len() / rows))
            .enumerate()
        {
            let expected = TensorData::new(expected.to_vec(), got.dims());
            let atol = relative * largest(&expected);
            let what = format!("{}, step {step}", case.name());
            assert_close(&what, got, &expected, atol, 0.0);
        }
    }
    check(case, &generated, "latents");
}
