//! `cargo xtask bench gpu`: times operations and networks of `diffuse` on a GPU and, with
//! `--reference`, of PyTorch, in turns on the same card; then the time of a step by kernel, if
//! NVIDIA's profiler is installed.
//!
//! With `--program` nothing is built: the machine with the card needs only this program,
//! `gpu-speed` and Python.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, bail};

use crate::arguments::Arguments;
use crate::operations::{OPERATIONS, flops};
use crate::timer::{TimedOut, Timer, median, output, ratio};
use crate::{cargo, gpus, profile, run, target};

const USAGE: &str = "usage: cargo xtask bench gpu [--reference PYTHON] [--program FILE] \
                     [--rounds N] [--seconds N]";

/// The script for PyTorch, embedded, so that the machine with the card needs no file.
const REFERENCE: &str = include_str!("../bench/gpu.py");

/// On GPUs these are fused into other kernels.
const FUSED: [&str; 2] = ["silu", "channel_bias"];

/// The product whose rate in PyTorch is taken as the card's peak.
const LIMIT: &str = "product 8192 8192 8192";

/// The lines for both programs, and their names in the table.
const NETWORKS: [(&str, &str); 5] = [
    ("unet f16", "UNet, batch 2, latents of 64 x 64, f16"),
    ("vae f16", "VAE decode, latents of 64 x 64, f16"),
    ("vae f32", "VAE decode, latents of 64 x 64, f32"),
    ("text f16", "text encoder, batch 2, f16"),
    ("ddpm f16", "ddpm-cat-256, batch 1, f16"),
];

/// Warm-up calls of a line, which also compile kernels.
const FIRST_CALLS: usize = 3;
/// Seconds of calls in a round, within limits of the number of calls.
const ROUND: f64 = 0.1;
const MOST_CALLS: f64 = 2000.0;

/// Shares of the time: for starting both programs, for a row, and for the profile.
const START: u32 = 4;
const OPERATION: u32 = 1;
const NETWORK: u32 = 6;
const PROFILE: u32 = 8;

pub fn bench(arguments: &[String]) -> Result<()> {
    let arguments = Arguments::parse(arguments, &["reference", "program", "rounds", "seconds"])?;
    if !arguments.positional.is_empty() {
        bail!("{USAGE}");
    }
    let rounds = arguments.number("rounds", 5)?;
    let seconds = arguments.number("seconds", 240)?;
    let program = match arguments.get("program") {
        Some(file) => Path::new(file)
            .canonicalize()
            .with_context(|| format!("there is no program `{file}`"))?,
        None => build()?,
    };
    let fused = |operation: &&str| FUSED.iter().any(|name| operation.starts_with(name));
    let operations: Vec<_> = OPERATIONS.into_iter().filter(|name| !fused(name)).collect();

    let shares = START
        + OPERATION * (1 + operations.len() as u32)
        + NETWORK * NETWORKS.len() as u32
        + PROFILE;
    let folder = Folder::new()?;
    let mut ours = Command::new(&program);
    ours.current_dir(&folder.path);
    let mut bench = Bench {
        ours: Timer::start(ours)?,
        reference: None,
        rounds,
        budget: Budget::new(Duration::from_secs(seconds as u64), shares),
    };
    if let Some(python) = arguments.get("reference") {
        let mut command = Command::new(python);
        command.args(["-c", REFERENCE]);
        bench.reference = Some(Timer::start(command)?);
    }
    bench.print_versions();
    bench.print_operations(&operations);
    bench.print_networks();

    let limit = bench.budget.take(PROFILE);
    // Frees their memory.
    drop(bench);
    let (line, name) = NETWORKS[0];
    let mut profiler = Command::new("ncu");
    profiler.current_dir(&folder.path);
    if let Err(error) = profile::print(profiler, &program, line, name, limit) {
        complain!("no profile by kernel: {error:#}");
    }
    Ok(())
}

/// The working folder of `gpu-speed`, with CubeCL's settings: compiled kernels are kept, since the
/// program is restarted after a timeout and by the profiler.
struct Folder {
    path: PathBuf,
    temporary: bool,
}

