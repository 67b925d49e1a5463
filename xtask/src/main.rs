//! The workspace's own commands: `cargo xtask COMMAND`.
// They panic if stdout is closed; the macros below do not.
#![deny(clippy::print_stdout, clippy::print_stderr)]

/// `println!` that ignores a closed pipe.
macro_rules! say {
    ($($argument:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stdout(), $($argument)*);
    }};
}

/// `eprintln!` that ignores a closed pipe.
macro_rules! complain {
    ($($argument:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($argument)*);
    }};
}

mod arguments;
mod bench;
mod check;
mod clients;
mod cpu;
mod deny;
mod golden;
mod gpu;
mod operations;
mod profile;
mod test;
mod timer;
mod web;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

const HELP: &str = "\
usage: cargo xtask COMMAND

  test [ARGS]              run all tests; ARGS go to `cargo test`
  check                    formatting, lints, documentation, dependencies, packages
  convert SRC DST [--dtype f16|f32|bf16] [--variant NAME]
                           rewrite a checkpoint as clean safetensors
  bench MODEL [OPTIONS]    time the program and, with --reference PYTHON, Diffusers on the same
                           weights
  bench cpu [OPTIONS]      time operations and networks on the CPU, beside those of
                           --runtime torch|compile|openvino|onnxruntime|candle, which needs
                           --reference PYTHON except for candle
  bench gpu [OPTIONS]      time operations and networks on a GPU, beside PyTorch's with --reference
                           PYTHON, and list the kernels of a step if NVIDIA's `ncu` is installed;
                           --seconds N limits the time; with --program FILE, a built `gpu-speed`,
                           it needs neither cargo nor the sources
  bench quality [OPTIONS]  measure how often images of the built-in model follow new prompts
  fetch MODEL [--revision R] [--variant V] [--into FOLDER]
                           fetch a checkpoint from the hub: OWNER/NAME, or sd-v1-4, sd-v1-5,
                           ddpm-cat-256
  golden [--python PYTHON] record the expected values of the tests again, from Diffusers
  clients [--python PYTHON] [--program FILE] [SCRIPT ...]
                           run real clients against the server, see docs/testing.md
  web [--open] [--webgpu]  build the page that computes in the browser; --open shows it

The features `wgpu` and `cuda` extend `test` and `check` to the code of that backend, and `bench`
measures on that GPU unless `--backend` is given:

  cargo run --release --package xtask --features wgpu -- COMMAND
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (command, rest) = match arguments.split_first() {
        Some((command, rest)) => (command.as_str(), rest),
        None => ("help", [].as_slice()),
    };
    let result = match command {
        "test" => test::run(rest),
        "check" => check::run(rest),
        "fetch" => diffuse("fetch", rest),
        "golden" => golden::run(rest),
        "clients" => clients::run_all(rest),
        "convert" => diffuse("convert", rest),
        "web" => web::run(rest),
        "bench" => match rest.split_first() {
            Some((what, rest)) if what == "quality" => {
                start(&["diffuse-training", "--bin", "scene-quality"], rest)
            }
            Some((what, rest)) if what == "cpu" => cpu::bench(rest),
            Some((what, rest)) if what == "gpu" => gpu::bench(rest),
            _ => bench::bench(rest),
        },
        "help" | "--help" | "-h" => {
            say!("{}", HELP.trim_end());
            Ok(())
        }
        other => Err(anyhow::anyhow!("there is no command `{other}`\n\n{HELP}")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The folder that cargo builds into.
fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// The workspace's folder.
fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent()
        .expect("xtask is inside the workspace")
        .to_path_buf()
}

/// The running cargo.
fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// The GPU backends among xtask's own features.
fn gpus() -> Vec<&'static str> {
    [
        ("wgpu", cfg!(feature = "wgpu")),
        ("cuda", cfg!(feature = "cuda")),
    ]
    .into_iter()
    .filter_map(|(name, wanted)| wanted.then_some(name))
    .collect()
}

/// xtask's own features, passed on to the programs that it builds.
fn features() -> Vec<String> {
    let gpus = gpus();
    if gpus.is_empty() {
        return Vec::new();
    }
    vec!["--features".into(), gpus.join(",")]
}

/// Runs the command of the same name of `diffuse`, so that xtask depends on neither TLS nor burn.
fn diffuse(name: &str, arguments: &[String]) -> Result<()> {
    start(&["diffuse-cli"], &[&[name.to_string()], arguments].concat())
}

/// Builds and runs a program of the workspace: `cargo run --package`, with arguments.
fn start(package: &[&str], arguments: &[String]) -> Result<()> {
    // In the user's folder, since paths may be relative.
    let here = std::env::current_dir().context("cannot tell the current folder")?;
    run(cargo()
        .current_dir(here)
        .args(["run", "--quiet", "--release", "--manifest-path"])
        .arg(root().join("Cargo.toml"))
        .arg("--package")
        .args(package)
        .arg("--")
        .args(arguments))
}

/// Runs a command, which must succeed.
fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let status = command
        .status()
        .with_context(|| format!("cannot run `{name}`"))?;
    if !status.success() {
        let arguments: Vec<_> = command
            .get_args()
            .map(|argument| argument.to_string_lossy())
            .collect();
        bail!("`{name} {}` failed", arguments.join(" "));
    }
    Ok(())
}

/// What a command writes to its standard output; it must succeed.
fn output(command: &mut Command) -> Result<String> {
    let name = format!("{command:?}");
    let output = command
        .output()
        .with_context(|| format!("cannot run {name}"))?;
    if !output.status.success() {
        bail!(
            "{name} failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    String::from_utf8(output.stdout).with_context(|| format!("{name} wrote no text"))
}

/// An error if there are arguments.
fn no_arguments(arguments: &[String]) -> Result<()> {
    match arguments {
        [] => Ok(()),
        [first, ..] => bail!("unknown argument `{first}`"),
    }
}
