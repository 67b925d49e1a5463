//! Plots the losses of training runs from their `log.csv`.
//!
//! `cargo run --release -p diffuse-training --bin training-curves -- OUT.svg
//! NAME=FOLDER[,FOLDER]..`: a panel for each name; commas separate runs that continue one another.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use plotters::prelude::*;

/// A column of a log against the step.
struct Curve {
    name: String,
    points: Vec<(f64, f64)>,
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [output, panels @ ..] = &arguments[..] else {
        bail!("usage: training-curves OUT.svg NAME=FOLDER[,FOLDER..] ..");
    };
    let width = 330 * panels.len().max(1) as u32;
    let area = SVGBackend::new(output, (width, 240)).into_drawing_area();
    area.fill(&WHITE)?;
    for (panel, area) in panels
        .iter()
        .zip(area.split_evenly((1, panels.len().max(1))))
    {
        let (name, folders) = panel
            .split_once('=')
            .with_context(|| format!("`{panel}` is not NAME=FOLDER"))?;
        let mut curves: Vec<Curve> = Vec::new();
        let mut start = 0.0;
        for folder in folders.split(',') {
            start = read(Path::new(folder), start, &mut curves)?;
        }
        draw(&area, name, &curves, start)?;
    }
    area.present()?;
    println!("{output}");
    Ok(())
}

/// Adds a run's losses, which begin at step `start`, and returns the step at which they end.
fn read(folder: &Path, start: f64, curves: &mut Vec<Curve>) -> Result<f64> {
    let path = folder.join("log.csv");
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
    let mut lines = text.lines();
    let names: Vec<&str> = lines.next().unwrap_or_default().split(',').collect();
    // The step is first, the learning rate and the seconds last; the total is left out if there are
    // parts.
    let losses = 1 + usize::from(names.len() > 4)..names.len() - 2;
    let mut end = start;
    for line in lines {
        let values: Vec<f64> = line.split(',').map(str::parse).collect::<Result<_, _>>()?;
        end = start + values[0];
        for column in losses.clone() {
            let index = column - losses.start;
            if curves.len() <= index {
                curves.push(Curve {
                    name: names[column].into(),
                    points: Vec::new(),
                });
            }
            curves[index].points.push((end, values[column]));
        }
    }
    Ok(end)
}

fn draw(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    title: &str,
    curves: &[Curve],
    end: f64,
) -> Result<()> {
    let values = || curves.iter().flat_map(|curve| curve.points.iter());
    let low = values().map(|(_, value)| *value).fold(f64::MAX, f64::min);
    let high = values().map(|(_, value)| *value).fold(0.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 14))
        .margin(8)
        .x_label_area_size(28)
        .y_label_area_size(44)
        .build_cartesian_2d(0.0..end, (low * 0.8..high * 1.2).log_scale())?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.1))
        .x_desc("step")
        .x_labels(5)
        .label_style(("sans-serif", 11))
        .draw()?;
    for (index, curve) in curves.iter().enumerate() {
        let color = Palette99::pick(index).to_rgba();
        chart
            .draw_series(LineSeries::new(curve.points.clone(), color.stroke_width(1)))?
            .label(&curve.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 12, y)], color));
    }
    chart
        .configure_series_labels()
        .label_font(("sans-serif", 11))
        .background_style(WHITE.mix(0.8))
        .draw()?;
    Ok(())
}
