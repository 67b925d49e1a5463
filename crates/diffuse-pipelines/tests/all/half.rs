//! Whole runs in half precision: close to the single-precision image, and never black.

use burn::tensor::FloatDType;
use burn_flex::Flex;
use diffuse_pipelines::{
    DDPMOptions, DDPMPipeline, LoadOptions, StableDiffusionOptions, StableDiffusionPipeline,
};
use diffuse_testing::reference;
use image::RgbImage;

fn text_to_image(load: LoadOptions) -> RgbImage {
    let folder = reference().join("sd/base");
    let pipeline =
        StableDiffusionPipeline::<Flex>::from_pretrained_with(folder, &load, &Default::default());
    let options = StableDiffusionOptions {
        num_inference_steps: 8,
        seeds: vec![3],
        ..StableDiffusionOptions::from("a lighthouse")
    };
    pipeline
        .unwrap()
        .generate(&options)
        .unwrap()
        .images
        .remove(0)
}

fn unconditional(load: LoadOptions) -> RgbImage {
    let folder = reference().join("ddpm/cat");
    let pipeline = DDPMPipeline::<Flex>::from_pretrained_with(folder, &load, &Default::default());
    let options = DDPMOptions {
        num_inference_steps: 8,
        seeds: vec![3],
        ..DDPMOptions::default()
    };
    pipeline
        .unwrap()
        .generate(&options)
        .unwrap()
        .images
        .remove(0)
}

/// Mean difference of levels.
fn difference(got: &RgbImage, expected: &RgbImage) -> f64 {
    let pairs = got.as_raw().iter().zip(expected.as_raw());
    let total: u64 = pairs
        .map(|(got, expected)| u64::from(got.abs_diff(*expected)))
        .sum();
    total as f64 / got.as_raw().len() as f64
}

/// Computed and kept in these types.
fn types(dtype: FloatDType, weights: Option<FloatDType>) -> LoadOptions {
    LoadOptions {
        dtype: Some(dtype),
        weights,
        ..LoadOptions::default()
    }
}

#[test]
fn half_precision_gives_nearly_the_same_images() {
    for image in [text_to_image, unconditional] {
        let expected = image(types(FloatDType::F32, None));
        for (dtype, allowed) in [(FloatDType::F16, 1.0), (FloatDType::BF16, 6.0)] {
            // In all of it, and in the weights alone.
            for load in [types(dtype, None), types(FloatDType::F32, Some(dtype))] {
                let difference = difference(&image(load), &expected);
                assert!(difference < allowed, "{dtype:?}: {difference}");
                assert!(difference > 0.0, "{dtype:?} is not used");
            }
        }
    }
}
