//! What can be typed.

use std::ffi::OsString;
use std::fmt;
#[cfg(feature = "serve")]
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use diffuse_pipelines::schedulers::Overrides;
use diffuse_pipelines::unet::FreeU;
use diffuse_pipelines::{
    PipelineKind, PromptSyntax, StableDiffusionImg2ImgOptions, StableDiffusionInpaintOptions,
    StableDiffusionOptions,
};
use serde_json::Value;

use crate::batch::{Batch, with_file};
use crate::builtin::builtin;
use crate::control::Controls;
use crate::sweep::{Sweep, with_axes};

/// Images from diffusion models.
#[derive(Debug, Parser)]
#[command(
    name = "diffuse",
    version,
    arg_required_else_help = true,
    override_usage = "diffuse PROMPT [OPTIONS]\n       diffuse COMMAND [OPTIONS]",
    after_help = FIRST_IMAGE,
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

/// Where a person begins.
const FIRST_IMAGE: &str = "\
A first image, without a download:
  diffuse \"a small red house on snow at night\"

The small model that is built in knows skies (day, sunset, night), grounds (meadow, sand, snow, sea),
houses, trees, boats, mountains, the sun and the moon. For anything else, name a Stable Diffusion v1
checkpoint:
  diffuse \"a lighthouse in a storm\" --model CompVis/stable-diffusion-v1-4

`diffuse txt2img --help` explains the options.";

impl Cli {
    /// Reads the program's arguments. What begins with neither a command nor `--help` or
    /// `--version` is for `txt2img`.
    pub fn read(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let mut arguments: Vec<OsString> = arguments.into_iter().collect();
        let command = with_file(with_axes(Self::command()));
        if let Some(first) = arguments.get(1) {
            let mut names: Vec<&str> = command.get_subcommands().map(|it| it.get_name()).collect();
            names.extend(["help", "-h", "--help", "-V", "--version"]);
            let first = first.to_string_lossy();
            if !names.contains(&&*first) {
                let meant = names.iter().find(|name| strsim::jaro(name, &first) > 0.8);
                if let Some(meant) = meant.filter(|meant| !meant.starts_with('-')) {
                    let message = format!(
                        "there is no command `{first}`: for the command, `diffuse {meant}`; for an \
                         image of it, `diffuse txt2img {first}`\n"
                    );
                    return Err(clap::Error::raw(ErrorKind::InvalidSubcommand, message));
                }
                arguments.insert(1, "txt2img".into());
            }
        }
        let arguments = join_dashed_values(&command, arguments);
        let matches = command.try_get_matches_from(arguments)?;
        let mut cli = Self::from_arg_matches(&matches)?;
        let Some((_, matches)) = matches.subcommand() else {
            return Ok(cli);
        };
        match &mut cli.command {
            Command::Txt2img(args) => args.common.take(matches)?,
            Command::Img2img(args) => args.common.take(matches)?,
            Command::Inpaint(args) => args.common.take(matches)?,
            #[cfg(feature = "serve")]
            Command::Serve(args) => args.served.take(matches)?,
            #[cfg(feature = "fleet")]
            Command::Worker(args) => args.served.take(matches)?,
            Command::Sweep(args) => args.take(matches)?,
            Command::Batch(args) => args.common.take(matches)?,
            Command::Ddpm(args) => {
                if let Some(text) = args.model.take_options(matches)?.first() {
                    return Err(no_option(text));
                }
            }
            _ => {}
        }
        Ok(cli)
    }
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make images of one or several texts
    Txt2img(Box<Txt2img>),
    /// Make variants of an image
    Img2img(Box<Img2img>),
    /// Repaint a part of an image
    Inpaint(Box<Inpaint>),
    /// Compare prompts, schedulers, steps, guidance and seeds on a contact sheet
    ///
    /// An option that is an axis takes several values, separated by commas; prompts are several
    /// arguments. The sheet has an image of each combination, with the values as labels:
    ///
    /// diffuse sweep "a boat at sunset" --seed 0,1,2 --scheduler euler,unipc,ddim
    Sweep(Box<Sweep>),
    /// Make an image of each prompt of a file, and go on where a run has ended
    Batch(Box<Batch>),
    /// Make images without a text
    Ddpm(Box<Ddpm>),
    /// Describe a checkpoint: components, parameters, types, what is not supported
    Inspect(Inspect),
    /// Fetch a checkpoint from the hub, without making an image
    #[cfg(feature = "hub")]
    Fetch(Fetch),
    /// Rewrite a checkpoint as safetensors with today's keys, one file a model
    Convert(Convert),
    /// Answer requests over HTTP: OpenAI's images API, AUTOMATIC1111's, and a page
    #[cfg(feature = "serve")]
    Serve(Box<Serve>),
    /// Answer the requests of a queue, which `diffuse serve --queue` fills
    #[cfg(feature = "fleet")]
    Worker(Box<Worker>),
    /// List the devices that this build can use
    Devices,
    /// List the schedulers and every name they go by
    Schedulers,
}

