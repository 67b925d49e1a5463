//! `cargo xtask bench cpu`: operations and networks of `diffuse` on the CPU and, if a Python is named, of PyTorch, OpenVINO or
//! ONNX Runtime, or of candle, in turns on the same cores. Both are programs that time one line of input after the other, so that
//! neither pays for starting.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::arguments::Arguments;
use crate::{cargo, root, run, target};

const USAGE: &str = "usage: cargo xtask bench cpu [--reference PYTHON] \
                     [--runtime torch|compile|openvino|onnxruntime|candle] \
                     [--models FOLDER] [--threads N] [--rounds N]";

/// What Stable Diffusion v1 does for a picture of 512 x 512 with guidance: names and sizes.
///
/// - `conv`, `conv_stride_2`: `BATCH CHANNELS OUTPUTS HEIGHT WIDTH KERNEL`
/// - `linear ROWS INPUTS OUTPUTS`, and `linear_geglu` with twice the outputs before the gate
/// - `attention BATCH TOKENS CONTEXT HEADS SIZE`
/// - `group_norm_silu`, `channel_bias`: `BATCH CHANNELS HEIGHT WIDTH`
/// - `layer_norm`: `ROWS WIDTH`, and `silu SIZE`
const OPERATIONS: [&str; 23] = [
    "conv 2 320 320 64 64 3",
    "conv 2 960 320 64 64 3",
    "conv 2 640 640 32 32 3",
    "conv 2 1280 1280 16 16 3",
    "conv 2 1280 1280 8 8 3",
    "conv 1 512 512 64 64 3",
    "conv 1 512 512 256 256 3",
    "conv 1 256 256 256 256 3",
    "conv 1 128 128 512 512 3",
    "conv 2 640 320 64 64 1",
    "conv_stride_2 2 320 320 64 64 3",
    "linear 8192 320 320",
    "linear_geglu 8192 320 1280",
    "linear 8192 1280 320",
    "linear_geglu 2048 640 2560",
    "linear_geglu 512 1280 5120",
    "attention 2 4096 4096 8 40",
    "attention 2 1024 1024 8 80",
    "attention 2 4096 77 8 40",
    "group_norm_silu 2 320 64 64",
    "layer_norm 8192 320",
    "silu 2621440",
    "channel_bias 2 320 64 64",
];

/// Networks, their folders in `--models`, and what is asked of each.
const NETWORKS: [(&str, &str, &str); 3] = [
    ("unet", "sd/unet", "2 64 64 77"),
    ("vae", "sd/vae", "64 64"),
    ("ddpm", "ddpm/unet", "1 256 256"),
];

pub fn bench(arguments: &[String]) -> Result<()> {
    let names = ["reference", "runtime", "models", "threads", "rounds"];
    let arguments = Arguments::parse(arguments, &names)?;
    if !arguments.positional.is_empty() {
        bail!("{USAGE}");
    }
    let threads = arguments.number("threads", std::thread::available_parallelism()?.get())?;
    let rounds = arguments.number("rounds", 5)?;
    let runtime = arguments.get("runtime").unwrap_or("torch");
    // What the other is called; PyTorch has operations, all have networks.
    let (other, mut lines): (_, Vec<String>) = match runtime {
        "torch" => ("PyTorch", OPERATIONS.map(String::from).into()),
        "compile" => ("PyTorch compiled", Vec::new()),
        "openvino" => ("OpenVINO", Vec::new()),
        "onnxruntime" => ("ONNX Runtime", Vec::new()),
        "candle" => ("candle", Vec::new()),
        _ => bail!("{USAGE}"),
    };
    let python = arguments.get("reference");
    if runtime == "candle" && python.is_some() {
        bail!("candle needs no Python, which `--reference` names");
    }
    if !["torch", "candle"].contains(&runtime) && python.is_none() {
        bail!("{other} needs a Python, which `--reference` names");
    }
    if let Some(folder) = arguments.get("models") {
        if folder.contains(char::is_whitespace) {
            bail!("`{folder}` has a space, which separates words here");
        }
        for (name, subfolder, sizes) in NETWORKS {
            // It has no networks but Stable Diffusion's.
            if runtime == "candle" && name == "ddpm" {
                continue;
            }
            let model = Path::new(folder).join(subfolder);
            if !model.is_dir() {
                bail!("`{folder}` has no folder `{subfolder}`: see docs/performance.md");
            }
            lines.push(format!("{name} {} {sizes}", model.display()));
        }
    }

    if lines.is_empty() {
        bail!("{other} has networks only here, which `--models` names");
    }

    let mut build = cargo();
    build.args(["build", "--release", "--package", "diffuse-examples"]);
    run(build.args(["--example", "cpu-speed"]))?;
    let program = target().join("release/examples/cpu-speed");
    let threads_word = threads.to_string();
    let mut ours = Timer::start(Command::new(program).env("RAYON_NUM_THREADS", &threads_word))?;
    // Before the other program starts, which takes a core for a while.
    let peak = 1.0 / ours.seconds("peak")?;
    let mut reference = match python {
        Some(python) => Some(Timer::start(
            Command::new(python)
                .arg(root().join("xtask/bench/cpu.py"))
                .args([&threads_word, runtime]),
        )?),
        None if runtime == "candle" => Some(Timer::start(
            Command::new(build_candle()?).env("RAYON_NUM_THREADS", &threads_word),
        )?),
        None => None,
    };

    println!("{threads} threads, at most {peak:.0} GFLOP/s, medians of {rounds}\n");
    println!("| | diffuse, ms | {other}, ms | ratio | GFLOP/s | of the peak |");
    println!("|---|---|---|---|---|---|");
    for line in lines {
        let (mut times, mut others) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            times.push(ours.seconds(&line)?);
            if let Some(reference) = &mut reference {
                others.push(reference.seconds(&line)?);
            }
        }
        // Neighbours in time are compared, so that what slows the machine down for a while slows both.
        let ratios = times.iter().zip(&others).map(|(ours, other)| ours / other);
        let ratio = median(ratios.collect()).map_or(String::new(), |ratio| format!("{ratio:.2}"));
        let time = median(times).unwrap_or(f64::NAN);
        let other = median(others).map_or(String::new(), |other| format!("{:.2}", other * 1e3));
        let (rate, share) = match flops(&line) {
            Some(flops) => {
                let rate = flops / time / 1e9;
                (format!("{rate:.0}"), format!("{:.2}", rate / peak))
            }
            None => Default::default(),
        };
        let name = shown(&line);
        println!(
            "| {name} | {:.2} | {other} | {ratio} | {rate} | {share} |",
            time * 1e3
        );
    }
    Ok(())
}

