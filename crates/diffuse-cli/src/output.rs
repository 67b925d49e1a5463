//! Where pictures go: PNG files that say how they were made, and the terminal.

use std::fs;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use burn::tensor::backend::Backend;
use diffuse_pipelines::schedulers::SchedulerConfig;
use diffuse_pipelines::{Generated, latents, replace_file};
use image::{DynamicImage, RgbImage};
use serde_json::{Map, Value};

use crate::args::Run;

/// Keyword of the PNG's text chunk.
const KEYWORD: &str = "diffuse";

/// Checks, before anything is computed, that the outputs can be written.
pub fn check(run: &Run) -> Result<()> {
    let png = run
        .output
        .extension()
        .is_some_and(|extension| extension.eq_ignore_ascii_case("png"));
    if !png {
        bail!("`{}`: pictures are written as .png", run.output.display());
    }
    let latents = run.output_latents.iter();
    for path in latents.chain([&run.output]) {
        if path.is_dir() {
            bail!("cannot write `{}`: it is a folder", path.display());
        }
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let probe = folder.join(format!(".diffuse-{}.part", std::process::id()));
        let written = fs::write(&probe, []).and_then(|()| fs::remove_file(&probe));
        written.with_context(|| format!("cannot write `{}`", path.display()))?;
    }
    Ok(())
}

/// Prints the seeds that a run is about to use.
pub fn announce(run: &Run) {
    if !run.quiet {
        let seeds: Vec<String> = run.seed.iter().map(u64::to_string).collect();
        println!("seed {}", seeds.join(","));
    }
}

/// Adds the scheduler with all its options to a picture's record, and warns of keys that have no effect.
pub fn record_scheduler(record: &mut Map<String, Value>, config: &SchedulerConfig) {
    for key in config.ignored() {
        eprintln!(
            "warning: `{key}` in the scheduler's configuration is not an option of any scheduler"
        );
    }
    record.insert("scheduler".into(), config.class_name().into());
    record.insert("scheduler_config".into(), config.values().clone().into());
}

/// Writes everything that a run made, and says so.
pub fn write<B: Backend>(
    generated: &Generated<B>,
    run: &Run,
    options: Map<String, Value>,
) -> Result<()> {
    for text in &generated.truncated {
        eprintln!("warning: a prompt is too long for the text encoder, this part was cut: {text}");
    }
    if let Some(path) = &run.output_latents {
        latents::write(path, &generated.latents)?;
    }
    for (index, picture) in generated.images.iter().enumerate() {
        let several = (generated.images.len() > 1).then_some(index);
        let path = numbered(&run.output, several);
        let mut options = options.clone();
        options.insert("image".into(), index.into());
        write_png(&path, picture, &Value::from(options))?;
        if !run.quiet {
            preview(picture);
            println!("{}", path.display());
        }
    }
    Ok(())
}

/// `out.png`, or `out-3.png`.
fn numbered(path: &Path, index: Option<usize>) -> PathBuf {
    let Some(index) = index else {
        return path.to_path_buf();
    };
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let extension = path.extension().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{stem}-{index}.{extension}"))
}

fn write_png(path: &Path, picture: &RgbImage, options: &Value) -> Result<()> {
    let write = |temporary: &Path| -> io::Result<()> {
        let file = BufWriter::new(fs::File::create(temporary)?);
        let mut encoder = png::Encoder::new(file, picture.width(), picture.height());
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        encoder.add_itxt_chunk(KEYWORD.into(), options.to_string())?;
        let mut writer = encoder.write_header()?;
        writer.write_image_data(picture.as_raw())?;
        writer.finish()?;
        Ok(())
    };
    replace_file(path, write).with_context(|| format!("cannot write `{}`", path.display()))
}

/// Shows a picture in a terminal that can show one; failing to is not worth a word.
fn preview(picture: &RgbImage) {
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        return;
    }
    // Asking a terminal for its abilities writes to it, so that comes after.
    let colors = std::env::var("COLORTERM").unwrap_or_default();
    let can_show = matches!(colors.as_str(), "truecolor" | "24bit")
        || viuer::is_iterm_supported()
        || viuer::get_kitty_support() != viuer::KittySupport::None;
    if !can_show {
        return;
    }
    let config = viuer::Config {
        absolute_offset: false,
        width: Some(48),
        ..viuer::Config::default()
    };
    let _ = viuer::print(&DynamicImage::from(picture.clone()), &config);
    let _ = io::stdout().flush();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_pictures_are_numbered_before_the_extension() {
        let check = |path: &str, index, expected: &str| {
            assert_eq!(numbered(Path::new(path), index), Path::new(expected));
        };
        check("out.png", None, "out.png");
        check("out.png", Some(0), "out-0.png");
        check("a/b.c/cat.v2.PNG", Some(12), "a/b.c/cat.v2-12.PNG");
    }
}
