//! Whole runs against the reference's: latents and images of every recorded case.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use burn::tensor::TensorData;
use burn_flex::Flex;
use diffuse_pipelines::schedulers::{
    Overrides, StepOptions, scheduler_from_config, scheduler_names,
};
use diffuse_pipelines::unet::{Pretrained, UNet2DConditionModel};
use diffuse_pipelines::{
    DDIMPipeline, DDPMOptions, DDPMPipeline, Generated, LoadOptions, StableDiffusionImg2ImgOptions,
    StableDiffusionInpaintOptions, StableDiffusionInputs, StableDiffusionOptions,
    StableDiffusionPipeline, StepEvent, latents, load_image,
};
use diffuse_testing::{Values, assert_close, read_json, reference};
use image::RgbImage;
use serde_json::Value;

type B = Flex;

/// A case of a manifest, with the folder that its paths are relative to.
struct Case<'a> {
    folder: &'a Path,
    values: &'a Value,
}

impl Case<'_> {
    fn name(&self) -> &str {
        self.values["name"].as_str().unwrap()
    }

    fn get<T>(&self, key: &str, read: impl Fn(&Value) -> Option<T>) -> Option<T> {
        let value = self.values.get(key).filter(|value| !value.is_null())?;
        Some(read(value).unwrap_or_else(|| panic!("{}: {key}", self.name())))
    }

    fn number(&self, key: &str) -> Option<f64> {
        self.get(key, Value::as_f64)
    }

    fn count(&self, key: &str) -> Option<usize> {
        self.get(key, |value| value.as_u64().map(|count| count as usize))
    }

    /// One text or number, or a list of them.
    fn list<T>(&self, key: &str, read: impl Fn(&Value) -> Option<T>) -> Vec<T> {
        match self.values.get(key) {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(values)) => values.iter().map(|value| read(value).unwrap()).collect(),
            Some(value) => vec![read(value).unwrap()],
        }
    }

    fn texts(&self, key: &str) -> Vec<String> {
        self.list(key, |value| value.as_str().map(String::from))
    }

    fn path(&self, key: &str) -> Option<PathBuf> {
        self.get(key, |value| {
            value.as_str().map(|path| self.folder.join(path))
        })
    }

    /// One image or a list of them.
    fn images(&self, key: &str) -> Vec<RgbImage> {
        let paths = self.texts(key).into_iter();
        let read = |path| load_image(&fs::read(self.folder.join(path)).unwrap()).unwrap();
        paths.map(read).collect()
    }

    fn scheduler_options(&self) -> Overrides {
        let options = self.get("scheduler_options", |value| value.as_object().cloned());
        options.unwrap_or_default()
    }

    fn tolerance(&self, key: &str) -> f64 {
        self.values["tolerance"][key].as_f64().unwrap()
    }

    fn expected(&self) -> Values {
        let tensors = self.values["expected"]["tensors"].as_str().unwrap();
        Values::open(self.folder.join(tensors))
    }

    fn check(&self, generated: &Generated<B>, tensor: &str) {
        let name = self.name();
        let atol = self.tolerance(&format!("{tensor}_atol"));
        let expected = self.expected().data(tensor);
        assert_close(name, generated.latents.clone(), &expected, atol, 0.0);

        let images = self.values["expected"]["images"].as_array().unwrap();
        assert_eq!(images.len(), generated.images.len(), "{name}");
        for (path, got) in images.iter().zip(&generated.images) {
            let path = self.folder.join(path.as_str().unwrap());
            let expected = image::open(&path).unwrap().to_rgb8();
            let (max, mean) = compare(got, &expected);
            let allowed = (self.tolerance("image_max"), self.tolerance("image_mean"));
            assert!(
                max <= allowed.0 && mean <= allowed.1,
                "{name}: levels differ by {max} at most, {mean} on average"
            );
        }
    }
}

/// The largest and the mean difference of levels.
fn compare(got: &RgbImage, expected: &RgbImage) -> (f64, f64) {
    assert_eq!(got.dimensions(), expected.dimensions());
    let differences: Vec<f64> = got
        .as_raw()
        .iter()
        .zip(expected.as_raw())
        .map(|(got, expected)| f64::from(got.abs_diff(*expected)))
        .collect();
    let max = differences.iter().copied().fold(0.0, f64::max);
    (
        max,
        differences.iter().sum::<f64>() / differences.len() as f64,
    )
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
            scheduler_from_config(config, None, &case.scheduler_options()).unwrap();
        if values["pipeline"] == "DDIMPipeline" {
            pipeline = DDIMPipeline::new(pipeline).unwrap().inner;
        }
        let clipped = case.get("use_clipped_model_output", Value::as_bool);
        let options = DDPMOptions {
            batch_size: case.count("batch_size").unwrap_or(1),
            num_inference_steps: case.count("steps").unwrap(),
            seeds: case.list("seed", Value::as_u64),
            step: StepOptions {
                eta: case.number("eta"),
                use_clipped_model_output: clipped.unwrap_or(false),
                ..StepOptions::default()
            },
        };
        case.check(&pipeline.generate(&options).unwrap(), "sample");
    }
    assert!(cases.as_array().unwrap().len() >= 8);
}

