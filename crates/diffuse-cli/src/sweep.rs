//! `diffuse sweep`: every combination of some options, side by side on a contact sheet.

use std::collections::BTreeSet;

use anyhow::{Result, bail};
use burn::tensor::backend::Backend;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, ValueEnum};
use diffuse_pipelines::clip::PromptChunks;
use diffuse_pipelines::schedulers::{Scheduler, TimestepRequest, scheduler_names};
use diffuse_pipelines::{
    PromptSyntax, StableDiffusionInputs, StableDiffusionOptions, StableDiffusionPipeline,
    StepEvent, random_seed,
};
use image::RgbImage;
use serde_json::{Map, Value, json};

use crate::args::{BackendName, Size, StableDiffusion};
use crate::backend::{self, Job, with_backend};
use crate::generate;
use crate::grid::Sheet;
use crate::output;
use crate::preview;
use crate::progress::Progress;
use crate::stable_diffusion::scheduler;

/// The most images of a sweep.
const MAX_IMAGES: usize = 1024;
/// Where the sheet goes by default.
const SHEET: &str = "sheet.png";

/// The options of `diffuse sweep`.
#[derive(Debug, Args)]
pub struct Sweep {
    #[command(flatten)]
    common: StableDiffusion,
    #[command(flatten)]
    size: Size,
    /// The axis of the columns; combinations of the others are rows [default: the last of prompt,
    /// scheduler, steps, guidance-scale and seed with several values]
    #[arg(long, value_enum, value_name = "AXIS")]
    columns: Option<Axis>,
    #[arg(skip)]
    schedulers: Vec<String>,
    #[arg(skip)]
    steps: Vec<usize>,
    #[arg(skip)]
    guidance_scales: Vec<f64>,
    /// Whether the single images are written, too.
    #[arg(skip)]
    single_images: bool,
}

/// An option with several values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Axis {
    Prompt,
    Scheduler,
    Steps,
    GuidanceScale,
    Seed,
}

/// All axes; the last one varies fastest.
const AXES: [Axis; 5] = [
    Axis::Prompt,
    Axis::Scheduler,
    Axis::Steps,
    Axis::GuidanceScale,
    Axis::Seed,
];

impl Axis {
    fn name(self) -> String {
        let value = self.to_possible_value().expect("no axis is hidden");
        value.get_name().replace('-', "_")
    }
}

/// Makes the options of the command `sweep` that are axes take several values, and says what the
/// others mean there.
pub fn with_axes(command: clap::Command) -> clap::Command {
    let axis = |arg: Arg| {
        let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        arg.help(format!("Axis: {}{}", help[..1].to_lowercase(), &help[1..]))
    };
    let several = |name: &'static str| {
        move |arg: Arg| {
            let arg = arg.action(ArgAction::Append).value_delimiter(',');
            axis(arg).value_name(name)
        }
    };
    command.mut_subcommand("sweep", |command| {
        command
            .mut_arg("scheduler", several("NAME[,NAME...]"))
            .mut_arg("steps", several("N[,N...]"))
            .mut_arg("guidance_scale", several("G[,G...]"))
            .mut_arg("prompts", |arg| arg.help("Axis: texts of the images"))
            .mut_arg("seed", |arg| {
                arg.help("Axis: seeds; -1 is 2^64-1, as in torch [default: one at random]")
            })
            .mut_arg("grid", |arg| {
                arg.help(format!("The contact sheet [default: {SHEET}]"))
            })
            .mut_arg("output", |arg| {
                arg.hide_default_value(true)
                    .help("Write the single images, too: with `-0`, `-1`, ... before the extension")
            })
            .mut_arg("num_images", |arg| arg.hide(true))
            .mut_arg("output_latents", |arg| arg.hide(true))
    })
}

impl Sweep {
    /// Reads the axes, and what all commands with a prompt read.
    pub fn take(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        fn values<T: Clone + Send + Sync + 'static>(matches: &ArgMatches, name: &str) -> Vec<T> {
            let values = matches.get_many(name);
            values.into_iter().flatten().cloned().collect()
        }
        self.common.take(matches)?;
        self.schedulers = values(matches, "scheduler");
        self.steps = values(matches, "steps");
        self.guidance_scales = values(matches, "guidance_scale");
        self.single_images = matches.value_source("output") == Some(ValueSource::CommandLine);
        Ok(())
    }
}

