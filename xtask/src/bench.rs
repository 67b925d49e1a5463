//! `cargo xtask bench`: times `diffuse` on a checkpoint and, with `--reference`, Diffusers on the
//! same weights. The two take turns, each run in a process of its own; medians are printed.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::arguments::Arguments;
use crate::{cargo, gpus, root, run, target};

const USAGE: &str = "usage: cargo xtask bench MODEL [--backend flex|wgpu|cuda] \
                     [--dtype f32|f16|bf16] [--weights f32|f16|bf16] [--steps N] [--width W] \
                     [--height H] [--rounds N] [--threads N] [--reference PYTHON]";

const PROMPT: &str = "a photograph of an astronaut riding a horse";

/// Seconds of each stage, calls of the network, and peak memory in bytes.
type Figures = BTreeMap<String, f64>;

struct Bench {
    model: String,
    backend: String,
    dtype: String,
    /// Storage type of the weights, if it is given.
    weights: Option<String>,
    steps: usize,
    size: [usize; 2],
    threads: usize,
    is_ddpm: bool,
}

pub fn bench(arguments: &[String]) -> Result<()> {
    let names = [
        "backend",
        "dtype",
        "weights",
        "steps",
        "width",
        "height",
        "rounds",
        "threads",
        "reference",
    ];
    let arguments = Arguments::parse(arguments, &names)?;
    let [model] = &arguments.positional[..] else {
        bail!("{USAGE}");
    };
    let size = |name| match arguments.get(name) {
        None => Ok(0),
        Some(_) => arguments.number(name, 0),
    };
    let bench = Bench {
        model: model.clone(),
        backend: arguments
            .get("backend")
            .or(gpus().pop())
            .unwrap_or("flex")
            .to_string(),
        dtype: arguments.get("dtype").unwrap_or("f32").to_string(),
        weights: arguments.get("weights").map(String::from),
        steps: arguments.number("steps", 4)?,
        size: [size("width")?, size("height")?],
        threads: arguments.number("threads", std::thread::available_parallelism()?.get())?,
        is_ddpm: is_ddpm(Path::new(model))?,
    };
    let python = arguments.get("reference");

    let program = bench.build()?;
    let mut ours = Vec::new();
    let mut reference = Vec::new();
    for _ in 0..arguments.number("rounds", 1)? {
        ours.push(bench.run_program(&program)?);
        if let Some(python) = python {
            reference.push(bench.run_reference(python)?);
        }
    }
    bench.print(&median(&ours), &median(&reference), ours.len());
    Ok(())
}

fn is_ddpm(model: &Path) -> Result<bool> {
    let path = model.join("model_index.json");
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
    let index: Value = serde_json::from_str(&text)?;
    Ok(index["_class_name"]
        .as_str()
        .is_some_and(|class| class.starts_with("DD")))
}

impl Bench {
    /// Builds `diffuse` with the backend, and gives its path.
    fn build(&self) -> Result<PathBuf> {
        let mut command = cargo();
        command.args(["build", "--release", "--package", "diffuse-cli"]);
        command.args(["--features", &self.backend]);
        run(&mut command)?;
        Ok(target().join("release").join("diffuse"))
    }

    fn run_program(&self, program: &Path) -> Result<Figures> {
        let folder = std::env::temp_dir().join(format!("diffuse-bench-{}", std::process::id()));
        fs::create_dir_all(&folder)?;
        let timings = folder.join("timings.json");
        let mut command = Command::new(program);
        if self.is_ddpm {
            command.arg("ddpm");
        } else {
            command.args(["txt2img", PROMPT, "--no-safety-checker"]);
            for (name, size) in ["--width", "--height"].iter().zip(self.size) {
                if size > 0 {
                    command.args([name, &*size.to_string()]);
                }
            }
        }
        command
            .args(["--model", &self.model, "--seed", "0", "--quiet"])
            .args(["--backend", &self.backend, "--dtype", &self.dtype])
            .args(["--steps", &self.steps.to_string()])
            .arg("--output")
            .arg(folder.join("out.png"))
            .arg("--timings")
            .arg(&timings)
            .env("RAYON_NUM_THREADS", self.threads.to_string());
        if let Some(weights) = &self.weights {
            command.args(["--weights", weights]);
        }
        run(&mut command)?;
        let figures = figures(&fs::read(&timings)?)?;
        fs::remove_dir_all(&folder)?;
        Ok(figures)
    }