/// The options of all commands that take a prompt.
#[derive(Debug, Args)]
pub struct StableDiffusion {
    /// Text of the image; several texts make a batch
    #[arg(value_name = "PROMPT")]
    pub prompts: Vec<String>,
    #[command(flatten)]
    pub model: Model,
    #[command(flatten)]
    pub weights: StableDiffusionWeights,
    /// What not to show: one for all prompts, or one for each
    #[arg(long, value_name = "TEXT", num_args = 1..)]
    pub negative_prompt: Vec<String>,
    /// How prompts are read: as Diffusers or as AUTOMATIC1111's web UI reads them
    #[arg(long, value_enum, default_value_t = PromptSyntaxName::Plain)]
    pub prompt_syntax: PromptSyntaxName,
    #[arg(
        long,
        value_name = "N",
        value_parser = parse_count,
        conflicts_with_all = ["timesteps", "sigmas"],
        help = format!(
            "Number of steps [default: {}, of the built-in model {}]",
            txt2img_defaults().num_inference_steps,
            builtin(PipelineKind::StableDiffusion).num_inference_steps,
        )
    )]
    pub steps: Option<usize>,
    /// Timesteps, in descending order
    #[arg(
        long,
        value_name = "A,B,...",
        value_delimiter = ',',
        value_parser = parse_number,
        conflicts_with = "sigmas"
    )]
    pub timesteps: Option<Vec<f64>>,
    /// Sigmas, in descending order
    #[arg(long, value_name = "A,B,...", value_delimiter = ',', value_parser = parse_number)]
    pub sigmas: Option<Vec<f64>>,
    #[arg(
        long,
        value_name = "G",
        value_parser = parse_number,
        help = format!(
            "How closely to follow the prompt; 1 and less is no guidance [default: {}, of the \
             built-in model {}]",
            txt2img_defaults().guidance_scale,
            builtin(PipelineKind::StableDiffusion).guidance_scale,
        )
    )]
    pub guidance_scale: Option<f64>,
    /// How much of the contrast that guidance adds to remove, 0 to 1
    #[arg(long, value_name = "R", default_value_t = 0.0, value_parser = parse_number)]
    pub guidance_rescale: f64,
    /// How many of the text encoder's last layers to leave out
    #[arg(long, value_name = "K", value_parser = parse_count)]
    pub clip_skip: Option<usize>,
    /// How much noise each step adds, 0 to 1, for schedulers that take it
    #[arg(long, value_name = "E", default_value_t = 0.0, value_parser = parse_number)]
    pub eta: f64,
    /// FreeU, another balance of backbone and skip connections: 0.9,0.2,1.5,1.6 for Stable
    /// Diffusion v1
    #[arg(long, value_name = "S1,S2,B1,B2", value_parser = parse_freeu)]
    pub freeu: Option<FreeU>,
    /// DeepCache: compute the inner blocks of the UNet in every Nth step only; BRANCH is the skip
    /// connection that is the last to be computed in each step, the larger, the slower and the more
    /// exact [default: 0]
    #[arg(long, value_name = "N[:BRANCH]", value_parser = parse_deep_cache)]
    pub deep_cache: Option<DeepCacheArgument>,
    /// Encode and decode images that are larger than those the VAE was trained on in overlapping
    /// tiles of that size, with less memory; colors and contrast change a little. Images of a batch
    /// are always encoded and decoded one after the other
    #[arg(long, value_enum, default_value_t = Switch::Off)]
    pub vae_tiling: Switch,
    /// Show what the result will look like, as is predicted after each step: `terminal`, or a file
    /// (.png) that each step replaces
    #[arg(
        long,
        value_name = "terminal|FILE",
        value_parser = OsStringValueParser::new().map(PreviewTarget::from),
    )]
    pub preview: Option<PreviewTarget>,
    /// VAE for previews, such as TAESD [default: a linear map to colors]
    #[arg(long, value_name = "FOLDER|FILE", requires = "preview")]
    pub preview_vae: Option<PathBuf>,
    #[command(flatten)]
    pub run: Run,
    #[command(flatten)]
    pub control: Controls,
}

/// A value of `--preview`.
#[derive(Debug, Clone, PartialEq)]
pub enum PreviewTarget {
    Terminal,
    File(PathBuf),
}

impl From<OsString> for PreviewTarget {
    fn from(text: OsString) -> Self {
        if text == "terminal" {
            Self::Terminal
        } else {
            Self::File(text.into())
        }
    }
}

/// A value of `--deep-cache`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeepCacheArgument {
    pub interval: usize,
    pub branch: usize,
}

/// Whether something is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    On,
    Off,
}

#[derive(Debug, Args)]
pub struct Txt2img {
    #[command(flatten)]
    pub common: StableDiffusion,
    #[command(flatten)]
    pub size: Size,
    /// Start from these latents (safetensors with a tensor `latents`) in place of drawn noise
    #[arg(long, value_name = "FILE")]
    pub init_latents: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct Img2img {
    #[command(flatten)]
    pub common: StableDiffusion,
    /// The image to start from (PNG, JPEG, WebP); `-` reads it from standard input. Its sides are
    /// rounded down to multiples of 8
    #[arg(long, value_name = "FILE")]
    pub image: PathBuf,
    #[arg(
        long,
        value_name = "S",
        value_parser = parse_number,
        default_value_t = StableDiffusionImg2ImgOptions::default().strength,
        help = "How much to change the image, 0 to 1: the part of the steps that are taken"
    )]
    pub strength: f64,
}

