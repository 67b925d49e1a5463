//! Relatives of Stable Diffusion v1 and of DDPM against Diffusers: whole runs, and single
//! evaluations of a network. `reference/family/README.md` describes the cases.

use std::fs;
use std::path::Path;

use burn::tensor::Tensor;
use burn_flex::Flex;
use diffuse_pipelines::convert::{ConvertOptions, convert};
use diffuse_pipelines::inspect::Inspection;
use diffuse_pipelines::unet::{
    ClassEmbedType, ClassLabels, ConfigError, ModelConfig, Timestep, UNet2DConditionConfig,
    UNet2DConditionModel, UNet2DConditionOptions, UNet2DConfig, UNet2DModel,
};
use diffuse_pipelines::{
    DDPMOptions, DDPMPipeline, Generated, ModelIndex, PipelineKind, Pretrained,
    StableDiffusionPipeline, to_images,
};
use diffuse_testing::{Values, assert_close, assert_stage, read_json, reference};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::Case;

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

/// Copies a folder over another.
pub fn lay_over(from: &Path, to: &Path) {
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
        Some(labels) => {
            let options = UNet2DConditionOptions {
                class_labels: Some(&labels),
                ..UNet2DConditionOptions::default()
            };
            unet.forward_with(sample, timestep, &context.into(), options)
        }
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

/// `config.json` of a folder with another value.
#[track_caller]
fn check_refused<C: ModelConfig>(folder: &str, key: &str, value: Value, expected: &str) {
    let path = reference().join("family").join(folder).join("config.json");
    let mut config = read_json(path).as_object().unwrap().clone();
    config.insert(key.to_string(), value);
    let invalid = |message| ConfigError::Parse {
        path: "config.json".into(),
        message,
    };
    let error = C::from_map(config, &invalid).err().expect(key);
    assert_eq!(error.to_string(), expected);
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    let unet = check_refused::<UNet2DConditionConfig>;
    for (key, value, expected) in [
        (
            "act_fn",
            json!("quick_gelu"),
            "`act_fn` is \"quick_gelu\", but UNet2DConditionModel supports `silu` and `gelu`",
        ),
        (
            "time_embedding_type",
            json!("fourier"),
            "`time_embedding_type` is \"fourier\", but UNet2DConditionModel supports only \
             \"positional\"",
        ),
        (
            "dual_cross_attention",
            json!(true),
            "`dual_cross_attention` is true, but UNet2DConditionModel supports only false",
        ),
        (
            "resnet_skip_time_act",
            json!(true),
            "`resnet_skip_time_act` is true, but UNet2DConditionModel supports only false",
        ),
        (
            "resnet_out_scale_factor",
            json!(1.4),
            "`resnet_out_scale_factor` is 1.4, but UNet2DConditionModel supports only 1.0",
        ),
        (
            "only_cross_attention",
            json!([true]),
            "`only_cross_attention` is [true], but UNet2DConditionModel supports one value, or as \
             many as `block_out_channels` (2)",
        ),
        (
            "conv_in_kernel",
            json!(2),
            "`conv_in_kernel` is 2, but UNet2DConditionModel supports odd numbers",
        ),
        (
            "conv_out_kernel",
            json!(33),
            "`conv_out_kernel` is 33, but UNet2DConditionModel supports 1 to 31",
        ),
        (
            "class_embed_type",
            json!("projection"),
            "`projection_class_embeddings_input_dim` is null, but UNet2DConditionModel supports 1 \
             to 65536 for projections",
        ),
        (
            "class_embeddings_concat",
            json!(true),
            "`class_embeddings_concat` is true, but UNet2DConditionModel supports only false \
             without class labels",
        ),
        (
            "num_class_embeds",
            json!(0),
            "`num_class_embeds` is 0, but UNet2DConditionModel supports 1 to 65536",
        ),
        (
            "mid_block_type",
            json!("UNetMidBlock2DSimpleCrossAttn"),
            "`config.json` is not a valid configuration: `mid_block_type`: unknown variant \
             `UNetMidBlock2DSimpleCrossAttn`, expected `UNetMidBlock2DCrossAttn` or \
             `UNetMidBlock2D`",
        ),
    ] {
        unet("unet-layers", key, value, expected);
    }
    let unet_2d = check_refused::<UNet2DConfig>;
    for (key, value, expected) in [
        (
            "class_embed_type",
            json!("projection"),
            "`class_embed_type` is \"projection\", but UNet2DModel supports null, `timestep` and \
             `identity`",
        ),
        (
            "time_embedding_type",
            json!("learned"),
            "`config.json` is not a valid configuration: `time_embedding_type`: unknown variant \
             `learned`, expected `positional` or `fourier`",
        ),
        (
            "downsample_type",
            json!("fir"),
            "`config.json` is not a valid configuration: `downsample_type`: unknown variant \
             `fir`, expected `conv` or `resnet`",
        ),
    ] {
        unet_2d("cifar", key, value, expected);
    }
}

/// A checkpoint of `folder` with a UNet of another one.
fn with_unet(folder: &Path, unet: &Path) -> TempDir {
    let together = tempfile::tempdir().unwrap();
    lay_over(folder, together.path());
    lay_over(unet, &together.path().join("unet"));
    together
}

#[test]
fn pipelines_refuse_networks_that_need_class_labels() {
    let family = reference().join("family");
    let device = Default::default();
    let folder = with_unet(
        &family.join("distilled"),
        &family.join("unet-class-timestep"),
    );
    let error = StableDiffusionPipeline::<B>::from_pretrained(folder.path(), &device).err();
    assert_eq!(
        error.unwrap().to_string(),
        "`class_embed_type` is \"timestep\", but UNet2DConditionModel supports only null in a \
         pipeline"
    );
    let folder = with_unet(&family.join("butterflies"), &family.join("unet_2d-classes"));
    let error = DDPMPipeline::<B>::from_pretrained(folder.path(), &device).err();
    assert_eq!(
        error.unwrap().to_string(),
        "`num_class_embeds` is 5, but UNet2DModel supports only null in a pipeline"
    );
}

#[test]
fn single_files_have_no_residual_blocks_that_change_the_size() {
    let family = reference().join("family");
    let folder = with_unet(
        &family.join("distilled"),
        &family.join("unet-resnet-blocks"),
    );
    let file = folder.path().join("model.safetensors");
    let error = convert::<B>(folder.path(), &file, &ConvertOptions::default(), |_| {});
    assert_eq!(
        error.unwrap_err().to_string(),
        "`down_block_types` is [\"ResnetDownsampleBlock2D\",\"CrossAttnDownBlock2D\"], but \
         UNet2DConditionModel supports only blocks that change the size by a convolution in a \
         single file"
    );
    assert!(!file.exists());
}

#[test]
fn latent_consistency_models_are_stable_diffusion() {
    let family = reference().join("family");
    let folder = tempfile::tempdir().unwrap();
    lay_over(&family.join("distilled"), folder.path());
    lay_over(&family.join("lcm"), folder.path());
    let index = ModelIndex::read(folder.path()).unwrap();
    assert_eq!(index.class(), Some("LatentConsistencyModelPipeline"));
    let kind = PipelineKind::of(&index);
    assert_eq!(kind, Some(PipelineKind::StableDiffusion));
    let inspection = Inspection::read::<B>(folder.path()).unwrap();
    assert_eq!(inspection.all_problems(), [""; 0]);
}

#[test]
#[should_panic = "this network needs class labels"]
fn networks_with_classes_need_labels() {
    let folder = reference().join("family/unet_2d-classes");
    let unet = UNet2DModel::<B>::from_pretrained(folder, &Default::default()).unwrap();
    unet.forward(Tensor::zeros([1, 3, 8, 8], &Default::default()), 3.0);
}

#[test]
#[should_panic = "of 5 classes, [5] do not all exist"]
fn classes_have_to_exist() {
    let folder = reference().join("family/unet_2d-classes");
    let unet = UNet2DModel::<B>::from_pretrained(folder, &Default::default()).unwrap();
    let sample = Tensor::zeros([1, 3, 8, 8], &Default::default());
    unet.forward_with_classes(sample, 3.0, &ClassLabels::Classes(vec![5]));
}

/// Diffusers cannot compute these sizes: its residual blocks double the size, whatever the size of
/// the skip connection.
#[test]
fn residual_blocks_change_odd_sizes() {
    let folder = reference().join("family/unet-resnet-blocks");
    let unet = UNet2DConditionModel::<B>::from_pretrained(folder, &Default::default()).unwrap();
    let sample = Tensor::ones([1, 4, 7, 5], &Default::default());
    let context = Tensor::ones([1, 3, 4], &Default::default());
    assert_eq!(unet.forward(sample, 3.0, &context).dims(), [1, 4, 7, 5]);
}
