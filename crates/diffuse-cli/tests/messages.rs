//! What a person at a terminal reads, whole.

mod common;

use std::fs;
use std::path::Path;

use diffuse_testing::reference;
use tempfile::TempDir;

const POINTER: &str = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3438167540\n";
const PAGE: &str = "<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n";

/// A folder with the tiny checkpoint `NAME` in `m`, where the program runs.
fn world(name: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    common::copy(&reference().join(name), &folder.path().join("m"));
    folder
}

/// Runs the program, which must fail with this message and leave no image.
#[track_caller]
fn check(folder: &TempDir, arguments: &[&str], expected: &str) {
    let mut command = common::diffuse(arguments);
    let output = command.current_dir(folder).output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(message, format!("error: {expected}\n"), "{arguments:?}");
    assert_eq!(output.status.code(), Some(1), "{arguments:?}");
    assert!(!folder.path().join("out.png").exists());
}

/// Puts something else in a file's place.
#[track_caller]
fn check_stand_in(name: &str, file: &str, contents: &str, expected: &str) {
    let folder = world(name);
    let path = folder.path().join("m").join(file);
    assert!(path.is_file(), "{file}");
    fs::write(path, contents).unwrap();
    let message = format!("cannot read `m/{file}`: {expected}");
    check(&folder, &["txt2img", "a boat", "--model", "m"], &message);
}

#[test]
fn pointers_of_git_lfs_and_web_pages_are_told_apart_from_damage() {
    let pointer = "it is a git-lfs pointer, which stands for the file: install git-lfs and run \
                   `git lfs pull` in the folder that was cloned";
    check_stand_in(
        "sd/base",
        "unet/diffusion_pytorch_model.safetensors",
        POINTER,
        pointer,
    );
    check_stand_in(
        "sd/bin",
        "unet/diffusion_pytorch_model.bin",
        POINTER,
        pointer,
    );
    check_stand_in("sd/base", "tokenizer/vocab.json", POINTER, pointer);
    let page =
        "it is a web page, perhaps of a login or an error, and not the file: fetch the file again";
    for file in [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json",
        "text_encoder/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ] {
        check_stand_in("sd/base", file, PAGE, page);
    }
}

#[test]
fn merges_that_are_none() {
    let folder = world("sd/base");
    fs::write(
        folder.path().join("m/tokenizer/merges.txt"),
        "#version: 0.2\na b c\n",
    )
    .unwrap();
    check(
        &folder,
        &["txt2img", "a boat", "--model", "m"],
        "`m/tokenizer/merges.txt` is not valid: line 2 is not two tokens",
    );
}

#[test]
fn checkpoints_of_other_pipelines_say_what_they_are() {
    let boat = ["txt2img", "a boat", "--model", "m"];
    check(
        &world("ddpm/cat"),
        &boat,
        "`m/model_index.json`: its class is DDPMPipeline, not StableDiffusionPipeline: it has no \
         `tokenizer`; `diffuse ddpm` is for it",
    );
    check(
        &world("sd/base"),
        &["ddpm", "--model", "m"],
        "`m/model_index.json`: its class is StableDiffusionPipeline, not DDPMPipeline: `unet` is a \
         UNet2DConditionModel, but this pipeline needs a UNet2DModel; `diffuse txt2img` is for it",
    );

    let edit = |folder: &TempDir, from: &str, to: &str| {
        let path = folder.path().join("m/model_index.json");
        let index = fs::read_to_string(&path).unwrap();
        assert!(index.contains(from));
        fs::write(path, index.replace(from, to)).unwrap();
    };
    let xl = world("sd/base");
    edit(
        &xl,
        "\"StableDiffusionPipeline\"",
        "\"StableDiffusionXLPipeline\"",
    );
    let second =
        "\"text_encoder_2\": [\"transformers\", \"CLIPTextModelWithProjection\"], \"unet\":";
    edit(&xl, "\"unet\":", second);
    check(
        &xl,
        &boat,
        "`m/model_index.json`: its class is StableDiffusionXLPipeline, not \
         StableDiffusionPipeline: it has a `text_encoder_2`, which would be left out",
    );
    let ldm = world("ddpm/cat");
    edit(&ldm, "\"DDPMPipeline\"", "\"LDMPipeline\"");
    edit(
        &ldm,
        "\"unet\":",
        "\"vqvae\": [\"diffusers\", \"VQModel\"], \"unet\":",
    );
    check(
        &ldm,
        &["ddpm", "--model", "m"],
        "`m/model_index.json`: its class is LDMPipeline, not DDPMPipeline: it has a `vqvae`, which \
         would be left out",
    );
    edit(
        &ldm,
        "\"vqvae\"",
        "\"tokenizer\": [\"transformers\", \"BertTokenizer\"], \"vqvae\"",
    );
    check(
        &ldm,
        &boat,
        "`m/model_index.json`: its class is LDMPipeline, not StableDiffusionPipeline: `tokenizer` \
         is a BertTokenizer, but this pipeline needs a CLIPTokenizer or CLIPTokenizerFast",
    );
}

