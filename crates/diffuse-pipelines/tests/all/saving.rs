//! Models that are saved and loaded again are the same, under today's names.

use std::path::Path;

use burn::tensor::{DType, FloatDType};
use burn_flex::Flex;
use diffuse_nn::checkpoint::{Checkpoint, float_dtype};
use diffuse_nn::config::ModelConfig;
use diffuse_pipelines::clip::CLIPTextModel;
use diffuse_pipelines::unet::{UNet2DConditionModel, UNet2DModel};
use diffuse_pipelines::vae::{AutoencoderKL, AutoencoderTiny};
use diffuse_pipelines::{LoadOptions, Pretrained};
use diffuse_testing::{read_json, reference};

/// All tensors of a weights file, in `f32`.
fn tensors(path: &Path, translate: impl Fn(&str) -> Option<String>) -> Vec<(String, Vec<f32>)> {
    let checkpoint = Checkpoint::open(path).unwrap().rename(translate).unwrap();
    let keys: Vec<String> = checkpoint.tensors().keys().cloned().collect();
    let values = |key: &String| checkpoint.read_f32(key).unwrap().iter().collect();
    keys.iter().map(|key| (key.clone(), values(key))).collect()
}

fn check<M: Pretrained<Flex>>(folder: &str, class: &str) {
    let device = Default::default();
    let folder = reference().join(folder);
    let saved = tempfile::tempdir().unwrap();
    let model = M::from_pretrained(&folder, &device).unwrap();
    // Twice: an existing file is replaced.
    model.save_pretrained(saved.path()).unwrap();
    model.save_pretrained(saved.path()).unwrap();

    let name = format!("{}.safetensors", M::Config::WEIGHTS[0]);
    let expected = tensors(&folder.join(&name), M::current_key);
    let got = tensors(&saved.path().join(&name), |key| Some(key.to_string()));
    assert!(!got.is_empty());
    assert_eq!(got, expected);

    let again = M::from_pretrained(saved.path(), &device).unwrap();
    assert_eq!(
        serde_json::to_value(again.config()).unwrap(),
        serde_json::to_value(model.config()).unwrap()
    );
    let config = read_json(saved.path().join("config.json"));
    let written = config
        .get("_class_name")
        .unwrap_or(&config["architectures"][0]);
    assert_eq!(written, class);
    let files = std::fs::read_dir(saved.path()).unwrap().count();
    assert_eq!(files, 2, "no temporary file is left");
}

#[test]
fn saved_models_are_the_same() {
    check::<UNet2DModel<Flex>>("ddpm/cat", "UNet2DModel");
    check::<UNet2DConditionModel<Flex>>("sd/base/unet", "UNet2DConditionModel");
    check::<AutoencoderKL<Flex>>("sd/base/vae", "AutoencoderKL");
    check::<AutoencoderTiny<Flex>>("autoencoders/tiny", "AutoencoderTiny");
    check::<CLIPTextModel<Flex>>("sd/base/text_encoder", "CLIPTextModel");
}

#[test]
fn models_are_saved_in_the_types_they_have() {
    let options = LoadOptions {
        dtype: Some(FloatDType::F32),
        weights: Some(FloatDType::BF16),
        ..LoadOptions::default()
    };
    let folder = reference().join("sd/base/vae");
    let model =
        AutoencoderKL::<Flex>::from_pretrained_with(folder, &options, &Default::default()).unwrap();
    assert_eq!(float_dtype(&model), DType::F32);
    let saved = tempfile::tempdir().unwrap();
    model.save_pretrained(saved.path()).unwrap();
    let checkpoint =
        Checkpoint::open(saved.path().join("diffusion_pytorch_model.safetensors")).unwrap();
    assert!(
        checkpoint
            .tensors()
            .values()
            .all(|info| info.dtype == if info.shape.len() > 1 { "BF16" } else { "F32" })
    );
}

#[test]
fn shards_hold_the_same_model() {
    let device = Default::default();
    let (source, folder) = (
        reference().join("sd/base/unet"),
        tempfile::tempdir().unwrap(),
    );
    let load = |folder: &Path| {
        let model = UNet2DConditionModel::<Flex>::from_pretrained(folder, &device).unwrap();
        model.conv_out.weight.val().into_data()
    };
    std::fs::copy(
        source.join("config.json"),
        folder.path().join("config.json"),
    )
    .unwrap();
    let whole = Checkpoint::open(source.join("diffusion_pytorch_model.safetensors")).unwrap();
    let mut map = serde_json::Map::new();
    for shard in ["down", "rest"] {
        let name = format!("diffusion_pytorch_model-{shard}-of-2.safetensors");
        let belongs = |key: &str| key.starts_with("down") == (shard == "down");
        let part = whole
            .clone()
            .rename(|key| belongs(key).then(|| key.to_string()));
        let part = part.unwrap();
        map.extend(
            part.tensors()
                .keys()
                .map(|key| (key.clone(), name.clone().into())),
        );
        part.write_safetensors(folder.path().join(&name), None)
            .unwrap();
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": map }).to_string();
    let path = folder
        .path()
        .join("diffusion_pytorch_model.safetensors.index.json");
    std::fs::write(path, index).unwrap();
    assert_eq!(load(folder.path()), load(&source));
}

#[test]
fn pickles_hold_the_same_model() {
    let device = Default::default();
    let load = |folder: &str, variant: Option<&str>| {
        let options = LoadOptions {
            variant: variant.map(String::from),
            ..LoadOptions::default()
        };
        let folder = reference().join(folder);
        let model = UNet2DConditionModel::<Flex>::from_pretrained_with(folder, &options, &device);
        model.unwrap().conv_in.weight.val().into_data()
    };
    // The pickle is in half precision, as the variant is.
    assert_eq!(
        load("sd/bin/unet", None),
        load("sd/base/unet", Some("fp16"))
    );
}
