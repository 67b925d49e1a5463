//! The program, for tests.

use std::fs;
use std::io::BufReader;
use std::path::Path;
use std::process::Command;

use diffuse_pipelines::schedulers::scheduler_names;

/// The program with arguments. Without `--backend` it computes on the CPU here: a GPU rounds
/// differently, and is announced.
pub fn diffuse(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_diffuse"));
    command.args(arguments);
    let computes =
        !["inspect", "fetch", "convert", "devices", "schedulers"].contains(&arguments[0]);
    if computes && !arguments.contains(&"--backend") {
        command.args(["--backend", "flex"]);
    }
    command
}

/// Runs a command whose output nobody reads: it has to succeed without a word.
#[allow(dead_code)]
#[track_caller]
pub fn check_closed_pipe(mut command: Command) {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = command.stdout(writer).output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{command:?}: {message}");
    assert_eq!(message, "", "{command:?}");
}

/// The JSON in a PNG's text chunk.
#[allow(dead_code)]
pub fn record(path: impl AsRef<Path>) -> serde_json::Value {
    let file = BufReader::new(fs::File::open(path).unwrap());
    let reader = png::Decoder::new(file).read_info().unwrap();
    let chunk = &reader.info().utf8_text[0];
    assert_eq!(chunk.keyword, "diffuse");
    serde_json::from_str(&chunk.get_text().unwrap()).unwrap()
}

/// The message for a scheduler of an unknown name.
#[allow(dead_code)]
pub fn unknown_scheduler(name: &str) -> String {
    let known = scheduler_names().map(|(short, class)| format!("`{short}`, `{class}`"));
    let known: Vec<String> = known.collect();
    format!(
        "unknown scheduler `{name}`, expected one of {}",
        known.join(", ")
    )
}

/// Copies a folder with everything in it.
#[allow(dead_code)]
pub fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let from = entry.unwrap().path();
        let to = to.join(from.file_name().unwrap());
        if from.is_dir() {
            copy(&from, &to);
        } else {
            fs::write(&to, fs::read(&from).unwrap()).unwrap();
        }
    }
}
