//! The autoencoder against values recorded from Diffusers.

use burn::tensor::{backend::Backend, s};
use burn_flex::Flex;
use burn_ndarray::NdArray;
use diffuse_testing::{Values, assert_stage, reference};
use diffuse_vae::{AutoencoderKL, AutoencoderTiny, LoadOptions, Pretrained, SampleSize};

fn check<B: Backend>() {
    let device = B::Device::default();
    let vae =
        AutoencoderKL::<B>::from_pretrained(reference().join("sd/base/vae"), &device).unwrap();
    let values = Values::open(reference().join("sd/stages/vae.safetensors"));

    let posterior = vae.encode(values.tensor("encode.image", &device));
    assert_stage("mean", posterior.mode(), &values.data("encode.mean"));
    assert_stage("logvar", posterior.logvar, &values.data("encode.logvar"));
    for case in ["decode", "decode_odd"] {
        let key = format!("{case}.latents");
        if values.names().contains(&key) {
            let image = vae.decode(values.tensor(&key, &device));
            assert_stage(case, image, &values.data(&format!("{case}.image")));
        }
    }
}

#[test]
fn encodes_and_decodes_as_the_reference() {
    check::<Flex>();
    check::<NdArray>();
}

#[test]
fn scaling_factor_that_is_absent_is_the_default() {
    let vae = AutoencoderKL::<Flex>::from_pretrained(
        reference().join("sd/base/vae"),
        &Default::default(),
    );
    assert_eq!(vae.unwrap().config().scaling_factor, 0.18215);
}

fn check_tiling<B: Backend>() {
    let device = B::Device::default();
    let mut vae =
        AutoencoderKL::<B>::from_pretrained(reference().join("sd/base/vae"), &device).unwrap();
    let values = Values::open(reference().join("autoencoders/stages/tiling.safetensors"));
    let latents = values.tensor("decode.latents", &device);
    let image = values.tensor("decode.image", &device);
    vae.enable_tiling();
    let decoded = vae.decode(latents.clone());
    assert_stage("decode", decoded.clone(), &values.data("decode.image"));
    let posterior = vae.encode(image);
    assert_stage("mean", posterior.mean, &values.data("encode.mean"));
    assert_stage("logvar", posterior.logvar, &values.data("encode.logvar"));

    // The values are not those without tiles.
    vae.disable_tiling();
    let whole = vae.decode(latents.clone());
    let difference = (whole - decoded).abs().max().into_data();
    assert!(difference.iter::<f64>().next().unwrap() > 0.02);

    // What is no larger than a tile is not divided.
    let latents = latents.narrow(2, 0, 8).narrow(3, 0, 8);
    let whole = vae.decode(latents.clone());
    let posterior = vae.encode(whole.clone());
    vae.enable_tiling();
    let decoded = vae.decode(latents).into_data();
    decoded.assert_eq(&whole.clone().into_data(), true);
    let mean = vae.encode(whole).mean.into_data();
    mean.assert_eq(&posterior.mean.into_data(), true);
}

#[test]
fn tiles_are_blended_as_in_diffusers() {
    check_tiling::<Flex>();
    check_tiling::<NdArray>();
}

#[test]
fn tiles_of_an_odd_size_are_rounded_down() {
    let device = Default::default();
    let folder = reference().join("sd/base/vae");
    let options = LoadOptions::default();
    let (mut config, weights) = AutoencoderKL::<Flex>::open(folder, &options).unwrap();
    let values = Values::open(reference().join("autoencoders/stages/tiling.safetensors"));
    // 90 pixels are 11 latents, of which a tile takes 8. None is smaller than 4 latents.
    for (size, same) in [(64, true), (90, true), (32, false), (1, false)] {
        config.sample_size = SampleSize::Square(size);
        let mut vae =
            AutoencoderKL::<Flex>::from_checkpoint(&config, &weights, &options, &device).unwrap();
        vae.enable_tiling();
        let decoded = vae.decode(values.tensor("decode.latents", &device));
        assert_eq!(decoded.dims(), [1, 3, 72, 104]);
        let difference = decoded - values.tensor("decode.image", &device);
        let difference = difference.abs().max().into_data();
        let difference = difference.iter::<f64>().next().unwrap();
        assert_eq!(difference < 1e-4, same, "{size}: {difference}");
    }
}

fn check_tiny<B: Backend>() {
    let device = B::Device::default();
    let folder = reference().join("autoencoders");
    let mut vae = AutoencoderTiny::<B>::from_pretrained(folder.join("tiny"), &device).unwrap();
    let values = Values::open(folder.join("stages/tiny.safetensors"));
    let latents = vae.encode(values.tensor("encode.image", &device));
    assert_stage("encode", latents, &values.data("encode.latents"));
    let image = vae.decode(values.tensor("decode.latents", &device));
    assert_stage("decode", image, &values.data("decode.image"));

    vae.enable_tiling();
    let values = Values::open(folder.join("stages/tiny_tiling.safetensors"));
    let image = vae.decode(values.tensor("decode.latents", &device));
    let latents = vae.encode(image.clone());
    let [_, _, height, _] = latents.dims();
    let latents = latents.narrow(2, 50, height - 50);
    assert_stage("tiled encode", latents, &values.data("encode.latents"));
    let image = image.slice([s![..], s![..], s![400..;8], s![..;8]]);
    let expected = values.data("decode.every_eighth_pixel");
    assert_stage("tiled decode", image, &expected);
}

#[test]
fn the_tiny_autoencoder_encodes_and_decodes_as_in_diffusers() {
    check_tiny::<Flex>();
    check_tiny::<NdArray>();
}
