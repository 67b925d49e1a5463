//! Conversion: every layout becomes the same clean folder, and gives the same image.

use std::fs;
use std::path::Path;

use burn::tensor::FloatDType;
use burn_flex::Flex;
use diffuse_nn::checkpoint::Checkpoint;
use diffuse_pipelines::convert::{ConvertOptions, convert};
use diffuse_pipelines::{
    DDPMOptions, DDPMPipeline, LoadOptions, StableDiffusionOptions, StableDiffusionPipeline,
};
use diffuse_testing::{read_json, reference};
use image::RgbImage;

type B = Flex;

fn image(folder: &Path, variant: Option<&str>) -> RgbImage {
    let options = LoadOptions {
        variant: variant.map(String::from),
        ..LoadOptions::default()
    };
    let pipeline =
        StableDiffusionPipeline::<B>::from_pretrained_with(folder, &options, &Default::default());
    let options = StableDiffusionOptions {
        num_inference_steps: 3,
        seeds: vec![1],
        ..StableDiffusionOptions::from("a lighthouse")
    };
    pipeline
        .unwrap()
        .generate(&options)
        .unwrap()
        .images
        .remove(0)
}

fn types(path: &Path) -> Vec<String> {
    let checkpoint = Checkpoint::open(path).unwrap();
    let mut types: Vec<String> = checkpoint
        .tensors()
        .values()
        .map(|info| info.dtype.clone())
        .collect();
    types.dedup();
    types
}

fn convert_to(source: &Path, target: &Path, options: &ConvertOptions) {
    let mut files = Vec::new();
    convert::<B>(source, target, options, |file| files.push(file.to_string())).unwrap();
    assert!(!files.is_empty());
}

#[test]
fn converted_folders_give_the_same_image() {
    let folder = tempfile::tempdir().unwrap();
    let same = ConvertOptions::default();

    let plain = folder.path().join("plain");
    convert_to(&reference().join("sd/base"), &plain, &same);
    assert_eq!(
        image(&plain, None),
        image(&reference().join("sd/base"), None)
    );
    let vae = plain.join("vae/diffusion_pytorch_model.safetensors");
    let keys = Checkpoint::open(&vae).unwrap();
    assert!(
        keys.tensors()
            .contains_key("decoder.mid_block.attentions.0.to_q.weight")
    );
    assert_eq!(types(&vae), ["F32"]);

    // Pickles, in half precision.
    let bin = folder.path().join("bin");
    convert_to(&reference().join("sd/bin"), &bin, &same);
    assert_eq!(image(&bin, None), image(&reference().join("sd/bin"), None));
    assert_eq!(
        types(&bin.join("unet/diffusion_pytorch_model.safetensors")),
        ["F16"]
    );

    let variant = ConvertOptions {
        variant: Some("fp16".into()),
        ..same
    };
    let half = folder.path().join("half");
    convert_to(&reference().join("sd/base"), &half, &variant);
    assert_eq!(
        image(&half, None),
        image(&reference().join("sd/base"), Some("fp16"))
    );
}

#[test]
fn types_are_converted() {
    let folder = tempfile::tempdir().unwrap();
    for (dtype, name) in [
        (FloatDType::F16, "F16"),
        (FloatDType::BF16, "BF16"),
        (FloatDType::F32, "F32"),
    ] {
        let target = folder.path().join(name);
        let options = ConvertOptions {
            dtype: Some(dtype),
            ..ConvertOptions::default()
        };
        convert_to(&reference().join("sd/bin"), &target, &options);
        assert_eq!(
            types(&target.join("text_encoder/model.safetensors")),
            [name]
        );
    }
}

#[test]
fn ddpm_folders_stay_flat() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("cat");
    convert_to(
        &reference().join("ddpm/cat"),
        &target,
        &ConvertOptions::default(),
    );
    let run = |folder: &Path| {
        let pipeline = DDPMPipeline::<B>::from_pretrained(folder, &Default::default()).unwrap();
        let options = DDPMOptions {
            num_inference_steps: 3,
            seeds: vec![1],
            ..DDPMOptions::default()
        };
        pipeline.generate(&options).unwrap().images.remove(0)
    };
    assert_eq!(run(&target), run(&reference().join("ddpm/cat")));
    assert!(target.join("config.json").is_file());
}

#[test]
fn components_that_are_left_out_are_switched_off() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source");
    convert_to(
        &reference().join("sd/base"),
        &source,
        &ConvertOptions::default(),
    );
    let path = source.join("model_index.json");
    let mut index = read_json(&path);
    index["safety_checker"] =
        serde_json::json!(["stable_diffusion", "StableDiffusionSafetyChecker"]);
    fs::write(&path, index.to_string()).unwrap();

    let target = folder.path().join("target");
    convert_to(&source, &target, &ConvertOptions::default());
    let index = read_json(target.join("model_index.json"));
    assert_eq!(index["safety_checker"], serde_json::json!([null, null]));
    assert_eq!(index["requires_safety_checker"], false);
    assert_eq!(
        index["unet"],
        serde_json::json!(["diffusers", "UNet2DConditionModel"])
    );
}

#[test]
fn failures_leave_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source");
    convert_to(
        &reference().join("sd/base"),
        &source,
        &ConvertOptions::default(),
    );
    let weights = source.join("vae/diffusion_pytorch_model.safetensors");
    fs::write(&weights, [0; 20]).unwrap();
    let target = folder.path().join("target");
    let result = convert::<B>(&source, &target, &ConvertOptions::default(), |_| {});
    assert_eq!(
        result.unwrap_err().to_string(),
        format!(
            "`{}` is not a valid safetensors file: its header is not JSON: EOF while parsing a \
             value at line 1 column 0",
            weights.display()
        )
    );
    let left: Vec<_> = fs::read_dir(folder.path()).unwrap().collect();
    assert_eq!(left.len(), 1);

    let result = convert::<B>(&source, &source, &ConvertOptions::default(), |_| {});
    assert_eq!(
        result.unwrap_err().to_string(),
        format!("`{}` exists already", source.display())
    );
}