#[derive(Debug, Args)]
pub struct Inpaint {
    #[command(flatten)]
    pub common: StableDiffusion,
    #[command(flatten)]
    pub size: Size,
    /// The image to repaint (PNG, JPEG, WebP); `-` reads it from standard input. It is resized to
    /// width and height
    #[arg(long, value_name = "FILE")]
    pub image: PathBuf,
    /// White where the image is repainted, black where it is kept
    #[arg(long, value_name = "FILE", required_unless_present = "mask_box")]
    pub mask: Option<PathBuf>,
    /// In place of a mask: a rectangle of the image to repaint, in pixels
    #[arg(
        long,
        value_name = "LEFT,TOP,WIDTH,HEIGHT",
        value_parser = parse_box,
        conflicts_with = "mask"
    )]
    pub mask_box: Option<[u32; 4]>,
    #[arg(
        long,
        value_name = "S",
        value_parser = parse_number,
        default_value_t = StableDiffusionInpaintOptions::default().strength,
        help = "How much to change the white part, 0 to 1: the part of the steps that are taken"
    )]
    pub strength: f64,
    /// Run on the part of the image around the white part of the mask, with a margin of P pixels,
    /// and put the result into the whole image
    #[arg(long, value_name = "P")]
    pub padding_mask_crop: Option<u32>,
    /// Put the pixels of the image back where the mask is black; without it, these change a little
    #[arg(long)]
    pub keep_unmasked: bool,
    /// Start from these latents (safetensors with a tensor `latents`) in place of drawn noise
    #[arg(long, value_name = "FILE")]
    pub init_latents: Option<PathBuf>,
}

/// The size of images.
#[derive(Debug, Args)]
pub struct Size {
    /// Width in pixels, a multiple of 8 [default: what the model was made for]
    #[arg(long, value_name = "W", value_parser = parse_count)]
    pub width: Option<usize>,
    /// Height in pixels, a multiple of 8 [default: what the model was made for]
    #[arg(long, value_name = "H", value_parser = parse_count)]
    pub height: Option<usize>,
}

#[derive(Debug, Args)]
pub struct Ddpm {
    #[command(flatten)]
    pub model: Model,
    #[arg(
        long,
        value_name = "N",
        value_parser = parse_count,
        help = format!(
            "Number of steps [default: {DDPM_STEPS} with DDPM, of the built-in model {}; else \
             {OTHER_STEPS}]",
            builtin(PipelineKind::Unconditional).num_inference_steps,
        )
    )]
    pub steps: Option<usize>,
    /// How much noise each step of DDIM adds, 0 to 1
    #[arg(long, value_name = "E", default_value_t = 0.0, value_parser = parse_number)]
    pub eta: f64,
    /// Compute the noise again from the clipped image in each step of DDIM
    #[arg(long)]
    pub use_clipped_model_output: bool,
    #[command(flatten)]
    pub run: Run,
}

/// A model that is served.
#[cfg(feature = "serve")]
#[derive(Debug, Args)]
pub struct Served {
    #[command(flatten)]
    pub model: Model,
    #[command(flatten)]
    pub weights: StableDiffusionWeights,
    /// What clients and queues call the model [default: as it is given]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Pixels of the largest image [default: 1048576]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub max_pixels: Option<usize>,
    /// Steps of the longest run [default: 150]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub max_steps: Option<usize>,
    /// Images of the largest run [default: 10]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub max_images: Option<usize>,
    /// VAE for previews, such as TAESD [default: a linear map to colors]
    #[arg(long, value_name = "FOLDER|FILE")]
    pub preview_vae: Option<PathBuf>,
    /// Print nothing but warnings and errors
    #[arg(long)]
    pub quiet: bool,
}

#[cfg(feature = "fleet")]
#[derive(Debug, Args)]
pub struct Worker {
    #[command(flatten)]
    pub served: Served,
    /// The NATS server: `nats://HOST:4222`
    #[arg(long, value_name = "URL", value_parser = parse_queue)]
    pub queue: String,
    /// Seconds without a step after which another worker gets the request
    #[arg(long, value_name = "S", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..))]
    pub lease: u64,
    /// How many workers may begin a request before it is given up
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = parse_count)]
    pub attempts: usize,
}

