//! The options of ControlNets, and loading them.

use std::path::PathBuf;

use anyhow::{Context, Result};
use burn::tensor::backend::Backend;
use clap::error::ErrorKind;
use clap::{ArgMatches, Args};
use diffuse_pipelines::unet::ControlNetModel;
use diffuse_pipelines::{LoadOptions, StableDiffusionControl, canny, load_controlnet};
use image::RgbImage;
use serde_json::{Value, json};

use crate::args::parse_number;
use crate::generate::read_image;
use crate::model::find_controlnet;

const HEADING: &str = "ControlNet";

/// ControlNets. Each has the options that follow it.
#[derive(Debug, Default, Args)]
pub struct Controls {
    /// ControlNet: a folder in Diffusers' format, a file, or a name on the hub; may be repeated.
    /// Each takes the `--control-...` options behind it
    #[arg(long, help_heading = HEADING, value_name = "MODEL")]
    controlnet: Vec<PathBuf>,
    /// The image that the ControlNet sees (edges, a pose, ...). Without another size, the result of
    /// txt2img has its size
    #[arg(long, help_heading = HEADING, value_name = "FILE")]
    control_image: Vec<PathBuf>,
    /// Take the edges of the image, as ControlNets for edges need them, with the thresholds of
    /// OpenCV's Canny [default: 100,200]
    #[arg(
        long,
        help_heading = HEADING,
        value_name = "LOW,HIGH",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "100,200",
        value_parser = parse_thresholds
    )]
    control_canny: Vec<[u32; 2]>,
    /// How much the ControlNet counts [default: 1]
    #[arg(long, help_heading = HEADING, value_name = "S", value_parser = parse_number)]
    control_scale: Vec<f64>,
    /// Where in the run the ControlNet begins, 0 to 1 [default: 0]
    #[arg(long, help_heading = HEADING, value_name = "A", value_parser = parse_number)]
    control_start: Vec<f64>,
    /// Where in the run the ControlNet ends, 0 to 1 [default: 1]
    #[arg(long, help_heading = HEADING, value_name = "B", value_parser = parse_number)]
    control_end: Vec<f64>,
    /// Let ControlNets guess what their images show, if need be without a prompt; with a guidance
    /// scale of 3 to 5
    #[arg(long, help_heading = HEADING, requires = "controlnet")]
    pub guess_mode: bool,
    #[arg(skip)]
    networks: Vec<Network>,
}

/// A ControlNet with its options.
#[derive(Debug, Default, Clone, PartialEq)]
struct Network {
    model: PathBuf,
    image: Option<PathBuf>,
    canny: Option<[u32; 2]>,
    scale: Option<f64>,
    start: Option<f64>,
    end: Option<f64>,
}

impl Controls {
    /// Gives each ControlNet the options behind it.
    pub fn take(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        let places = indices(matches, "controlnet");
        self.networks = self
            .controlnet
            .iter()
            .map(|model| Network {
                model: model.clone(),
                ..Network::default()
            })
            .collect();
        let networks = &mut self.networks;
        let mut assign = Assign { matches, places };
        assign.to(networks, "control_image", &self.control_image, |it| {
            &mut it.image
        })?;
        assign.to(networks, "control_canny", &self.control_canny, |it| {
            &mut it.canny
        })?;
        assign.to(networks, "control_scale", &self.control_scale, |it| {
            &mut it.scale
        })?;
        assign.to(networks, "control_start", &self.control_start, |it| {
            &mut it.start
        })?;
        assign.to(networks, "control_end", &self.control_end, |it| &mut it.end)?;
        match networks.iter().find(|network| network.image.is_none()) {
            None => Ok(()),
            Some(network) => Err(invalid(format!(
                "`--controlnet {}` needs a `--control-image` behind it",
                network.model.display()
            ))),
        }
    }