impl Folder {
    /// A temporary folder, or the current one if it has settings already.
    fn new() -> Result<Self> {
        let path = std::env::current_dir().context("cannot tell the current folder")?;
        if path
            .ancestors()
            .any(|folder| folder.join("cubecl.toml").exists())
        {
            return Ok(Self {
                path,
                temporary: false,
            });
        }
        let path = std::env::temp_dir().join(format!("diffuse-bench-{}", std::process::id()));
        let settings = "[compilation]\ncache = { file = \"kernels\" }\n";
        fs::create_dir_all(&path)
            .and_then(|()| fs::write(path.join("cubecl.toml"), settings))
            .with_context(|| format!("cannot write to `{}`", path.display()))?;
        Ok(Self {
            path,
            temporary: true,
        })
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if self.temporary {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

fn build() -> Result<PathBuf> {
    let mut build = cargo();
    build.args(["build", "--release", "--package", "diffuse-pipelines"]);
    build.args(["--features", gpus().pop().unwrap_or("cuda")]);
    run(build.args(["--example", "gpu-speed"]))?;
    Ok(target().join("release/examples/gpu-speed"))
}

/// The remaining time, shared among the remaining measurements.
struct Budget {
    end: Instant,
    shares: u32,
}

impl Budget {
    fn new(all: Duration, shares: u32) -> Self {
        Self {
            end: Instant::now() + all,
            shares,
        }
    }

    /// The limit of the next measurement. Most need less than their share, so each may take three
    /// times as much; a part is always reserved for those that follow.
    fn take(&mut self, share: u32) -> Duration {
        self.shares = self.shares.saturating_sub(share);
        let left = self.end.saturating_duration_since(Instant::now());
        left * (3 * share) / (3 * share + self.shares)
    }
}

/// The program that computes a line.
#[derive(Clone, Copy, PartialEq)]
enum Side {
    Ours,
    Reference,
}

/// The result of a line: the seconds of each round, and a note if it failed.
#[derive(Default)]
struct Times {
    rounds: Vec<f64>,
    note: String,
    /// Calls per round; `None` if the line is no longer timed.
    calls: Option<usize>,
}

impl Times {
    fn give_up(&mut self, error: Error, limit: Duration) {
        complain!("{error:#}");
        self.calls = None;
        if error.is::<TimedOut>() {
            self.note = format!("killed after {:.1} s", limit.as_secs_f64());
        }
    }

    fn median(&self) -> Option<f64> {
        median(self.rounds.clone())
    }

    /// The median in ms, and the note.
    fn cell(&self, digits: usize) -> String {
        let note = &self.note;
        match self.median() {
            Some(seconds) if note.is_empty() => format!("{:.digits$}", seconds * 1e3),
            Some(seconds) => format!("{:.digits$} ({note})", seconds * 1e3),
            None => note.clone(),
        }
    }

    fn ratio(&self, others: &Self) -> String {
        ratio(&self.rounds, &others.rounds).map_or(String::new(), |ratio| format!("{ratio:.2}"))
    }
}

struct Bench {
    ours: Timer,
    reference: Option<Timer>,
    rounds: usize,
    budget: Budget,
}

impl Bench {
    fn side(&mut self, side: Side) -> Option<&mut Timer> {
        match side {
            Side::Ours => Some(&mut self.ours),
            Side::Reference => self.reference.as_mut(),
        }
    }

    /// Times lines in turns, round by round, within the share of the time.
    fn times<const N: usize>(&mut self, share: u32, lines: [(Side, &str); N]) -> [Times; N] {
        let limit = self.budget.take(share);
        let end = Instant::now() + limit;
        let left = || end.saturating_duration_since(Instant::now());
        let mut times = [(); N].map(|()| Times::default());
        for i in 0..N {
            let (side, line) = lines[i];
            let (earlier, times) = times.split_at_mut(i);
            // No graph of a network that fails.
            let mut same_side = lines
                .iter()
                .zip(earlier)
                .filter(|((other, _), _)| *other == side);
            let failed = same_side.any(|(_, times)| times.calls.is_none());
            let Some(timer) = self.side(side).filter(|_| !failed) else {
                continue;
            };
            // Leaves time for the others, and for the rounds.
            let limit = left() * 2 / 3;
            if limit < Duration::from_millis(100) {
                times[0].note = "no time left".into();
                continue;
            }
            match timer.seconds(&format!("{line} {FIRST_CALLS}"), limit) {
                Ok(seconds) => {
                    let calls = (ROUND / seconds).clamp(FIRST_CALLS as f64, MOST_CALLS);
                    times[0].calls = Some(calls as usize);
                }
                Err(error) => times[0].give_up(error, limit),
            }
        }
        let mut longest = Duration::ZERO;
        for _ in 0..self.rounds {
            if longest >= left() {
                break;
            }
            let start = Instant::now();
            for ((side, line), times) in lines.iter().zip(&mut times) {
                let (Some(timer), Some(calls)) = (self.side(*side), times.calls) else {
                    continue;
                };
                let limit = left();
                match timer.seconds(&format!("{line} {calls}"), limit) {
                    Ok(seconds) => times.rounds.push(seconds),
                    Err(error) => times.give_up(error, limit),
                }
            }
            longest = longest.max(start.elapsed());
        }
        times
    }

    /// The card, the date, and the versions of both programs.
    fn print_versions(&mut self) {
        let limit = self.budget.take(START);
        let end = Instant::now() + limit;
        let left = || end.saturating_duration_since(Instant::now());
        let mut parts = Vec::new();
        let few = left().min(Duration::from_secs(10));
        parts.extend(first_line(
            "nvidia-smi",
            &["--query-gpu=name,driver_version", "--format=csv,noheader"],
            few,
        ));
        let has_card = !parts.is_empty();
        parts.extend(first_line("date", &["-u", "+%F"], few));
        match self.ours.ask("versions", left()) {
            Ok(versions) => parts.push(versions),
            Err(error) => complain!("{error:#}"),
        }
        if let Some(reference) = &mut self.reference {
            match reference.ask("card", left()) {
                Ok(card) if !has_card => parts.insert(0, card),
                Ok(_) => {}
                // It may have been slow to start only; its files are in the page cache now.
                Err(error) if error.is::<TimedOut>() => complain!("{error:#}"),
                Err(error) => {
                    complain!("PyTorch is left out: {error:#}");
                    self.reference = None;
                }
            }
        }
        if let Some(reference) = &mut self.reference {
            match reference.ask("versions", left()) {
                Ok(versions) => parts.push(versions),
                Err(error) => complain!("{error:#}"),
            }
        }
        say!("{}\n", parts.join("; "));
    }

    fn print_operations(&mut self, operations: &[&str]) {
        let [limit] = self.times(OPERATION, [(Side::Reference, &with_type(LIMIT))]);
        let peak = rate(LIMIT, &limit);
        if let Some(peak) = peak {
            say!("`{LIMIT}` in f16 in PyTorch, the limit: {peak:.0} TFLOP/s\n");
        }
        say!("| f16 | diffuse, ms | PyTorch, ms | ratio | TFLOP/s | of the limit |");
        say!("|---|---|---|---|---|---|");
        for operation in operations {
            let line = with_type(operation);
            let lines = [(Side::Ours, &*line), (Side::Reference, &*line)];
            let [ours, reference] = self.times(OPERATION, lines);
            let rate = rate(operation, &ours);
            let share = rate.zip(peak).map(|(rate, peak)| rate / peak);
            say!(
                "| {operation} | {} | {} | {} | {} | {} |",
                ours.cell(3),
                reference.cell(3),
                ours.ratio(&reference),
                rate.map_or(String::new(), |rate| format!("{rate:.0}")),
                share.map_or(String::new(), |share| format!("{share:.2}")),
            );
        }
        say!();
    }

    fn print_networks(&mut self) {
        say!("| | diffuse, ms | PyTorch, ms | ratio | CUDA graph, ms | ratio |");
        say!("|---|---|---|---|---|---|");
        for (line, name) in NETWORKS {
            let graph = format!("graph {line}");
            let lines = [
                (Side::Ours, line),
                (Side::Reference, line),
                (Side::Reference, &graph),
            ];
            let [ours, eager, graph] = self.times(NETWORK, lines);
            say!(
                "| {name} | {} | {} | {} | {} | {} |",
                ours.cell(2),
                eager.cell(2),
                ours.ratio(&eager),
                graph.cell(2),
                ours.ratio(&graph),
            );
        }
        say!();
    }
}

/// The line of an operation, with the type after the name.
fn with_type(operation: &str) -> String {
    operation.replacen(' ', " f16 ", 1)
}

/// TFLOP/s of an operation.
fn rate(operation: &str, times: &Times) -> Option<f64> {
    Some(flops(operation)? / times.median()? / 1e12)
}

/// The output of a system program, if it is installed.
fn first_line(program: &str, arguments: &[&str], limit: Duration) -> Option<String> {
    let printed = output(Command::new(program).args(arguments), "", limit).ok()??;
    let line = printed.lines().next()?.trim();
    (!line.is_empty()).then(|| line.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_come_after_names() {
        assert_eq!(with_type("linear 2 3 4"), "linear f16 2 3 4");
    }

    #[test]
    fn time_is_left_to_those_that_follow() {
        let all = Duration::from_secs(300);
        let mut budget = Budget::new(all, 10);
        let limits: Vec<f64> = [5, 4, 1]
            .map(|share| budget.take(share).as_secs_f64())
            .into();
        let left = [300.0 * 15.0 / 20.0, 300.0 * 12.0 / 13.0, 300.0];
        for (limit, expected) in limits.iter().zip(left) {
            assert!((limit - expected).abs() < 1.0, "{limits:?}");
        }
    }

    #[test]
    fn rows_say_what_was_killed() {
        let mut times = Times {
            rounds: vec![2e-3, 1e-3, 3e-3],
            ..Times::default()
        };
        assert_eq!(times.cell(3), "2.000");
        assert_eq!(rate("linear 1000 1000 1000", &times), Some(1.0));
        let late = || Error::new(TimedOut).context("`unet f16 3`");
        times.give_up(late(), Duration::from_secs(9));
        assert_eq!(times.cell(1), "2.0 (killed after 9.0 s)");
        let mut times = Times::default();
        times.give_up(late(), Duration::from_secs(9));
        assert_eq!(times.cell(1), "killed after 9.0 s");
        assert_eq!(times.ratio(&Times::default()), "");
        let mut times = Times::default();
        times.give_up(anyhow::anyhow!("out of memory"), Duration::from_secs(9));
        assert_eq!(times.cell(1), "");
    }
}
