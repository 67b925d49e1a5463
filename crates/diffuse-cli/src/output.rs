//! Where images go: PNG files that say how they were made, and the terminal.

use std::fmt::Display;
use std::fs;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use burn::tensor::backend::Backend;
use console::Term;
use diffuse_pipelines::schedulers::SchedulerConfig;
use diffuse_pipelines::{Generated, check_regular, latents, replace_file};
use image::RgbImage;
use serde_json::{Map, Value, json};

use crate::args::Run;
use crate::grid;
use crate::terminal;

/// Keyword of the PNG's text chunk.
const KEYWORD: &str = "diffuse";

/// Prints a line. That nobody reads it, or that it cannot be written, is no reason to stop.
pub fn say(line: impl Display) {
    let _ = writeln!(io::stdout(), "{line}");
}

/// Prints a warning or an error; see [`say`].
pub fn complain(line: impl Display) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Prints what the libraries warn of.
pub fn show_warnings() {
    struct Warnings;
    impl log::Log for Warnings {
        fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
            metadata.level() <= log::Level::Warn && metadata.target().starts_with("diffuse")
        }

        fn log(&self, record: &log::Record<'_>) {
            if self.enabled(record.metadata()) {
                complain(format_args!("warning: {}", record.args()));
            }
        }

        fn flush(&self) {}
    }
    if log::set_logger(&Warnings).is_ok() {
        log::set_max_level(log::LevelFilter::Warn);
    }
}

/// Checks, before anything is computed, that `images` outputs can be written.
pub fn check(run: &Run, images: usize) -> Result<()> {
    // A larger number is refused before anything is computed.
    let mut paths = image_paths(&run.output, images.min(1024));
    paths.extend(run.grid.clone());
    check_images(&paths)?;
    if let Some(latents) = &run.output_latents {
        if paths.contains(latents) {
            bail!(
                "`{}` is given for an image and for the latents",
                latents.display()
            );
        }
        check_path(latents)?;
    }
    Ok(())
}

/// Checks that these images can be written.
pub fn check_images(paths: &[PathBuf]) -> Result<()> {
    for (index, path) in paths.iter().enumerate() {
        check_extension(path)?;
        if paths[..index].contains(path) {
            bail!("`{}` is given for two images", path.display());
        }
        check_path(path)?;
    }
    Ok(())
}

/// Checks that an image's file is called as PNG files are.
pub fn check_extension(path: &Path) -> Result<()> {
    let extension = path.extension();
    if !extension.is_some_and(|extension| extension.eq_ignore_ascii_case("png")) {
        bail!("`{}`: images are written as .png", path.display());
    }
    Ok(())
}

/// Checks that a file can be written.
pub fn check_path(path: &Path) -> Result<()> {
    let check = || {
        if path.exists() {
            check_regular(path)?;
        }
        // A temporary file as the real one will have.
        let mut name = path.file_name().unwrap_or_default().to_os_string();
        name.push(format!(".{}.part", std::process::id()));
        let probe = path.with_file_name(name);
        fs::write(&probe, []).and_then(|()| fs::remove_file(&probe))
    };
    check().with_context(|| format!("cannot write `{}`", path.display()))
}

/// Prints the seeds that a run is about to use.
pub fn announce(run: &Run) {
    if !run.quiet {
        let seeds: Vec<String> = run.seed.iter().map(u64::to_string).collect();
        say(format_args!("seed {}", seeds.join(",")));
    }
}

/// Adds the scheduler with all its options to an image's record, and warns of keys that have no
/// effect.
pub fn record_scheduler(record: &mut Map<String, Value>, config: &SchedulerConfig) {
    warn_of_ignored(config);
    record.insert("scheduler".into(), config.class_name().into());
    record.insert("scheduler_config".into(), config.values().clone().into());
}

/// Warns of keys of a scheduler's configuration that have no effect.
pub fn warn_of_ignored(config: &SchedulerConfig) {
    for key in config.ignored() {
        complain(format_args!(
            "warning: `{key}` in the scheduler's configuration is not an option of any scheduler"
        ));
    }
}

/// Warns of texts that are too long, by the parts that were cut.
pub fn warn_of_truncated<'a>(texts: impl IntoIterator<Item = &'a String>) {
    for text in texts {
        complain(format_args!(
            "warning: a prompt is too long for the text encoder, this part was cut: {text}"
        ));
    }
}

/// Writes how long the stages took and the most memory that was in use, if that was asked for.
pub fn write_timings<B: Backend>(
    generated: &Generated<B>,
    loading: Duration,
    run: &Run,
) -> Result<()> {
    let Some(path) = &run.timings else {
        return Ok(());
    };
    let timings = json!({
        "load": loading.as_secs_f64(),
        "encode": generated.times.encode.as_secs_f64(),
        "denoise": generated.times.denoise.as_secs_f64(),
        "decode": generated.times.decode.as_secs_f64(),
        "calls": generated.timesteps.len(),
        "peak": peak_memory(),
    });
    replace_file(path, |temporary| fs::write(temporary, timings.to_string()))
        .with_context(|| format!("cannot write `{}`", path.display()))
}

