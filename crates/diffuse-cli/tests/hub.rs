//! The program with models from a hub on this machine.
#![cfg(feature = "hub")]

mod common;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output};

use diffuse_testing::hub::{Behaviour, HubServer};
use diffuse_testing::reference;

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

    /// Runs the program, which must fail with one clear message.
    #[track_caller]
    fn check_error(&self, arguments: &[&str], expected: &[&str]) {
        check_error(self.diffuse(arguments), expected);
    }
}

#[track_caller]
fn check_error(output: Output, expected: &[&str]) {
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{message}");
    for part in expected {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
    assert_eq!(message.lines().count(), 1, "{message}");
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

    let decoder = png::Decoder::new(std::io::BufReader::new(
        fs::File::open(world.path("hub.png")).unwrap(),
    ));
    let reader = decoder.read_info().unwrap();
    let record = reader.info().utf8_text[0].get_text().unwrap();
    let record: serde_json::Value = serde_json::from_str(&record).unwrap();
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
    assert!(told.starts_with("DDPMPipeline\n"), "{told}");
    assert!(told.contains("everything is supported"), "{told}");
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
    world.check_error(&["fetch", CAT, "--into", "cat"], &["`cat` is not empty"]);
    assert!(world.hub.requests().is_empty());
}

#[test]
fn fetch_tells_the_folder_in_the_cache() {
    let world = World::new();
    let told = world.check(&["fetch", CAT]);
    let folder = told.lines().last().unwrap();
    assert!(
        Path::new(folder).join("model_index.json").is_file(),
        "{told}"
    );
    assert!(
        Path::new(folder).starts_with(world.path("home/hub")),
        "{told}"
    );
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
    let nothing = "there is no folder `no/body`, nor can it be had from the hub: ";
    world.check_error(
        &["ddpm", "--model", "no/body"],
        &[nothing, "there is no repository `no/body`"],
    );
    world.check_error(
        &["ddpm", "--model", "no-such-folder"],
        &["there is no folder `no-such-folder`"],
    );
    world.check_error(
        &["ddpm", "--model", "a/b/c"],
        &["there is no folder `a/b/c`"],
    );
    world.check_error(
        &["ddpm", "--model", CAT, "--revision", "v2"],
        &["has no revision `v2`"],
    );
    world.check_error(
        &["txt2img", "a", "--model", CAT],
        &["it has no `tokenizer`"],
    );
    world.check_error(&["fetch", "no-alias"], &["`no-alias`", "owner/name"]);
    let folder = reference().join("ddpm/cat").display().to_string();
    world.check_error(
        &["ddpm", "--model", &folder, "--revision", "v2"],
        &["is on this machine"],
    );

    let mut offline = world.command(&["ddpm", "--model", "no/body"]);
    check_error(
        offline.env("HF_HUB_OFFLINE", "1").output().unwrap(),
        &[nothing, "HF_HUB_OFFLINE"],
    );
    world.check(&["fetch", CAT]);
    let config = format!(
        "home/hub/models--someone--ddpm-cat/snapshots/{}/config.json",
        world.hub.commit(CAT)
    );
    fs::remove_file(world.path(&config)).unwrap();
    let mut offline = world.command(&["ddpm", "--model", CAT]);
    let output = offline.env("TRANSFORMERS_OFFLINE", "1").output().unwrap();
    assert_eq!(
        String::from_utf8(output.stderr).unwrap(),
        format!(
            "error: there is no folder `{CAT}`, nor can it be had from the hub: `config.json` of \
             `{CAT}` (revision `main`) is not in the cache `{}`, and the program works offline: \
             unset `HF_HUB_OFFLINE` and `TRANSFORMERS_OFFLINE` to fetch it\n",
            world.path("home/hub/models--someone--ddpm-cat").display()
        )
    );
    let folder = world.folder.path().display().to_string();
    world.check_error(
        &["fetch", &folder],
        &["is on this machine: there is nothing to fetch"],
    );

    let mut unreachable = world.command(&["ddpm", "--model", "no/body"]);
    check_error(
        unreachable
            .env("HF_ENDPOINT", "http://127.0.0.1:9")
            .output()
            .unwrap(),
        &[nothing, "cannot reach the hub at `http://127.0.0.1:9`"],
    );
    world.hub.behave(Behaviour {
        token: Some("hf_secret".into()),
        ..Behaviour::default()
    });
    world.check_error(&["fetch", CAT], &["HF_TOKEN"]);
    let mut known = world.command(&["fetch", CAT, "--quiet"]);
    assert!(
        known
            .env("HF_TOKEN", "hf_secret")
            .output()
            .unwrap()
            .status
            .success()
    );
}