#[cfg(feature = "serve")]
#[derive(Debug, Args)]
pub struct Serve {
    #[command(flatten)]
    pub served: Served,
    /// Address to listen on; port 0 is any free one
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:7860")]
    pub listen: SocketAddr,
    /// Name of the server in requests, beside `localhost` and addresses; may be repeated
    #[arg(long, value_name = "NAME")]
    pub allow_host: Vec<String>,
    /// Key that requests need, as `Authorization: Bearer KEY` [default: the variable
    /// DIFFUSE_API_KEY, or none]
    #[arg(long, value_name = "KEY")]
    pub key: Option<String>,
    /// Requests that may wait; more are refused [default: 32, in a queue of NATS 1000]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub queue_length: Option<usize>,
    /// Have workers answer (`diffuse worker`), through a NATS server: `nats://HOST:4222`
    #[cfg(feature = "fleet")]
    #[arg(long, value_name = "URL", value_parser = parse_queue)]
    pub queue: Option<String>,
}

#[derive(Debug, Args)]
pub struct Inspect {
    /// A pipeline's folder, a component's folder, a weights file, or a name on the hub
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// Branch, tag or commit of a model from the hub [default: main]
    #[arg(long, value_name = "R")]
    pub revision: Option<String>,
    /// Variant to fetch of a model from the hub; the output lists the available variants
    #[arg(long, value_name = "NAME")]
    pub variant: Option<String>,
}

#[cfg(feature = "hub")]
#[derive(Debug, Args)]
pub struct Fetch {
    /// `OWNER/NAME` on the hub, or `sd-v1-4`, `sd-v1-5`, `ddpm-cat-256`
    #[arg(value_name = "MODEL")]
    pub model: String,
    /// Branch, tag or commit [default: main]
    #[arg(long, value_name = "R")]
    pub revision: Option<String>,
    /// Variant of the weights files: `fp16` takes `*.fp16.safetensors`
    #[arg(long, value_name = "NAME")]
    pub variant: Option<String>,
    /// Leave out the safety checker (1.2 GB of Stable Diffusion v1)
    #[arg(long)]
    pub no_safety_checker: bool,
    /// Copy the files into this folder, which needs no cache
    #[arg(long, value_name = "FOLDER")]
    pub into: Option<PathBuf>,
    /// Print nothing but errors
    #[arg(long)]
    pub quiet: bool,
}

#[derive(Debug, Args)]
pub struct Convert {
    /// A checkpoint's folder, in any form that can be loaded, or a single file
    #[arg(value_name = "SRC")]
    pub source: PathBuf,
    /// The folder to make or, from a folder, the single file (`.safetensors`)
    #[arg(value_name = "DST")]
    pub destination: PathBuf,
    /// Variant of the weights files to take [default: the plain ones, or `fp16` if there are only
    /// those]
    #[arg(long, value_name = "NAME")]
    pub variant: Option<String>,
    /// Type of the weights [default: as they are]
    #[arg(long, value_enum)]
    pub dtype: Option<FloatType>,
    /// Refuse weights files with tensors that the model does not have
    #[arg(long)]
    pub strict: bool,
    #[command(flatten)]
    pub single_file: SingleFile,
    /// Print nothing but warnings and errors
    #[arg(long)]
    pub quiet: bool,
}

/// Which weights, and what to compute them with.
#[derive(Debug, Args)]
pub struct Model {
    /// The checkpoint: a folder in Diffusers' format, a single file (`.safetensors`, `.ckpt`), or a
    /// name on the hub (`CompVis/stable-diffusion-v1-4`) [default: a small model of scenes that is
    /// built in]
    #[arg(long, value_name = "MODEL")]
    pub model: Option<PathBuf>,
    /// Branch, tag or commit of a model from the hub [default: main]
    #[arg(long, value_name = "R")]
    pub revision: Option<String>,
    /// Variant of the weights files: `fp16` takes `*.fp16.safetensors`
    #[arg(long, value_name = "NAME")]
    pub variant: Option<String>,
    /// Backend [default: `cuda` or else `wgpu` if it is built in and finds a GPU, else
    /// `flex`]
    #[arg(long, value_enum)]
    pub backend: Option<BackendName>,
    /// Which of the backend's devices, as `diffuse devices` counts them [default: the fastest kind]
    #[arg(long, value_name = "INDEX", value_parser = parse_count)]
    pub device: Option<usize>,
    /// Refuse weights files with tensors that the model does not have
    #[arg(long)]
    pub strict: bool,
    /// Type to compute in [default: f32 on the CPU, f16 on GPUs that have it]
    #[arg(long, value_enum)]
    pub dtype: Option<FloatType>,
    /// Type to keep weights in, if not `--dtype`: `f16` halves the memory of a model that
    /// computes in f32
    #[arg(long, value_enum)]
    pub weights: Option<FloatType>,
    /// Scheduler in place of the checkpoint's: a class (`EulerDiscreteScheduler`) or a short name
    /// (`euler`)
    #[arg(long, value_name = "NAME")]
    pub scheduler: Option<String>,
    /// Option of the scheduler; the value is JSON or a bare word
    #[arg(long, value_name = "KEY=VALUE", num_args = 1..)]
    scheduler_option: Vec<String>,
    #[arg(skip)]
    options: Vec<(String, Value)>,
}

#[cfg(feature = "serve")]
impl Served {
    fn take(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        match self.model.take_options(matches)?.first() {
            Some(text) => Err(no_option(text)),
            None => Ok(()),
        }
    }
}

