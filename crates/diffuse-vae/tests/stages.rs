//! The autoencoder against values recorded from Diffusers.

use burn::tensor::backend::Backend;
use burn_flex::Flex;
use burn_ndarray::NdArray;
use diffuse_testing::{Values, assert_stage, reference};
use diffuse_vae::{AutoencoderKL, Pretrained};

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
