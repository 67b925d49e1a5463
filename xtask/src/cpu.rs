//! `cargo xtask bench cpu`: times operations and networks of `diffuse` on the CPU, in turns with
//! those of PyTorch, OpenVINO, ONNX Runtime or candle on the same cores. Both are programs that
//! time one line of input after the other, so that starting is not measured.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::arguments::Arguments;
use crate::operations::{OPERATIONS, flops};
use crate::timer::{Timer, median, ratio};
use crate::{cargo, root, run, target};

const USAGE: &str = "usage: cargo xtask bench cpu [--reference PYTHON] \
                     [--runtime torch|compile|openvino|onnxruntime|candle] \
                     [--models FOLDER] [--threads N] [--rounds N] [--isa avx2]";

/// Networks, their folders in `--models`, and their sizes.
const NETWORKS: [(&str, &str, &str); 3] = [
    ("unet", "sd/unet", "2 64 64 77"),
    ("vae", "sd/vae", "64 64"),
    ("ddpm", "ddpm/unet", "1 256 256"),
];

pub fn bench(arguments: &[String]) -> Result<()> {
    let names = ["reference", "runtime", "models", "threads", "rounds", "isa"];
    let arguments = Arguments::parse(arguments, &names)?;
    if !arguments.positional.is_empty() {
        bail!("{USAGE}");
    }
    let threads = arguments.number("threads", std::thread::available_parallelism()?.get())?;
    let rounds = arguments.number("rounds", 5)?;
    let runtime = arguments.get("runtime").unwrap_or("torch");
    // The other program's name; PyTorch has operations, all have networks.
    let (other, mut lines): (_, Vec<String>) = match runtime {
        "torch" => ("PyTorch", OPERATIONS.map(String::from).into()),
        "compile" => ("PyTorch compiled", Vec::new()),
        "openvino" => ("OpenVINO", Vec::new()),
        "onnxruntime" => ("ONNX Runtime", Vec::new()),
        "candle" => ("candle", Vec::new()),
        _ => bail!("{USAGE}"),
    };
    let is_avx2 = match arguments.get("isa") {
        None => false,
        Some("avx2") if ["torch", "compile"].contains(&runtime) => true,
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
    let with_threads = |mut command: Command| {
        command.env("RAYON_NUM_THREADS", threads.to_string());
        command
    };
    let mut command = with_threads(Command::new(program));
    if is_avx2 {
        command.arg("avx2");
    }
    let mut ours = Timer::start(command)?;
    // Before the other program starts and uses a core for a while.
    let peak = 1.0 / seconds(&mut ours, "peak")?;
    let mut reference = match python {
        Some(python) => {
            let mut command = Command::new(python);
            command.arg(root().join("xtask/bench/cpu.py"));
            command.args([&threads.to_string(), runtime]);
            if is_avx2 {
                command.env("ATEN_CPU_CAPABILITY", "avx2");
                command.env("ONEDNN_MAX_CPU_ISA", "AVX2");
                command.env("MKL_ENABLE_INSTRUCTIONS", "AVX2");
            }
            Some(Timer::start(command)?)
        }
        None if runtime == "candle" => {
            Some(Timer::start(with_threads(Command::new(build_candle()?)))?)
        }
        None => None,
    };

    say!("{threads} threads, at most {peak:.0} GFLOP/s, medians of {rounds}\n");
    say!("| | diffuse, ms | {other}, ms | ratio | GFLOP/s | of the peak |");
    say!("|---|---|---|---|---|---|");
    for line in &lines {
        let (mut times, mut others) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            times.push(seconds(&mut ours, line)?);
            if let Some(reference) = &mut reference {
                others.push(seconds(reference, line)?);
            }
        }
        let ratio = ratio(&times, &others).map_or(String::new(), |ratio| format!("{ratio:.2}"));
        let time = median(times).unwrap_or(f64::NAN);
        let other = median(others).map_or(String::new(), |other| format!("{:.2}", other * 1e3));
        let (rate, share) = match flops(line) {
            Some(flops) => {
                let rate = flops / time / 1e9;
                (format!("{rate:.0}"), format!("{:.2}", rate / peak))
            }
            None => Default::default(),
        };
        let name = shown(line);
        say!(
            "| {name} | {:.2} | {other} | {ratio} | {rate} | {share} |",
            time * 1e3
        );
    }
    // The other program's threads may still spin on a core.
    drop(reference);
    print_parts(&mut ours, &lines, peak)
}

/// Prints what share of its time each part of an operation takes, and the rate of its products.
fn print_parts(ours: &mut Timer, lines: &[String], peak: f64) -> Result<()> {
    say!("\nShares of the time of diffuse:\n");
    let mut has_header = false;
    for line in lines {
        let Some(flops) = flops(line) else { continue };
        let answer = ours.ask(&format!("parts {line}"), Duration::MAX)?;
        let Some((parts, total)) = read_parts(&answer) else {
            bail!("`{line}` has no parts: `{answer}`");
        };
        if !has_header {
            let names: Vec<&str> = parts.iter().map(|part| part.0).collect();
            say!("| | {} | products of the peak |", names.join(" | "));
            say!("|---{}|---|", "|---".repeat(names.len()));
            has_header = true;
        }
        let seconds = |name| parts.iter().find(|part| part.0 == name && part.1 > 0.0);
        // Winograd's products have a quarter of a direct convolution's operations.
        let flops = match seconds("input transform") {
            Some(_) => flops / 4.0,
            None => flops,
        };
        let share = seconds("products").map_or(String::new(), |(_, seconds)| {
            format!("{:.2}", flops / seconds / 1e9 / peak)
        });
        let shares = parts.iter().map(|(_, seconds)| match *seconds {
            0.0 => String::new(),
            seconds => format!("{:.2}", seconds / total),
        });
        let shares: Vec<String> = shares.collect();
        say!("| {} | {} | {share} |", shown(line), shares.join(" | "));
    }
    Ok(())
}

/// Names and seconds of parts, and the seconds of all, from a list such as `packing=0.1,total=2`.
fn read_parts(list: &str) -> Option<(Vec<(&str, f64)>, f64)> {
    let parts = list.trim().split(',').map(|part| {
        let (name, seconds) = part.split_once('=')?;
        Some((name, seconds.parse().ok()?))
    });
    let mut parts: Vec<_> = parts.collect::<Option<_>>()?;
    let (name, total) = parts.pop()?;
    (name == "total").then_some((parts, total))
}

/// Builds the candle program, which is not part of this workspace.
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

/// Seconds of a line, without a limit.
fn seconds(timer: &mut Timer, line: &str) -> Result<f64> {
    // Idle threads of the other program may still spin on a core.
    std::thread::sleep(Duration::from_millis(300));
    timer.seconds(line, Duration::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_read() {
        assert_eq!(
            read_parts("packing=0.5,input transform=2e-3,total=1\n"),
            Some((vec![("packing", 0.5), ("input transform", 2e-3)], 1.0))
        );
        assert_eq!(read_parts("packing=0.5"), None);
        assert_eq!(read_parts("packing=a,total=1"), None);
    }

    #[test]
    fn folders_are_not_shown() {
        assert_eq!(shown("unet folder/unet 2 64 64 77"), "unet 2 64 64 77");
    }
}
