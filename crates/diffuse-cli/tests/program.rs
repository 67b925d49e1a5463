//! The program as a person uses it: what it writes, what it says, and what wrong input gets.

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use common::{record, unknown_scheduler};
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

/// Runs the program in `folder`, where it must fail with this message and leave no file behind.
#[track_caller]
fn check_error_in(folder: &Path, arguments: &[&str], expected: &str) {
    let (target, path) = output("out.png");
    let mut command = common::diffuse(&[arguments, &["--output", &path]].concat());
    let result = command.current_dir(folder).output().unwrap();
    let message = text(&result.stderr);
    assert_eq!(message, format!("error: {expected}\n"), "{arguments:?}");
    assert_eq!(result.status.code(), Some(1), "{arguments:?}");
    assert_eq!(fs::read_dir(target.path()).unwrap().count(), 0);
}

/// [`check_error_in`] the folder of the tiny checkpoints.
#[track_caller]
fn check_error(arguments: &[&str], expected: &str) {
    check_error_in(&reference(), arguments, expected);
}

/// [`check_error`] of a text-to-image run with the tiny checkpoint.
#[track_caller]
fn check_option(option: &[&str], expected: &str) {
    let base = ["txt2img", "a lighthouse", "--model", "sd/base"];
    check_error(&[&base[..], option].concat(), expected);
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
    assert_eq!(text(&first.stdout), format!("seed {seed}\n{path}\n"));

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
    let cut = " a lighthouse in the rain ,".repeat(387);
    assert_eq!(
        text(&result.stderr),
        format!(
            "warning: a prompt is too long for the text encoder, this part was cut: the rain ,{cut}\
             \n"
        )
    );
}

