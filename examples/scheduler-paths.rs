//! Draws the paths and sigmas of every sampler, without a network.
//!
//! Images are points in the plane, and the data are two moons: a mixture of normal distributions,
//! for which the output of a perfect network is known exactly. Each sampler starts from the same
//! noise, with about the same number of model evaluations. One figure shows the paths of a few
//! points, the other the sigma of each evaluation.
//!
//! `cargo run --release -p diffuse-examples --example scheduler-paths -- docs`

use std::f64::consts::PI;
use std::path::{Path, PathBuf};

use anyhow::Result;
use burn::prelude::*;
use burn::tensor::DType;
use burn_flex::Flex;
use diffuse_schedulers::{
    Generator, NoiseSchedule, NoiseSource, Overrides, Scheduler, SchedulerConfig, StepOptions,
    randn_tensor, scheduler_catalog, scheduler_from_config,
};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use serde_json::{Value, json};

/// Model evaluations of a run, or as nearly as a sampler's steps allow.
const CALLS: usize = 20;
/// Number of points whose ends are drawn, and of those whose paths are drawn.
const POINTS: usize = 32;
const WAYS: usize = 4;

type Point = (f64, f64);
type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn main() -> Result<()> {
    let folder: PathBuf = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "docs".into())
        .into();
    let names: Vec<&str> = scheduler_catalog().map(|info| info.name).collect();
    let world = World::new()?;

    let paths = folder.join("scheduler-paths.svg");
    let variants = ["DPM++ 2M Karras", "DPM++ 2M SDE"];
    grid(&paths, &[&names[..], &variants].concat(), |area, name| {
        draw_paths(area, name, &world)
    })?;
    let sigmas = folder.join("scheduler-sigmas.svg");
    grid(&sigmas, &[&names[..], &[LEGEND]].concat(), |area, name| {
        draw_sigmas(area, name, &world)
    })?;
    println!("{}\n{}", paths.display(), sigmas.display());
    Ok(())
}

/// The noise schedule of Stable Diffusion, and data with an exact network.
struct World {
    schedule: NoiseSchedule,
    /// The means of the normal distributions, along each moon.
    moons: [Vec<Point>; 2],
}

/// The standard deviation of each normal distribution.
const BLUR: f64 = 0.08;

impl World {
    fn new() -> Result<Self> {
        let scheduler = diffuse_schedulers::DDIMScheduler::<Flex>::from_config(&config())?;
        // Two half circles, shifted and scaled to about mean 0 and deviation 1.
        let moon = |side: f64| {
            let angle = |k: usize| PI * k as f64 / 23.0;
            let point = |a: f64| (1.2 * side * (a.cos() - 0.5), 1.2 * side * (a.sin() - 0.25));
            (0..24).map(|k| point(angle(k))).collect()
        };
        Ok(Self {
            schedule: scheduler.noise_schedule().clone(),
            moons: [moon(1.0), moon(-1.0)],
        })
    }

    /// The sigma of `x0 + σ ε` at a timestep, whose unit depends on the family of models.
    fn sigma(&self, class: &str, timestep: f64) -> f64 {
        match class {
            "IPNDMScheduler" => (timestep * PI / 2.0).tan().min(1e4),
            _ if class.starts_with("EDM") => (4.0 * timestep).exp(),
            _ => {
                let table = self.schedule.alphas_cumprod();
                let log_sigma = |t: usize| (1.0 / f64::from(table[t]) - 1.0).sqrt().ln();
                let below = (timestep.max(0.0) as usize).min(table.len() - 2);
                let share = timestep - below as f64;
                (log_sigma(below) * (1.0 - share) + log_sigma(below + 1) * share).exp()
            }
        }
    }

