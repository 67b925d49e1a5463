//! `diffuse img2img` and `diffuse inpaint`, and ControlNets.

mod common;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Stdio;

use diffuse_testing::reference;
use image::RgbImage;
use serde_json::Value;
use tempfile::TempDir;

/// A folder where the program runs: the tiny checkpoint in `m`, one for inpainting in `n`, images.
fn world() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let values = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../diffuse-pipelines/tests/reference/image_to_image");
    for name in ["m", "n"] {
        common::copy(&reference().join("sd/base"), &path(name));
    }
    fs::remove_dir_all(path("n/unet")).unwrap();
    common::copy(&values.join("inpaint"), &path("n/unet"));
    let index = fs::read_to_string(path("n/model_index.json")).unwrap();
    let index = index.replace("StableDiffusionPipeline", "StableDiffusionInpaintPipeline");
    fs::write(path("n/model_index.json"), index).unwrap();
    common::copy(&values.join("inputs"), folder.path());
    common::copy(&values.join("expected"), &path("expected"));
    let denoising = values.parent().unwrap().join("denoising");
    common::copy(&denoising, &path("denoising"));
    common::copy(&denoising.join("expected"), &path("expected"));
    folder
}

/// Runs the program with `input` at its standard input.
fn run_with(folder: &TempDir, arguments: &[&str], input: &[u8]) -> Result<RgbImage, String> {
    let path = folder.path().join("out.png");
    let mut child = common::diffuse(&[arguments, &["--quiet"]].concat())
        .current_dir(folder)
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It may end without reading it.
    let _ = child.stdin.take().unwrap().write_all(input);
    let output = child.wait_with_output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    if output.status.success() {
        assert_eq!(message, "", "{arguments:?}");
        let image = image::open(&path).unwrap().to_rgb8();
        fs::remove_file(path).unwrap();
        return Ok(image);
    }
    assert_eq!(output.status.code(), Some(1), "{arguments:?}");
    assert!(!path.exists());
    Err(message)
}

fn run(folder: &TempDir, arguments: &[&str]) -> Result<RgbImage, String> {
    run_with(folder, arguments, &[])
}

/// Levels differ by 3 at most.
#[track_caller]
fn check_image(folder: &TempDir, image: &RgbImage, expected: &str) {
    let path = folder.path().join("expected").join(expected);
    let expected = image::open(path).unwrap().to_rgb8();
    assert_eq!(image.dimensions(), expected.dimensions());
    let pairs = image.iter().zip(expected.iter());
    let largest = pairs.map(|(a, b)| a.abs_diff(*b)).max().unwrap();
    assert!(largest <= 3, "{largest}");
}

const IMG2IMG: [&str; 12] = [
    "img2img",
    "a lighthouse on a cliff in the rain",
    "--model",
    "m",
    "--scheduler",
    "EulerDiscreteScheduler",
    "--steps",
    "8",
    "--strength",
    "0.5",
    "--seed",
    "205",
];

#[test]
fn variants_of_an_image_are_those_of_diffusers() {
    let folder = world();
    let image = run(&folder, &[&IMG2IMG[..], &["--image", "image.png"]].concat()).unwrap();
    check_image(&folder, &image, "img2img_euler_0.png");
    // The same from standard input.
    let input = fs::read(folder.path().join("image.png")).unwrap();
    let arguments = [&IMG2IMG[..], &["--image", "-"]].concat();
    assert_eq!(run_with(&folder, &arguments, &input).unwrap(), image);
    assert_eq!(
        run_with(&folder, &arguments, b"").unwrap_err(),
        "error: cannot read standard input: it is not a PNG, JPEG or WebP image, or it is \
         damaged: The image format could not be determined\n"
    );
}

#[test]
fn repainted_images_are_those_of_diffusers() {
    let folder = world();
    let start = ["inpaint", "an owl reading a newspaper, etching"];
    let options = ["--scheduler", "DDIMScheduler", "--steps", "8"];
    let files = ["--image", "image.png", "--mask", "soft_mask.png"];
    let arguments = [&start[..], &options, &files].concat();
    let image = run(
        &folder,
        &[&arguments[..], &["--model", "m", "--seed", "232"]].concat(),
    );
    check_image(&folder, &image.unwrap(), "inpaint_4_ddim_0.png");
    let more = ["--model", "n", "--seed", "262", "--guidance-scale", "4"];
    let image = run(&folder, &[&arguments[..], &more].concat());
    check_image(&folder, &image.unwrap(), "inpaint_9_ddim_0.png");

    let start = ["inpaint", "a lighthouse on a cliff in the rain"];
    let files = ["--image", "odd.png", "--mask", "odd_mask_tall.png"];
    let more = [
        "--padding-mask-crop",
        "4",
        "--width",
        "64",
        "--height",
        "64",
    ];
    let model = ["--model", "m", "--seed", "250"];
    let image = run(
        &folder,
        &[&start[..], &options, &files, &more, &model].concat(),
    );
    check_image(&folder, &image.unwrap(), "inpaint_4_crop_tall_0.png");
}

