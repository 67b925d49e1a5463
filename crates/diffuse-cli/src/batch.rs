//! `diffuse batch`: an image of each line of a file. A run that was killed goes on where it was.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use burn::tensor::backend::Backend;
use clap::Args;
use diffuse_pipelines::{StableDiffusionOptions, StepEvent, replace_file};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::args::{BackendName, Size, StableDiffusion};
use crate::backend::{self, Job, with_backend};
use crate::generate::{self, Loaded};
use crate::output;
use crate::progress::Progress;
use crate::stable_diffusion::scheduler;

/// The table of results.
const TABLE: &str = "results.csv";

/// The options of `diffuse batch`.
#[derive(Debug, Args)]
pub struct Batch {
    #[command(flatten)]
    pub common: StableDiffusion,
    #[command(flatten)]
    size: Size,
    /// Folder of the images and of the table `results.csv`; made if it does not exist. Images that
    /// are there already are not made again
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
}

/// Says what the options that all commands with a prompt have mean for `batch`.
pub fn with_file(command: clap::Command) -> clap::Command {
    command.mut_subcommand("batch", |command| {
        let hidden = [
            "num_images",
            "output",
            "output_latents",
            "grid",
            "timings",
            "preview",
        ];
        let command = command
            .mut_arg("prompts", |arg| {
                arg.value_name("FILE").help(
                    "Prompts: a text file with one a line, or JSON lines (.jsonl) with `prompt` \
                     and, where they differ from the options, `id`, `negative_prompt`, `seed`, \
                     `steps`, `guidance_scale`, `scheduler`, `width` and `height`",
                )
            })
            .mut_arg("seed", |arg| {
                arg.help("Seed of the first line; the next has the next [default: 0]")
            });
        hidden.into_iter().fold(command, |command, name| {
            command.mut_arg(name, |arg| arg.hide(true))
        })
    })
}

/// A line of the file; what it leaves out, the options say.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Line {
    id: Option<String>,
    prompt: String,
    negative_prompt: Option<String>,
    seed: Option<u64>,
    steps: Option<usize>,
    guidance_scale: Option<f64>,
    scheduler: Option<String>,
    width: Option<usize>,
    height: Option<usize>,
}

/// A row of the table.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Row {
    id: String,
    file: String,
    prompt: String,
    negative_prompt: String,
    seed: u64,
    steps: usize,
    guidance_scale: f64,
    scheduler: String,
    width: Option<u32>,
    height: Option<u32>,
    seconds: f64,
    error: String,
    /// Of everything that makes the image.
    hash: String,
}

pub fn run(args: Box<Batch>) -> Result<()> {
    let [file] = &args.common.prompts[..] else {
        bail!("one file of prompts is expected, as in `diffuse batch prompts.txt --out images`");
    };
    let lines = read(Path::new(file))?;
    if args.common.run.seed.len() > 1 {
        bail!("one seed is expected: that of the first line");
    }
    if args.common.run.num_images != 1 || args.common.run.output_latents.is_some() {
        bail!("a batch has one image of each line, and no latents");
    }
    if args.common.negative_prompt.len() > 1 {
        bail!("one negative prompt is expected, for all lines");
    }
    fs::create_dir_all(&args.out)
        .with_context(|| format!("cannot make the folder `{}`", args.out.display()))?;
    let model = &args.common.model;
    let backend = backend::choose(model.backend, args.common.run.quiet);
    with_backend(backend, model.device, BatchJob { args, lines })
}