#[test]
fn inspect_tells_what_a_checkpoint_is() {
    let inspect = |model: &str| {
        let mut command = common::diffuse(&["inspect", model]);
        command.current_dir(reference()).output().unwrap()
    };
    assert_eq!(
        text(&inspect("sd/base").stdout),
        "\
StableDiffusionPipeline
  feature_extractor switched off
  safety_checker    switched off
  scheduler         PNDMScheduler                beta_schedule \"scaled_linear\", \
                    prediction_type \"epsilon\", timestep_spacing \"leading\", \
                    num_train_timesteps 1000
  text_encoder      CLIPTextModel                       31,896 parameters
    sd/base/text_encoder/model.fp16.safetensors: 53 tensors, 31,896 F16, 77 I64
    sd/base/text_encoder/model.safetensors: 53 tensors, 31,896 F32, 77 I64
  tokenizer         CLIPTokenizer                641 token ids, 77 a text
  unet              UNet2DConditionModel               151,372 parameters
    sd/base/unet/diffusion_pytorch_model.fp16.safetensors: 442 tensors, 151,372 F16
    sd/base/unet/diffusion_pytorch_model.safetensors: 442 tensors, 151,372 F32
  vae               AutoencoderKL                       53,247 parameters
    sd/base/vae/diffusion_pytorch_model.fp16.safetensors: 180 tensors, 53,247 F16
    sd/base/vae/diffusion_pytorch_model.safetensors: 180 tensors, 53,247 F32
everything is supported
"
    );
    let result = inspect("no/such/folder");
    assert_eq!(result.status.code(), Some(1));
    assert_eq!(
        text(&result.stderr),
        "error: there is no folder `no/such/folder`\n"
    );
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
    let size = "`height` and `width` have to be divisible by 8 and not zero, but";
    check_option(&["--width", "100"], &format!("{size} `width` is 100"));
    check_option(&["--height", "0"], &format!("{size} `height` is 0"));
    for steps in ["0", "1001"] {
        let expected = format!(
            "`num_inference_steps` is `{steps}`, `PNDMScheduler` supports 1 to 1000 \
             (`num_train_timesteps`)"
        );
        check_option(&["--steps", steps], &expected);
    }
    check_option(
        &["--steps", "many"],
        "invalid value 'many' for '--steps <N>': it has to be a whole number, 0 or more\n\n\
         For more information, try '--help'.",
    );
    check_option(&["--guidance-scale", "NaN"], "`guidance_scale` is NaN");
    check_option(&["--eta", "-1"], "`eta` is -1, but has to be in [0, 1]");
    check_option(
        &["--clip-skip", "99"],
        "`clip_skip` is 99, but the text encoder has 3 layers",
    );
    check_option(&["--num-images", "0"], "`num_images_per_prompt` is 0");
    check_option(
        &["--seed", "1,2,3"],
        "3 seeds for an effective batch size of 1: give one for the whole batch, or one an image",
    );
    check_option(&["--scheduler", "dpmpp"], &unknown_scheduler("dpmpp"));
    check_option(
        &["--scheduler-option", "karras=true"],
        "`PNDMScheduler` has no option `karras`, it has `num_train_timesteps`, `beta_start`, \
         `beta_end`, `beta_schedule`, `trained_betas`, `timestep_spacing`, `steps_offset`, \
         `prediction_type`, `skip_prk_steps`, `set_alpha_to_one`",
    );
    check_option(
        &["--scheduler-option", "steps_offset"],
        "`steps_offset` is not an option of the scheduler: `--scheduler-option` takes KEY=VALUE, \
         as in `use_karras_sigmas=true`",
    );
    check_option(
        &["--scheduler-option", "beta_schedule=quadratic"],
        "`beta_schedule` is `quadratic`, which `PNDMScheduler` does not support: unknown variant \
         `quadratic`, expected one of `linear`, `scaled_linear`, `squaredcos_cap_v2`, `sigmoid`, \
         `laplace`, `exp`",
    );
    check_option(
        &["--timesteps", "10,20", "--scheduler", "ddpm"],
        "`timesteps` cannot be used by `DDPMScheduler`: they must be in descending order",
    );
    check_option(
        &["--timesteps", "20,10"],
        "`timesteps` cannot be used by `PNDMScheduler`: its `set_timesteps` takes a number of \
         steps",
    );
    check_option(
        &["--timesteps", "20,10", "--sigmas", "3,0"],
        "the argument '--timesteps <A,B,...>' cannot be used with '--sigmas <A,B,...>'\n\n\
         Usage: diffuse txt2img --model <MODEL> --timesteps <A,B,...> --output <FILE> \
         --backend <BACKEND> <PROMPT>...\n\n\
         For more information, try '--help'.",
    );
    check_option(
        &["--variant", "ema"],
        "`sd/base/text_encoder` has none of `model.ema.safetensors`, `pytorch_model.ema.bin`; it \
         has `model.fp16.safetensors`, `model.safetensors` (a variant is chosen by its name)",
    );
    check_option(
        &["--init-latents", "no-such-file.safetensors"],
        "cannot read `no-such-file.safetensors`: No such file or directory (os error 2)",
    );
    check_option(
        &["--output-latents", "/no/such/folder/l.safetensors"],
        "cannot write `/no/such/folder/l.safetensors`: No such file or directory (os error 2)",
    );
    check_option(
        &["--unknown"],
        "unexpected argument '--unknown' found\n\n  \
         tip: to pass '--unknown' as a value, use '-- --unknown'\n\n\
         Usage: diffuse txt2img --model <MODEL> <PROMPT>...\n\n\
         For more information, try '--help'.",
    );
    check_error(
        &["txt2img", "--model", "sd/base"],
        "no prompt is given; one is, for example, in `diffuse \"a boat at sunset\" --seed 0`",
    );
    check_error(
        &["txt2img", "a", "--model", "no/such/folder"],
        "there is no folder `no/such/folder`",
    );
    let weights = "sd/base/vae/diffusion_pytorch_model.safetensors";
    check_error(
        &["txt2img", "a", "--model", weights],
        &format!("`{weights}` is a VAE, which cannot be used here"),
    );
    check_error(
        &["ddpm", "--model", weights],
        &format!("`{weights}` is a file, but a model is a folder in Diffusers' format"),
    );
}

