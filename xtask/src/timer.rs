//! Timed programs, and medians of their results.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// A program that prints a line for each line of input. It is restarted after it has ended.
pub struct Timer {
    command: Command,
    running: Option<Running>,
}

struct Running {
    child: Child,
    input: ChildStdin,
    answers: Receiver<String>,
}

/// The error of a line without a result in time.
#[derive(Debug)]
pub struct TimedOut;

impl std::fmt::Display for TimedOut {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        formatter.write_str("killed, since it took too long")
    }
}

impl std::error::Error for TimedOut {}

impl Timer {
    /// Starts a program.
    pub fn start(command: Command) -> Result<Self> {
        let mut timer = Self {
            command,
            running: None,
        };
        timer.running = Some(Running::start(&mut timer.command)?);
        Ok(timer)
    }

    /// The result of a line. A program without a result within `limit` is killed.
    pub fn ask(&mut self, line: &str, limit: Duration) -> Result<String> {
        // It is not in `self` until it has a result: on errors, it is dropped and killed.
        let mut running = match self.running.take() {
            Some(running) => running,
            None => Running::start(&mut self.command)?,
        };
        let context = || format!("`{line}`");
        // A program that has ended reads no input; the missing result is the error.
        let _ = writeln!(running.input, "{line}").and_then(|()| running.input.flush());
        let answer = match running.answers.recv_timeout(limit) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Timeout) => return Err(TimedOut).with_context(context),
            Err(RecvTimeoutError::Disconnected) => bail!("`{line}` ended the program"),
        };
        self.running = Some(running);
        Ok(answer)
    }

    /// The seconds of a line; otherwise like [`ask`](Self::ask).
    pub fn seconds(&mut self, line: &str, limit: Duration) -> Result<f64> {
        let answer = self.ask(line, limit)?;
        let seconds = answer.trim().parse();
        seconds.with_context(|| format!("`{line}` was not timed: `{}`", answer.trim()))
    }
}

impl Running {
    fn start(command: &mut Command) -> Result<Self> {
        let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = piped
            .spawn()
            .with_context(|| format!("cannot run `{}`", command.get_program().display()))?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("no way to talk to a program");
        };
        let (sender, answers) = channel();
        // It ends with the program's output.
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self {
            child,
            input,
            answers,
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It waits for input, or took too long: nothing is lost.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The output of a program for an input; `None` if there is no such program.
///
/// # Errors
/// If it takes longer than `limit`, and is killed.
pub fn output(command: &mut Command, input: &str, limit: Duration) -> Result<Option<String>> {
    let name = command.get_program().to_string_lossy().into_owned();
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut child = match child {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        child => child.with_context(|| format!("cannot run `{name}`"))?,
    };
    if let Some(mut stdin) = child.stdin.take() {
        // A program that reads nothing may have closed its input.
        let _ = stdin.write_all(input.as_bytes());
    }
    let (sender, printed) = channel();
    let stdout = child.stdout.take();
    thread::spawn(move || {
        let mut text = Vec::new();
        if let Some(mut stdout) = stdout {
            let _ = stdout.read_to_end(&mut text);
        }
        let _ = sender.send(String::from_utf8_lossy(&text).into_owned());
    });
    let printed = printed.recv_timeout(limit);
    if printed.is_err() {
        let _ = child.kill();
    }
    let _ = child.wait();
    Ok(Some(
        printed
            .map_err(|_| TimedOut)
            .with_context(|| format!("`{name}`"))?,
    ))
}

/// The middle of the values in order.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// The median of the ratios of each round: both programs of a round are slowed down alike.
pub fn ratio(ours: &[f64], others: &[f64]) -> Option<f64> {
    median(
        ours.iter()
            .zip(others)
            .map(|(ours, other)| ours / other)
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_of_neighbours() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![]), None);
        assert_eq!(ratio(&[1.0, 8.0, 3.0], &[2.0, 16.0, 3.0]), Some(0.5));
        assert_eq!(ratio(&[1.0], &[]), None);
    }

    #[cfg(unix)]
    #[test]
    fn programs_are_killed_and_started_again() {
        let script = "while read word; do
            case $word in sleep) exec sleep 60;; end) exit;; *) echo $word;; esac
        done";
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let mut timer = Timer::start(command).unwrap();
        let limit = Duration::from_secs(10);
        assert_eq!(timer.seconds("2.5", limit).unwrap(), 2.5);
        let error = timer.seconds("word", limit).unwrap_err();
        assert_eq!(error.to_string(), "`word` was not timed: `word`");
        let error = timer.ask("sleep", Duration::from_millis(50)).unwrap_err();
        assert!(error.is::<TimedOut>(), "{error:#}");
        let error = timer.ask("end", limit).unwrap_err();
        assert!(!error.is::<TimedOut>(), "{error:#}");
        assert_eq!(timer.ask("again", limit).unwrap(), "again");
    }

    #[cfg(unix)]
    #[test]
    fn output_is_read_in_time() {
        let limit = Duration::from_secs(10);
        let printed = output(&mut Command::new("cat"), "text", limit).unwrap();
        assert_eq!(printed.as_deref(), Some("text"));
        assert_eq!(
            output(&mut Command::new("no-such-program"), "", limit).unwrap(),
            None
        );
        let mut sleep = Command::new("sleep");
        let error = output(sleep.arg("60"), "", Duration::from_millis(50)).unwrap_err();
        assert!(error.is::<TimedOut>(), "{error:#}");
    }
}