#[test]
fn single_files_for_inpainting() {
    let folder = world();
    fs::copy(
        reference().join("single_file/v1-inpaint-merge.safetensors"),
        folder.path().join("merge.safetensors"),
    )
    .unwrap();
    // The file's UNet is that of `sd/inpaint`.
    fs::copy(
        reference().join("sd/inpaint/unet/config.json"),
        folder.path().join("n/unet/config.json"),
    )
    .unwrap();
    let model = [
        "--model",
        "merge.safetensors",
        "--config",
        "n",
        "--steps",
        "2",
    ];
    let files = ["--image", "image.png", "--mask", "mask.png"];
    let arguments = [&["inpaint", "a boat", "--seed", "1"], &model[..], &files].concat();
    assert_eq!(run(&folder, &arguments).unwrap().dimensions(), (64, 64));
}

#[test]
fn the_built_in_model_and_the_record() {
    let folder = world();
    let options = ["--steps", "4", "--strength", "0.5", "--seed", "3"];
    let start = ["a small red house on snow", "--image", "odd.png"];
    let image = run(&folder, &[&["img2img"], &start[..], &options].concat());
    assert_eq!(image.unwrap().dimensions(), (96, 64));
    let more = [
        "--mask",
        "odd_mask_wide.png",
        "--width",
        "64",
        "--height",
        "64",
    ];
    let keep = ["--keep-unmasked", "--output", "kept.png"];
    let arguments = [&["inpaint"], &start[..], &options, &more, &keep].concat();
    let output = common::diffuse(&[&arguments[..], &["--quiet"]].concat())
        .current_dir(&folder)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let expected = r#"{
            "command": "inpaint", "version": "VERSION", "model": "built in: scenes",
            "variant": null, "prompt": ["a small red house on snow"], "negative_prompt": [],
            "prompt_syntax": "plain", "vae": null, "vae_tiling": false, "lora": [], "embedding": [],
            "steps": 4, "timesteps": null, "sigmas": null, "guidance_scale": 2.0,
            "guidance_rescale": 0.0, "clip_skip": null, "control": [], "guess_mode": false,
            "freeu": null, "cache_interval": 1, "cache_branch_id": 0, "eta": 0.0, "seed": [3],
            "num_images": 1, "width": 64, "height": 64, "init_image": "odd.png",
            "mask": "odd_mask_wide.png", "mask_box": null, "strength": 0.5,
            "padding_mask_crop": null, "keep_unmasked": true, "init_latents": null,
            "backend": "flex", "revision": null, "dtype": "f32", "weights": null,
            "scheduler": "PNDMScheduler", "scheduler_config": {"num_train_timesteps": 1000,
            "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "trained_betas": null, "timestep_spacing": "leading", "steps_offset": 1,
            "prediction_type": "epsilon", "skip_prk_steps": true, "set_alpha_to_one": false,
            "clip_sample": false}, "image": 0, "nsfw_content_detected": null
        }"#;
    let expected = expected.replace("VERSION", env!("CARGO_PKG_VERSION"));
    let expected: Value = serde_json::from_str(&expected).unwrap();
    assert_eq!(common::record(folder.path().join("kept.png")), expected);
}