pub fn run(mut args: Box<Sweep>) -> Result<()> {
    let common = &mut args.common;
    if common.prompts.is_empty() {
        bail!(
            "no prompt is given; one is, for example, in `diffuse sweep \"a boat at sunset\" \
             --seed 0,1,2 --scheduler euler,ddim`"
        );
    }
    let is_value = |prompt: &&String| {
        let mut names = scheduler_names();
        prompt.trim().parse::<f64>().is_ok()
            || names.any(|(short, class)| **prompt == short || **prompt == class)
    };
    if let Some(value) = common.prompts.iter().find(is_value) {
        bail!(
            "the prompt `{value}` looks like a value of an option: several values are separated by \
             commas, as in `--seed 0,1,2`"
        );
    }
    if common.run.num_images != 1 {
        bail!("a sweep has one image of each combination: give several seeds to `--seed`");
    }
    if common.run.output_latents.is_some() {
        bail!("a sweep writes no latents");
    }
    let negative = common.negative_prompt.len();
    if negative > 1 && negative != common.prompts.len() {
        bail!(
            "{negative} negative prompts for {} prompts: give one for all, or one for each",
            common.prompts.len()
        );
    }
    if common.run.seed.is_empty() {
        common.run.seed.push(random_seed());
    }
    let sheet = common.run.grid.get_or_insert_with(|| SHEET.into());
    let mut paths = vec![sheet.clone()];
    let count = args.combinations();
    if count > MAX_IMAGES {
        bail!("a sweep of {count} images is too large: at most {MAX_IMAGES}");
    }
    if args.single_images {
        paths.extend(output::image_paths(&args.common.run.output, count));
    }
    output::check_images(&paths)?;
    preview::check(&args.common, 1)?;
    let model = &args.common.model;
    let backend = backend::choose(model.backend, args.common.run.quiet);
    with_backend(backend, model.device, SweepJob(args))
}

impl Sweep {
    /// Number of values of each axis.
    fn lengths(&self) -> [usize; 5] {
        let run = &self.common.run;
        [
            self.common.prompts.len(),
            self.schedulers.len().max(1),
            self.steps.len().max(1),
            self.guidance_scales.len().max(1),
            run.seed.len(),
        ]
    }

    fn combinations(&self) -> usize {
        self.lengths().into_iter().fold(1, usize::saturating_mul)
    }

    /// The place of the axis of the columns in [`AXES`].
    fn columns(&self) -> usize {
        let lengths = self.lengths();
        let chosen = self
            .columns
            .and_then(|axis| AXES.iter().position(|it| *it == axis));
        chosen.unwrap_or_else(|| lengths.iter().rposition(|length| *length > 1).unwrap_or(4))
    }

    /// The places of the axes of the rows.
    fn rows(&self) -> Vec<usize> {
        let mut rows = self.varied(&[0, 1, 2, 3, 4]);
        rows.retain(|axis| *axis != self.columns());
        rows
    }

    /// Those of some axes that have several values.
    fn varied(&self, axes: &[usize]) -> Vec<usize> {
        let lengths = self.lengths();
        let axes = axes.iter().copied();
        axes.filter(|axis| lengths[*axis] > 1).collect()
    }

    /// The combinations row by row: the index of the value on each axis.
    fn cells(&self) -> Vec<[usize; 5]> {
        let lengths = self.lengths();
        let mut cells = vec![[0; 5]];
        for axis in self.rows().into_iter().chain([self.columns()]) {
            let values = |cell: [usize; 5]| {
                (0..lengths[axis]).map(move |value| {
                    let mut cell = cell;
                    cell[axis] = value;
                    cell
                })
            };
            cells = cells.into_iter().flat_map(values).collect();
        }
        cells
    }
}

struct SweepJob(Box<Sweep>);