    fn run_reference(&self, python: &str) -> Result<Figures> {
        let device = if self.backend == "cuda" {
            "cuda"
        } else {
            "cpu"
        };
        let output = Command::new(python)
            .arg(root().join("xtask/bench/reference.py"))
            .arg(&self.model)
            .args([self.steps, self.size[0], self.size[1], self.threads].map(|n| n.to_string()))
            .args([&self.dtype, device])
            .output()
            .with_context(|| format!("cannot run `{python}`"))?;
        if !output.status.success() {
            bail!(
                "Diffusers failed: {}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        let line = printed
            .lines()
            .last()
            .context("Diffusers printed nothing")?;
        figures(line.as_bytes())
    }

    fn print(&self, ours: &Figures, reference: &Figures, rounds: usize) {
        let weights = self.weights.as_ref();
        let weights = weights.map_or(String::new(), |weights| format!(" (weights in {weights})"));
        say!(
            "{} on {}, {}{weights}, {} threads, {} steps, median of {rounds}",
            self.model,
            self.backend,
            self.dtype,
            self.threads,
            self.steps
        );
        say!(
            "{:<22}{:>12}{:>12}{:>8}",
            "",
            "diffuse",
            "reference",
            "ratio"
        );
        for (name, key, unit) in [
            ("load", "load", "s"),
            ("encode the text", "encode", "s"),
            ("a step", "step", "s"),
            ("steps a second", "rate", "/s"),
            ("decode the image", "decode", "s"),
            ("all but loading", "total", "s"),
            ("peak memory", "peak", "GB"),
        ] {
            // A stage that a pipeline lacks takes no time.
            let Some(ours) = derived(ours, key).filter(|value| *value > 0.0) else {
                continue;
            };
            let reference = derived(reference, key);
            let cell = |value: f64| format!("{value:.2} {unit}");
            say!(
                "{name:<22}{:>12}{:>12}{:>8}",
                cell(ours),
                reference.map(cell).unwrap_or_default(),
                reference
                    .map(|reference| format!("{:.2}", ours / reference))
                    .unwrap_or_default(),
            );
        }
    }
}

fn figures(json: &[u8]) -> Result<Figures> {
    let values: BTreeMap<String, Value> =
        serde_json::from_slice(json).context("the timings are not valid")?;
    Ok(values
        .into_iter()
        .filter_map(|(key, value)| Some((key, value.as_f64()?)))
        .collect())
}

/// A recorded figure, or one computed from others.
fn derived(figures: &Figures, key: &str) -> Option<f64> {
    let get = |key: &str| figures.get(key).copied();
    match key {
        "step" => Some(get("denoise")? / get("calls")?),
        "rate" => Some(get("calls")? / get("denoise")?),
        "total" => {
            Some(get("denoise")? + get("encode").unwrap_or(0.0) + get("decode").unwrap_or(0.0))
        }
        "peak" => Some(get("peak")? / 1e9),
        key => get(key),
    }
}

/// The median of each figure over all runs.
fn median(runs: &[Figures]) -> Figures {
    let Some(first) = runs.first() else {
        return Figures::new();
    };
    let middle = |key: &String| {
        let mut values: Vec<f64> = runs
            .iter()
            .filter_map(|run| run.get(key).copied())
            .collect();
        values.sort_by(f64::total_cmp);
        (key.clone(), values[values.len() / 2])
    };
    first.keys().map(middle).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_taken_of_each_figure() {
        let run = |load: f64, denoise: f64| {
            Figures::from([
                ("load".into(), load),
                ("denoise".into(), denoise),
                ("calls".into(), 4.0),
            ])
        };
        let median = median(&[run(3.0, 8.0), run(1.0, 16.0), run(2.0, 12.0)]);
        assert_eq!(median["load"], 2.0);
        assert_eq!(derived(&median, "step"), Some(3.0));
        assert_eq!(derived(&median, "decode"), None);
    }
}
