//! The safety checker of Stable Diffusion v1: an image is flagged if its CLIP embedding is too
//! close to that of one of 17 concepts.
//!
//! ```text
//! score(c) = cos(image, c) - threshold(c) + adjustment, rounded to 3 digits
//! ```
//!
//! An image is flagged if the score of a concept is above zero. Three more embeddings, of images
//! that need special care, come first: if one of their scores is above zero, the adjustment is 0.01
//! from there on, else 0.

use burn::module::{Module, Param};
use burn::tensor::{DType, Tensor, backend::Backend};
use diffuse_clip::{CLIPVisionConfig, CLIPVisionModel};
use diffuse_nn::checkpoint::float_dtype;
use diffuse_nn::config::{ConfigError, MAX_CHANNELS, ModelConfig, check_size};
use diffuse_nn::pretrained::{LoadOptions, Pretrained, PretrainedError};
use diffuse_nn::{Linear, LinearConfig, ModelPath};
use image::{Rgb, RgbImage};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::PipelineError;
use crate::clip_image_processor::CLIPImageProcessor;
use crate::components::component_path;

/// Number of concepts.
const CONCEPTS: usize = 17;
/// Number of embeddings of images that need special care.
const SPECIAL_CARE: usize = 3;

/// What a [`StableDiffusionSafetyChecker`]'s `config.json` holds: the parts of a whole CLIP's that
/// it uses.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SafetyCheckerConfig {
    /// The vision model.
    pub vision_config: CLIPVisionConfig,
    /// Size of the embeddings that are compared.
    pub projection_dim: usize,
}

impl Default for SafetyCheckerConfig {
    fn default() -> Self {
        Self {
            vision_config: CLIPVisionConfig::default(),
            projection_dim: 512,
        }
    }
}

impl ModelConfig for SafetyCheckerConfig {
    const CLASS: &'static str = "StableDiffusionSafetyChecker";
    const WEIGHTS: [&'static str; 2] = CLIPVisionConfig::WEIGHTS;

    /// `vision_config_dict`, which early versions of transformers wrote, takes precedence, as in
    /// transformers; and null is the default in the vision model's part, too.
    fn section(mut map: Map<String, Value>) -> Map<String, Value> {
        if let Some(vision @ Value::Object(_)) = map.remove("vision_config_dict") {
            map.insert("vision_config".into(), vision);
        }
        if let Some(Value::Object(vision)) = map.get_mut("vision_config") {
            vision.retain(|_, value| !value.is_null());
        }
        map
    }

    fn validate(&self) -> Result<(), ConfigError> {
        let (key, dim) = ("projection_dim", self.projection_dim);
        check_size(Self::CLASS, key, dim, MAX_CHANNELS)?;
        self.vision_config.validate()
    }

    fn to_map(&self) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("architectures".into(), vec![Self::CLASS].into());
        map.insert("model_type".into(), "clip".into());
        map.insert("projection_dim".into(), self.projection_dim.into());
        map.insert("vision_config".into(), self.vision_config.to_map().into());
        map
    }
}

/// The network of the safety checker.
#[derive(Module, Debug)]
pub struct StableDiffusionSafetyChecker<B: Backend> {
    /// Images to features.
    pub vision_model: CLIPVisionModel<B>,
    /// Features to embeddings, without bias.
    pub visual_projection: Linear<B>,
    /// `[17, projection_dim]`
    pub concept_embeds: Param<Tensor<B, 2>>,
    /// `[3, projection_dim]`
    pub special_care_embeds: Param<Tensor<B, 2>>,
    /// Thresholds: `[17]`.
    pub concept_embeds_weights: Param<Tensor<B, 1>>,
    /// Thresholds: `[3]`.
    pub special_care_embeds_weights: Param<Tensor<B, 1>>,
    #[module(skip)]
    config: SafetyCheckerConfig,
}