impl Job for SweepJob {
    fn run<B: Backend>(self, backend: BackendName, device: B::Device) -> Result<()> {
        let args = *self.0;
        let mut loaded = generate::load::<B>(&args.common, backend, &device)?;
        let mut record = generate::record("txt2img", &args.common, &loaded.options);
        loaded.describe(&mut record, backend);
        record.insert("width".into(), args.size.width.into());
        record.insert("height".into(), args.size.height.into());
        let config = loaded.pipeline.scheduler.config().clone();
        let build = |name| scheduler::<B>(&config, name, &args.common.model);
        let schedulers: Vec<Box<dyn Scheduler<B>>> = match &args.schedulers[..] {
            [] => vec![build(None)?],
            names => names
                .iter()
                .map(|name| build(Some(name)))
                .collect::<Result<_>>()?,
        };
        let values = Values::new(&args, &loaded.options, &schedulers);
        let cells = args.cells();
        for cell in &cells {
            let inputs = loaded.inputs(&args.common.control);
            let scheduler = &*schedulers[cell[1]];
            let checked = check(&loaded.pipeline, scheduler, &values.options(cell), &inputs);
            if let Err(error) = checked {
                let which = values.labels(&args.varied(&[0, 1, 2, 3]), cell);
                return Err(match which.is_empty() {
                    true => error,
                    false => error.context(which.join(", ")),
                });
            }
        }

        let run = &args.common.run;
        output::announce(run);
        for scheduler in &schedulers {
            output::warn_of_ignored(scheduler.config());
        }
        let paths = output::image_paths(&run.output, cells.len());
        let mut images = Vec::new();
        let mut flags = Vec::new();
        let mut truncated = BTreeSet::new();
        for (index, cell) in cells.iter().enumerate() {
            loaded.pipeline.scheduler = schedulers[cell[1]].fresh()?;
            let progress = Progress::new(run.quiet).image(index + 1, cells.len());
            let on_step = |event: StepEvent<'_, B>| {
                if let Some(preview) = &loaded.preview {
                    preview.update(&event, &progress);
                }
                progress.update(&event)
            };
            let (pipeline, inputs) = (&loaded.pipeline, loaded.inputs(&args.common.control));
            let generated = pipeline.generate_with(&values.options(cell), inputs, on_step);
            progress.finish();
            let generated = generated?;
            truncated.extend(generated.truncated);
            let flag = generated.nsfw_content_detected.map(|flags| flags[0]);
            flags.extend(flag);
            images.extend(generated.images);
            if args.single_images {
                let mut record = record.clone();
                record.extend(values.record(cell));
                record.insert("nsfw_content_detected".into(), flag.into());
                output::write_png(&paths[index], &images[index], &record.into())?;
                if !run.quiet {
                    output::say(paths[index].display());
                }
            }
        }
        output::warn_of_truncated(&truncated);
        let names = (0..cells.len()).map(|index| match args.single_images {
            true => format!("`{}`", paths[index].display()),
            false => format!("image {}", index + 1),
        });
        output::warn_of_flagged(&flags, names);

        record.extend(values.record_of_sheet());
        if !flags.is_empty() {
            record.insert("nsfw_content_detected".into(), flags.into());
        }
        let sheet = values.sheet(&cells, &images).draw();
        let path = run.grid.as_ref().expect("`run` has filled it in");
        output::write_png(path, &sheet, &record.into())?;
        if !run.quiet {
            output::show(&sheet);
            output::say(path.display());
        }
        Ok(())
    }
}

/// Checks a combination before anything is computed.
fn check<B: Backend>(
    pipeline: &StableDiffusionPipeline<B>,
    scheduler: &dyn Scheduler<B>,
    options: &StableDiffusionOptions,
    inputs: &StableDiffusionInputs<'_, B>,
) -> Result<()> {
    pipeline.check_inputs(options, inputs)?;
    if options.prompt_syntax == PromptSyntax::A1111 {
        PromptChunks::new(&pipeline.tokenizer, &options.prompt[0])?;
    }
    let request = match (&options.timesteps, &options.sigmas) {
        (Some(timesteps), _) => TimestepRequest::Timesteps(timesteps.clone()),
        (None, Some(sigmas)) => TimestepRequest::Sigmas(sigmas.clone()),
        (None, None) => TimestepRequest::Steps(options.num_inference_steps),
    };
    Ok(scheduler.fresh()?.set_timesteps(&request)?)
}

/// The values of all axes.
struct Values<'a> {
    args: &'a Sweep,
    options: &'a StableDiffusionOptions,
    /// Class and options of each scheduler.
    schedulers: Vec<(String, Value)>,
    steps: Vec<usize>,
    guidance_scales: Vec<f64>,
}

impl<'a> Values<'a> {
    fn new<B: Backend>(
        args: &'a Sweep,
        options: &'a StableDiffusionOptions,
        schedulers: &[Box<dyn Scheduler<B>>],
    ) -> Self {
        let schedulers = schedulers.iter().map(|scheduler| {
            let config = scheduler.config();
            let class = config.class_name().unwrap_or_default().to_string();
            (class, config.values().clone().into())
        });
        // Without values of its own an axis has that of the options.
        Self {
            args,
            options,
            schedulers: schedulers.collect(),
            steps: match &args.steps[..] {
                [] => vec![options.num_inference_steps],
                steps => steps.to_vec(),
            },
            guidance_scales: match &args.guidance_scales[..] {
                [] => vec![options.guidance_scale],
                scales => scales.to_vec(),
            },
        }
    }

