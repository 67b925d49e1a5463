//! What is loaded on top of a checkpoint: adapters, textual inversions, VAEs, single files; and
//! prompts as AUTOMATIC1111's web UI reads them.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use diffuse_testing::reference;
use image::RgbImage;
use tempfile::TempDir;

/// A folder where the program runs, with the tiny checkpoint in `m` and some files.
fn world() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    common::copy(&reference().join("sd/base"), &folder.path().join("m"));
    let inversions =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../diffuse-clip/tests/fixtures/inversions");
    common::copy(&inversions, &folder.path().join("inversions"));
    for (from, to) in [
        ("lora/kohya.safetensors", "style.safetensors"),
        (
            "lora/refused/no_key_matches.safetensors",
            "other.safetensors",
        ),
        ("single_file/v1.ckpt", "v1.ckpt"),
        ("single_file/vae.safetensors", "vae.safetensors"),
        ("single_file/kinds/sdxl.safetensors", "sdxl.safetensors"),
        (
            "single_file/kinds/lora.safetensors",
            "kind-lora.safetensors",
        ),
    ] {
        fs::copy(reference().join(from), folder.path().join(to)).unwrap();
    }
    folder
}

fn run(folder: &TempDir, prompt: &str, options: &[&str]) -> Result<RgbImage, String> {
    let path: PathBuf = folder.path().join("out.png");
    let arguments = ["txt2img", prompt, "--steps", "2", "--seed", "5", "--quiet"];
    let arguments = [&arguments[..], options].concat();
    let output = common::diffuse(&arguments)
        .current_dir(folder)
        .output()
        .unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    if output.status.success() {
        assert_eq!(message, "", "{arguments:?}");
        let image = image::open(&path).unwrap().to_rgb8();
        fs::remove_file(path).unwrap();
        Ok(image)
    } else {
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(!path.exists());
        Err(message)
    }
}

#[track_caller]
fn image(folder: &TempDir, prompt: &str, options: &[&str]) -> RgbImage {
    run(folder, prompt, &[&["--model", "m"], options].concat()).unwrap()
}

#[track_caller]
fn check_error(folder: &TempDir, prompt: &str, options: &[&str], expected: &str) {
    let message = run(folder, prompt, options).unwrap_err();
    assert_eq!(message, format!("error: {expected}\n"));
}

#[test]
fn adapters_by_option_and_in_prompts() {
    let folder = world();
    let plain = image(&folder, "a boat", &[]);
    let full = image(&folder, "a boat", &["--lora", "style.safetensors"]);
    let weak = image(&folder, "a boat", &["--lora", "style.safetensors:0.5"]);
    let unet = image(&folder, "a boat", &["--lora", "style.safetensors:0.5:0"]);
    let nothing = image(&folder, "a boat", &["--lora", "style.safetensors:0"]);
    assert_eq!(nothing, plain);
    for (a, b) in [(&plain, &full), (&full, &weak), (&weak, &unet)] {
        assert_ne!(a, b);
    }
    let twice = [
        "--lora",
        "style.safetensors:0.25",
        "--lora",
        "style.safetensors:0.25",
    ];
    let sum = image(&folder, "a boat", &twice);
    let levels = sum.as_raw().iter().zip(weak.as_raw());
    assert!(levels.into_iter().all(|(a, b)| a.abs_diff(*b) <= 1));

    // In the prompt, first comes the text encoder's strength.
    let named = image(&folder, "a boat<lora:style:0.5>", &["--lora-dir", "."]);
    assert_eq!(named, weak);
    let named = image(&folder, "a boat<lora:style:0:0.5>", &["--lora-dir", "."]);
    assert_eq!(named, unet);

    check_error(
        &folder,
        "a boat<lora:missing:1>",
        &["--model", "m", "--lora-dir", "."],
        "`.` has no `missing.safetensors`, which a prompt names",
    );
    check_error(
        &folder,
        "a boat",
        &["--model", "m", "--lora", "sdxl.safetensors"],
        "`sdxl.safetensors` is Stable Diffusion XL, not a LoRA",
    );
    check_error(
        &folder,
        "a boat",
        &["--model", "m", "--lora", "other.safetensors"],
        "`other.safetensors` is for another model: none of its 6 tensors matches; they are \
         `lora_te2_text_model_encoder_layers_31_mlp_fc1.alpha`, \
         `lora_te2_text_model_encoder_layers_31_mlp_fc1.lora_down.weight`, \
         `lora_te2_text_model_encoder_layers_31_mlp_fc1.lora_up.weight` and 3 more",
    );
}

