//! Whole runs against the reference's: latents and images of every recorded case.

mod common;

use std::ops::ControlFlow;

use burn::tensor::TensorData;
use burn_flex::Flex;
use diffuse_pipelines::schedulers::{
    Overrides, StepOptions, scheduler_from_config, scheduler_names,
};
use diffuse_pipelines::{
    DDIMPipeline, DDPMOptions, DDPMPipeline, Generated, LoadOptions, StableDiffusionInputs,
    StableDiffusionPipeline, latents,
};
use diffuse_testing::{Values, assert_close, is_another_set, read_json, reference};
use image::RgbImage;
use serde_json::Value;

use common::Case;

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

#[test]
fn text_to_image_runs_give_the_references_images() {
    let folder = reference().join("sd");
    let cases = read_json(folder.join("cases.json"));
    let (mut checked, mut traces) = (0, 0);
    for values in cases.as_array().unwrap() {
        let case = Case {
            folder: &folder,
            values,
        };
        let scheduler = values["scheduler"].as_str();
        if values["pipeline"] != "StableDiffusionPipeline"
            || values.get("single_file").is_some()
            || !scheduler.is_none_or(implemented)
        {
            continue;
        }
        check_text_to_image(&case, scheduler);
        checked += 1;
        traces += usize::from(values.get("trace").is_some());
    }
    if !is_another_set() {
        assert_eq!((checked, traces), (41, 4));
    }
}

fn check_text_to_image(case: &Case<'_>, scheduler: Option<&str>) {
    let device = Default::default();
    let load = LoadOptions {
        variant: case.get("variant", |value| value.as_str().map(String::from)),
        ..LoadOptions::default()
    };
    let model = case.folder.join(case.values["model"].as_str().unwrap());
    let mut pipeline =
        StableDiffusionPipeline::<B>::from_pretrained_with(model, &load, &device).unwrap();
    if scheduler.is_some() {
        let config = pipeline.scheduler.config();
        let options = scheduler_options(case);
        pipeline.scheduler = scheduler_from_config(config, scheduler, &options).unwrap();
    }

    let options = case.text_to_image_options();
    let start = case.get("latents", |value| value.as_str().map(String::from));

    let mut trace = Vec::new();
    let inputs = StableDiffusionInputs {
        latents: start.map(|path| latents::read(case.folder.join(path), &device).unwrap()),
        ..StableDiffusionInputs::default()
    };
    let generated = pipeline
        .generate_with(&options, inputs, |event| {
            trace.push(event.latents.clone());
            ControlFlow::Continue(())
        })
        .unwrap();
    if case.values.get("trace").is_some() {
        let expected = expected(case);
        assert_eq!(
            generated.timesteps,
            expected.list("timesteps"),
            "{}",
            case.name()
        );
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