    /// The posterior mean of the data, given `y = x0 + σ ε`.
    fn image(&self, y: Point, sigma: f64) -> Point {
        let variance = BLUR * BLUR + sigma * sigma;
        let means = || self.moons.iter().flatten();
        let distance = |m: &Point| (y.0 - m.0).powi(2) + (y.1 - m.1).powi(2);
        let nearest = means().map(distance).fold(f64::INFINITY, f64::min);
        let (mut sum, mut total) = ((0.0, 0.0), 0.0);
        for middle in means() {
            let weight = (-(distance(middle) - nearest) / (2.0 * variance)).exp();
            sum = (sum.0 + weight * middle.0, sum.1 + weight * middle.1);
            total += weight;
        }
        let share = sigma * sigma / variance;
        let mean = |middle: f64, y: f64| middle / total * share + y * (1.0 - share);
        (mean(sum.0, y.0), mean(sum.1, y.1))
    }

    /// The solution of the ODE from `y`: the output of a model distilled to one step.
    fn end(&self, mut y: Point, sigma: f64) -> Point {
        let sigmas = |k: i32| sigma * (0.01 / sigma).powf(f64::from(k) / 100.0);
        for k in 0..100 {
            let (here, next) = (sigmas(k), sigmas(k + 1));
            let image = self.image(y, here);
            let step = |y: f64, image: f64| image + (y - image) * next / here;
            y = (step(y.0, image.0), step(y.1, image.1));
        }
        self.image(y, sigmas(100))
    }

    /// The output of the perfect network of a sampler's family for `x = (x0 + σ ε) / √(1 + σ²)`,
    /// `[points, 2, 1, 1]`.
    fn model(&self, class: &str, x: Tensor<Flex, 4>, timestep: f64) -> Tensor<Flex, 4> {
        let sigma = self.sigma(class, timestep);
        let scale = (1.0 + sigma * sigma).sqrt();
        let answers = points(&x).into_iter().flat_map(|(a, b)| {
            let y = (a * scale, b * scale);
            let image = match class {
                "LCMScheduler" | "TCDScheduler" => self.end(y, sigma),
                _ => self.image(y, sigma),
            };
            [(y.0, image.0), (y.1, image.1)].map(|(y, image)| {
                let noise = (y - image) / sigma;
                let velocity = (noise - sigma * image) / scale;
                match class {
                    "IPNDMScheduler" => velocity,
                    _ if class.starts_with("EDM") => -velocity,
                    _ => noise,
                }
            })
        });
        let answers: Vec<f64> = answers.collect();
        Tensor::from_data(TensorData::new(answers, x.dims()), (&x.device(), x.dtype()))
    }
}