/// Builds the program that runs candle's networks, which is not of this workspace.
fn build_candle() -> Result<PathBuf> {
    let folder = target().join("candle");
    let mut build = cargo();
    build.args(["build", "--release", "--manifest-path"]);
    build.arg(root().join("xtask/bench/candle/Cargo.toml"));
    run(build.arg("--target-dir").arg(&folder))?;
    Ok(folder.join("release/candle-speed"))
}

/// A line without the folder of a model.
fn shown(line: &str) -> String {
    let words = line.split(' ').filter(|word| !word.contains('/'));
    words.collect::<Vec<_>>().join(" ")
}

/// Multiplications and additions of a direct computation.
fn flops(line: &str) -> Option<f64> {
    let mut words = line.split(' ');
    let name = words.next()?;
    let sizes: Option<Vec<f64>> = words.map(|word| word.parse().ok()).collect();
    let product: f64 = sizes.as_ref()?.iter().product();
    match name {
        "linear" => Some(2.0 * product),
        "linear_geglu" => Some(4.0 * product),
        // The kernel's side counts twice.
        "conv" => Some(2.0 * product * sizes?.last()?),
        // A quarter of the positions.
        "conv_stride_2" => Some(0.5 * product * sizes?.last()?),
        "attention" => Some(4.0 * product),
        _ => None,
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// A program that times what it reads.
struct Timer {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Timer {
    fn start(command: &mut Command) -> Result<Self> {
        let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = piped
            .spawn()
            .with_context(|| format!("cannot run `{}`", command.get_program().display()))?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("no way to talk to a program");
        };
        let output = BufReader::new(output);
        Ok(Self {
            child,
            input,
            output,
        })
    }

    fn seconds(&mut self, line: &str) -> Result<f64> {
        // The other's threads may still wait for work, which takes a core.
        std::thread::sleep(Duration::from_millis(300));
        writeln!(self.input, "{line}")?;
        self.input.flush()?;
        let mut answer = String::new();
        self.output.read_line(&mut answer)?;
        let seconds = answer.trim().parse();
        seconds.with_context(|| format!("`{line}` was not timed: `{}`", answer.trim()))
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // It waits for input; nothing is lost.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_are_counted() {
        assert_eq!(flops("linear 2 3 4"), Some(48.0));
        assert_eq!(flops("conv 1 2 3 4 5 3"), Some(2.0 * 120.0 * 9.0));
        assert_eq!(flops("attention 1 2 3 4 5"), Some(480.0));
        assert_eq!(flops("linear_geglu 2 3 4"), Some(96.0));
        assert_eq!(flops("silu 9"), None);
        assert_eq!(flops("unet folder/unet 2 64 64 77"), None);
        assert_eq!(shown("unet folder/unet 2 64 64 77"), "unet 2 64 64 77");
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![]), None);
    }
}
