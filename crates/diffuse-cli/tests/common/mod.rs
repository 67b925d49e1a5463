//! The program, for tests.

use std::process::Command;

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