fn config() -> SchedulerConfig {
    let noise = json!({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"});
    SchedulerConfig::from_values(noise.as_object().cloned().unwrap_or_default())
}

/// A sampler with options for points in the plane.
fn scheduler(name: &str, options: Value) -> Result<Box<dyn Scheduler<Flex>>> {
    let mut overrides = options.as_object().cloned().unwrap_or_default();
    let plain = scheduler_from_config::<Flex>(&config(), Some(name), &Overrides::new())?;
    for (key, value) in [
        ("clip_sample", json!(false)),
        ("skip_prk_steps", json!(true)),
        ("sigma_data", json!(1.0)),
    ] {
        if plain.config().get(key).is_some() {
            overrides.insert(key.into(), value);
        }
    }
    Ok(scheduler_from_config(&config(), Some(name), &overrides)?)
}

/// The number of steps with this number of model evaluations.
fn set_steps(scheduler: &mut dyn Scheduler<Flex>) -> Result<()> {
    scheduler.set_timesteps(&CALLS.div_ceil(scheduler.order()).into())?;
    Ok(())
}

fn class(scheduler: &dyn Scheduler<Flex>) -> String {
    scheduler.config().class_name().unwrap_or_default().into()
}

/// The points of `[points, 2, 1, 1]`.
fn points(x: &Tensor<Flex, 4>) -> Vec<Point> {
    let numbers: Vec<f64> = x.to_data().iter::<f64>().collect();
    numbers
        .as_chunks::<2>()
        .0
        .iter()
        .map(|&[a, b]| (a, b))
        .collect()
}

/// A run of a sampler.
struct Run {
    /// All points at each model evaluation, scaled as the model input, and at the end.
    paths: Vec<Vec<Point>>,
    /// A note of a few words.
    note: String,
}

fn run(name: &str, world: &World) -> Result<Run> {
    let mut scheduler = scheduler(name, json!({}))?;
    let class = class(&*scheduler);
    set_steps(&mut *scheduler)?;
    let device = Default::default();
    let mut generator = Generator::new(7);
    let noise = randn_tensor::<Flex>(&mut generator, [POINTS, 2, 1, 1], DType::F32, &device)?;
    let inverse = class.contains("Inverse");
    let mut sample = match inverse {
        // Inverse samplers start from data: blurred means.
        true => {
            let means = world.moons.iter().flatten().cycle().step_by(7).take(POINTS);
            let means: Vec<f64> = means.flat_map(|&(a, b)| [a, b]).collect();
            let means = TensorData::new(means, [POINTS, 2, 1, 1]);
            noise * BLUR + Tensor::from_data(means, (&device, DType::F32))
        }
        false => noise * scheduler.init_noise_sigma(),
    };
    let mut untouched = generator.clone();
    let mut paths = Vec::new();
    for timestep in scheduler.timesteps().to_vec() {
        let input = scheduler.scale_model_input(sample.clone(), timestep)?;
        paths.push(points(&input));
        let output = world.model(&class, input, timestep);
        sample = scheduler
            .step(
                output,
                timestep,
                sample,
                &StepOptions::default(),
                &mut generator,
            )?
            .prev_sample;
    }
    paths.push(points(&sample));
    let next = |generator: &mut Generator| generator.randn([1; 4], DType::F32);
    let kind = if next(&mut generator)? != next(&mut untouched)? {
        "with noise".into()
    } else if inverse {
        "inverse".into()
    } else {
        // The mean distance of the ends from the solution of the ODE.
        let sigma = world.sigma(&class, scheduler.timesteps()[0]);
        let scale = (1.0 + sigma * sigma).sqrt();
        let distance = |(start, end): (&Point, &Point)| {
            let exact = world.end((start.0 * scale, start.1 * scale), sigma);
            (end.0 - exact.0).hypot(end.1 - exact.1)
        };
        let distances = paths[0].iter().zip(&paths[paths.len() - 1]).map(distance);
        format!("error {:.3}", distances.sum::<f64>() / POINTS as f64)
    };
    let note = format!("{} evaluations, {kind}", paths.len() - 1);
    Ok(Run { paths, note })
}

const PANEL: (u32, u32) = (440, 420);
const COLUMNS: usize = 4;
const INK: RGBColor = RGBColor(31, 35, 40);
const FAINT: RGBColor = RGBColor(208, 215, 222);
/// The name of the panel with the legend.
const LEGEND: &str = "";
const HUES: [RGBColor; WAYS] = [
    RGBColor(214, 39, 40),
    RGBColor(31, 119, 180),
    RGBColor(44, 160, 44),
    RGBColor(255, 127, 14),
];

/// A panel for each sampler, with its name and a note.
fn grid(path: &Path, names: &[&str], draw: impl Fn(&Area, &str) -> Result<String>) -> Result<()> {
    let rows = names.len().div_ceil(COLUMNS);
    let size = (PANEL.0 * COLUMNS as u32, PANEL.1 * rows as u32);
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE)?;
        for (area, name) in root.split_evenly((rows, COLUMNS)).iter().zip(names) {
            let note = draw(&area.margin(84, 14, 14, 14), name)?;
            let center = Pos::new(HPos::Center, VPos::Top);
            let middle = PANEL.0 as i32 / 2;
            let title = sans(32).style(FontStyle::Bold).color(&INK).pos(center);
            area.draw(&Text::new(*name, (middle, 14), title))?;
            let quiet = sans(24).color(&INK.mix(0.7)).pos(center);
            area.draw(&Text::new(note, (middle, 54), quiet))?;
        }
        root.present()?;
    }
    // Default attributes make up half of the file.
    for default in [
        r#" opacity="1""#,
        r#" stroke="none""#,
        r#" stroke-width="1""#,
    ] {
        svg = svg.replace(default, "");
    }
    // Draws coinciding marks once.
    let mut lines: Vec<&str> = svg.lines().collect();
    lines.dedup();
    std::fs::write(path, lines.join("\n") + "\n")?;
    Ok(())
}