impl Model {
    /// What an image's record calls the model.
    pub fn name(&self, pipeline: PipelineKind) -> String {
        match &self.model {
            Some(path) => path.display().to_string(),
            None => format!("built in: {}", builtin(pipeline).name),
        }
    }

    /// The scheduler's options as given; of one that is given twice, the last.
    pub fn scheduler_options(&self) -> Overrides {
        self.options.iter().cloned().collect()
    }

    /// Reads the scheduler's options. Returns the values that are none: prompts.
    fn take_options(&mut self, matches: &ArgMatches) -> Result<Vec<String>, clap::Error> {
        let mut others = Vec::new();
        for values in occurrences(matches, "scheduler_option") {
            for (index, text) in values.into_iter().enumerate() {
                match parse_option(&text) {
                    Some(option) => self.options.push(option),
                    None if index == 0 => return Err(no_option(&text)),
                    None => others.push(text),
                }
            }
        }
        Ok(others)
    }
}

/// What is loaded in place of, or on top of, a Stable Diffusion checkpoint's own weights.
#[derive(Debug, Args)]
pub struct StableDiffusionWeights {
    /// VAE in place of the checkpoint's: a folder in Diffusers' format, or a file
    #[arg(long, value_name = "FOLDER|FILE")]
    pub vae: Option<PathBuf>,
    /// LoRA, LoHa, LoKr or DoRA, with its strength [default: 1] and one for the text encoder
    /// [default: the same]; may be repeated. `dutch-angle` is a LoRA of the built-in model
    #[arg(long, value_name = "FILE[:S[:T]]", value_parser = parse_lora)]
    pub lora: Vec<LoraArgument>,
    /// Folder of the LoRAs that prompts name as `<lora:NAME:S>`
    #[arg(long, value_name = "FOLDER")]
    pub lora_dir: Option<PathBuf>,
    /// Textual inversion; prompts call it NAME [default: the file's name]; may be repeated
    #[arg(long, value_name = "[NAME=]FILE", value_parser = parse_embedding)]
    pub embedding: Vec<EmbeddingArgument>,
    /// Neither fetch nor run the checkpoint's safety checker, which makes images black that it
    /// takes for unsafe
    #[arg(long)]
    pub no_safety_checker: bool,
    #[command(flatten)]
    pub single_file: SingleFile,
}

/// How a single file is read.
#[derive(Debug, Args)]
pub struct SingleFile {
    /// Of a single file: folder in Diffusers' format with the configurations, tokenizer and
    /// scheduler [default: those of Stable Diffusion v1 or v2]
    #[arg(long, value_name = "FOLDER")]
    pub config: Option<PathBuf>,
    /// Of a single file: take the UNet's averaged weights (EMA)
    #[arg(long)]
    pub ema: bool,
}

/// A value of `--lora`.
#[derive(Debug, Clone)]
pub struct LoraArgument {
    pub path: PathBuf,
    pub strength: f64,
    pub text_encoder: Option<f64>,
}

/// A value of `--embedding`.
#[derive(Debug, Clone)]
pub struct EmbeddingArgument {
    pub name: Option<String>,
    pub path: PathBuf,
}

/// How prompts are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PromptSyntaxName {
    /// As text, of which the first 75 tokens count
    Plain,
    /// `(word:1.3)`, `[word]`, `BREAK`, any length
    A1111,
}

impl From<PromptSyntaxName> for PromptSyntax {
    fn from(name: PromptSyntaxName) -> Self {
        match name {
            PromptSyntaxName::Plain => Self::Plain,
            PromptSyntaxName::A1111 => Self::A1111,
        }
    }
}

/// How many images, from which seeds, and where they go.
#[derive(Debug, Args)]
pub struct Run {
    /// One seed for the whole batch, or one for each image; -1 is 2^64-1, as in torch [default:
    /// random]
    #[arg(
        long,
        value_name = "S[,S...]",
        value_delimiter = ',',
        value_parser = parse_seed
    )]
    pub seed: Vec<u64>,
    /// Number of images, of each prompt
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = parse_count)]
    pub num_images: usize,
    /// The image; with several, their names get `-0`, `-1`, ... before the extension
    #[arg(long, value_name = "FILE", default_value = "out.png")]
    pub output: PathBuf,
    /// Write all images in one, too: a row for each prompt, or about as wide as high
    #[arg(long, value_name = "FILE")]
    pub grid: Option<PathBuf>,
    /// Write the final latents, too: safetensors with one tensor `latents`
    #[arg(long, value_name = "FILE")]
    pub output_latents: Option<PathBuf>,
    /// Print nothing but warnings and errors
    #[arg(long)]
    pub quiet: bool,
    /// Write seconds a stage, model calls and the peak of memory as JSON
    #[arg(long, value_name = "FILE", hide = true)]
    pub timings: Option<PathBuf>,
}

impl StableDiffusion {
    /// Reads the scheduler's options and the prompts behind options.
    pub fn take(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        let prompts = self.model.take_options(matches)?;
        self.take_prompts(matches, prompts);
        self.control.take(matches)
    }

