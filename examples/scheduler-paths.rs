//! No model: draws what each sampler does, for choosing one by looking.
//!
//! Images here are points in the plane, and the data are two moons: a mixture of normal
//! distributions, for which the answer of a perfect network can be written down. Each sampler
//! starts from the same noise with about the same number of model calls. One figure shows the ways
//! of a few points, the other the noise levels that are visited.
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

/// Model calls of a run, as nearly as a sampler's steps allow.
const CALLS: usize = 20;
/// Points that are drawn at their ends, and those of them whose way is drawn.
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

    let ways = folder.join("scheduler-paths.svg");
    let variants = ["DPM++ 2M Karras", "DPM++ 2M SDE"];
    grid(&ways, &[&names[..], &variants].concat(), |area, name| {
        draw_ways(area, name, &world)
    })?;
    let levels = folder.join("scheduler-levels.svg");
    grid(&levels, &[&names[..], &[LEGEND]].concat(), |area, name| {
        draw_levels(area, name, &world)
    })?;
    println!("{}\n{}", ways.display(), levels.display());
    Ok(())
}

/// The noise of Stable Diffusion, and data that need no network.
struct World {
    schedule: NoiseSchedule,
    /// The middles of the normal distributions, along each moon.
    moons: [Vec<Point>; 2],
}

/// The deviation of each normal distribution.
const BLUR: f64 = 0.08;

