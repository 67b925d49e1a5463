//! Image to image and inpainting beside whole runs: files, refusals, what is kept.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use burn_flex::Flex;
use diffuse_pipelines::schedulers::{Overrides, scheduler_from_config};
use diffuse_pipelines::unet::{Pretrained, UNet2DConditionModel};
use diffuse_pipelines::{
    PipelineError, StableDiffusionImg2ImgOptions, StableDiffusionInpaintOptions,
    StableDiffusionInputs, StableDiffusionOptions, StableDiffusionPipeline, generators, load_image,
};
use image::{Rgb, RgbImage};

type B = Flex;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference")
}

fn open(name: &str) -> RgbImage {
    let path = folder().join("image_to_image/inputs").join(name);
    load_image(&fs::read(path).unwrap()).unwrap()
}

fn pipeline() -> StableDiffusionPipeline<B> {
    let base = folder().join("sd/base");
    StableDiffusionPipeline::from_pretrained(base, &Default::default()).unwrap()
}

fn inpainting_pipeline() -> StableDiffusionPipeline<B> {
    let unet = folder().join("image_to_image/inpaint");
    let mut pipeline = pipeline();
    pipeline.unet = UNet2DConditionModel::from_pretrained(unet, &Default::default()).unwrap();
    pipeline
}

fn options(seeds: &[u64]) -> StableDiffusionOptions {
    StableDiffusionOptions {
        num_inference_steps: 4,
        seeds: seeds.to_vec(),
        ..StableDiffusionOptions::from("a lighthouse")
    }
}

fn img2img(seeds: &[u64]) -> StableDiffusionImg2ImgOptions {
    StableDiffusionImg2ImgOptions {
        options: options(seeds),
        image: vec![open("image.png")],
        ..StableDiffusionImg2ImgOptions::default()
    }
}

fn inpaint(seeds: &[u64]) -> StableDiffusionInpaintOptions {
    StableDiffusionInpaintOptions {
        options: options(seeds),
        image: vec![open("image.png")],
        mask_image: vec![open("mask.png")],
        ..StableDiffusionInpaintOptions::default()
    }
}

#[test]
fn files_are_read_as_by_diffusers() {
    for (name, tolerance) in [
        ("turned.png", 0),
        ("turned.webp", 0),
        ("grey.png", 0),
        // Decoders of JPEG round differently.
        ("turned.jpg", 2),
    ] {
        let (image, expected) = (open(name), open(&format!("{name}.expected.png")));
        assert_eq!(image.dimensions(), expected.dimensions(), "{name}");
        let pairs = image.iter().zip(expected.iter());
        let largest = pairs.map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert!(largest <= tolerance, "{name}: {largest}");
    }
}

#[test]
fn a_noise_source_of_several_generators_equals_seeds() {
    let pipeline = pipeline();
    let mut options = img2img(&[3, 4]);
    options.options.num_images_per_prompt = 2;
    let expected = pipeline.image_to_image(&options).unwrap();
    options.options.seeds.clear();
    let mut noise = generators(&[3, 4]);
    let inputs = StableDiffusionInputs {
        noise: Some(&mut noise),
        ..StableDiffusionInputs::default()
    };
    let generated = pipeline
        .image_to_image_with(&options, inputs, |_| ControlFlow::Continue(()))
        .unwrap();
    assert_eq!(generated.images, expected.images);
    // An image of a batch is the one that its seed gives alone.
    let alone = pipeline.image_to_image(&img2img(&[4])).unwrap();
    let pairs = alone.images[0].iter().zip(expected.images[1].iter());
    assert!(pairs.map(|(a, b)| a.abs_diff(*b)).max().unwrap() <= 1);
}

#[test]
fn unmasked_pixels_are_kept_if_asked_for() {
    let mut options = inpaint(&[5]);
    let (image, mask) = (open("image.png"), open("mask.png"));
    let kept = |result: &RgbImage| {
        let pixels = result.pixels().zip(image.pixels()).zip(mask.pixels());
        let black = pixels.filter(|(_, mask)| **mask == Rgb([0; 3]));
        let (same, all): (Vec<_>, Vec<_>) = black.partition(|((a, b), _)| a == b);
        (same.len(), same.len() + all.len())
    };
    let pipeline = pipeline();
    let plain = pipeline.inpaint(&options).unwrap().images.remove(0);
    let (same, all) = kept(&plain);
    assert_eq!(all, 64 * 64 - 28 * 34);
    assert!(same < all / 10, "{same}");
    options.keep_unmasked = true;
    let result = pipeline.inpaint(&options).unwrap().images.remove(0);
    assert_eq!(kept(&result), (all, all));
    for (x, y, pixel) in result.enumerate_pixels() {
        if mask.get_pixel(x, y) == &Rgb([255; 3]) {
            assert_eq!(pixel, plain.get_pixel(x, y));
        }
    }
}

#[test]
fn a_callback_stops_the_run() {
    let options = inpaint(&[6]);
    let generated = inpainting_pipeline()
        .inpaint_with(&options, StableDiffusionInputs::default(), |event| {
            assert_eq!(event.steps, 5);
            if event.step == 1 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })
        .unwrap();
    assert!(generated.interrupted);
    assert!(generated.images.is_empty());
}

