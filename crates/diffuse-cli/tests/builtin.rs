//! The models that the program carries: an image in an empty folder, and the same as the
//! reference's.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use image::RgbImage;
use serde_json::Value;

/// Runs the program in a folder.
fn diffuse(folder: &Path, arguments: &[&str]) -> Output {
    let output = common::diffuse(arguments)
        .current_dir(folder)
        .output()
        .unwrap();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{arguments:?}: {message}");
    output
}

/// Where the reference's images are, made by `xtask/golden/builtin.py`.
fn expected() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/builtin")
}

fn open(path: PathBuf) -> RgbImage {
    image::open(path).unwrap().into_rgb8()
}

#[test]
fn images_are_the_references() {
    let text = fs::read_to_string(expected().join("cases.json")).unwrap();
    let cases: Value = serde_json::from_str(&text).unwrap();
    for case in cases["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let seed = case["seed"].to_string();
        let folder = tempfile::tempdir().unwrap();
        // A prompt needs no command, and neither needs a model.
        let what = case["prompt"].as_str().unwrap_or("ddpm");
        let mut arguments = vec![what, "--seed", &seed, "--quiet"];
        let text = |key: &str| case.get(key).map(ToString::to_string);
        let start = case["image"].as_str().map(|name| expected().join(name));
        let start = start.map(|path| path.with_extension("png"));
        let (area, strength) = (text("mask_box"), text("strength"));
        let area = area.map(|area| area.trim_matches(['[', ']']).to_string());
        if let Some(start) = &start {
            let command = if area.is_some() { "inpaint" } else { "img2img" };
            arguments.splice(..1, [command, what, "--image", start.to_str().unwrap()]);
            arguments.extend(area.iter().flat_map(|area| ["--mask-box", area]));
            arguments.extend(
                strength
                    .iter()
                    .flat_map(|strength| ["--strength", strength]),
            );
        }
        if let Some(lora) = case["lora"].as_str() {
            arguments.extend(["--lora", lora]);
        }
        diffuse(folder.path(), &arguments);
        let image = open(folder.path().join("out.png"));
        let reference = open(expected().join(name).with_extension("png"));
        assert_eq!(image.dimensions(), reference.dimensions(), "{name}");
        let differences: Vec<u8> = image
            .as_raw()
            .iter()
            .zip(reference.as_raw())
            .map(|(ours, theirs)| ours.abs_diff(*theirs))
            .collect();
        let largest = *differences.iter().max().unwrap();
        let mean =
            differences.iter().map(|it| f64::from(*it)).sum::<f64>() / differences.len() as f64;
        println!("{name}: {largest} levels at most, {mean:.4} on average");
        assert!(largest <= 2 && mean <= 0.1, "{name}: {largest}, {mean}");
    }
}

#[test]
fn a_lora_of_strength_zero_changes_no_pixel() {
    let folder = tempfile::tempdir().unwrap();
    let make = |lora: &[&str]| {
        let arguments = ["two trees by day", "--seed", "1", "--steps", "2", "--quiet"];
        diffuse(folder.path(), &[&arguments, lora].concat());
        open(folder.path().join("out.png"))
    };
    let without = make(&[]);
    assert!(make(&["--lora", "dutch-angle:0"]) == without);
    assert!(make(&["--lora", "dutch-angle"]) != without);
}

/// The message of a run with the LoRA `dutch-angle` that fails.
fn message(folder: &Path, model: &[&str]) -> String {
    let arguments = [&["a tree", "--lora", "dutch-angle"], model].concat();
    let output = common::diffuse(&arguments)
        .current_dir(folder)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn the_lora_is_for_the_built_in_model_and_a_file_of_its_name_comes_first() {
    let folder = tempfile::tempdir().unwrap();
    let model = diffuse_testing::reference().join("sd/base");
    assert_eq!(
        message(folder.path(), &["--model", model.to_str().unwrap()]),
        "error: `dutch-angle` is for another model: \
         `unet.down_blocks.0.attentions.0.proj_in.lora_A.weight` changes a weight of shape \
         [48, 48], but that of `down_blocks.0.attentions.0.proj_in` is [16, 16]\n"
    );
    fs::write(folder.path().join("dutch-angle"), "a file").unwrap();
    assert_eq!(
        message(folder.path(), &[]),
        "error: `dutch-angle` is not a valid safetensors file: it is too short for a header\n"
    );
}

#[test]
fn the_built_in_model_needs_no_file_and_leaves_none() {
    let folder = tempfile::tempdir().unwrap();
    let temporary = folder.path().join("temporary");
    fs::create_dir(&temporary).unwrap();
    let arguments = ["two trees by day", "--steps", "2", "--output", "trees.png"];
    let output = common::diffuse(&arguments)
        .current_dir(folder.path())
        .env("TMPDIR", &temporary)
        .output()
        .unwrap();
    assert!(output.status.success());
    assert_eq!(
        open(folder.path().join("trees.png")).dimensions(),
        (128, 128)
    );
    assert_eq!(fs::read_dir(&temporary).unwrap().count(), 0);
}
