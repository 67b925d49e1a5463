//! The program as a person uses it: what it writes, what it says, and what wrong input gets.

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use diffuse_testing::reference;

fn diffuse(arguments: &[&str]) -> Output {
    common::diffuse(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A tiny checkpoint of the tests.
fn model(name: &str) -> String {
    reference().join(name).display().to_string()
}

/// A fresh folder, and a path in it.
fn output(name: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name).display().to_string();
    (folder, path)
}

/// Runs the program, which must fail with one clear message and leave no file behind.
#[track_caller]
fn check_error(arguments: &[&str], expected: &str) {
    let (folder, path) = output("out.png");
    let arguments = [arguments, &["--output", &path]].concat();
    let result = diffuse(&arguments);
    let message = text(&result.stderr);
    assert_eq!(result.status.code(), Some(1), "{arguments:?}: {message}");
    assert!(message.contains(expected), "{arguments:?}: {message}");
    assert!(!message.contains("panicked"), "{message}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// [`check_error`] of a text-to-image run with the tiny checkpoint.
#[track_caller]
fn check_option(option: &[&str], expected: &str) {
    let model = model("sd/base");
    let base = ["txt2img", "a lighthouse", "--model", &model, "--seed", "1"];
    check_error(&[&base[..], option].concat(), expected);
}

/// The JSON in the PNG's text chunk.
fn record(path: &str) -> serde_json::Value {
    let decoder = png::Decoder::new(std::io::BufReader::new(fs::File::open(path).unwrap()));
    let reader = decoder.read_info().unwrap();
    let chunk = &reader.info().utf8_text[0];
    assert_eq!(chunk.keyword, "diffuse");
    serde_json::from_str(&chunk.get_text().unwrap()).unwrap()
}

#[test]
fn image_says_how_it_was_made() {
    let (_folder, path) = output("cat.png");
    let model = model("sd/base");
    let result = diffuse(&[
        "txt2img",
        "a lighthouse",
        "--model",
        &model,
        "--steps",
        "3",
        "--seed",
        "7",
        "--scheduler",
        "euler",
        "--scheduler-option",
        "use_karras_sigmas=true",
        "--weights",
        "f16",
        "--output",
        &path,
    ]);
    assert!(result.status.success(), "{}", text(&result.stderr));
    assert_eq!(text(&result.stdout), format!("seed 7\n{path}\n"));
    let record = record(&path);
    assert_eq!(record["prompt"], serde_json::json!(["a lighthouse"]));
    assert_eq!(record["seed"], serde_json::json!([7]));
    assert_eq!(record["steps"], 3);
    assert_eq!(record["scheduler"], "EulerDiscreteScheduler");
    assert_eq!(record["scheduler_config"]["use_karras_sigmas"], true);
    assert_eq!(record["dtype"], "f32");
    assert_eq!(record["weights"], "f16");
}

#[test]
fn random_seed_is_told_and_makes_the_image_again() {
    let (folder, path) = output("first.png");
    let model = model("ddpm/new-names");
    let base = ["ddpm", "--model", &model, "--steps", "2", "--output"];
    let first = diffuse(&[&base[..], &[&path]].concat());
    let seed = record(&path)["seed"][0].as_u64().unwrap().to_string();
    assert!(text(&first.stdout).starts_with(&format!("seed {seed}\n")));

    let again = folder.path().join("again.png").display().to_string();
    diffuse(&[&base[..], &[&again, "--seed", &seed, "--quiet"]].concat());
    let pixels = |path: &str| image::open(path).unwrap().to_rgb8();
    assert_eq!(pixels(&path), pixels(&again));
}

#[test]
fn several_prompts_and_images_are_numbered_prompt_by_prompt() {
    let (folder, path) = output("out.png");
    let model = model("sd/base");
    let latents = folder
        .path()
        .join("latents.safetensors")
        .display()
        .to_string();
    let result = diffuse(&[
        "txt2img",
        "a lighthouse",
        "a boat",
        "--model",
        &model,
        "--steps",
        "2",
        "--num-images",
        "2",
        "--seed",
        "1,2,3,4",
        "--negative-prompt",
        "blurry",
        "--output",
        &path,
        "--output-latents",
        &latents,
        "--quiet",
    ]);
    assert!(result.status.success(), "{}", text(&result.stderr));
    assert!(result.stdout.is_empty());
    let mut names: Vec<String> = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(
        names,
        [
            "latents.safetensors",
            "out-0.png",
            "out-1.png",
            "out-2.png",
            "out-3.png"
        ]
    );

    // The third image is the second prompt's first, and is made alone from its seed.
    let third = folder.path().join("third.png").display().to_string();
    diffuse(&[
        "txt2img",
        "a boat",
        "--model",
        &model,
        "--steps",
        "2",
        "--seed",
        "3",
        "--negative-prompt",
        "blurry",
        "--output",
        &third,
    ]);
    let together = folder.path().join("out-2.png");
    let (got, expected) = (image::open(together).unwrap(), image::open(third).unwrap());
    let differences = got.as_bytes().iter().zip(expected.as_bytes());
    let largest = differences
        .map(|(got, expected)| got.abs_diff(*expected))
        .max();
    assert!(largest <= Some(1), "{largest:?}");
}

#[test]
fn final_latents_can_start_a_run() {
    let (folder, path) = output("out.png");
    let model = model("sd/base");
    let latents = folder.path().join("l.safetensors").display().to_string();
    let base = [
        "txt2img", "a boat", "--model", &model, "--steps", "2", "--seed", "1",
    ];
    diffuse(
        &[
            &base[..],
            &["--output", &path, "--output-latents", &latents],
        ]
        .concat(),
    );
    let result = diffuse(&[&base[..], &["--output", &path, "--init-latents", &latents]].concat());
    assert!(result.status.success(), "{}", text(&result.stderr));
}

#[test]
fn long_prompt_is_cut_with_a_warning() {
    let (_folder, path) = output("out.png");
    let model = model("sd/base");
    let prompt = "a lighthouse in the rain, ".repeat(400);
    let result = diffuse(&[
        "txt2img", &prompt, "--model", &model, "--steps", "1", "--output", &path,
    ]);
    assert!(result.status.success());
    assert!(text(&result.stderr).contains("this part was cut"));
}

#[test]
fn inspect_tells_what_a_checkpoint_is() {
    let result = diffuse(&["inspect", &model("sd/base")]);
    let told = text(&result.stdout);
    for part in [
        "StableDiffusionPipeline",
        "UNet2DConditionModel",
        "F16",
        "PNDMScheduler",
    ] {
        assert!(told.contains(part), "{told}");
    }
    assert!(told.contains("everything is supported"), "{told}");
    let result = diffuse(&["inspect", "no/such/folder"]);
    assert_eq!(result.status.code(), Some(1));
}

/// As in `diffuse schedulers | true`.
#[test]
fn closed_pipes_are_no_errors() {
    let (folder, path) = output("out.png");
    let model = model("ddpm/new-names");
    let converted = folder.path().join("converted").display().to_string();
    for arguments in [
        &["ddpm", "--model", &model, "--steps", "1", "--output", &path][..],
        &["inspect", &model],
        &["convert", &model, &converted],
        &["devices"],
        &["schedulers"],
        &["--help"],
        &["help", "ddpm"],
        &["--version"],
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_diffuse"));
        command.args(arguments);
        if arguments.contains(&path.as_str()) {
            command.args(["--backend", "flex"]);
        }
        common::check_closed_pipe(command);
    }
    assert!(Path::new(&path).is_file());
}

#[test]
fn wrong_options_are_errors() {
    check_option(&["--width", "100"], "`width` is 100");
    check_option(&["--height", "0"], "`height` is 0");
    check_option(&["--steps", "0"], "num_inference_steps");
    check_option(&["--steps", "1001"], "1001");
    check_option(&["--steps", "many"], "many");
    check_option(&["--guidance-scale", "NaN"], "`guidance_scale` is NaN");
    check_option(&["--eta", "-1"], "`eta` is -1");
    check_option(&["--clip-skip", "99"], "`clip_skip` is 99");
    check_option(&["--num-images", "0"], "`num_images_per_prompt` is 0");
    check_option(&["--seed", "1,2,3"], "seeds");
    check_option(&["--scheduler", "dpmpp"], "unknown scheduler `dpmpp`");
    check_option(&["--scheduler-option", "karras=true"], "`karras`");
    check_option(&["--scheduler-option", "steps_offset"], "KEY=VALUE");
    check_option(
        &["--scheduler-option", "beta_schedule=quadratic"],
        "quadratic",
    );
    check_option(
        &["--timesteps", "10,20", "--scheduler", "ddpm"],
        "timesteps",
    );
    check_option(&["--timesteps", "20,10"], "PNDMScheduler");
    check_option(
        &["--timesteps", "20,10", "--sigmas", "3,0"],
        "cannot be used with",
    );
    check_option(&["--variant", "ema"], "model.ema.safetensors");
    check_option(
        &["--init-latents", "no-such-file.safetensors"],
        "no-such-file.safetensors",
    );
    check_option(
        &["--output-latents", "/no/such/folder/l.safetensors"],
        "/no/such/folder",
    );
    check_option(&["--unknown"], "--unknown");
    check_error(
        &["txt2img", "--model", &model("sd/base")],
        "no prompt is given",
    );
    check_error(
        &["txt2img", "a", "--model", "no/such/folder"],
        "no folder `no/such/folder`",
    );
    let weights = model("sd/base/vae/diffusion_pytorch_model.safetensors");
    check_error(
        &["txt2img", "a", "--model", &weights],
        "is a VAE, which cannot be used here",
    );
    check_error(&["ddpm", "--model", &weights], "is a file, but");
    check_error(
        &["txt2img", "a", "--model", &model("ddpm/cat")],
        "it has no `tokenizer`",
    );
    check_error(&["ddpm", "--model", &model("sd/base")], "UNet2DModel");
}

#[test]
fn backend_that_is_not_built_in_is_an_error_that_names_the_feature() {
    if !cfg!(feature = "cuda") {
        check_option(&["--backend", "cuda"], "--features cuda");
    }
    if !cfg!(feature = "wgpu") {
        check_option(&["--backend", "wgpu"], "--features wgpu");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn too_little_memory_is_an_error_and_not_an_abort() {
    let (folder, path) = output("out.png");
    let result = Command::new("sh")
        .args(["-c", "ulimit -v 1000000; exec \"$@\"", "sh"])
        .args([env!("CARGO_BIN_EXE_diffuse"), "txt2img", "a"])
        .args(["--width", "16384", "--height", "16384", "--steps", "1"])
        .args(["--model", &model("sd/base"), "--output", &path])
        .args(["--backend", "flex"])
        // Each thread would take its share of the addresses.
        .env("RAYON_NUM_THREADS", "1")
        .output()
        .unwrap();
    let message = text(&result.stderr);
    assert_eq!(result.status.code(), Some(1), "{message}");
    assert!(
        message.starts_with("error: there is not enough memory"),
        "{message}"
    );
    let advice = "; a smaller image, fewer images at once, `--vae-tiling on`, `--weights f16` or \
                  `--dtype f16` need less\n";
    assert!(message.ends_with(advice), "{message}");
    assert_eq!(message.lines().count(), 1, "{message}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[cfg(unix)]
#[test]
fn arguments_that_are_not_unicode_are_errors() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let result = Command::new(env!("CARGO_BIN_EXE_diffuse"))
        .arg("txt2img")
        .arg(OsStr::from_bytes(b"a \xff cat"))
        .output()
        .unwrap();
    assert_eq!(result.status.code(), Some(1));
    assert!(text(&result.stderr).contains("UTF-8"));
}

#[test]
fn outputs_that_cannot_be_written_are_errors_before_anything_is_computed() {
    let model = model("sd/base");
    let (folder, _) = output("out.png");
    let folder = folder.path().display().to_string();
    for (path, expected) in [
        ("/no/such/folder/out.png", "cannot write"),
        (folder.as_str(), "written as .png"),
        ("out.jpg", "written as .png"),
    ] {
        let result = diffuse(&["txt2img", "a", "--model", &model, "--output", path]);
        assert_eq!(result.status.code(), Some(1));
        let message = text(&result.stderr);
        assert!(message.contains(expected), "{path}: {message}");
    }
}

/// A copy of the tiny checkpoint, to damage.
fn copy_of(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    common::copy(&reference().join(name), folder.path());
    folder
}

/// Damages one file of a checkpoint and checks the message.
#[track_caller]
fn check_damage(file: &str, damage: impl Fn(Vec<u8>) -> Option<Vec<u8>>, expected: &str) {
    let folder = copy_of("sd/base");
    let path = folder.path().join(file);
    match damage(fs::read(&path).unwrap()) {
        Some(bytes) => fs::write(&path, bytes).unwrap(),
        None => fs::remove_file(&path).unwrap(),
    }
    let model = folder.path().display().to_string();
    check_error(
        &["txt2img", "a", "--model", &model, "--steps", "1"],
        expected,
    );
}

/// Replaces text in a file.
fn replace(from: &str, to: &str) -> impl Fn(Vec<u8>) -> Option<Vec<u8>> {
    let (from, to) = (from.to_string(), to.to_string());
    move |bytes| {
        let old = String::from_utf8(bytes).unwrap();
        let new = old.replace(&from, &to);
        assert_ne!(old, new, "{from} is in the file");
        Some(new.into_bytes())
    }
}

#[test]
fn missing_files_are_errors() {
    for file in [
        "model_index.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
    ] {
        check_damage(file, |_| None, file);
    }
    check_damage("tokenizer/merges.txt", |_| None, "merges.txt");
    check_damage(
        "unet/diffusion_pytorch_model.safetensors",
        |_| None,
        "it has `diffusion_pytorch_model.fp16.safetensors`",
    );
}

#[test]
fn broken_json_is_an_error() {
    for file in [
        "model_index.json",
        "unet/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
    ] {
        check_damage(file, |bytes| Some(bytes[..bytes.len() / 2].to_vec()), "");
        check_damage(file, |_| Some(b"\xff\xfe".to_vec()), "");
        check_damage(file, |_| Some(b"[]".to_vec()), "");
    }
    check_damage(
        "unet/config.json",
        |_| Some(b"{".to_vec()),
        "unet/config.json",
    );
    check_damage(
        "unet/config.json",
        replace("\"in_channels\": 4", "\"in_channels\": NaN"),
        "unet/config.json",
    );
}

#[test]
fn index_decides_which_scheduler_it_is() {
    let folder = copy_of("sd/base");
    let path = folder.path().join("model_index.json");
    let index = fs::read_to_string(&path).unwrap();
    fs::write(&path, index.replace("PNDMScheduler", "DDIMScheduler")).unwrap();
    let model = folder.path().display().to_string();
    let out = folder.path().join("out.png").display().to_string();
    diffuse(&[
        "txt2img", "a", "--model", &model, "--steps", "2", "--output", &out,
    ]);
    assert_eq!(record(&out)["scheduler"], "DDIMScheduler");
}

#[test]
fn outputs_that_would_overwrite_each_other_are_errors() {
    let (_folder, path) = output("out.png");
    let model = model("sd/base");
    let arguments = [
        "txt2img",
        "a",
        "--model",
        &model,
        "--output-latents",
        &path,
        "--output",
        &path,
    ];
    let result = diffuse(&arguments);
    assert_eq!(result.status.code(), Some(1));
    assert!(text(&result.stderr).contains("for an image and for the latents"));
}

#[test]
fn absurd_numbers_of_images_are_errors() {
    for count in ["1000000", "18446744073709551615"] {
        check_option(&["--num-images", count], "too large a batch");
    }
}

#[test]
fn python_numbers_in_the_scheduler_are_read() {
    let folder = copy_of("sd/base");
    let path = folder.path().join("scheduler/scheduler_config.json");
    let config = fs::read_to_string(&path).unwrap();
    let config = config.replacen('{', "{\n  \"lambda_min_clipped\": -Infinity,", 1);
    fs::write(&path, config).unwrap();
    let model = folder.path().display().to_string();
    let out = folder.path().join("out.png").display().to_string();
    let result = diffuse(&[
        "txt2img", "a", "--model", &model, "--steps", "1", "--output", &out,
    ]);
    assert!(result.status.success(), "{}", text(&result.stderr));
}

#[test]
fn unsupported_values_are_errors_that_name_key_value_and_choice() {
    let unet = "unet/config.json";
    check_damage(unet, replace("\"silu\"", "\"mish\""), "`act_fn`");
    check_damage(
        unet,
        replace("\"DownBlock2D\"", "\"SidewaysBlock2D\""),
        "SidewaysBlock2D",
    );
    check_damage(
        unet,
        replace(
            "\"in_channels\": 4",
            "\"in_channels\": 4, \"class_embed_type\": \"timestep\"",
        ),
        "`class_embed_type` is \"timestep\", but UNet2DConditionModel supports only null",
    );
    check_damage(
        unet,
        replace("\"in_channels\": 4", "\"in_channels\": 99999999999"),
        "`in_channels`",
    );
    check_damage(
        unet,
        replace("\"in_channels\": 4", "\"in_channels\": -4"),
        "`in_channels`",
    );
    check_damage(
        "vae/config.json",
        replace(
            "\"in_channels\": 3",
            "\"in_channels\": 3, \"shift_factor\": 0.5",
        ),
        "`shift_factor`",
    );
    check_damage(
        "model_index.json",
        replace("PNDMScheduler", "NewScheduler"),
        "NewScheduler",
    );
    check_damage(
        "model_index.json",
        replace("AutoencoderKL", "AutoencoderTiny"),
        "AutoencoderTiny",
    );
}

#[test]
fn damaged_weights_are_errors() {
    let file = "unet/diffusion_pytorch_model.safetensors";
    check_damage(
        file,
        |bytes| Some(bytes[..bytes.len() - 1].to_vec()),
        "truncated",
    );
    check_damage(file, |bytes| Some(bytes[..4].to_vec()), "too short");
    check_damage(file, |_| Some(Vec::new()), "too short");
    check_damage(
        file,
        |mut bytes| {
            bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
            Some(bytes)
        },
        "length",
    );
    // Other names of the same length keep the header's length true.
    let rename = |from: &'static str, to: &'static str| {
        move |bytes: Vec<u8>| {
            let start = bytes
                .windows(from.len())
                .position(|window| window == from.as_bytes());
            let start = start.unwrap();
            let mut bytes = bytes;
            bytes[start..start + to.len()].copy_from_slice(to.as_bytes());
            Some(bytes)
        }
    };
    check_damage(
        file,
        rename("\"conv_in.bias\"", "\"conv_xx.bias\""),
        "lacks `conv_in.bias`",
    );
    let vae = "vae/diffusion_pytorch_model.safetensors";
    check_damage(vae, rename("\"F32\"", "\"I32\""), "has type I32");
    // The first tensor of the file; its bytes stay those of F32.
    check_damage(
        vae,
        rename("\"F32\"", "\"F16\""),
        "has type F16 and shape [",
    );
    check_damage(
        vae,
        rename("\"F32\"", "\"F99\""),
        "`: unknown variant `F99`",
    );
}

#[test]
fn weights_of_another_shape_are_errors() {
    check_damage(
        "unet/config.json",
        replace("\"out_channels\": 4", "\"out_channels\": 8"),
        "`conv_out.weight`",
    );
    check_damage(
        "unet/config.json",
        replace("\"layers_per_block\": 1", "\"layers_per_block\": 2"),
        "lacks `down_blocks",
    );
}

#[test]
fn weights_that_are_left_over_are_one_warning() {
    let folder = copy_of("ddpm/cat");
    let path = folder.path().join("config.json");
    let config = fs::read_to_string(&path).unwrap();
    let config = config.replace(
        "\"mid_block_scale_factor\"",
        "\"mid_block_type\": null,\n  \"mid_block_scale_factor\"",
    );
    fs::write(&path, config).unwrap();
    let model = folder.path().display().to_string();
    let surplus = "that this model does not have";
    let (_folder, path) = output("out.png");
    let run = ["ddpm", "--model", &model, "--steps", "1", "--output", &path];
    let result = diffuse(&run);
    let message = text(&result.stderr);
    assert!(result.status.success(), "{message}");
    assert!(message.starts_with("warning: "), "{message}");
    assert!(
        message.ends_with(&format!("{surplus}; not used\n")),
        "{message}"
    );
    assert_eq!(message.lines().count(), 1, "{message}");
    check_error(
        &["ddpm", "--model", &model, "--steps", "1", "--strict"],
        surplus,
    );
}