    /// Takes the prompts that stand behind an option: `others`, and, where no other prompt is
    /// given, all but the first value of `--negative-prompt`.
    fn take_prompts(&mut self, matches: &ArgMatches, others: Vec<String>) {
        if self.prompts.is_empty() && others.is_empty() {
            self.negative_prompt.clear();
            for mut values in occurrences(matches, "negative_prompt") {
                self.prompts.extend(values.split_off(1));
                self.negative_prompt.extend(values);
            }
        }
        self.prompts.extend(others);
    }
}

/// The library's values, where the person says nothing.
pub fn txt2img_defaults() -> StableDiffusionOptions {
    StableDiffusionOptions::default()
}

/// Steps of DDPM, which takes one for each timestep that the models were trained on.
pub const DDPM_STEPS: usize = 1000;
/// Steps of other schedulers without a prompt.
pub const OTHER_STEPS: usize = 50;

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BackendName {
    /// The CPU
    Flex,
    /// A GPU through Vulkan, Metal, DirectX 12 or WebGPU
    Wgpu,
    /// An NVIDIA GPU
    Cuda,
}

impl fmt::Display for BackendName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            BackendName::Flex => "flex",
            BackendName::Wgpu => "wgpu",
            BackendName::Cuda => "cuda",
        })
    }
}

/// Floating point types.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FloatType {
    F32,
    F16,
    Bf16,
}

/// `use_karras_sigmas=true`; the value is JSON or else a bare word.
fn parse_option(text: &str) -> Option<(String, Value)> {
    let (key, value) = text.split_once('=')?;
    let is_key = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let value = serde_json::from_str(value).unwrap_or_else(|_| Value::from(value));
    (!key.is_empty() && key.chars().all(is_key)).then(|| (key.to_string(), value))
}

fn no_option(text: &str) -> clap::Error {
    let message = format!(
        "`{text}` is not an option of the scheduler: `--scheduler-option` takes KEY=VALUE, as in \
         `use_karras_sigmas=true`\n"
    );
    clap::Error::raw(ErrorKind::InvalidValue, message)
}

/// `file.safetensors`, `file.safetensors:0.8` or `file.safetensors:0.8:0.5`
fn parse_lora(text: &str) -> Result<LoraArgument, String> {
    let mut rest = text;
    let mut numbers = Vec::new();
    // A path may have colons, too.
    while numbers.len() < 2
        && let Some((before, last)) = rest.rsplit_once(':')
        && let Ok(number) = last.parse::<f64>()
    {
        if !number.is_finite() {
            return Err(format!("`{last}` is not a strength"));
        }
        numbers.insert(0, number);
        rest = before;
    }
    if rest.is_empty() {
        return Err("it names no file".into());
    }
    Ok(LoraArgument {
        path: rest.into(),
        strength: numbers.first().copied().unwrap_or(1.0),
        text_encoder: numbers.get(1).copied(),
    })
}

/// `file.pt` or `name=file.pt`
fn parse_embedding(text: &str) -> Result<EmbeddingArgument, String> {
    let (name, path) = match text.split_once('=') {
        Some(("", _)) => return Err("the name is empty".into()),
        Some((name, path)) => (Some(name.to_string()), path),
        None => (None, text),
    };
    if path.is_empty() {
        return Err("it names no file".into());
    }
    Ok(EmbeddingArgument {
        name,
        path: path.into(),
    })
}

/// `0.9,0.2,1.5,1.6`
fn parse_freeu(text: &str) -> Result<FreeU, String> {
    let numbers: Option<Vec<f64>> = text.split(',').map(|number| number.parse().ok()).collect();
    match numbers.as_deref() {
        Some(&[s1, s2, b1, b2]) => Ok(FreeU { s1, s2, b1, b2 }),
        _ => Err("it has to be four numbers, as in `0.9,0.2,1.5,1.6`".to_string()),
    }
}

/// `nats://host:4222`
#[cfg(feature = "fleet")]
fn parse_queue(text: &str) -> Result<String, String> {
    let is_url = ["nats://", "tls://"]
        .iter()
        .any(|scheme| text.starts_with(scheme));
    match is_url {
        true => Ok(text.to_string()),
        false => Err("it has to be the URL of a NATS server, as in `nats://localhost:4222`".into()),
    }
}

/// `16,44,64,68`
fn parse_box(text: &str) -> Result<[u32; 4], String> {
    let numbers: Option<Vec<u32>> = text.split(',').map(|number| number.parse().ok()).collect();
    let numbers = numbers.and_then(|numbers| <[u32; 4]>::try_from(numbers).ok());
    numbers.ok_or_else(|| "it has to be four whole numbers, as in `16,44,64,68`".to_string())
}

/// `3` or `3:1`
fn parse_deep_cache(text: &str) -> Result<DeepCacheArgument, String> {
    let (interval, branch) = text.split_once(':').unwrap_or((text, "0"));
    Ok(DeepCacheArgument {
        interval: parse_count(interval)?,
        branch: parse_count(branch)?,
    })
}