#[track_caller]
fn check<T>(result: Result<T, PipelineError>, expected: &str) {
    let message = result.map(|_| ()).unwrap_err().to_string();
    assert_eq!(message, expected);
}

#[test]
fn image_to_image_refuses() {
    let pipeline = pipeline();
    let check = |change: &dyn Fn(&mut StableDiffusionImg2ImgOptions), expected: &str| {
        let mut options = img2img(&[0]);
        change(&mut options);
        check(pipeline.image_to_image(&options), expected);
    };
    let none = "`strength` 0.2 of 4 steps leaves no step: give a larger one, or more steps";
    check(&|options| options.strength = 0.2, none);
    let none = "`strength` 0 of 4 steps leaves no step: give a larger one, or more steps";
    check(&|options| options.strength = 0.0, none);
    for (strength, name) in [(1.1, "1.1"), (-0.1, "-0.1"), (f64::NAN, "NaN")] {
        let expected = format!("`strength` is {name}, but has to be in [0, 1]");
        check(&|options| options.strength = strength, &expected);
    }
    check(&|options| options.image.clear(), "`image` is empty");
    check(
        &|options| options.image.push(open("other.png")),
        "`image` has 2 for an effective batch size of 1: give one, or as many as divide it",
    );
    check(
        &|options| options.image = vec![RgbImage::new(30, 7)],
        "an image of 30 x 7 is too small: 8 on each side at least",
    );
    check(
        &|options| options.options.width = Some(64),
        "image to image takes no `width`, `height` or `latents`: they are the image's",
    );
    check(
        &|options| options.options.prompt.clear(),
        "provide either `prompt` or `prompt_embeds`",
    );
    check(
        &|options| options.options.seeds = vec![1, 2],
        "2 seeds for an effective batch size of 1: give one for the whole batch, or one an image",
    );
}

#[test]
fn strength_counts_custom_timesteps() {
    let mut pipeline = pipeline();
    let config = pipeline.scheduler.config();
    let euler = scheduler_from_config(config, Some("EulerDiscreteScheduler"), &Overrides::new());
    pipeline.scheduler = euler.unwrap();
    let mut options = img2img(&[0]);
    options.options.timesteps = Some(vec![999.0, 500.0, 1.0]);
    options.strength = 0.67;
    let generated = pipeline.image_to_image(&options).unwrap();
    assert_eq!(generated.timesteps, [500.0, 1.0]);
    options.strength = 0.3;
    let none = "`strength` 0.3 of 3 steps leaves no step: give a larger one, or more steps";
    check(pipeline.image_to_image(&options), none);
}

#[test]
fn schedulers_without_add_noise_are_refused() {
    let mut pipeline = pipeline();
    let config = pipeline.scheduler.config();
    pipeline.scheduler =
        scheduler_from_config(config, Some("IPNDMScheduler"), &Overrides::new()).unwrap();
    let expected = "`IPNDMScheduler` has no `add_noise`";
    check(pipeline.image_to_image(&img2img(&[0])), expected);
    check(pipeline.inpaint(&inpaint(&[0])), expected);
}

#[test]
fn inpainting_refuses() {
    let pipeline = pipeline();
    let check = |change: &dyn Fn(&mut StableDiffusionInpaintOptions), expected: &str| {
        let mut options = inpaint(&[0]);
        change(&mut options);
        check(pipeline.inpaint(&options), expected);
    };
    let none = "`strength` 0.2 of 4 steps leaves no step: give a larger one, or more steps";
    check(&|options| options.strength = 0.2, none);
    check(
        &|options| options.mask_image.clear(),
        "`mask_image` has 0 for an effective batch size of 1: give one, or as many as divide it",
    );
    check(
        &|options| {
            options.options.num_images_per_prompt = 6;
            options.image = vec![open("image.png"); 2];
            options.mask_image = vec![open("mask.png"); 3];
        },
        "3 masks for 2 images: give one for all, or one for each",
    );
    check(
        &|options| {
            options.options.num_images_per_prompt = 2;
            options.image.push(open("other.png"));
            options.padding_mask_crop = Some(2);
        },
        "`padding_mask_crop` is for one image and one mask",
    );
    check(
        &|options| {
            options.image = vec![open("odd.png")];
            options.padding_mask_crop = Some(2);
        },
        "with `padding_mask_crop` the mask has the size of the image, but they are 64 x 64 and \
         100 x 70",
    );
    check(
        &|options| {
            options.mask_image = vec![RgbImage::new(64, 64)];
            options.padding_mask_crop = Some(2);
        },
        "the mask is black: there is nothing to repaint",
    );
}

#[test]
fn a_unet_for_inpainting_inpaints_only() {
    let pipeline = inpainting_pipeline();
    assert!(pipeline.is_for_inpainting());
    let message = |task| {
        format!(
            "these parts do not fit together: the UNet takes 9 channels: it is for inpainting, \
             not for {task}"
        )
    };
    check(
        pipeline.image_to_image(&img2img(&[0])),
        &message("image to image"),
    );
    check(pipeline.generate(&options(&[0])), &message("text to image"));
}
