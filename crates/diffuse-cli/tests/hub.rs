//! The program with models from a hub on this machine.
#![cfg(feature = "hub")]

mod common;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output};

use common::record;
use diffuse_testing::hub::{Behaviour, HubServer};
use diffuse_testing::{read_json, reference};
use serde_json::json;

const CAT: &str = "someone/ddpm-cat";

struct World {
    hub: HubServer,
    /// Holds the cache, and is the current folder.
    folder: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let hub = HubServer::start();
        hub.publish(CAT, reference().join("ddpm/cat"));
        let folder = tempfile::tempdir().unwrap();
        Self { hub, folder }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = common::diffuse(arguments);
        for name in [
            "HF_HUB_CACHE",
            "HUGGINGFACE_HUB_CACHE",
            "HF_HUB_OFFLINE",
            "TRANSFORMERS_OFFLINE",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN",
            "HF_HUB_DISABLE_SYMLINKS",
            "HF_TOKEN",
            "HUGGING_FACE_HUB_TOKEN",
            "HF_TOKEN_PATH",
        ] {
            command.env_remove(name);
        }
        command
            .current_dir(self.folder.path())
            .env("HF_HOME", self.path("home"))
            .env("HF_ENDPOINT", self.hub.endpoint());
        command
    }

    fn diffuse(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs the program, which must succeed, and gives what it prints.
    #[track_caller]
    fn check(&self, arguments: &[&str]) -> String {
        let output = self.diffuse(arguments);
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{arguments:?}: {error}");
        assert_eq!(error, "", "the bar is hidden");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs the program, which must fail with this message.
    #[track_caller]
    fn check_error(&self, arguments: &[&str], expected: &str) {
        assert_eq!(error(&mut self.command(arguments)), expected);
    }
}

/// The message of a program that fails.
#[track_caller]
fn error(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{message}");
    let message = message.strip_prefix("error: ").unwrap();
    message.strip_suffix('\n').unwrap().to_string()
}

fn pixels(path: &Path) -> image::RgbImage {
    image::open(path).unwrap().to_rgb8()
}

#[test]
fn model_by_its_name() {
    let world = World::new();
    let options = ["--steps", "2", "--seed", "5", "--output"];
    let run = |model: &str, output: &str| {
        let arguments = ["ddpm", "--model", model];
        world.check(&[&arguments[..], &options, &[output]].concat());
        pixels(&world.path(output))
    };
    let folder = reference().join("ddpm/cat").display().to_string();
    assert_eq!(run(CAT, "hub.png"), run(&folder, "folder.png"));

    let record = record(world.path("hub.png"));
    assert_eq!(record["model"], CAT);
    assert_eq!(record["revision"], world.hub.commit(CAT));

    // Again by the commit, without a hub.
    let commit = world.hub.commit(CAT);
    let arguments = ["ddpm", "--model", CAT, "--revision", &commit];
    let again = [&arguments[..], &options, &["again.png"]].concat();
    let output = world.command(&again).env("HF_HUB_OFFLINE", "1").output();
    assert!(output.unwrap().status.success());
    assert_eq!(
        pixels(&world.path("again.png")),
        pixels(&world.path("hub.png"))
    );
}

#[test]
fn inspect_by_name() {
    let world = World::new();
    let told = world.check(&["inspect", CAT]);
    let weights = format!(
        "home/hub/models--someone--ddpm-cat/snapshots/{}/diffusion_pytorch_model.safetensors",
        world.hub.commit(CAT)
    );
    assert_eq!(
        told,
        format!(
            "\
DDPMPipeline
  scheduler         DDPMScheduler                beta_schedule \"linear\", \
                    prediction_type \"epsilon\", timestep_spacing \"leading\", \
                    num_train_timesteps 1000
  unet              UNet2DModel                        103,875 parameters
    {}: 268 tensors, 103,875 F32
everything is supported
",
            world.path(&weights).display()
        )
    );
}

/// Changes the index of `sd/base` to one with a safety checker.
fn with_safety_checker() -> String {
    let mut index = read_json(reference().join("sd/base/model_index.json"));
    index["safety_checker"] = json!(["stable_diffusion", "StableDiffusionSafetyChecker"]);
    index["feature_extractor"] = json!(["transformers", "CLIPImageProcessor"]);
    index.to_string()
}

#[test]
fn the_safety_checker_makes_flagged_images_black() {
    let world = World::new();
    let sd = "someone/stable-diffusion";
    world.hub.publish(sd, reference().join("sd/base"));
    world
        .hub
        .publish_file(sd, "model_index.json", with_safety_checker());
    for file in [
        "feature_extractor/preprocessor_config.json",
        "safety_checker/config.json",
        "safety_checker/model.safetensors",
    ] {
        let contents = fs::read(reference().join("safety_checker").join(file)).unwrap();
        world.hub.publish_file(sd, file, contents);
    }
    let [owl, lighthouse] = [
        "an owl reading a newspaper, etching",
        "a lighthouse on a cliff in the rain",
    ];
    let run = |model: &str, prompts: &[&str], options: &[&str]| {
        let arguments = ["txt2img", "--steps", "4", "--seed", "301,302", "--quiet"];
        let arguments = [&arguments[..], &["--model", model], prompts, options].concat();
        let output = world.diffuse(&arguments);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let both = [lighthouse, owl];
    assert_eq!(
        run(sd, &both, &[]),
        "warning: the safety checker takes 1 of 2 images for unsafe, and makes it black: \
         `out-0.png`; try another prompt or seed, or turn the checker off by \
         `--no-safety-checker`\n"
    );
    let is_black = |name: &str| pixels(&world.path(name)).iter().all(|level| *level == 0);
    assert!(is_black("out-0.png") && !is_black("out-1.png"));
    assert_eq!(
        record(world.path("out-0.png"))["nsfw_content_detected"],
        true
    );
    assert_eq!(
        record(world.path("out-1.png"))["nsfw_content_detected"],
        false
    );
    assert_eq!(run(sd, &both, &["--no-safety-checker"]), "");
    assert!(!is_black("out-0.png"));
    let record = record(world.path("out-0.png"));
    assert!(record["nsfw_content_detected"].is_null());

    // A folder without it says so, unless it is not wanted.
    world.check(&["fetch", sd, "--no-safety-checker", "--into", "sd"]);
    assert!(!world.path("sd/safety_checker").exists());
    assert_eq!(
        run("sd", &both, &[]),
        "warning: the model's `safety_checker` is missing: images are not checked\n"
    );
    assert_eq!(run("sd", &both, &["--no-safety-checker"]), "");
    world.check(&["fetch", sd, "--into", "whole"]);
    let told = world.check(&["inspect", "whole"]);
    assert_eq!(
        told,
        "\
StableDiffusionPipeline
  feature_extractor CLIPImageProcessor           32 x 32 pixels
  safety_checker    StableDiffusionSafetyChecker         9,756 parameters
    whole/safety_checker/model.safetensors: 61 tensors, 9,756 F32, 17 I64
  scheduler         PNDMScheduler                beta_schedule \"scaled_linear\", \
                    prediction_type \"epsilon\", timestep_spacing \"leading\", \
                    num_train_timesteps 1000
  text_encoder      CLIPTextModel                       31,896 parameters
    whole/text_encoder/model.safetensors: 53 tensors, 31,896 F32, 77 I64
  tokenizer         CLIPTokenizer                641 token ids, 77 a text
  unet              UNet2DConditionModel               151,372 parameters
    whole/unet/diffusion_pytorch_model.safetensors: 442 tensors, 151,372 F32
  vae               AutoencoderKL                       53,247 parameters
    whole/vae/diffusion_pytorch_model.safetensors: 180 tensors, 53,247 F32
everything is supported
"
    );
}

#[test]
fn folder_without_a_cache() {
    let world = World::new();
    let told = world.check(&["fetch", CAT, "--into", "cat"]);
    assert_eq!(told, format!("commit {}\ncat\n", world.hub.commit(CAT)));
    let mut names: Vec<_> = fs::read_dir(world.path("cat"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let expected = [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "model_index.json",
        "scheduler_config.json",
    ];
    assert_eq!(names, expected);
    // Copies: editing them edits no file of the cache.
    let cached = world.check(&["fetch", CAT]);
    let cached = Path::new(cached.lines().last().unwrap());
    for name in names {
        let published = fs::read(reference().join("ddpm/cat").join(&name)).unwrap();
        let copied = world.path("cat").join(&name);
        assert_eq!(fs::read(&copied).unwrap(), published, "{name}");
        let mut file = fs::OpenOptions::new().write(true).open(copied).unwrap();
        file.write_all(b"edited").unwrap();
        assert_eq!(fs::read(cached.join(&name)).unwrap(), published, "{name}");
    }
    fs::remove_dir_all(world.path("home")).unwrap();
    world.hub.requests();
    world.check_error(&["fetch", CAT, "--into", "cat"], "`cat` is not empty");
    assert!(world.hub.requests().is_empty());
}

#[test]
fn fetch_tells_the_folder_in_the_cache() {
    let world = World::new();
    let told = world.check(&["fetch", CAT]);
    let commit = world.hub.commit(CAT);
    let folder = format!("home/hub/models--someone--ddpm-cat/snapshots/{commit}");
    let folder = world.path(&folder);
    assert!(folder.join("model_index.json").is_file());
    assert_eq!(told, format!("commit {commit}\n{}\n", folder.display()));
    assert_eq!(world.check(&["fetch", CAT, "--quiet"]), "");
}

/// As in `diffuse fetch MODEL | true`.
#[test]
fn fetch_into_a_closed_pipe() {
    let world = World::new();
    common::check_closed_pipe(world.command(&["fetch", CAT]));
    common::check_closed_pipe(world.command(&["inspect", CAT]));
}

#[test]
fn errors_say_what_to_do() {
    let world = World::new();
    let ddpm = |model| ["ddpm", "--model", model];
    let not_fetched =
        |id: &str| format!("there is no folder `{id}`, and it cannot be fetched from the hub:");
    let (nothing, no_cat) = (not_fetched("no/body"), not_fetched(CAT));
    world.check_error(
        &ddpm("no/body"),
        &format!(
            "{nothing} there is no repository `no/body` on the hub: check the name; a private one \
             needs a token in `HF_TOKEN`"
        ),
    );
    for name in ["no-such-folder", "a/b/c"] {
        world.check_error(&ddpm(name), &format!("there is no folder `{name}`"));
    }
    world.check_error(
        &["ddpm", "--model", CAT, "--revision", "v2"],
        &format!("{no_cat} `{CAT}` has no revision `v2`: give a branch, a tag or a commit"),
    );
    let commit = world.hub.commit(CAT);
    let cache = world.path("home/hub/models--someone--ddpm-cat");
    let snapshot = cache.join("snapshots").join(commit);
    world.check_error(
        &["txt2img", "a", "--model", CAT],
        &format!(
            "{no_cat} `{CAT}` cannot be used, and nothing more of it was fetched: `{}`: its class \
             is DDPMPipeline, not StableDiffusionPipeline: it has no `tokenizer`",
            snapshot.join("model_index.json").display()
        ),
    );
    world.check_error(
        &["fetch", "no-alias"],
        "`no-alias` is neither a folder nor the name of a repository (`owner/name`)",
    );
    let folder = reference().join("ddpm/cat").display().to_string();
    world.check_error(
        &["ddpm", "--model", &folder, "--revision", "v2"],
        &format!("`--revision v2` is for models from the hub, but `{folder}` is on this machine"),
    );

    let offline = "and the program works offline: unset `HF_HUB_OFFLINE` and \
                   `TRANSFORMERS_OFFLINE` to fetch it";
    let mut command = world.command(&ddpm("no/body"));
    assert_eq!(
        error(command.env("HF_HUB_OFFLINE", "1")),
        format!(
            "{nothing} `no/body` (revision `main`) is not in the cache `{}`, {offline}",
            world.path("home/hub/models--no--body").display()
        )
    );
    world.check(&["fetch", CAT]);
    fs::remove_file(snapshot.join("config.json")).unwrap();
    let mut command = world.command(&ddpm(CAT));
    assert_eq!(
        error(command.env("TRANSFORMERS_OFFLINE", "1")),
        format!(
            "{no_cat} `config.json` of `{CAT}` (revision `main`) is not in the cache `{}`, \
             {offline}",
            cache.display()
        )
    );
    let folder = world.folder.path().display().to_string();
    world.check_error(
        &["fetch", &folder],
        &format!("`{folder}` is on this machine: there is nothing to fetch"),
    );

    let mut command = world.command(&ddpm("no/body"));
    let message = error(command.env("HF_ENDPOINT", "http://127.0.0.1:9"));
    // The rest is the system's.
    let (message, _) = message.split_once(": io: ").unwrap();
    assert_eq!(
        message,
        format!(
            "{nothing} cannot reach the hub at `http://127.0.0.1:9`: check the connection, \
             `HTTPS_PROXY` and `HF_ENDPOINT`; to work without it, fetch the model elsewhere and \
             copy its folder here"
        )
    );
    world.hub.behave(Behaviour {
        token: Some("hf_secret".into()),
        ..Behaviour::default()
    });
    world.check_error(
        &["fetch", CAT],
        &format!(
            "the hub denies access to `{CAT}`: check the name and, if the repository is private, \
             set `HF_TOKEN` to a token that can read it"
        ),
    );
    let mut known = world.command(&["fetch", CAT, "--quiet"]);
    let output = known.env("HF_TOKEN", "hf_secret").output().unwrap();
    assert!(output.status.success(), "{output:?}");
}