#[test]
fn folders_that_are_no_pipelines_say_what_they_are() {
    let folder = world("sd/base");
    check(
        &folder,
        &["txt2img", "a boat", "--model", "m/unet"],
        "`m/unet` has no `model_index.json`: it holds a UNet2DConditionModel, which is one \
         component of a pipeline; name the folder above it",
    );
    fs::create_dir(folder.path().join("f")).unwrap();
    let nothing = "`f` has no `model_index.json`: it is not a pipeline in Diffusers' format";
    check(&folder, &["txt2img", "a boat", "--model", "f"], nothing);
    check(&folder, &["convert", "f", "g"], nothing);
    fs::write(folder.path().join("f/v1-5-pruned.ckpt"), "").unwrap();
    check(
        &folder,
        &["txt2img", "a boat", "--model", "f"],
        "`f` has no `model_index.json`: `v1-5-pruned.ckpt` may be a single-file checkpoint, which \
         cannot be read; look for one in Diffusers' format",
    );
}

#[test]
fn seeds_below_zero_are_torchs() {
    let folder = world("ddpm/new-names");
    let image = |seed: &str, output: &str| {
        let arguments = [
            "ddpm", "--model", "m", "--steps", "1", "--seed", seed, "--output", output,
        ];
        let result = common::diffuse(&arguments)
            .current_dir(&folder)
            .output()
            .unwrap();
        let told = String::from_utf8(result.stdout).unwrap();
        assert_eq!(told, format!("seed 18446744073709551615\n{output}\n"));
        image::open(folder.path().join(output)).unwrap().to_rgb8()
    };
    assert_eq!(image("-1", "a.png"), image("18446744073709551615", "b.png"));
}

/// A folder, weights and images whose names are not UTF-8.
#[cfg(unix)]
#[test]
fn paths_that_are_not_utf8() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let folder = world("sd/base");
    let name = |bytes: &[u8]| OsStr::from_bytes(bytes).to_os_string();
    let model = name(b"m\xff");
    fs::rename(folder.path().join("m"), folder.path().join(&model)).unwrap();
    let run = |arguments: &[&str], paths: &[(&str, &[u8])]| {
        let mut command = common::diffuse(arguments);
        for (option, path) in paths {
            command.arg(option).arg(name(path));
        }
        let output = command.current_dir(&folder).output().unwrap();
        let message = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{message}");
        assert_eq!(message, "");
    };
    let exists = |path: &[u8]| folder.path().join(Path::new(&name(path))).exists();
    run(
        &[
            "txt2img",
            "a boat",
            "--steps",
            "1",
            "--num-images",
            "2",
            "--quiet",
        ],
        &[
            ("--model", b"m\xff"),
            ("--output", b"o\xff.png"),
            ("--output-latents", b"l\xff.safetensors"),
        ],
    );
    assert!(exists(b"o\xff-0.png") && exists(b"o\xff-1.png") && exists(b"l\xff.safetensors"));
    run(
        &[
            "txt2img",
            "a boat",
            "--steps",
            "1",
            "--num-images",
            "2",
            "--quiet",
        ],
        &[
            ("--model", b"m\xff"),
            ("--output", b"p\xff.png"),
            ("--init-latents", b"l\xff.safetensors"),
        ],
    );
    assert!(exists(b"p\xff-0.png"));
}