#[test]
fn textual_inversions() {
    let folder = world();
    let plain = image(&folder, "a cat-toy on a table", &[]);
    let names: Vec<String> = fs::read_dir(folder.path().join("inversions"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let file = names.iter().find(|name| name.ends_with(".pt")).unwrap();
    let option = format!("cat-toy=inversions/{file}");
    let changed = image(&folder, "a cat-toy on a table", &["--embedding", &option]);
    assert_ne!(changed, plain);
    // A prompt without the word is as before.
    let options = ["--embedding", &option];
    assert_eq!(
        image(&folder, "a boat", &options),
        image(&folder, "a boat", &[])
    );
    check_error(
        &folder,
        "a boat",
        &["--model", "m", "--embedding", "style.safetensors"],
        "`style.safetensors` is a LoRA or another adapter, not a textual inversion",
    );
}

#[test]
fn single_files_and_vaes() {
    let folder = world();
    let half = image(&folder, "a boat", &["--variant", "fp16"]);
    let options = ["--model", "v1.ckpt", "--config", "m"];
    assert_eq!(run(&folder, "a boat", &options).unwrap(), half);
    let vae = image(
        &folder,
        "a boat",
        &["--variant", "fp16", "--vae", "vae.safetensors"],
    );
    assert_eq!(vae, half);
    let folder_vae = image(&folder, "a boat", &["--variant", "fp16", "--vae", "m"]);
    assert!(folder_vae.dimensions() == half.dimensions());

    check_error(
        &folder,
        "a boat",
        &["--model", "sdxl.safetensors"],
        "`sdxl.safetensors` is Stable Diffusion XL, which cannot be used here",
    );
    check_error(
        &folder,
        "a boat",
        &["--model", "kind-lora.safetensors"],
        "`kind-lora.safetensors` is a LoRA or another adapter, which cannot be used here",
    );
    check_error(
        &folder,
        "a boat",
        &["--model", "v1.ckpt", "--config", "m", "--ema"],
        "`v1.ckpt` lacks `model_ema.diffusion_modelinput_blocks00weight`, \
         `model_ema.diffusion_modelinput_blocks00bias`, \
         `model_ema.diffusion_modeltime_embed0weight` and 439 more",
    );
    check_error(
        &folder,
        "a boat",
        &["--model", "m", "--ema"],
        "`--ema` is for a single file, but `m` is a folder",
    );

    let convert = |from: &str, to: &str| {
        let mut command = common::diffuse(&["convert", from, to, "--config", "m", "--quiet"]);
        let output = command.current_dir(&folder).output().unwrap();
        let message = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{message}");
    };
    convert("v1.ckpt", "converted");
    let options = ["--model", "converted"];
    assert_eq!(run(&folder, "a boat", &options).unwrap(), half);
    convert("converted", "again.safetensors");
    let options = ["--model", "again.safetensors", "--config", "m"];
    assert_eq!(run(&folder, "a boat", &options).unwrap(), half);

    let output = common::diffuse(&["inspect", "sdxl.safetensors"])
        .current_dir(&folder)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(
        text,
        "  sdxl.safetensors  it is Stable Diffusion XL
    sdxl.safetensors: 6 tensors, 336 F16
not supported:
  sdxl.safetensors: Stable Diffusion XL cannot be used here
"
    );
}

#[test]
fn weighted_prompts() {
    let folder = world();
    let weighted = ["--prompt-syntax", "a1111"];
    let plain = image(&folder, "a boat at sea", &[]);
    assert_eq!(image(&folder, "a boat at sea", &weighted), plain);
    assert_ne!(image(&folder, "a (boat:1.4) at sea", &weighted), plain);
    // Beyond 75 tokens nothing is cut.
    let long = "a boat at sea, ".repeat(30);
    let longer = format!("{long}a red house");
    assert_ne!(
        image(&folder, &long, &weighted),
        image(&folder, &longer, &weighted)
    );
    check_error(
        &folder,
        "a [boat|ship]",
        &["--model", "m", "--prompt-syntax", "a1111"],
        "`[boat|ship]` alternates between texts from step to step, which is not supported; a \
         bracket is written `\\[`",
    );
    check_error(
        &folder,
        "a boat <lora:style:1>",
        &["--model", "m", "--prompt-syntax", "a1111"],
        "a prompt names the LoRA `style`, but no folder of LoRAs is given",
    );
    check_error(
        &folder,
        "a boat",
        &[
            "--model",
            "m",
            "--prompt-syntax",
            "a1111",
            "--negative-prompt",
            "ugly <lora:style:1>",
        ],
        "a negative prompt names the LoRA `style`; it changes the whole model: name it in the \
         prompt",
    );
    check_error(
        &folder,
        "a boat",
        &["--model", "no.safetensors"],
        "there is no file `no.safetensors`",
    );
}
