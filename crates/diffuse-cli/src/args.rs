//! What can be typed.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use diffuse_pipelines::PipelineKind;
use diffuse_pipelines::schedulers::Overrides;
use serde_json::Value;

use crate::builtin::Builtin;

/// Pictures from diffusion models.
#[derive(Debug, Parser)]
#[command(
    name = "diffuse",
    version,
    arg_required_else_help = true,
    override_usage = "diffuse PROMPT [OPTIONS]\n       diffuse COMMAND [OPTIONS]",
    after_help = FIRST_PICTURE,
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

/// Where a person begins.
const FIRST_PICTURE: &str = "\
A first picture, without a download:
  diffuse \"a small red house on snow at night\"

The small model that is built in knows skies (day, sunset, night), grounds (meadow, sand, snow, sea), houses, trees,
boats, mountains, the sun and the moon. For anything else, name a Stable Diffusion v1 checkpoint:
  diffuse \"a lighthouse in a storm\" --model CompVis/stable-diffusion-v1-4

`diffuse txt2img --help` explains the options.";

impl Cli {
    /// Reads the program's arguments. A first one that is neither a command nor an option is a prompt, as if `txt2img`
    /// stood before it.
    pub fn read(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let mut arguments: Vec<OsString> = arguments.into_iter().collect();
        let first = arguments.get(1).and_then(|first| first.to_str());
        if let Some(first) = first.filter(|first| !first.starts_with('-')) {
            let command = Self::command();
            let mut names: Vec<&str> = command.get_subcommands().map(|it| it.get_name()).collect();
            names.push("help");
            if !names.contains(&first) {
                let meant = names.iter().find(|name| strsim::jaro(name, first) > 0.8);
                if let Some(meant) = meant {
                    let message = format!(
                        "there is no command `{first}`: for the command, `diffuse {meant}`; for a picture of it, \
                         `diffuse txt2img {first}`\n"
                    );
                    return Err(clap::Error::raw(ErrorKind::InvalidSubcommand, message));
                }
                arguments.insert(1, "txt2img".into());
            }
        }
        Self::try_parse_from(arguments)
    }
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make pictures of one or several texts
    Txt2img(Box<Txt2img>),
    /// Make pictures without a text
    Ddpm(Box<Ddpm>),
    /// Say what a checkpoint is: components, parameters, types, what is not supported
    Inspect(Inspect),
    /// Fetch a checkpoint from the hub, without making a picture
    #[cfg(feature = "hub")]
    Fetch(Fetch),
    /// Rewrite a checkpoint: safetensors, one file a model, under today's keys
    Convert(Convert),
    /// List what this build can compute on
    Devices,
    /// List the schedulers and every name they go by
    Schedulers,
}

#[derive(Debug, Args)]
pub struct Txt2img {
    /// What to show; several make a batch
    #[arg(value_name = "PROMPT")]
    pub prompts: Vec<String>,
    #[command(flatten)]
    pub model: Model,
    /// What not to show: one for all prompts, or one for each
    #[arg(long, value_name = "TEXT", num_args = 1..)]
    pub negative_prompt: Vec<String>,
    /// Number of steps [default: 50, of the built-in model 25]
    #[arg(long, value_name = "N", conflicts_with_all = ["timesteps", "sigmas"])]
    pub steps: Option<usize>,
    /// The timesteps themselves, falling
    #[arg(
        long,
        value_name = "A,B,...",
        value_delimiter = ',',
        conflicts_with = "sigmas"
    )]
    pub timesteps: Option<Vec<f64>>,
    /// The noise levels themselves, falling
    #[arg(long, value_name = "A,B,...", value_delimiter = ',')]
    pub sigmas: Option<Vec<f64>>,
    /// How closely to follow the prompt; none beyond the model's own at 1 and below [default: 7.5, of the built-in model
    /// 4]
    #[arg(long, value_name = "G", allow_negative_numbers = true)]
    pub guidance_scale: Option<f64>,
    /// How much of the guidance's contrast to take back, 0 to 1
    #[arg(
        long,
        value_name = "R",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    pub guidance_rescale: f64,
    /// How many of the text encoder's last layers to leave out
    #[arg(long, value_name = "K")]
    pub clip_skip: Option<usize>,
    /// How much noise each step adds, 0 to 1, for schedulers that take it
    #[arg(
        long,
        value_name = "E",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    pub eta: f64,
    /// Width in pixels, a multiple of 8 [default: what the model was made for]
    #[arg(long, value_name = "W")]
    pub width: Option<usize>,
    /// Height in pixels, a multiple of 8 [default: what the model was made for]
    #[arg(long, value_name = "H")]
    pub height: Option<usize>,
    /// Start from these latents (safetensors with a tensor `latents`) in place of drawn noise
    #[arg(long, value_name = "FILE")]
    pub init_latents: Option<PathBuf>,
    #[command(flatten)]
    pub run: Run,
}

#[derive(Debug, Args)]
pub struct Ddpm {
    #[command(flatten)]
    pub model: Model,
    /// Number of steps [default: 1000 with DDPM, of the built-in model 100; else 50]
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// How much noise each step of DDIM adds, 0 to 1
    #[arg(
        long,
        value_name = "E",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    pub eta: f64,
    /// Compute the noise again from the clipped picture in each step of DDIM
    #[arg(long)]
    pub use_clipped_model_output: bool,
    #[command(flatten)]
    pub run: Run,
}

