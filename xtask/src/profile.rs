//! The time of a network by kernel, from NVIDIA's profiler.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::timer::output;

/// The metrics of each launch.
const METRIC: &str = "gpu__time_duration.sum";

/// A launch of a kernel.
#[derive(Debug, PartialEq)]
struct Launch {
    kernel: String,
    /// The sizes of the grid and of a block.
    sizes: String,
    microseconds: f64,
}

/// Profiles one call of a network in `gpu-speed`, and prints a table of its kernels. `command` is
/// the profiler's.
pub fn print(
    mut command: Command,
    program: &Path,
    line: &str,
    name: &str,
    limit: Duration,
) -> Result<()> {
    // Clocks and caches as without the profiler.
    command.args(["--clock-control", "none", "--cache-control", "none"]);
    command.args(["--metrics", METRIC, "--csv"]).arg(program);
    let Some(printed) = output(&mut command, &format!("{line} 1\n"), limit)? else {
        bail!("there is no `ncu` on the PATH");
    };
    let launches = launches(&printed)?;
    let call = last_call(&launches).context("the launches of calls do not repeat")?;
    say!("{}", table(name, call).trim_end());
    Ok(())
}

/// The launches in the profiler's output, in order.
fn launches(printed: &str) -> Result<Vec<Launch>> {
    // Other output has no quotes.
    let mut rows = printed
        .lines()
        .filter(|line| line.starts_with('"'))
        .map(cells);
    let header = rows.next().unwrap_or_default();
    if rows.clone().next().is_none() {
        let errors = printed.lines().filter(|line| line.starts_with("==ERROR=="));
        bail!(
            "`ncu` listed no launches: {}",
            errors.collect::<Vec<_>>().join(" ")
        );
    }
    let column = |name: &str| {
        let position = header.iter().position(|cell| cell == name);
        position.with_context(|| format!("`ncu` lists no `{name}`"))
    };
    let [kernel, grid, block] = [
        column("Kernel Name")?,
        column("Grid Size")?,
        column("Block Size")?,
    ];
    let [metric, unit, value] = [
        column("Metric Name")?,
        column("Metric Unit")?,
        column("Metric Value")?,
    ];
    let mut launches = Vec::new();
    for row in rows {
        if row.len() != header.len() || row[metric] != METRIC {
            continue;
        }
        let time: f64 = row[value]
            .replace(',', "")
            .parse()
            .with_context(|| format!("`{}` is not a time", row[value]))?;
        let factor = match row[unit].get(..1) {
            Some("n") => 1e-3,
            Some("u") => 1.0,
            Some("m") => 1e3,
            Some("s") => 1e6,
            _ => bail!("`{}` is not a unit of time", row[unit]),
        };
        launches.push(Launch {
            kernel: row[kernel].clone(),
            sizes: format!("{} {}", row[grid], row[block]),
            microseconds: time * factor,
        });
    }
    Ok(launches)
}

/// The cells of a row of quoted values.
fn cells(row: &str) -> Vec<String> {
    let row = row.trim_end();
    let inner = row.strip_prefix('"').and_then(|row| row.strip_suffix('"'));
    inner
        .unwrap_or(row)
        .split("\",\"")
        .map(|cell| cell.replace("\"\"", "\""))
        .collect()
}

/// The launches of the last call: the sequence that the list ends with, twice or more.
fn last_call(launches: &[Launch]) -> Option<&[Launch]> {
    let keys: Vec<_> = launches
        .iter()
        .map(|launch| (&launch.kernel, &launch.sizes))
        .collect();
    Some(&launches[launches.len() - period(&keys)?..])
}

/// The length of the sequence that repeats at the end of the list: of several, the one whose
/// repetitions begin earliest, since layers repeat within a call, and calls throughout.
fn period<T: PartialEq>(list: &[T]) -> Option<usize> {
    let mut found = None;
    let mut longest = 0;
    for period in 1..=list.len() / 2 {
        let pairs = list[period..]
            .iter()
            .rev()
            .zip(list[..list.len() - period].iter().rev());
        let repeated = pairs
            .take_while(|(later, earlier)| later == earlier)
            .count();
        if repeated >= period && repeated + period > longest {
            (found, longest) = (Some(period), repeated + period);
        }
    }
    found
}