    /// Reads the images of all ControlNets, before anything large is loaded.
    pub fn read_images(&self) -> Result<Vec<RgbImage>> {
        let read = |network: &Network| {
            let image = read_image(network.image.as_deref().expect("each has one"))?;
            Ok(match network.canny {
                Some([low, high]) => canny(&image, low, high),
                None => image,
            })
        };
        self.networks.iter().map(read).collect()
    }

    /// Loads all ControlNets.
    pub fn load<B: Backend>(
        &self,
        options: &LoadOptions,
        quiet: bool,
        device: &B::Device,
    ) -> Result<Vec<ControlNetModel<B>>> {
        // A variant is the checkpoint's.
        let options = LoadOptions {
            variant: None,
            ..options.clone()
        };
        let load = |network: &Network| {
            let path = find_controlnet(&network.model, quiet)?;
            let loaded = load_controlnet(path, None, &options, device);
            loaded.with_context(|| format!("cannot load `{}`", network.model.display()))
        };
        self.networks.iter().map(load).collect()
    }

    /// The ControlNets of a run.
    pub fn of_run<'a, B: Backend>(
        &self,
        models: &'a [ControlNetModel<B>],
        images: Vec<RgbImage>,
    ) -> Vec<StableDiffusionControl<'a, B>> {
        let parts = self.networks.iter().zip(models).zip(images);
        let control = |((network, model), image): ((&Network, &'a _), _)| {
            let mut control = StableDiffusionControl::new(model, vec![image]);
            for (own, given) in [
                (&mut control.conditioning_scale, network.scale),
                (&mut control.guidance_start, network.start),
                (&mut control.guidance_end, network.end),
            ] {
                *own = given.unwrap_or(*own);
            }
            control
        };
        parts.map(control).collect()
    }

    /// What an image's record says.
    pub fn record(&self) -> Vec<Value> {
        let record = |network: &Network| {
            json!({
                "model": network.model.display().to_string(),
                "image": network.image.as_ref().map(|path| path.display().to_string()),
                "canny": network.canny,
                "scale": network.scale.unwrap_or(1.0),
                "start": network.start.unwrap_or(0.0),
                "end": network.end.unwrap_or(1.0),
            })
        };
        self.networks.iter().map(record).collect()
    }
}

/// Gives options to the ControlNets that stand before them.
struct Assign<'a> {
    matches: &'a ArgMatches,
    /// Where the ControlNets stand.
    places: Vec<usize>,
}

impl Assign<'_> {
    fn to<T: Clone>(
        &mut self,
        networks: &mut [Network],
        option: &str,
        values: &[T],
        field: impl Fn(&mut Network) -> &mut Option<T>,
    ) -> Result<(), clap::Error> {
        let name = format!("--{}", option.replace('_', "-"));
        for (value, index) in values.iter().zip(indices(self.matches, option)) {
            let before = self.places.iter().filter(|place| **place < index).count();
            let Some(owner) = before.checked_sub(1) else {
                return Err(invalid(format!(
                    "`{name}` belongs behind the `--controlnet` that it is for"
                )));
            };
            let field = field(&mut networks[owner]);
            if field.replace(value.clone()).is_some() {
                let model = networks[owner].model.display();
                return Err(invalid(format!(
                    "`{name}` is given twice for `--controlnet {model}`"
                )));
            }
        }
        Ok(())
    }
}

/// The places of an option's values among the arguments.
fn indices(matches: &ArgMatches, option: &str) -> Vec<usize> {
    let indices = matches.indices_of(option).into_iter();
    indices.flatten().collect()
}

fn invalid(message: String) -> clap::Error {
    clap::Error::raw(ErrorKind::InvalidValue, message + "\n")
}

/// `100,200`
fn parse_thresholds(text: &str) -> Result<[u32; 2], String> {
    let numbers = text.split_once(',').and_then(|(low, high)| {
        let parse = |text: &str| text.trim().parse().ok();
        Some([parse(low)?, parse(high)?])
    });
    numbers.ok_or_else(|| "it has to be two whole numbers, as in `100,200`".to_string())
}