impl SafetyCheckerConfig {
    /// A network with fresh weights.
    ///
    /// # Panics
    /// If the number of heads does not divide the hidden size.
    pub fn init<B: Backend>(&self, device: &B::Device) -> StableDiffusionSafetyChecker<B> {
        use burn::module::Initializer::Ones;
        let (vision, dim) = (&self.vision_config, self.projection_dim);
        StableDiffusionSafetyChecker {
            vision_model: vision.init(device),
            visual_projection: LinearConfig::new(vision.hidden_size, dim)
                .with_bias(false)
                .init(device),
            concept_embeds: Ones.init([CONCEPTS, dim], device),
            special_care_embeds: Ones.init([SPECIAL_CARE, dim], device),
            concept_embeds_weights: Ones.init([CONCEPTS], device),
            special_care_embeds_weights: Ones.init([SPECIAL_CARE], device),
            config: self.clone(),
        }
    }
}

impl<B: Backend> Pretrained<B> for StableDiffusionSafetyChecker<B> {
    type Config = SafetyCheckerConfig;

    fn config(&self) -> &SafetyCheckerConfig {
        &self.config
    }

    fn from_config(config: &SafetyCheckerConfig, device: &B::Device) -> Self {
        config.init(device)
    }

    /// The vision model's keys are those of [`CLIPVisionModel`].
    fn current_key(key: &str) -> Option<String> {
        match key.strip_prefix("vision_model.") {
            Some(key) => {
                let key = <CLIPVisionModel<B> as Pretrained<B>>::current_key(key)?;
                Some(format!("vision_model.{key}"))
            }
            None => Some(key.to_string()),
        }
    }
}

/// The scores of an image.
#[derive(Debug, Clone, PartialEq)]
pub struct SafetyScores {
    /// Of the embeddings that need special care.
    pub special_care: Vec<f32>,
    /// Of the concepts.
    pub concepts: Vec<f32>,
}

impl SafetyScores {
    /// Whether a concept's score is above zero.
    pub fn is_flagged(&self) -> bool {
        self.concepts.iter().any(|score| *score > 0.0)
    }
}

impl<B: Backend> StableDiffusionSafetyChecker<B> {
    /// CLIP embeddings of images: `[batch, projection_dim]`.
    ///
    /// # Shapes
    /// - `pixel_values`: `[batch, 3, image_size, image_size]`, of a [`CLIPImageProcessor`]
    pub fn image_embeds(&self, pixel_values: Tensor<B, 4>) -> Tensor<B, 2> {
        let pixel_values = pixel_values.cast(float_dtype(self));
        let output = self.vision_model.forward(pixel_values);
        self.visual_projection.forward(output.pooler_output)
    }

    /// The scores of images by their embeddings, `[batch, projection_dim]`. Half precision ends
    /// here: cosines and scores are computed in `f32`.
    ///
    /// # Errors
    /// If an embedding is not finite.
    pub fn scores(&self, image_embeds: Tensor<B, 2>) -> Result<Vec<SafetyScores>, PipelineError> {
        let image_embeds = image_embeds.cast(DType::F32);
        let scores = |embeds: &Param<Tensor<B, 2>>, thresholds: &Param<Tensor<B, 1>>| {
            let embeds = normalize(embeds.val().cast(DType::F32));
            let cosines = normalize(image_embeds.clone()).matmul(embeds.transpose());
            let scores = cosines - thresholds.val().cast(DType::F32).unsqueeze();
            scores.into_data().iter::<f32>().collect::<Vec<f32>>()
        };
        let special_care = scores(&self.special_care_embeds, &self.special_care_embeds_weights);
        let concepts = scores(&self.concept_embeds, &self.concept_embeds_weights);
        if !special_care
            .iter()
            .chain(&concepts)
            .all(|score| score.is_finite())
        {
            return Err(PipelineError::NotFinite {
                what: "safety checker's embeddings",
            });
        }
        let images = special_care.chunks(SPECIAL_CARE);
        let images = images.zip(concepts.chunks(CONCEPTS));
        Ok(images
            .map(|(special_care, concepts)| adjusted(special_care, concepts))
            .collect())
    }
}