/// The kernels of a call, those that take longest first.
fn table(name: &str, call: &[Launch]) -> String {
    let mut kernels: BTreeMap<&str, (usize, f64)> = BTreeMap::new();
    for launch in call {
        let (count, total) = kernels.entry(&launch.kernel).or_default();
        *count += 1;
        *total += launch.microseconds;
    }
    let mut kernels: Vec<_> = kernels.into_iter().collect();
    kernels.sort_by(|(_, (_, a)), (_, (_, b))| b.total_cmp(a));
    let all: f64 = call.iter().map(|launch| launch.microseconds).sum();
    let mut text = format!(
        "{name}: {} launches a call, {:.2} ms in kernels\n\n\
         | kernel | launches | total, µs | mean, µs |\n|---|---|---|---|\n",
        call.len(),
        all / 1e3
    );
    for (kernel, (count, total)) in kernels {
        let mean = total / count as f64;
        text += &format!("| {kernel} | {count} | {total:.1} | {mean:.2} |\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRINTED: &str = r#"==PROF== Connected to process 7 (/tmp/gpu-speed)
==PROF== Profiling "product": 0%....50%....100% - 1 pass
0.0123
==PROF== Disconnected from process 7
"ID","Process ID","Kernel Name","Block Size","Grid Size","Metric Name","Metric Unit","Metric Value","Rule Name"
"0","7","product","(256, 1, 1)","(5, 128, 1)","gpu__time_duration.sum","ns","1,500",""
"1","7","norm","(64, 1, 1)","(8, 1, 1)","gpu__time_duration.sum","usecond","2.5",""
"1","7","norm","(64, 1, 1)","(8, 1, 1)","launch__grid_size","","8",""
"#;

    #[test]
    fn launches_are_read() {
        let launch = |kernel: &str, sizes: &str, microseconds| Launch {
            kernel: kernel.into(),
            sizes: sizes.into(),
            microseconds,
        };
        let expected = [
            launch("product", "(5, 128, 1) (256, 1, 1)", 1.5),
            launch("norm", "(8, 1, 1) (64, 1, 1)", 2.5),
        ];
        assert_eq!(launches(PRINTED).unwrap(), expected);
        let error = |printed: &str| launches(printed).unwrap_err().to_string();
        assert_eq!(
            error("==ERROR== no permission\n"),
            "`ncu` listed no launches: ==ERROR== no permission"
        );
        assert_eq!(
            error(&PRINTED.replace("usecond", "cycle")),
            "`cycle` is not a unit of time"
        );
    }

    #[test]
    fn calls_are_told_from_layers() {
        #[track_caller]
        fn check(launches: &str, call: Option<&str>) {
            let list: Vec<char> = launches.chars().collect();
            let found = period(&list).map(|period| &launches[launches.len() - period..]);
            assert_eq!(found, call);
        }
        check("wwwabcabcabc", Some("abc"));
        // Two layers, and the kernels after them.
        check("wwxababcababcababc", Some("ababc"));
        // The call ends with the same layers.
        check("wwxcababcababcabab", Some("cabab"));
        // The first call has more launches.
        check("wwabxcabcabc", Some("abc"));
        check("wabc", None);
        check("", None);
    }

    #[test]
    fn kernels_are_summed_up() {
        let mut list = launches(PRINTED).unwrap();
        list.extend(launches(PRINTED).unwrap());
        assert_eq!(last_call(&list).unwrap(), &list[2..]);
        assert_eq!(
            table("UNet", &list),
            "\
UNet: 4 launches a call, 0.01 ms in kernels

| kernel | launches | total, µs | mean, µs |
|---|---|---|---|
| norm | 2 | 5.0 | 2.50 |
| product | 2 | 3.0 | 1.50 |
"
        );
    }
}