/// A seed as `torch.manual_seed` takes it: below zero, it counts back from 2^64.
fn parse_seed(text: &str) -> Result<u64, String> {
    let negative = || text.parse::<i64>().ok().map(i64::cast_unsigned);
    let seed = text.parse().ok().or_else(negative);
    seed.ok_or_else(|| "a seed is a whole number from -2^63 to 2^64-1".to_string())
}

/// `--seed -1` as `--seed=-1`. Only `-h` and `-V` are options with one dash; anything else that
/// begins with one, behind an option that takes a value, is the value.
fn join_dashed_values(command: &clap::Command, arguments: Vec<OsString>) -> Vec<OsString> {
    let name = arguments.get(1).and_then(|name| name.to_str());
    let Some(command) = name.and_then(|name| command.find_subcommand(name)) else {
        return arguments;
    };
    let takes_value = |argument: &OsString| {
        let name = argument.to_str().and_then(|name| name.strip_prefix("--"));
        let options = command.get_arguments();
        name.is_some()
            && options
                .filter(|option| option.get_action().takes_values())
                .any(|option| option.get_long() == name)
    };
    let is_dashed = |value: &OsString| {
        let bytes = value.as_encoded_bytes();
        bytes.len() > 1 && bytes[0] == b'-' && bytes[1] != b'-' && value != "-h" && value != "-V"
    };
    let mut joined: Vec<OsString> = Vec::new();
    let mut arguments = arguments.into_iter();
    while let Some(mut argument) = arguments.next() {
        if argument == "--" {
            joined.push(argument);
            joined.extend(arguments);
            break;
        }
        let mut rest = arguments.clone();
        if takes_value(&argument)
            && let Some(value) = rest.next().filter(is_dashed)
        {
            argument.push("=");
            argument.push(value);
            arguments = rest;
        }
        joined.push(argument);
    }
    joined
}

/// A number of things.
fn parse_count(text: &str) -> Result<usize, String> {
    let count = text.parse();
    count.map_err(|_| "it has to be a whole number, 0 or more".to_string())
}

/// A number, not necessarily a whole one.
pub fn parse_number(text: &str) -> Result<f64, String> {
    let number = text.parse();
    number.map_err(|_| "it has to be a number".to_string())
}