fn sans(size: u32) -> FontDesc<'static> {
    ("sans-serif", size).into_font()
}

/// The moons in the background, the paths of a few points, and the ends of all.
fn draw_paths(area: &Area, name: &str, world: &World) -> Result<String> {
    let Run { paths, note } = run(name, world)?;
    let mut chart = ChartBuilder::on(area).build_cartesian_2d(-2.6..2.6, -2.3..2.3)?;
    for moon in &world.moons {
        chart.draw_series(LineSeries::new(moon.clone(), FAINT.stroke_width(34)))?;
    }
    for (which, hue) in HUES.iter().enumerate() {
        let path = paths.iter().map(|points| points[which]);
        chart.draw_series(LineSeries::new(path.clone(), hue.stroke_width(3)))?;
        // No marks at the corners of a jagged path.
        if !note.ends_with("noise") {
            chart.draw_series(path.map(|point| Circle::new(point, 4, hue.filled())))?;
        }
    }
    for (which, &end) in paths[paths.len() - 1].iter().enumerate() {
        let hue = HUES.get(which).unwrap_or(&INK);
        chart.draw_series([Circle::new(end, 6, hue.filled())])?;
    }
    Ok(note)
}

/// The sigmas of the model evaluations, by default and with the supported sigma schedules.
fn draw_sigmas(area: &Area, name: &str, world: &World) -> Result<String> {
    let schedules = [
        ("default", "", INK),
        ("use_karras_sigmas", "use_karras_sigmas", HUES[1]),
        ("use_exponential_sigmas", "use_exponential_sigmas", HUES[3]),
        ("use_beta_sigmas", "use_beta_sigmas", HUES[2]),
    ];
    if name == LEGEND {
        for (line, (text, _, hue)) in schedules.iter().enumerate() {
            let at = 60 + 44 * line as i32;
            area.draw(&Circle::new((40, at), 8, hue.filled()))?;
            let left = Pos::new(HPos::Left, VPos::Center);
            area.draw(&Text::new(*text, (64, at), sans(26).color(&INK).pos(left)))?;
        }
        return Ok(String::new());
    }
    let plain = scheduler(name, json!({}))?;
    let mut chart = ChartBuilder::on(area)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..1.0, (0.01..200.0).log_scale())?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .disable_x_axis()
        .y_labels(5)
        .y_label_formatter(&|sigma| sigma.to_string())
        .y_label_style(sans(22).color(&INK.mix(0.7)))
        .bold_line_style(FAINT)
        .light_line_style(TRANSPARENT)
        .axis_style(FAINT)
        .draw()?;
    let mut evaluations = 0;
    for (_, key, hue) in schedules.into_iter().rev() {
        let options = match plain.config().get(key) {
            Some(_) => json!({ key: true }),
            None if key.is_empty() => json!({}),
            None => continue,
        };
        let mut scheduler = scheduler(name, options)?;
        set_steps(&mut *scheduler)?;
        let class = class(&*scheduler);
        let timesteps = scheduler.timesteps();
        evaluations = timesteps.len();
        let place = |evaluation: usize| evaluation as f64 / (evaluations - 1) as f64;
        let sigma = |(evaluation, &t): (usize, &f64)| (place(evaluation), world.sigma(&class, t));
        let sigmas: Vec<Point> = timesteps.iter().enumerate().map(sigma).collect();
        chart.draw_series(LineSeries::new(sigmas.clone(), hue.stroke_width(3)))?;
        chart.draw_series(sigmas.into_iter().map(|p| Circle::new(p, 5, hue.filled())))?;
    }
    Ok(format!("{evaluations} evaluations"))
}