/// Rows of length one.
fn normalize<B: Backend>(x: Tensor<B, 2>) -> Tensor<B, 2> {
    let length = x.clone().powi_scalar(2).sum_dim(1).sqrt();
    x / length.clamp_min(1e-12)
}

/// Adjusted and rounded scores of an image.
fn adjusted(special_care: &[f32], concepts: &[f32]) -> SafetyScores {
    let mut adjustment = 0.0;
    let special_care = special_care.iter().map(|score| {
        let score = rounded(score + adjustment);
        if score > 0.0 {
            adjustment = 0.01;
        }
        score
    });
    let special_care = special_care.collect();
    let concepts = concepts.iter().map(|score| rounded(score + adjustment));
    SafetyScores {
        special_care,
        concepts: concepts.collect(),
    }
}

/// Rounded to three digits, as by numpy.
fn rounded(score: f32) -> f32 {
    (score * 1000.0).round_ties_even() / 1000.0
}

/// The safety checker of a pipeline: the network, and the image processor of its input
/// (`feature_extractor`).
#[derive(Debug, Clone)]
pub struct SafetyChecker<B: Backend> {
    model: StableDiffusionSafetyChecker<B>,
    feature_extractor: CLIPImageProcessor,
}

impl<B: Backend> SafetyChecker<B> {
    /// A checker of two parts.
    ///
    /// # Errors
    /// If the network takes images of another size.
    pub fn new(
        model: StableDiffusionSafetyChecker<B>,
        feature_extractor: CLIPImageProcessor,
    ) -> Result<Self, PipelineError> {
        let vision = &model.config.vision_config;
        let [height, width] = feature_extractor.crop_size.dims();
        let message = if [height, width] != [vision.image_size; 2] {
            format!(
                "the feature extractor gives images of {width} x {height}, the safety checker \
                 takes {size} x {size}",
                size = vision.image_size
            )
        } else if vision.num_channels != 3 {
            let channels = vision.num_channels;
            format!("an image has 3 channels, the safety checker takes {channels}")
        } else {
            return Ok(Self {
                model,
                feature_extractor,
            });
        };
        Err(PipelineError::Parts(message))
    }

    /// Loads `safety_checker` and `feature_extractor` of a pipeline's folder.
    ///
    /// # Errors
    /// If a file is missing or damaged, or asks for something that is not computed here.
    pub fn from_pretrained(
        folder: impl Into<ModelPath>,
        options: &LoadOptions,
        device: &B::Device,
    ) -> Result<Self, PipelineError> {
        let folder = folder.into();
        let component = |name| component_path(&folder, name);
        let feature_extractor = CLIPImageProcessor::from_pretrained(component("feature_extractor"))
            .map_err(PretrainedError::from)?;
        let folder = component("safety_checker");
        let model = StableDiffusionSafetyChecker::from_pretrained_with(folder, options, device)?;
        Self::new(model, feature_extractor)
    }

    /// The scores of an image.
    ///
    /// # Errors
    /// If its embedding is not finite.
    pub fn scores(&self, image: &RgbImage) -> Result<SafetyScores, PipelineError> {
        let device = self.model.concept_embeds.device();
        let pixel_values = self.feature_extractor.preprocess(image, &device);
        let embeds = self.model.image_embeds(pixel_values);
        Ok(self.model.scores(embeds)?.remove(0))
    }

    /// Replaces flagged images by black ones, and returns which they are.
    ///
    /// # Errors
    /// As [`scores`](Self::scores).
    pub fn apply(&self, images: &mut [RgbImage]) -> Result<Vec<bool>, PipelineError> {
        let mut flags = Vec::new();
        for image in images {
            let flagged = self.scores(image)?.is_flagged();
            if flagged {
                image.pixels_mut().for_each(|pixel| *pixel = Rgb([0; 3]));
            }
            flags.push(flagged);
        }
        Ok(flags)
    }
}
