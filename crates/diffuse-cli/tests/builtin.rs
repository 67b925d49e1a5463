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
        diffuse(folder.path(), &[what, "--seed", &seed, "--quiet"]);
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