impl World {
    fn new() -> Result<Self> {
        let scheduler = diffuse_schedulers::DDIMScheduler::<Flex>::from_config(&config())?;
        // Along two half circles, moved and scaled so that the whole has about mean 0 and deviation
        // 1.
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

    /// The noise level `σ` in `x0 + σ ε` at a timestep, which each family of models counts
    /// differently.
    fn level(&self, class: &str, timestep: f64) -> f64 {
        match class {
            "IPNDMScheduler" => (timestep * PI / 2.0).tan().min(1e4),
            _ if class.starts_with("EDM") => (4.0 * timestep).exp(),
            _ => {
                let table = self.schedule.alphas_cumprod();
                let level = |t: usize| (1.0 / f64::from(table[t]) - 1.0).sqrt().ln();
                let below = (timestep.max(0.0) as usize).min(table.len() - 2);
                let share = timestep - below as f64;
                (level(below) * (1.0 - share) + level(below + 1) * share).exp()
            }
        }
    }

    /// The mean of all data that `y = x0 + σ ε` may come from.
    fn image(&self, y: Point, sigma: f64) -> Point {
        let variance = BLUR * BLUR + sigma * sigma;
        let middles = || self.moons.iter().flatten();
        let distance = |m: &Point| (y.0 - m.0).powi(2) + (y.1 - m.1).powi(2);
        let nearest = middles().map(distance).fold(f64::INFINITY, f64::min);
        let (mut sum, mut total) = ((0.0, 0.0), 0.0);
        for middle in middles() {
            let weight = (-(distance(middle) - nearest) / (2.0 * variance)).exp();
            sum = (sum.0 + weight * middle.0, sum.1 + weight * middle.1);
            total += weight;
        }
        let share = sigma * sigma / variance;
        let mean = |middle: f64, y: f64| middle / total * share + y * (1.0 - share);
        (mean(sum.0, y.0), mean(sum.1, y.1))
    }

    /// Where the ODE leads from `y`: the answer of a model distilled to one step.
    fn end(&self, mut y: Point, sigma: f64) -> Point {
        let levels = |k: i32| sigma * (0.01 / sigma).powf(f64::from(k) / 100.0);
        for k in 0..100 {
            let (here, next) = (levels(k), levels(k + 1));
            let image = self.image(y, here);
            let step = |y: f64, image: f64| image + (y - image) * next / here;
            y = (step(y.0, image.0), step(y.1, image.1));
        }
        self.image(y, levels(100))
    }

    /// What the perfect network of a sampler's family answers to `x = (x0 + σ ε) / √(1 + σ²)`,
    /// `[points, 2, 1, 1]`.
    fn model(&self, class: &str, x: Tensor<Flex, 4>, timestep: f64) -> Tensor<Flex, 4> {
        let sigma = self.level(class, timestep);
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

/// A sampler with options that suit points in the plane.
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

/// As many steps as the calls allow.
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

/// Sampling from start to end.
struct Run {
    /// All points at each model call, as the model sees them, and at the end.
    ways: Vec<Vec<Point>>,
    /// What can be said of it in a few words.
    note: String,
}

fn run(name: &str, world: &World) -> Result<Run> {
    let mut scheduler = scheduler(name, json!({}))?;
    let class = class(&*scheduler);
    set_steps(&mut *scheduler)?;
    let device = Default::default();
    let mut generator = Generator::new(7);
    let noise = randn_tensor::<Flex>(&mut generator, [POINTS, 2, 1, 1], DType::F32, &device)?;
    let upwards = class.contains("Inverse");
    let mut sample = match upwards {
        // These start from data: the moons' middles, blurred.
        true => {
            let middles = world.moons.iter().flatten().cycle().step_by(7).take(POINTS);
            let middles: Vec<f64> = middles.flat_map(|&(a, b)| [a, b]).collect();
            let middles = TensorData::new(middles, [POINTS, 2, 1, 1]);
            noise * BLUR + Tensor::from_data(middles, (&device, DType::F32))
        }
        false => noise * scheduler.init_noise_sigma(),
    };
    let mut untouched = generator.clone();
    let mut ways = Vec::new();
    for timestep in scheduler.timesteps().to_vec() {
        let input = scheduler.scale_model_input(sample.clone(), timestep)?;
        ways.push(points(&input));
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
    ways.push(points(&sample));
    let next = |generator: &mut Generator| generator.randn([1; 4], DType::F32);
    let kind = if next(&mut generator)? != next(&mut untouched)? {
        "with noise".into()
    } else if upwards {
        "upwards".into()
    } else {
        // The mean distance of the ends from where the ODE leads.
        let sigma = world.level(&class, scheduler.timesteps()[0]);
        let scale = (1.0 + sigma * sigma).sqrt();
        let distance = |(start, end): (&Point, &Point)| {
            let exact = world.end((start.0 * scale, start.1 * scale), sigma);
            (end.0 - exact.0).hypot(end.1 - exact.1)
        };
        let distances = ways[0].iter().zip(&ways[ways.len() - 1]).map(distance);
        format!("off by {:.3}", distances.sum::<f64>() / POINTS as f64)
    };
    let note = format!("{} calls, {kind}", ways.len() - 1);
    Ok(Run { ways, note })
}

const PANEL: (u32, u32) = (440, 420);
const COLUMNS: usize = 4;
const INK: RGBColor = RGBColor(31, 35, 40);
const FAINT: RGBColor = RGBColor(208, 215, 222);
/// The name of the panel that explains the others.
const LEGEND: &str = "";
const HUES: [RGBColor; WAYS] = [
    RGBColor(214, 39, 40),
    RGBColor(31, 119, 180),
    RGBColor(44, 160, 44),
    RGBColor(255, 127, 14),
];

/// One panel a sampler, its name above and a note below the name.
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
    // What SVG takes for granted makes half the file.
    for default in [
        r#" opacity="1""#,
        r#" stroke="none""#,
        r#" stroke-width="1""#,
    ] {
        svg = svg.replace(default, "");
    }
    // Marks that fall on each other are drawn once.
    let mut lines: Vec<&str> = svg.lines().collect();
    lines.dedup();
    std::fs::write(path, lines.join("\n") + "\n")?;
    Ok(())
}

fn sans(size: u32) -> FontDesc<'static> {
    ("sans-serif", size).into_font()
}

/// The moons in the background, the ways of a few points, and where all end.
fn draw_ways(area: &Area, name: &str, world: &World) -> Result<String> {
    let Run { ways, note } = run(name, world)?;
    let mut chart = ChartBuilder::on(area).build_cartesian_2d(-2.6..2.6, -2.3..2.3)?;
    for moon in &world.moons {
        chart.draw_series(LineSeries::new(moon.clone(), FAINT.stroke_width(34)))?;
    }
    for (which, hue) in HUES.iter().enumerate() {
        let way = ways.iter().map(|points| points[which]);
        chart.draw_series(LineSeries::new(way.clone(), hue.stroke_width(3)))?;
        // The corners of a jagged way need no marks.
        if !note.ends_with("noise") {
            chart.draw_series(way.map(|point| Circle::new(point, 4, hue.filled())))?;
        }
    }
    for (which, &end) in ways[ways.len() - 1].iter().enumerate() {
        let hue = HUES.get(which).unwrap_or(&INK);
        chart.draw_series([Circle::new(end, 6, hue.filled())])?;
    }
    Ok(note)
}

/// The noise levels of the model calls, as the sampler places them and by the curves that it takes.
fn draw_levels(area: &Area, name: &str, world: &World) -> Result<String> {
    let curves = [
        ("as the sampler has it", "", INK),
        ("use_karras_sigmas", "use_karras_sigmas", HUES[1]),
        ("use_exponential_sigmas", "use_exponential_sigmas", HUES[3]),
        ("use_beta_sigmas", "use_beta_sigmas", HUES[2]),
    ];
    if name == LEGEND {
        for (line, (text, _, hue)) in curves.iter().enumerate() {
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
        .y_label_formatter(&|level| level.to_string())
        .y_label_style(sans(22).color(&INK.mix(0.7)))
        .bold_line_style(FAINT)
        .light_line_style(TRANSPARENT)
        .axis_style(FAINT)
        .draw()?;
    let mut calls = 0;
    for (_, key, hue) in curves.into_iter().rev() {
        let options = match plain.config().get(key) {
            Some(_) => json!({ key: true }),
            None if key.is_empty() => json!({}),
            None => continue,
        };
        let mut scheduler = scheduler(name, options)?;
        set_steps(&mut *scheduler)?;
        let class = class(&*scheduler);
        let timesteps = scheduler.timesteps();
        calls = timesteps.len();
        let place = |call: usize| call as f64 / (calls - 1) as f64;
        let level = |(call, &t): (usize, &f64)| (place(call), world.level(&class, t));
        let levels: Vec<Point> = timesteps.iter().enumerate().map(level).collect();
        chart.draw_series(LineSeries::new(levels.clone(), hue.stroke_width(3)))?;
        chart.draw_series(levels.into_iter().map(|p| Circle::new(p, 5, hue.filled())))?;
    }
    Ok(format!("{calls} calls"))
}