#[derive(Debug, Args)]
pub struct Inspect {
    /// A pipeline's folder, a component's folder, a weights file, or a name on the hub
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// Branch, tag or commit of a model from the hub [default: main]
    #[arg(long, value_name = "R")]
    pub revision: Option<String>,
    /// Variant to fetch of a model from the hub; all variants that are there are told
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
    /// Make a folder of it, too, which needs no cache
    #[arg(long, value_name = "FOLDER")]
    pub into: Option<PathBuf>,
    /// Print nothing but errors
    #[arg(long)]
    pub quiet: bool,
}

#[derive(Debug, Args)]
pub struct Convert {
    /// A checkpoint's folder, in any form that can be loaded
    #[arg(value_name = "SRC")]
    pub source: PathBuf,
    /// The folder to make
    #[arg(value_name = "DST")]
    pub destination: PathBuf,
    /// Variant of the weights files to take [default: the plain ones, or `fp16` if there are only those]
    #[arg(long, value_name = "NAME")]
    pub variant: Option<String>,
    /// Type of the weights [default: as they are]
    #[arg(long, value_enum)]
    pub dtype: Option<FloatType>,
    /// Print nothing but warnings and errors
    #[arg(long)]
    pub quiet: bool,
}

/// Which weights, and what to compute them with.
#[derive(Debug, Args)]
pub struct Model {
    /// The checkpoint: a folder in Diffusers' format, or a name on the hub (`CompVis/stable-diffusion-v1-4`) [default: a
    /// small model of scenes that is built in]
    #[arg(long, value_name = "MODEL")]
    pub model: Option<PathBuf>,
    /// Branch, tag or commit of a model from the hub [default: main]
    #[arg(long, value_name = "R")]
    pub revision: Option<String>,
    /// Variant of the weights files: `fp16` takes `*.fp16.safetensors`
    #[arg(long, value_name = "NAME")]
    pub variant: Option<String>,
    /// What computes [default: `cuda` or else `wgpu` if it is built in and finds a GPU, else `flex`]
    #[arg(long, value_enum)]
    pub backend: Option<BackendName>,
    /// Which of the backend's devices, as `diffuse devices` counts them [default: the fastest kind]
    #[arg(long, value_name = "INDEX")]
    pub device: Option<usize>,
    /// Type that is computed in [default: f32 on the CPU, f16 on GPUs that have it]
    #[arg(long, value_enum)]
    pub dtype: Option<FloatType>,
    /// Type that weights are kept in, if not `--dtype`: `f16` halves the memory of a model that computes in f32
    #[arg(long, value_enum)]
    pub weights: Option<FloatType>,
    /// Scheduler in place of the checkpoint's: a class (`EulerDiscreteScheduler`) or a short name (`euler`)
    #[arg(long, value_name = "NAME")]
    pub scheduler: Option<String>,
    /// Option of the scheduler; the value is JSON or a bare word
    #[arg(long, value_name = "KEY=VALUE", num_args = 1.., value_parser = parse_option)]
    pub scheduler_option: Vec<(String, Value)>,
}

impl Model {
    /// What a picture's record calls the model.
    pub fn name(&self, pipeline: PipelineKind) -> PathBuf {
        let builtin = || PathBuf::from(format!("built in: {}", Builtin::of(pipeline).name));
        self.model.clone().unwrap_or_else(builtin)
    }

    /// The scheduler's options as given; of one that is given twice, the last.
    pub fn scheduler_options(&self) -> Overrides {
        self.scheduler_option.iter().cloned().collect()
    }
}

/// How many pictures, from which seeds, and where they go.
#[derive(Debug, Args)]
pub struct Run {
    /// One seed for the whole batch, or one for each picture [default: random]
    #[arg(long, value_name = "S[,S...]", value_delimiter = ',')]
    pub seed: Vec<u64>,
    /// Number of pictures, of each prompt
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub num_images: usize,
    /// The picture; with several, their names get `-0`, `-1`, ... before the extension
    #[arg(long, value_name = "FILE", default_value = "out.png")]
    pub output: PathBuf,
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

/// `use_karras_sigmas=true`
fn parse_option(text: &str) -> Result<(String, Value), String> {
    let (key, value) = text
        .split_once('=')
        .filter(|(key, _)| !key.is_empty())
        .ok_or_else(|| format!("`{text}` is not KEY=VALUE"))?;
    // What is not JSON is a bare word.
    let value = serde_json::from_str(value).unwrap_or_else(|_| Value::from(value));
    Ok((key.to_string(), value))
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
        let read = |arguments: &[&str]| {
            let arguments = ["diffuse"].iter().chain(arguments);
            Cli::read(arguments.map(OsString::from))
        };
        let Ok(Cli {
            command: Command::Txt2img(args),
        }) = read(&["a small red house", "--seed", "3"])
        else {
            panic!("a prompt is for txt2img");
        };
        assert_eq!(args.prompts, ["a small red house"]);
        assert_eq!(args.run.seed, [3]);
        assert!(matches!(
            read(&["schedulers"]).unwrap().command,
            Command::Schedulers
        ));
        let message = read(&["shedulers"]).unwrap_err().to_string();
        assert!(message.contains("`diffuse schedulers`"), "{message}");
        assert!(read(&["--nonsense"]).is_err());
    }

    #[test]
    fn option_values_are_json_or_bare_words() {
        let parse = |text| parse_option(text).unwrap().1;
        assert_eq!(parse("a=true"), Value::from(true));
        assert_eq!(parse("a=2"), Value::from(2));
        assert_eq!(parse("a=[0, 1]"), serde_json::json!([0, 1]));
        assert_eq!(parse("a=\"x=y\""), Value::from("x=y"));
        assert_eq!(parse("a=sde-dpmsolver++"), Value::from("sde-dpmsolver++"));
        assert!(parse_option("a").is_err());
        assert!(parse_option("=1").is_err());
    }
}