/// The lines of a file of prompts; empty ones are left out.
fn read(path: &Path) -> Result<Vec<Line>> {
    let text = fs::read_to_string(path);
    let text = text.with_context(|| format!("cannot read `{}`", path.display()))?;
    let is_json = path.extension().is_some_and(|extension| {
        extension.eq_ignore_ascii_case("jsonl") || extension.eq_ignore_ascii_case("ndjson")
    });
    let mut lines = Vec::new();
    let mut names = BTreeSet::new();
    for (number, text) in (1..).zip(text.lines().map(str::trim)) {
        if text.is_empty() {
            continue;
        }
        let place = || format!("line {number} of `{}`", path.display());
        let mut line = Line {
            prompt: text.to_string(),
            ..Line::default()
        };
        if is_json {
            line = serde_json::from_str(text).with_context(place)?;
            if line.prompt.is_empty() {
                bail!("{} has no `prompt`", place());
            }
        }
        let name = line.id.get_or_insert_with(|| format!("{:05}", lines.len()));
        let is_name = Path::new(&*name).file_name() == Some(name.as_ref());
        if !is_name || name.starts_with('.') {
            bail!("{}: the id `{name}` is not the name of a file", place());
        }
        if !names.insert(name.clone()) {
            bail!("{}: another line has the id `{name}`, too", place());
        }
        lines.push(line);
    }
    if lines.is_empty() {
        bail!("`{}` has no prompts", path.display());
    }
    Ok(lines)
}

struct BatchJob {
    args: Box<Batch>,
    lines: Vec<Line>,
}

impl Job for BatchJob {
    fn run<B: Backend>(self, backend: BackendName, device: B::Device) -> Result<()> {
        let Self { args, lines } = self;
        let mut common = args.common;
        // They are the file's name.
        common.prompts.clear();
        let mut loaded = generate::load::<B>(&common, backend, &device)?;
        let mut table = Table::open(args.out.join(TABLE), &lines)?;
        let first = common.run.seed.first().copied().unwrap_or(0);
        let config = loaded.pipeline.scheduler.config().clone();
        let (mut made, mut kept, mut failed) = (0, 0, 0);
        for (index, line) in lines.iter().enumerate() {
            let options = StableDiffusionOptions {
                prompt: vec![line.prompt.clone()],
                negative_prompt: match &line.negative_prompt {
                    Some(text) => vec![text.clone()],
                    None => loaded.options.negative_prompt.clone(),
                },
                num_inference_steps: line.steps.unwrap_or(loaded.options.num_inference_steps),
                guidance_scale: line.guidance_scale.unwrap_or(loaded.options.guidance_scale),
                width: line.width.or(args.size.width),
                height: line.height.or(args.size.height),
                seeds: vec![line.seed.unwrap_or(first.wrapping_add(index as u64))],
                ..loaded.options.clone()
            };
            let id = line.id.clone().expect("`read` has filled it in");
            let path = args.out.join(format!("{id}.png"));
            let name = line
                .scheduler
                .as_deref()
                .or(common.model.scheduler.as_deref());
            let mut record = generate::record("batch", &common, &options);
            loaded.describe(&mut record, backend);
            record.extend(own_record(&options, name));
            let hash = hash(&record);
            if table.has(&id, &hash) && path.is_file() {
                kept += 1;
                continue;
            }
            let progress = Progress::new(common.run.quiet).image(index + 1, lines.len());
            let start = Instant::now();
            let scheduler = scheduler::<B>(&config, name, &common.model);
            let result = scheduler.and_then(|scheduler| {
                loaded.pipeline.scheduler = scheduler;
                paint(&loaded, &common, &options, &progress, record, &path)
            });
            progress.finish();
            let (size, error) = match result {
                Ok(size) => (size.map(Some), String::new()),
                Err(error) => ([None; 2], format!("{error:#}")),
            };
            if error.is_empty() {
                made += 1;
                if !common.run.quiet {
                    output::say(path.display());
                }
            } else {
                failed += 1;
                output::complain(format_args!("warning: {id}: {error}"));
            }
            table.add(Row {
                id,
                file: path
                    .file_name()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into(),
                prompt: line.prompt.clone(),
                negative_prompt: options.negative_prompt.concat(),
                seed: options.seeds[0],
                steps: options.num_inference_steps,
                guidance_scale: options.guidance_scale,
                scheduler: match loaded.pipeline.scheduler.config().class_name() {
                    Some(class) if error.is_empty() => class.to_string(),
                    _ => String::new(),
                },
                width: size[0],
                height: size[1],
                seconds: start.elapsed().as_secs_f64(),
                error,
                hash,
            })?;
        }
        if !common.run.quiet {
            output::say(format_args!(
                "{made} made, {kept} there already, {failed} failed"
            ));
        }
        match failed {
            0 => Ok(()),
            _ => bail!(
                "{failed} of {} prompts failed: `{}` says why",
                lines.len(),
                args.out.join(TABLE).display()
            ),
        }
    }
}