/// Runs the cases of a manifest of some pipelines; returns how many they were.
fn check_cases(folder: &Path, pipelines: &[&str]) -> usize {
    let manifest = folder.join("cases.json");
    if !manifest.is_file() {
        return 0;
    }
    let cases = read_json(manifest);
    let cases = cases.as_array().unwrap().iter();
    let cases = cases.filter(|values| {
        pipelines.contains(&values["pipeline"].as_str().unwrap())
            && values.get("single_file").is_none()
            && values["scheduler"].as_str().is_none_or(implemented)
    });
    cases
        .map(|values| check_stable_diffusion(&Case { folder, values }))
        .count()
}

/// Whether the recorded values are those of the repository.
fn own_reference() -> bool {
    std::env::var_os("DIFFUSE_REFERENCE").is_none()
}

#[test]
fn text_to_image_runs_give_the_references_images() {
    let checked = check_cases(&reference().join("sd"), &["StableDiffusionPipeline"]);
    assert!(checked >= 20, "{checked} cases");
}

#[test]
fn image_to_image_runs_give_the_references_images() {
    let pipelines = ["StableDiffusionImg2ImgPipeline"];
    let checked = check_cases(&reference().join("image_to_image"), &pipelines)
        + check_cases(&reference().join("sd"), &pipelines);
    assert!(
        checked == 20 || !own_reference() && checked > 20,
        "{checked} cases"
    );
}

#[test]
fn inpainting_runs_give_the_references_images() {
    let pipelines = ["StableDiffusionInpaintPipeline"];
    let checked = check_cases(&reference().join("image_to_image"), &pipelines)
        + check_cases(&reference().join("sd"), &pipelines);
    assert!(
        checked == 24 || !own_reference() && checked > 10,
        "{checked} cases"
    );
}

/// The pipeline of a case, with its scheduler.
fn load_pipeline(case: &Case<'_>) -> StableDiffusionPipeline<B> {
    let device = Default::default();
    let load = LoadOptions {
        variant: case.get("variant", |value| value.as_str().map(String::from)),
        ..LoadOptions::default()
    };
    let model = case.path("model").unwrap();
    let mut pipeline =
        StableDiffusionPipeline::<B>::from_pretrained_with(model, &load, &device).unwrap();
    if let Some(unet) = case.path("unet") {
        pipeline.unet = UNet2DConditionModel::from_pretrained(unet, &device).unwrap();
    }
    if let Some(scheduler) = case.values["scheduler"].as_str() {
        let config = pipeline.scheduler.config();
        let options = case.scheduler_options();
        pipeline.scheduler = scheduler_from_config(config, Some(scheduler), &options).unwrap();
    }
    pipeline
}

/// The options that all pipelines have.
fn common_options(case: &Case<'_>) -> StableDiffusionOptions {
    let numbers = |key| {
        let numbers = case.list(key, Value::as_f64);
        (!numbers.is_empty()).then_some(numbers)
    };
    let defaults = StableDiffusionOptions::default();
    StableDiffusionOptions {
        prompt: case.texts("prompt"),
        negative_prompt: case.texts("negative_prompt"),
        height: case.count("height"),
        width: case.count("width"),
        num_inference_steps: case.count("steps").unwrap_or(defaults.num_inference_steps),
        timesteps: numbers("timesteps"),
        sigmas: numbers("sigmas"),
        guidance_scale: case
            .number("guidance_scale")
            .unwrap_or(defaults.guidance_scale),
        guidance_rescale: case.number("guidance_rescale").unwrap_or(0.0),
        num_images_per_prompt: case.count("num_images_per_prompt").unwrap_or(1),
        eta: case.number("eta").unwrap_or(0.0),
        clip_skip: case.count("clip_skip"),
        seeds: case.list("seed", Value::as_u64),
        ..defaults
    }
}

fn check_stable_diffusion(case: &Case<'_>) {
    let device = Default::default();
    let pipeline = load_pipeline(case);
    let options = common_options(case);
    let mut trace = Vec::new();
    let inputs = StableDiffusionInputs {
        latents: case
            .path("latents")
            .map(|path| latents::read(path, &device).unwrap()),
        ..StableDiffusionInputs::default()
    };
    let on_step = |event: StepEvent<'_, B>| {
        trace.push(event.latents.clone());
        ControlFlow::Continue(())
    };
    let strength = case.number("strength");
    let generated = match case.values["pipeline"].as_str().unwrap() {
        "StableDiffusionImg2ImgPipeline" => {
            let defaults = StableDiffusionImg2ImgOptions::default();
            let options = StableDiffusionImg2ImgOptions {
                options,
                image: case.images("image"),
                strength: strength.unwrap_or(defaults.strength),
            };
            pipeline.image_to_image_with(&options, inputs, on_step)
        }
        "StableDiffusionInpaintPipeline" => {
            let defaults = StableDiffusionInpaintOptions::default();
            let options = StableDiffusionInpaintOptions {
                options,
                image: case.images("image"),
                mask_image: case.images("mask_image"),
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
        let expected = case.expected();
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
    case.check(&generated, "latents");
}