#[test]
fn backend_that_is_not_built_in_is_an_error_that_names_the_feature() {
    let backends = [
        ("flex", cfg!(feature = "flex")),
        ("wgpu", cfg!(feature = "wgpu")),
        ("cuda", cfg!(feature = "cuda")),
    ];
    let built_in = backends.iter().filter(|(_, is_built_in)| *is_built_in);
    let built_in: Vec<&str> = built_in.map(|(name, _)| *name).collect();
    for (name, is_built_in) in backends {
        if !is_built_in {
            let expected = format!(
                "the backend `{name}` is not built in: build the program with `--features {name}` \
                 (built in: {})",
                built_in.join(", ")
            );
            check_option(&["--backend", name], &expected);
        }
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
    let bytes = message.split(' ').find(|word| word.parse::<u64>().is_ok());
    assert_eq!(
        message,
        format!(
            "error: there is not enough memory, {} more bytes were refused; a smaller image, fewer \
             images at once, `--vae-tiling on`, `--weights f16` or `--dtype f16` need less\n",
            bytes.unwrap_or("some")
        )
    );
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
    assert_eq!(
        text(&result.stderr),
        "error: invalid UTF-8 was detected in one or more arguments\n\n\
         Usage: diffuse txt2img [OPTIONS] [PROMPT]...\n\n\
         For more information, try '--help'.\n"
    );
}

#[test]
fn outputs_that_cannot_be_written_are_errors_before_anything_is_computed() {
    let model = model("sd/base");
    let (folder, _) = output("out.png");
    let check = |path: &str, expected: &str| {
        let result = diffuse(&["txt2img", "a", "--model", &model, "--output", path]);
        assert_eq!(result.status.code(), Some(1));
        assert_eq!(text(&result.stderr), format!("error: {expected}\n"));
    };
    check(
        "/no/such/folder/out.png",
        "cannot write `/no/such/folder/out.png`: No such file or directory (os error 2)",
    );
    for path in [&folder.path().display().to_string(), "out.jpg"] {
        check(path, &format!("`{path}`: images are written as .png"));
    }
}

/// A folder with a copy of a tiny checkpoint in `m`, to damage.
fn copy_of(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    common::copy(&reference().join(name), &folder.path().join("m"));
    folder
}

/// Damages one file of a checkpoint and checks the message.
#[track_caller]
fn check_damage(file: &str, damage: impl Fn(Vec<u8>) -> Option<Vec<u8>>, expected: &str) {
    let folder = copy_of("sd/base");
    let path = folder.path().join("m").join(file);
    match damage(fs::read(&path).unwrap()) {
        Some(bytes) => fs::write(&path, bytes).unwrap(),
        None => fs::remove_file(&path).unwrap(),
    }
    check_error_in(
        folder.path(),
        &["txt2img", "a", "--model", "m", "--steps", "1"],
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
    check_damage(
        "model_index.json",
        |_| None,
        "`m` has no `model_index.json`: it is not a pipeline in Diffusers' format",
    );
    for file in [
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
    ] {
        let expected = format!("cannot read `m/{file}`: No such file or directory (os error 2)");
        check_damage(file, |_| None, &expected);
    }
    check_damage(
        "tokenizer/merges.txt",
        |_| None,
        "`m/tokenizer` has neither `tokenizer.json` nor `vocab.json` and `merges.txt`",
    );
    check_damage(
        "unet/diffusion_pytorch_model.safetensors",
        |_| None,
        "`m/unet` has none of `diffusion_pytorch_model.safetensors`, \
         `diffusion_pytorch_model.bin`; it has `diffusion_pytorch_model.fp16.safetensors` (a \
         variant is chosen by its name)",
    );
}

#[test]
fn broken_json_is_an_error() {
    let check = |file: &str, contents: &[u8], expected: &str| {
        check_damage(file, |_| Some(contents.to_vec()), expected);
    };
    let cut = "EOF while parsing an object at line 1 column 1";
    let unet = "`m/unet/config.json` is not a valid configuration";
    let scheduler = "cannot use `m/scheduler/scheduler_config.json`";
    let vocab = "`m/tokenizer/vocab.json` is not valid";
    for (file, not_json, not_a_map) in [
        (
            "model_index.json",
            format!("`m/model_index.json`: {cut}"),
            "`m/model_index.json`: it is not a JSON object".into(),
        ),
        (
            "unet/config.json",
            format!("{unet}: {cut}"),
            format!("{unet}: it is not a JSON object"),
        ),
        (
            "scheduler/scheduler_config.json",
            format!("{scheduler}: the scheduler configuration is not valid JSON: {cut}"),
            format!("{scheduler}: a scheduler configuration is a JSON object, not a list"),
        ),
        (
            "tokenizer/vocab.json",
            format!("{vocab}: {cut}"),
            format!("{vocab}: invalid type: sequence, expected a map at line 1 column 0"),
        ),
    ] {
        check(file, b"{", &not_json);
        check(file, b"[]", &not_a_map);
        let expected = format!("cannot read `m/{file}`: stream did not contain valid UTF-8");
        check(file, b"\xff\xfe", &expected);
    }
    check(
        "unet/config.json",
        b"{\"in_channels\": NaN}",
        &format!("{unet}: expected value at line 1 column 17"),
    );
}

#[test]
fn index_decides_which_scheduler_it_is() {
    let folder = copy_of("sd/base");
    let path = folder.path().join("m/model_index.json");
    let index = fs::read_to_string(&path).unwrap();
    fs::write(&path, index.replace("PNDMScheduler", "DDIMScheduler")).unwrap();
    let model = folder.path().join("m").display().to_string();
    let out = folder.path().join("out.png").display().to_string();
    diffuse(&[
        "txt2img", "a", "--model", &model, "--steps", "2", "--output", &out,
    ]);
    assert_eq!(record(&out)["scheduler"], "DDIMScheduler");
}

#[test]
fn outputs_that_would_overwrite_each_other_are_errors() {
    let (_folder, path) = output("out.png");
    let out = ["--output-latents", &path, "--output", &path];
    let result = diffuse(&[&["txt2img", "a", "--model", &model("sd/base")][..], &out].concat());
    assert_eq!(result.status.code(), Some(1));
    assert_eq!(
        text(&result.stderr),
        format!("error: `{path}` is given for an image and for the latents\n")
    );
}

#[test]
fn absurd_numbers_of_images_are_errors() {
    for count in ["1000000", "18446744073709551615"] {
        let expected = format!(
            "{count} images of 64 x 64 are too large a batch: at most 268435456 pixels at once"
        );
        check_option(&["--num-images", count], &expected);
    }
}

#[test]
fn python_numbers_in_the_scheduler_are_read() {
    let folder = copy_of("sd/base");
    let path = folder.path().join("m/scheduler/scheduler_config.json");
    let config = fs::read_to_string(&path).unwrap();
    let config = config.replacen('{', "{\n  \"lambda_min_clipped\": -Infinity,", 1);
    fs::write(&path, config).unwrap();
    let model = folder.path().join("m").display().to_string();
    let out = folder.path().join("out.png").display().to_string();
    let result = diffuse(&[
        "txt2img", "a", "--model", &model, "--steps", "1", "--output", &out,
    ]);
    assert!(result.status.success(), "{}", text(&result.stderr));
}

#[test]
fn unsupported_values_are_errors_that_name_key_value_and_choice() {
    let unet = "unet/config.json";
    let invalid = "`m/unet/config.json` is not a valid configuration:";
    check_damage(
        unet,
        replace("\"silu\"", "\"mish\""),
        &format!(
            "{invalid} `act_fn`: unknown variant `mish`, expected one of `silu`, `swish`, `gelu`, \
             `quick_gelu`"
        ),
    );
    check_damage(
        unet,
        replace("\"DownBlock2D\"", "\"SidewaysBlock2D\""),
        &format!(
            "{invalid} `down_block_types[3]`: unknown variant `SidewaysBlock2D`, expected one of \
             `DownBlock2D`, `CrossAttnDownBlock2D`, `ResnetDownsampleBlock2D`"
        ),
    );
    check_damage(
        unet,
        replace(
            "\"in_channels\": 4",
            "\"in_channels\": 4, \"class_embed_type\": \"timestep\"",
        ),
        "`class_embed_type` is \"timestep\", but UNet2DConditionModel supports only null in a \
         pipeline",
    );
    check_damage(
        unet,
        replace("\"in_channels\": 4", "\"in_channels\": 99999999999"),
        "`m/unet/config.json`: `in_channels` is 99999999999, but UNet2DConditionModel supports 1 \
         to 262144",
    );
    check_damage(
        unet,
        replace("\"in_channels\": 4", "\"in_channels\": -4"),
        &format!("{invalid} `in_channels`: invalid value: integer `-4`, expected usize"),
    );
    check_damage(
        "vae/config.json",
        replace(
            "\"in_channels\": 3",
            "\"in_channels\": 3, \"shift_factor\": 0.5",
        ),
        "`m/vae/config.json`: `shift_factor` is 0.5, but AutoencoderKL supports only null",
    );
    check_damage(
        "model_index.json",
        replace("PNDMScheduler", "NewScheduler"),
        &unknown_scheduler("NewScheduler"),
    );
    check_damage(
        "model_index.json",
        replace("AutoencoderKL", "AutoencoderTiny"),
        "`m/vae/config.json` is not a valid configuration: its class is AutoencoderKL, not \
         AutoencoderTiny",
    );
}

#[test]
fn damaged_weights_are_errors() {
    let file = "unet/diffusion_pytorch_model.safetensors";
    let invalid =
        |file: &str, reason: &str| format!("`m/{file}` is not a valid safetensors file: {reason}");
    check_damage(
        file,
        |bytes| Some(bytes[..bytes.len() - 1].to_vec()),
        &invalid(
            file,
            "it is truncated: its header describes more bytes than it has",
        ),
    );
    let short = invalid(file, "it is too short for a header");
    check_damage(file, |bytes| Some(bytes[..4].to_vec()), &short);
    check_damage(file, |_| Some(Vec::new()), &short);
    check_damage(
        file,
        |mut bytes| {
            bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
            Some(bytes)
        },
        &invalid(
            file,
            "its header's length is larger than the file or the format allows",
        ),
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
        &format!("`m/{file}` lacks `conv_in.bias`"),
    );
    let vae = "vae/diffusion_pytorch_model.safetensors";
    check_damage(
        vae,
        rename("\"F32\"", "\"I32\""),
        &format!(
            "`decoder.conv_in.bias` in `m/{vae}` has type I32, but weights are F64, F32, F16, BF16 \
             or F8"
        ),
    );
    // The first tensor of the file; its bytes stay those of F32.
    check_damage(
        vae,
        rename("\"F32\"", "\"F16\""),
        &invalid(
            vae,
            "`decoder.conv_in.bias` has type F16 and shape [16], which do not make bytes 0 to 64",
        ),
    );
    check_damage(
        vae,
        rename("\"F32\"", "\"F99\""),
        &invalid(
            vae,
            "`decoder.conv_in.bias`: unknown variant `F99`, expected one of `BOOL`, `F4`, \
             `F6_E2M3`, `F6_E3M2`, `U8`, `I8`, `F8_E5M2`, `F8_E4M3`, `F8_E8M0`, `I16`, `U16`, \
             `F16`, `BF16`, `I32`, `U32`, `F32`, `C64`, `F64`, `I64`, `U64`",
        ),
    );
}

#[test]
fn weights_of_another_shape_are_errors() {
    check_damage(
        "unet/config.json",
        replace("\"out_channels\": 4", "\"out_channels\": 8"),
        "`conv_out.weight` in `m/unet/diffusion_pytorch_model.safetensors` has shape \
         [4, 16, 3, 3], but this model needs [8, 16, 3, 3]",
    );
    check_damage(
        "unet/config.json",
        replace("\"layers_per_block\": 1", "\"layers_per_block\": 2"),
        "`m/unet/diffusion_pytorch_model.safetensors` lacks \
         `down_blocks.0.resnets.1.norm1.weight`, `down_blocks.0.resnets.1.norm1.bias`, \
         `down_blocks.0.resnets.1.conv1.weight` and 241 more",
    );
}

#[test]
fn weights_that_are_left_over_are_one_warning() {
    let folder = copy_of("ddpm/cat");
    let path = folder.path().join("m/config.json");
    let config = fs::read_to_string(&path).unwrap();
    let config = config.replace(
        "\"mid_block_scale_factor\"",
        "\"mid_block_type\": null,\n  \"mid_block_scale_factor\"",
    );
    fs::write(&path, config).unwrap();
    let surplus = "`m/diffusion_pytorch_model.safetensors` has \
                   `mid_block.attentions.0.group_norm.bias`, \
                   `mid_block.attentions.0.group_norm.weight`, \
                   `mid_block.attentions.0.key.bias` and 27 more that this model does not have";
    let run = ["ddpm", "--model", "m", "--steps", "1"];
    let mut command = common::diffuse(&run);
    let result = command.current_dir(folder.path()).output().unwrap();
    let message = text(&result.stderr);
    assert!(result.status.success(), "{message}");
    assert_eq!(message, format!("warning: {surplus}; not used\n"));
    check_error_in(folder.path(), &[&run[..], &["--strict"]].concat(), surplus);
}
