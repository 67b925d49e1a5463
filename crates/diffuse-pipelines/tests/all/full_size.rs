//! The published models at full size: as many parameters as the files have, under the same names,
//! with the same shapes. Nothing is allocated: fresh parameters are drawn when they are first used.

use std::collections::BTreeMap;

use burn::tensor::backend::Backend;
use burn_flex::Flex;
use diffuse_nn::checkpoint::parameters;
use diffuse_pipelines::clip::CLIPTextModel;
use diffuse_pipelines::unet::{ModelConfig, UNet2DConditionModel, UNet2DModel};
use diffuse_pipelines::vae::AutoencoderKL;
use diffuse_pipelines::{Pretrained, StableDiffusionSafetyChecker};
use diffuse_testing::{is_another_set, read_json, reference};
use serde_json::Value;

type Shapes = BTreeMap<String, Vec<usize>>;

fn shapes<B: Backend, M: Pretrained<B>>(config: &Value) -> Shapes {
    let map = config.as_object().unwrap().clone();
    let config = M::Config::from_map(map, &|message| panic!("{message}")).unwrap();
    let model = M::from_config(&config, &B::Device::default());
    parameters(&model)
        .into_iter()
        .map(|parameter| (parameter.key, parameter.shape))
        .collect()
}

fn check(model: &str, num_parameters: usize) {
    let path = reference().join("full-size.json");
    if !path.is_file() {
        assert!(is_another_set());
        return;
    }
    let published = &read_json(path)[model];
    let config = &published["config"];
    let (got, translate): (Shapes, fn(&str) -> Option<String>) = match published["class"].as_str() {
        Some("UNet2DModel") => (
            shapes::<Flex, UNet2DModel<Flex>>(config),
            UNet2DModel::<Flex>::current_key,
        ),
        Some("UNet2DConditionModel") => (
            shapes::<Flex, UNet2DConditionModel<Flex>>(config),
            UNet2DConditionModel::<Flex>::current_key,
        ),
        Some("AutoencoderKL") => (
            shapes::<Flex, AutoencoderKL<Flex>>(config),
            AutoencoderKL::<Flex>::current_key,
        ),
        Some("CLIPTextModel") => (
            shapes::<Flex, CLIPTextModel<Flex>>(config),
            CLIPTextModel::<Flex>::current_key,
        ),
        Some("StableDiffusionSafetyChecker") => (
            shapes::<Flex, StableDiffusionSafetyChecker<Flex>>(config),
            StableDiffusionSafetyChecker::<Flex>::current_key,
        ),
        other => panic!("{model} is a {other:?}"),
    };
    let expected: Shapes = published["tensors"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(key, shape)| {
            let shape = shape.as_array().unwrap().iter();
            let shape = shape.map(|size| size.as_u64().unwrap() as usize).collect();
            (translate(key).unwrap(), shape)
        })
        .collect();
    assert_eq!(got, expected, "{model}");
    let count: usize = got
        .values()
        .map(|shape| shape.iter().product::<usize>())
        .sum();
    assert_eq!(count, num_parameters, "{model}");
}

#[test]
fn ddpm_cat_256() {
    check("ddpm-cat-256", 113_673_219);
}

#[test]
fn ddpm_cifar10_32() {
    check("ddpm-cifar10-32", 35_746_307);
}

#[test]
fn stable_diffusion_v1_unet() {
    check("sd-v1-unet", 859_520_964);
}

#[test]
fn stable_diffusion_v1_inpainting_unet() {
    check("sd-v1-inpaint-unet", 859_535_364);
}

#[test]
fn stable_diffusion_v1_autoencoder() {
    check("sd-v1-vae", 83_653_863);
}

#[test]
fn stable_diffusion_v1_text_encoder() {
    check("sd-v1-text-encoder", 123_060_480);
}

#[test]
fn stable_diffusion_v1_safety_checker() {
    check("sd-v1-safety-checker", 303_981_588);
}
