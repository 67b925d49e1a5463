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

/// What a batch of `prompts.jsonl` or another file says at its end.
fn batch(folder: &Path, file: &str) -> String {
    let arguments = ["batch", file, "--out", "images", "--steps", "1"];
    let output = diffuse(folder, &arguments);
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().last().unwrap().to_string()
}

#[test]
fn a_batch_goes_on_where_it_was_killed() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let prompts: Vec<String> = (0..40)
        .map(|i| format!("a house number {i}, \"red\""))
        .collect();
    fs::write(folder.join("prompts.txt"), prompts.join("\n\n")).unwrap();
    let images = || {
        let entries = fs::read_dir(folder.join("images")).into_iter().flatten();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.ends_with(".png")).count()
    };
    let arguments = [
        "batch",
        "prompts.txt",
        "--out",
        "images",
        "--steps",
        "1",
        "--quiet",
    ];
    let mut child = common::diffuse(&arguments)
        .current_dir(folder)
        .spawn()
        .unwrap();
    while images() < 2 {
        assert!(child.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let before = images();
    assert!(before < 40);

    let said = batch(folder, "prompts.txt");
    let numbers: Vec<usize> = said
        .split(' ')
        .filter_map(|word| word.parse().ok())
        .collect();
    let [made, kept, failed] = numbers[..] else {
        panic!("{said}");
    };
    // The image whose row was not written any more is made again.
    assert!(
        kept == before || kept + 1 == before,
        "{said}, {before} before"
    );
    assert_eq!((made + kept, failed, images()), (40, 0, 40));
    assert_eq!(
        batch(folder, "prompts.txt"),
        "0 made, 40 there already, 0 failed"
    );
    let table = fs::read_to_string(folder.join("images/results.csv")).unwrap();
    assert_eq!(table.lines().count(), 41);

    // An image is the one of a single run.
    let single = [
        "a house number 3, \"red\"",
        "--steps",
        "1",
        "--seed",
        "3",
        "--quiet",
    ];
    diffuse(folder, &single);
    assert!(open(folder.join("out.png")) == open(folder.join("images/00003.png")));

    // A row that was cut off, and an image that was deleted.
    fs::write(folder.join("images/results.csv"), &table[..table.len() - 9]).unwrap();
    let first = table.lines().nth(1).unwrap().split(',').nth(1).unwrap();
    fs::remove_file(folder.join("images").join(first)).unwrap();
    assert_eq!(
        batch(folder, "prompts.txt"),
        "2 made, 38 there already, 0 failed"
    );
    assert_eq!(images(), 40);
}

#[test]
fn a_batch_of_json_lines_has_options_a_line() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let lines = [
        r#"{"prompt": "a boat", "id": "boat", "seed": 7, "steps": 2, "scheduler": "euler"}"#,
        r#"{"prompt": "a tree", "width": 33}"#,
        r#"{"prompt": "a house", "width": 64, "height": 72, "negative_prompt": "blue"}"#,
    ];
    fs::write(folder.join("lines.jsonl"), lines.join("\n")).unwrap();
    let output = common::diffuse(&["batch", "lines.jsonl", "--out", "images", "--quiet"])
        .current_dir(folder)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        String::from_utf8(output.stderr).unwrap(),
        "warning: 00001: `height` and `width` have to be divisible by 8 and not zero, but `width` \
         is 33\nerror: 1 of 3 prompts failed: `images/results.csv` says why\n"
    );
    let image = open(folder.join("images/00002.png"));
    assert_eq!(image.dimensions(), (64, 72));
    let euler = [
        "a boat",
        "--steps",
        "2",
        "--scheduler",
        "euler",
        "--seed",
        "7",
        "--quiet",
    ];
    diffuse(folder, &euler);
    assert!(open(folder.join("out.png")) == open(folder.join("images/boat.png")));

    let refused = |line: &str| {
        fs::write(folder.join("wrong.jsonl"), line).unwrap();
        let output = common::diffuse(&["batch", "wrong.jsonl", "--out", "images"])
            .current_dir(folder)
            .output()
            .unwrap();
        String::from_utf8(output.stderr).unwrap()
    };
    assert_eq!(
        refused(r#"{"prompt": "a", "id": "../a"}"#),
        "error: line 1 of `wrong.jsonl`: the id `../a` is not the name of a file\n"
    );
    assert_eq!(
        refused(r#"{"seed": 1}"#),
        "error: line 1 of `wrong.jsonl` has no `prompt`\n"
    );
    assert_eq!(
        refused(r#"{"prompt": "a", "stpes": 1}"#),
        "error: line 1 of `wrong.jsonl`: unknown field `stpes`, expected one of `id`, `prompt`, \
         `negative_prompt`, `seed`, `steps`, `guidance_scale`, `scheduler`, `width`, `height` at \
         line 1 column 23\n"
    );
}