/// The values of an option, apart for each time that it is given.
fn occurrences(matches: &ArgMatches, option: &str) -> Vec<Vec<String>> {
    let occurrences = matches.get_occurrences::<String>(option);
    let mut found = Vec::new();
    for values in occurrences.into_iter().flatten() {
        found.push(values.cloned().collect());
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_prompt_needs_no_command() {
        let args = txt2img(&["a small red house", "--seed", "3"]);
        assert_eq!(args.prompts, ["a small red house"]);
        assert_eq!(args.run.seed, [3]);
        assert!(matches!(
            read(&["schedulers"]).unwrap(),
            Command::Schedulers
        ));
        assert_eq!(
            error(&["shedulers"]),
            "error: there is no command `shedulers`: for the command, `diffuse schedulers`; for an \
             image of it, `diffuse txt2img shedulers`\n"
        );
        assert_eq!(
            error(&["--nonsense"]),
            "error: unexpected argument '--nonsense' found\n\n  \
             tip: to pass '--nonsense' as a value, use '-- --nonsense'\n\n\
             Usage: diffuse txt2img [OPTIONS] [PROMPT]...\n\n\
             For more information, try '--help'.\n"
        );
    }

    #[track_caller]
    fn error(arguments: &[&str]) -> String {
        read(arguments).unwrap_err().to_string()
    }

    fn read(arguments: &[&str]) -> Result<Command, clap::Error> {
        let arguments = ["diffuse"].iter().chain(arguments);
        Ok(Cli::read(arguments.map(OsString::from))?.command)
    }

    #[track_caller]
    fn txt2img(arguments: &[&str]) -> StableDiffusion {
        match read(arguments) {
            Ok(Command::Txt2img(args)) => args.common,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn prompts_behind_options() {
        let check = |arguments: &[&str], prompts: &[&str], negative: &[&str]| {
            let args = txt2img(arguments);
            assert_eq!(args.prompts, prompts, "{arguments:?}");
            assert_eq!(args.negative_prompt, negative, "{arguments:?}");
        };
        check(&["--seed", "3", "a boat"], &["a boat"], &[]);
        check(&["--negative-prompt", "x", "a boat"], &["a boat"], &["x"]);
        check(
            &["txt2img", "--negative-prompt", "x", "a boat", "a cat"],
            &["a boat", "a cat"],
            &["x"],
        );
        check(
            &[
                "--negative-prompt",
                "x",
                "--negative-prompt",
                "y",
                "a boat",
                "a cat",
            ],
            &["a boat", "a cat"],
            &["x", "y"],
        );
        check(
            &["a boat", "a cat", "--negative-prompt", "x", "y"],
            &["a boat", "a cat"],
            &["x", "y"],
        );
        check(
            &[
                "--negative-prompt",
                "x",
                "--scheduler-option",
                "a=1",
                "b=c",
                "a boat",
            ],
            &["a boat"],
            &["x"],
        );
        check(
            &["a boat", "--negative-prompt", "-ugly"],
            &["a boat"],
            &["-ugly"],
        );
        check(&["--", "-a boat"], &["-a boat"], &[]);
        check(&["--negative-prompt", "x"], &[], &["x"]);
    }

    #[test]
    fn scheduler_options_end_where_the_prompt_begins() {
        let args = txt2img(&["--scheduler-option", "a=1", "b=c", "a boat, x = 1"]);
        let expected = [("a".into(), Value::from(1)), ("b".into(), Value::from("c"))];
        assert_eq!(args.model.options, expected);
        assert_eq!(args.prompts, ["a boat, x = 1"]);
        for arguments in [
            ["txt2img", "--scheduler-option", "a boat", "a=1"],
            ["ddpm", "--scheduler-option", "a=1", "a boat"],
        ] {
            assert_eq!(
                error(&arguments),
                "error: `a boat` is not an option of the scheduler: `--scheduler-option` takes \
                 KEY=VALUE, as in `use_karras_sigmas=true`\n"
            );
        }
    }

    #[test]
    fn seeds_are_torchs() {
        let check = |text: &str, expected: &[u64]| {
            assert_eq!(txt2img(&["a", "--seed", text]).run.seed, expected, "{text}");
        };
        check("0", &[0]);
        check("-1", &[u64::MAX]);
        check("-1,5,-9223372036854775808", &[u64::MAX, 5, 1 << 63]);
        check("18446744073709551615", &[u64::MAX]);
        for text in ["-9223372036854775809", "18446744073709551616", "1.5", ""] {
            assert_eq!(
                error(&["a", "--seed", text]),
                format!(
                    "error: invalid value '{text}' for '--seed <S[,S...]>': a seed is a whole \
                     number from -2^63 to 2^64-1\n\nFor more information, try '--help'.\n"
                )
            );
        }
    }

    #[test]
    fn values_may_begin_with_a_dash() {
        let args = txt2img(&[
            "a", "--eta", "-1", "--output", "-a.png", "--model", "-m", "--sigmas", "-1,-2",
        ]);
        assert_eq!(args.eta, -1.0);
        assert_eq!(args.run.output, PathBuf::from("-a.png"));
        assert_eq!(args.model.model, Some(PathBuf::from("-m")));
        assert_eq!(args.sigmas, Some(vec![-1.0, -2.0]));
        assert_eq!(txt2img(&["--", "--seed", "-1"]).prompts, ["--seed", "-1"]);
        assert_eq!(
            error(&["a", "--steps", "-1"]),
            "error: invalid value '-1' for '--steps <N>': it has to be a whole number, 0 or \
             more\n\nFor more information, try '--help'.\n"
        );
        // An option is no value of another.
        assert_eq!(
            error(&["a", "--model", "--seed", "3"]),
            "error: a value is required for '--model <MODEL>' but none was supplied\n\n\
             For more information, try '--help'.\n"
        );
    }

    #[test]
    fn help_states_the_defaults_of_the_code() {
        let check = |name: &str, option: &str, expected: &str, default: &[&str]| {
            let mut command = Cli::command();
            let command = command.find_subcommand_mut(name).unwrap();
            let mut options = command.get_arguments();
            let option = options.find(|it| it.get_long() == Some(option)).unwrap();
            assert_eq!(option.get_help().unwrap().to_string(), expected);
            assert_eq!(option.get_default_values(), default, "{expected}");
        };
        check(
            "txt2img",
            "steps",
            "Number of steps [default: 50, of the built-in model 25]",
            &[],
        );
        check(
            "txt2img",
            "guidance-scale",
            "How closely to follow the prompt; 1 and less is no guidance [default: 7.5, of the \
             built-in model 2]",
            &[],
        );
        check(
            "img2img",
            "strength",
            "How much to change the image, 0 to 1: the part of the steps that are taken",
            &["0.8"],
        );
        check(
            "inpaint",
            "strength",
            "How much to change the white part, 0 to 1: the part of the steps that are taken",
            &["1"],
        );
        check(
            "ddpm",
            "steps",
            "Number of steps [default: 1000 with DDPM, of the built-in model 100; else 50]",
            &[],
        );
    }

    #[test]
    fn option_values_are_json_or_bare_words() {
        let parse = |text| parse_option(text).unwrap().1;
        assert_eq!(parse("a=true"), Value::from(true));
        assert_eq!(parse("a=2"), Value::from(2));
        assert_eq!(parse("a=[0, 1]"), serde_json::json!([0, 1]));
        assert_eq!(parse("a=\"x=y\""), Value::from("x=y"));
        assert_eq!(parse("a=sde-dpmsolver++"), Value::from("sde-dpmsolver++"));
        assert_eq!(parse("a="), Value::from(""));
        for text in ["a", "=1", "a boat, x=1"] {
            assert_eq!(parse_option(text), None, "{text}");
        }
    }
}
