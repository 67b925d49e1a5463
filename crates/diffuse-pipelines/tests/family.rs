//! Relatives of Stable Diffusion v1 and of DDPM against Diffusers: whole runs, and single
//! evaluations of a network. `reference/family/README.md` describes the cases.

mod common;

use std::fs;
use std::path::Path;

use burn::tensor::Tensor;
use burn_flex::Flex;
use diffuse_pipelines::unet::{
    ClassEmbedType, ClassLabels, Timestep, UNet2DConditionModel, UNet2DModel,
};
use diffuse_pipelines::{
    DDPMOptions, DDPMPipeline, Generated, Pretrained, StableDiffusionPipeline, to_images,
};
use diffuse_testing::{Values, assert_close, assert_stage, read_json, reference};
use serde_json::Value;
use tempfile::TempDir;

use common::Case;

type B = Flex;

/// Calls `check` for each case of a kind, and returns their number.
fn each_case(kind: &str, check: impl Fn(&Case<'_>)) -> usize {
    let folder = reference().join("family");
    let cases = read_json(folder.join("cases.json"));
    let cases = cases.as_array().unwrap().iter();
    let cases = cases.filter(|values| values["kind"] == kind);
    let check = |values| {
        check(&Case {
            folder: &folder,
            values,
        });
    };
    cases.map(check).count()
}

/// A case's `folders` in one, each laid over those before it.
fn checkpoint(case: &Case<'_>) -> TempDir {
    let together = tempfile::tempdir().unwrap();
    for folder in case.texts("folders") {
        lay_over(&case.folder.join(folder), together.path());
    }
    together
}

fn lay_over(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            lay_over(&path, &target);
        } else {
            fs::copy(path, target).unwrap();
        }
    }
}

#[test]
fn runs_give_the_latents_and_images_of_diffusers() {
    let runs = each_case("run", |case| match case.values["pipeline"].as_str() {
        Some("DDPMPipeline") => check_unconditional(case),
        _ => check_text_to_image(case),
    });
    assert_eq!(runs, 15);
}

fn check_unconditional(case: &Case<'_>) {
    let folder = checkpoint(case);
    let device = Default::default();
    let pipeline = DDPMPipeline::<B>::from_pretrained(folder.path(), &device).unwrap();
    let values = expected(case);

    // Clipping hides much of a network of this size in the samples.
    let sample = values.tensor("network.sample", &device);
    let output = pipeline.unet.forward(sample, timestep(&values, "network."));
    assert_stage(case.name(), output, &values.data("network.output"));

    let options = DDPMOptions {
        num_inference_steps: case.steps().unwrap(),
        seeds: case.list("seed", Value::as_u64),
        ..DDPMOptions::default()
    };
    let generated = pipeline.generate(&options).unwrap();
    check_latents(case, &generated, "sample");
    let images = to_images::<B>(values.tensor("sample", &device)).unwrap();
    case.check_images(&generated.images, &images);
}

fn check_text_to_image(case: &Case<'_>) {
    let folder = checkpoint(case);
    let device = Default::default();
    let pipeline = StableDiffusionPipeline::<B>::from_pretrained(folder.path(), &device).unwrap();
    let generated = pipeline.generate(&case.text_to_image_options()).unwrap();
    check_latents(case, &generated, "latents");
    let latents = expected(case).tensor("latents", &device);
    let images = pipeline.decode(latents).unwrap();
    case.check_images(&generated.images, &images);
}

fn expected(case: &Case<'_>) -> Values {
    Values::open(case.folder.join(case.values["expected"].as_str().unwrap()))
}

fn check_latents(case: &Case<'_>, generated: &Generated<B>, tensor: &str) {
    let atol = case.tolerance(&format!("{tensor}_atol"));
    let latents = generated.latents.clone();
    assert_close(
        case.name(),
        latents,
        &expected(case).data(tensor),
        atol,
        0.0,
    );
}

#[test]
fn single_evaluations_give_the_outputs_of_diffusers() {
    let stages = each_case("stage", |case| {
        let stage = case.folder.join(case.values["stage"].as_str().unwrap());
        let (folder, values) = (stage.parent().unwrap(), Values::open(&stage));
        let output = match case.values["class"].as_str().unwrap() {
            "UNet2DModel" => evaluate_unet_2d(folder, &values),
            "UNet2DConditionModel" => evaluate_unet_2d_condition(folder, &values),
            other => panic!("{other}"),
        };
        assert_stage(case.name(), output, &values.data("output"));
    });
    assert_eq!(stages, 16);
}

fn evaluate_unet_2d(folder: &Path, values: &Values) -> Tensor<B, 4> {
    let device = Default::default();
    let unet = UNet2DModel::<B>::from_pretrained(folder, &device).unwrap();
    let sample = values.tensor("sample", &device);
    let timestep = timestep(values, "");
    match class_labels(values, unet.config().class_embed_type) {
        None => unet.forward(sample, timestep),
        Some(labels) => unet.forward_with_classes(sample, timestep, &labels),
    }
}

fn evaluate_unet_2d_condition(folder: &Path, values: &Values) -> Tensor<B, 4> {
    let device = Default::default();
    let unet = UNet2DConditionModel::<B>::from_pretrained(folder, &device).unwrap();
    let sample = values.tensor("sample", &device);
    let context = values.tensor("encoder_hidden_states", &device);
    let timestep = timestep(values, "");
    match class_labels(values, unet.config().class_embed_type) {
        None => unet.forward(sample, timestep, &context),
        Some(labels) => unet.forward_with_classes(sample, timestep, &context, &labels),
    }
}

fn class_labels(values: &Values, kind: Option<ClassEmbedType>) -> Option<ClassLabels<B>> {
    const NAME: &str = "class_labels";
    if !values.names().iter().any(|name| name == NAME) {
        return None;
    }
    let device = Default::default();
    Some(match kind {
        None => {
            let classes = values.list(NAME).into_iter();
            ClassLabels::Classes(classes.map(|class| class as usize).collect())
        }
        Some(ClassEmbedType::Timestep) => ClassLabels::Numbers(values.list(NAME)),
        Some(_) => ClassLabels::Features(values.tensor(NAME, &device)),
    })
}

fn timestep(values: &Values, prefix: &str) -> Timestep {
    Timestep::Each(values.list(&format!("{prefix}timestep")))
}