    /// The options of the run that makes an image.
    fn options(&self, cell: &[usize; 5]) -> StableDiffusionOptions {
        let [prompt, _, steps, guidance, seed] = *cell;
        let size = &self.args.size;
        let negative = &self.options.negative_prompt;
        StableDiffusionOptions {
            prompt: vec![self.options.prompt[prompt].clone()],
            negative_prompt: match negative.len() {
                0 | 1 => negative.clone(),
                _ => vec![negative[prompt].clone()],
            },
            width: size.width,
            height: size.height,
            num_inference_steps: self.steps[steps],
            guidance_scale: self.guidance_scales[guidance],
            seeds: vec![self.args.common.run.seed[seed]],
            ..self.options.clone()
        }
    }

    /// The labels of the values on some axes.
    fn labels(&self, axes: &[usize], cell: &[usize; 5]) -> Vec<String> {
        let common = &self.args.common;
        let label = |axis: &usize| {
            let value = cell[*axis];
            match AXES[*axis] {
                Axis::Prompt => common.prompts[value].clone(),
                Axis::Scheduler => match self.args.schedulers.get(value) {
                    Some(name) => name.clone(),
                    None => self.schedulers[value].0.clone(),
                },
                Axis::Steps => match (&common.timesteps, &common.sigmas) {
                    (None, None) => match self.steps[value] {
                        1 => "1 step".to_string(),
                        steps => format!("{steps} steps"),
                    },
                    (Some(timesteps), _) => format!("{} timesteps", timesteps.len()),
                    (None, Some(sigmas)) => format!("{} sigmas", sigmas.len()),
                },
                Axis::GuidanceScale => format!("guidance {}", self.guidance_scales[value]),
                Axis::Seed => format!("seed {}", common.run.seed[value]),
            }
        };
        axes.iter().map(label).collect()
    }

    /// What a record says of one image.
    fn record(&self, cell: &[usize; 5]) -> Map<String, Value> {
        let options = self.options(cell);
        let (class, config) = &self.schedulers[cell[1]];
        let mut record = object(json!({
            "prompt": [self.args.common.prompts[cell[0]]],
            "negative_prompt": options.negative_prompt,
            "scheduler": class,
            "scheduler_config": config,
            "guidance_scale": options.guidance_scale,
            "seed": options.seeds,
            "image": 0,
        }));
        if options.timesteps.is_none() && options.sigmas.is_none() {
            record.insert("steps".into(), options.num_inference_steps.into());
        }
        record
    }

    /// What the record of the sheet says: all values of each axis.
    fn record_of_sheet(&self) -> Map<String, Value> {
        let (classes, configs): (Vec<_>, Vec<_>) = self.schedulers.iter().cloned().unzip();
        let rows = self.args.rows().into_iter().map(|axis| AXES[axis].name());
        let mut record = object(json!({
            "command": "sweep",
            "scheduler": classes,
            "scheduler_config": configs,
            "guidance_scale": self.guidance_scales,
            "columns": AXES[self.args.columns()].name(),
            "rows": rows.collect::<Vec<_>>(),
        }));
        let common = &self.args.common;
        if common.timesteps.is_none() && common.sigmas.is_none() {
            record.insert("steps".into(), self.steps.clone().into());
        }
        record
    }

    /// The sheet of all images.
    fn sheet<'b>(&self, cells: &[[usize; 5]], images: &'b [RgbImage]) -> Sheet<'b> {
        let (columns, rows) = (self.args.columns(), self.args.rows());
        let count = self.args.lengths()[columns];
        let single: Vec<usize> = (0..AXES.len())
            .filter(|axis| *axis != columns && !rows.contains(axis))
            .collect();
        let mut title = self.labels(&single, &cells[0]);
        // A prompt is a paragraph of its own.
        let prompt = single.contains(&0).then(|| title.remove(0));
        if let [negative] = &self.options.negative_prompt[..] {
            title.push(format!("without {negative}"));
        }
        let row = |cells: &[[usize; 5]]| self.labels(&rows, &cells[0]).join("\n");
        let labels = cells[..count].iter();
        Sheet {
            title: prompt.into_iter().chain([title.join(", ")]).collect(),
            columns: labels
                .map(|cell| self.labels(&[columns], cell).remove(0))
                .collect(),
            rows: match rows.is_empty() {
                true => Vec::new(),
                false => cells.chunks(count).map(row).collect(),
            },
            images,
        }
    }
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(object) => object,
        _ => unreachable!("a record is an object"),
    }
}