/// Bytes of the largest resident set so far, where the system tells.
fn peak_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kibibytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kibibytes * 1024)
}

/// Writes everything that a run made, and says so.
pub fn write<B: Backend>(
    generated: &Generated<B>,
    run: &Run,
    options: Map<String, Value>,
) -> Result<()> {
    warn_of_truncated(&generated.truncated);
    if let Some(path) = &run.output_latents {
        latents::write(path, &generated.latents)?;
    }
    let paths = image_paths(&run.output, generated.images.len());
    let flags = generated.nsfw_content_detected.as_deref();
    let names = paths.iter().map(|path| format!("`{}`", path.display()));
    warn_of_flagged(flags.unwrap_or_default(), names);
    for (index, (image, path)) in generated.images.iter().zip(&paths).enumerate() {
        let mut options = options.clone();
        options.insert("image".into(), index.into());
        let flag = flags.map(|flags| flags[index]);
        options.insert("nsfw_content_detected".into(), flag.into());
        write_png(path, image, &options.into())?;
        if !run.quiet {
            show(image);
            say(path.display());
        }
    }
    if let Some(path) = run.grid.as_ref().filter(|_| !generated.images.is_empty()) {
        let images = &generated.images;
        let columns = match run.num_images {
            several if several > 1 && several < images.len() => several,
            _ => grid::columns(images.len()),
        };
        write_png(path, &grid::grid(images, columns), &options.into())?;
        if !run.quiet {
            say(path.display());
        }
    }
    Ok(())
}

/// Says which images the safety checker made black.
pub fn warn_of_flagged(flags: &[bool], names: impl Iterator<Item = String>) {
    let flagged = flags.iter().zip(names).filter(|(flag, _)| **flag);
    let flagged: Vec<String> = flagged.map(|(_, name)| name).collect();
    if !flagged.is_empty() {
        complain(format_args!(
            "warning: the safety checker takes {} of {} images for unsafe, and makes it black: {}; \
             try another prompt or seed, or turn the checker off by `--no-safety-checker`",
            flagged.len(),
            flags.len(),
            flagged.join(", ")
        ));
    }
}

/// `out.png`, or `out-0.png`, `out-1.png`, ... for several images.
pub fn image_paths(path: &Path, images: usize) -> Vec<PathBuf> {
    if images <= 1 {
        return vec![path.to_path_buf()];
    }
    let numbered = |index: usize| {
        let mut name = path.file_stem().unwrap_or_default().to_os_string();
        name.push(format!("-{index}."));
        name.push(path.extension().unwrap_or_default());
        path.with_file_name(name)
    };
    (0..images).map(numbered).collect()
}

pub fn write_png(path: &Path, image: &RgbImage, options: &Value) -> Result<()> {
    let write = |temporary: &Path| -> io::Result<()> {
        let file = BufWriter::new(fs::File::create(temporary)?);
        let mut encoder = png::Encoder::new(file, image.width(), image.height());
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        encoder.add_itxt_chunk(KEYWORD.into(), options.to_string())?;
        let mut writer = encoder.write_header()?;
        writer.write_image_data(image.as_raw())?;
        writer.finish()?;
        Ok(())
    };
    replace_file(path, write).with_context(|| format!("cannot write `{}`", path.display()))
}

/// Shows an image, if standard output is a terminal that can.
pub fn show(image: &RgbImage) {
    let terminal = Term::stdout();
    if terminal::has_colors(&terminal) {
        // Ends its last line itself.
        let _ = write!(io::stdout(), "{}", terminal::text(image, &terminal));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_images_are_numbered_before_the_extension() {
        let check = |path: &str, images, expected: &[&str]| {
            let expected: Vec<PathBuf> = expected.iter().map(PathBuf::from).collect();
            assert_eq!(image_paths(Path::new(path), images), expected);
        };
        check("out.png", 1, &["out.png"]);
        check("out.png", 2, &["out-0.png", "out-1.png"]);
        check(
            "a/b.c/cat.v2.PNG",
            2,
            &["a/b.c/cat.v2-0.PNG", "a/b.c/cat.v2-1.PNG"],
        );
    }

    #[cfg(unix)]
    #[test]
    fn names_that_are_not_utf8_stay() {
        use std::ffi::OsStr;
        use std::os::unix::ffi::OsStrExt;
        let path = |bytes: &[u8]| PathBuf::from(OsStr::from_bytes(bytes));
        let expected = [path(b"a\xff-0.png"), path(b"a\xff-1.png")];
        assert_eq!(image_paths(&path(b"a\xff.png"), 2), expected);
    }
}