#[test]
fn refusals() {
    let folder = world();
    let check = |arguments: &[&str], expected: &str| {
        let message = run(&folder, arguments).unwrap_err();
        assert_eq!(message, format!("error: {expected}\n"), "{arguments:?}");
    };
    let image = ["img2img", "a boat", "--model", "m", "--image"];
    check(
        &[&image[..], &["none.png"]].concat(),
        "cannot read `none.png`: No such file or directory (os error 2)",
    );
    check(
        &[&image[..], &["m/model_index.json"]].concat(),
        "cannot read `m/model_index.json`: it is not a PNG, JPEG or WebP image, or it is damaged: \
         The image format could not be determined",
    );
    check(
        &[&image[..], &["image.png", "--strength", "0.01"]].concat(),
        "`strength` 0.01 of 50 steps leaves no step: give a larger one, or more steps",
    );
    check(
        &[&image[..], &["image.png", "--strength", "2"]].concat(),
        "`strength` is 2, but has to be in [0, 1]",
    );
    check(
        &["img2img", "--model", "m", "--image", "image.png"],
        "no prompt is given; one is, for example, in `diffuse img2img \"a boat at sunset\" \
         --image boat.png`",
    );
    let mask = ["inpaint", "a boat", "--model", "m", "--image"];
    check(
        &[&mask[..], &["-", "--mask", "-"]].concat(),
        "only one of `--image` and `--mask` can be read from standard input",
    );
    check(
        &[&mask[..], &["image.png", "--mask", "none.png"]].concat(),
        "cannot read `none.png`: No such file or directory (os error 2)",
    );
    check(
        &[&mask[..], &["image.png", "--mask-box", "64,0,9,9"]].concat(),
        "`--mask-box 64,0,9,9` has no pixel of 64 x 64",
    );
    let crop = ["odd.png", "--mask", "mask.png", "--padding-mask-crop", "3"];
    check(
        &[&mask[..], &crop].concat(),
        "with `padding_mask_crop` the mask has the size of the image, but they are 64 x 64 and \
         100 x 70",
    );
    let other = "these parts do not fit together: the UNet takes 9 channels: it is for inpainting, \
                 not for";
    check(
        &["img2img", "a boat", "--model", "n", "--image", "image.png"],
        &format!("{other} image to image"),
    );
    check(
        &["txt2img", "a boat", "--model", "n"],
        &format!("{other} text to image"),
    );
}

#[test]
fn controlnets_have_the_options_behind_them() {
    let folder = world();
    let start = [
        "an owl reading a newspaper, etching",
        "--model",
        "m",
        "--scheduler",
        "UniPCMultistepScheduler",
        "--steps",
        "6",
        "--seed",
        "309",
    ];
    let first = "--controlnet denoising/first --control-image other.png --control-scale 0.7 \
                 --control-end 0.8";
    let second = "--control-start 0.3 --control-image image.png --control-scale 0.4";
    let both = format!("{first} --controlnet denoising/bgr {second}");
    let both: Vec<&str> = both.split(' ').collect();
    let image = run(&folder, &[&start[..], &both].concat()).unwrap();
    check_image(&folder, &image, "control_two_0.png");

    // Edges are white on black: another image.
    let canny = [&start[..], &both, &["--control-canny=20,60"]].concat();
    assert!(run(&folder, &canny).unwrap() != image);

    let refused = |options: &str| {
        let options: Vec<&str> = options.split(' ').collect();
        run(&folder, &[&start[..], &options].concat()).unwrap_err()
    };
    assert_eq!(
        refused("--controlnet denoising/first"),
        "error: `--controlnet denoising/first` needs a `--control-image` behind it\n"
    );
    assert_eq!(
        refused("--control-image image.png --controlnet denoising/first"),
        "error: `--control-image` belongs behind the `--controlnet` that it is for\n"
    );
    assert_eq!(
        refused("--controlnet a --control-image b --control-scale 1 --control-scale 2"),
        "error: `--control-scale` is given twice for `--controlnet a`\n"
    );
    let none = [
        &start[..],
        &["--controlnet", "none", "--control-image", "image.png"],
    ]
    .concat();
    assert_eq!(
        run(&folder, &none).unwrap_err(),
        "error: cannot load `none`: there is no folder `none`\n"
    );
}

#[test]
fn freeu_and_deep_cache_are_those_of_their_programs() {
    let folder = world();
    let start = [
        "a lighthouse on a cliff in the rain",
        "--model",
        "m",
        "--steps",
        "6",
    ];
    let start = [&start[..], &["--scheduler", "DDIMScheduler", "--seed"]].concat();
    let freeu = [&start[..], &["331", "--freeu", "0.9,0.2,1.5,1.6"]].concat();
    check_image(&folder, &run(&folder, &freeu).unwrap(), "freeu_0.png");
    let cached = [&start[..], &["341", "--deep-cache", "2"]].concat();
    check_image(
        &folder,
        &run(&folder, &cached).unwrap(),
        "deep_cache_2_0.png",
    );
}