/// What a line may change.
fn own_record(options: &StableDiffusionOptions, scheduler: Option<&str>) -> Map<String, Value> {
    let record = json!({
        "prompt": options.prompt,
        "negative_prompt": options.negative_prompt,
        "seed": options.seeds,
        "width": options.width,
        "height": options.height,
        "scheduler": scheduler,
    });
    match record {
        Value::Object(record) => record,
        _ => unreachable!("the record is an object"),
    }
}

fn hash(record: &Map<String, Value>) -> String {
    let text = serde_json::to_string(record).expect("a record can be written");
    let digest = Sha256::digest(text.as_bytes());
    digest[..8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Makes the image of a line. Returns its width and height.
fn paint<B: Backend>(
    loaded: &Loaded<B>,
    common: &StableDiffusion,
    options: &StableDiffusionOptions,
    progress: &Progress,
    mut record: Map<String, Value>,
    path: &Path,
) -> Result<[u32; 2]> {
    let on_step = |event: StepEvent<'_, B>| progress.update(&event);
    let inputs = loaded.inputs(&common.control);
    let generated = loaded.pipeline.generate_with(options, inputs, on_step)?;
    output::record_scheduler(&mut record, loaded.pipeline.scheduler.config());
    let flagged = generated.nsfw_content_detected.map(|flags| flags[0]);
    record.insert("nsfw_content_detected".into(), flagged.into());
    let image = &generated.images[0];
    output::write_png(path, image, &record.into())?;
    Ok([image.width(), image.height()])
}

/// The table of results, a row for each line that is done. Rows are appended; a row that was cut
/// off counts as not there.
struct Table {
    file: fs::File,
    path: PathBuf,
    rows: BTreeMap<String, Row>,
}

impl Table {
    /// Opens or makes the table, with the rows of `lines` only.
    fn open(path: PathBuf, lines: &[Line]) -> Result<Self> {
        let known: BTreeSet<&str> = lines.iter().filter_map(|line| line.id.as_deref()).collect();
        let text = fs::read_to_string(&path).unwrap_or_default();
        let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
        let mut reader = csv::Reader::from_reader(whole.as_bytes());
        let rows = reader.deserialize::<Row>().flatten();
        let rows = rows.filter(|row| known.contains(&*row.id) && row.error.is_empty());
        let rows: BTreeMap<String, Row> = rows.map(|row| (row.id.clone(), row)).collect();
        let cannot = || format!("cannot write `{}`", path.display());
        replace_file(&path, |temporary| {
            let mut writer = csv::Writer::from_path(temporary)?;
            // Without rows, the header is written by the first one.
            for row in rows.values() {
                writer.serialize(row)?;
            }
            writer.flush()
        })
        .with_context(cannot)?;
        let file = fs::OpenOptions::new().append(true).open(&path);
        let file = file.with_context(cannot)?;
        Ok(Self { file, path, rows })
    }

    fn has(&self, id: &str, hash: &str) -> bool {
        self.rows.get(id).is_some_and(|row| row.hash == hash)
    }

    /// Appends a row at once, so that nothing is lost if the program is killed.
    fn add(&mut self, row: Row) -> Result<()> {
        let is_first = self
            .file
            .metadata()
            .is_ok_and(|metadata| metadata.len() == 0);
        let mut writer = csv::WriterBuilder::new()
            .has_headers(is_first)
            .from_writer(Vec::new());
        writer.serialize(&row)?;
        let bytes = writer.into_inner().map_err(|error| error.into_error())?;
        let written = self.file.write_all(&bytes).and_then(|()| self.file.flush());
        written.with_context(|| format!("cannot write `{}`", self.path.display()))?;
        self.rows.insert(row.id.clone(), row);
        Ok(())
    }
}
