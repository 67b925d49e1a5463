//! CLIP's vision model (Radford et al. 2021, <https://arxiv.org/abs/2103.00020>, section 2.4): a
//! vision transformer (Dosovitskiy et al. 2020, <https://arxiv.org/abs/2010.11929>) with one more
//! layer norm before its layers.

use burn::module::{Initializer, Module, Param};
use burn::nn::{Embedding, EmbeddingConfig};
use burn::tensor::{Tensor, backend::Backend};
use diffuse_nn::config::{ConfigError, MAX_CHANNELS, ModelConfig, check_size};
use diffuse_nn::pretrained::Pretrained;
use diffuse_nn::{Activation, Conv2d, Conv2dConfig, LayerNorm, LayerNormConfig, ops};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::encoder::{CLIPEncoder, CLIPEncoderConfig};

/// What a [`CLIPVisionModel`]'s `config.json` holds; defaults are those of transformers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CLIPVisionConfig {
    /// Size of the embeddings.
    pub hidden_size: usize,
    /// Size between the two layers of each feed-forward part.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Number of attention heads.
    pub num_attention_heads: usize,
    /// Channels of an image.
    pub num_channels: usize,
    /// Height and width of an image.
    pub image_size: usize,
    /// Height and width of a patch.
    pub patch_size: usize,
    /// Activation of the feed-forward parts.
    pub hidden_act: Activation,
    /// Epsilon of all norms.
    pub layer_norm_eps: f64,
}

impl Default for CLIPVisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: 224,
            patch_size: 32,
            hidden_act: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
        }
    }
}

impl ModelConfig for CLIPVisionConfig {
    const CLASS: &'static str = "CLIPVisionModel";
    const WEIGHTS: [&'static str; 2] = ["model", "pytorch_model"];
    const ONLY: &'static [(&'static str, &'static [&'static str])] =
        &[("model_type", &["\"clip_vision_model\""])];

    fn validate(&self) -> Result<(), ConfigError> {
        let class = Self::CLASS;
        check_size(class, "num_channels", self.num_channels, MAX_CHANNELS)?;
        check_size(class, "image_size", self.image_size, MAX_CHANNELS)?;
        check_size(class, "patch_size", self.patch_size, self.image_size)?;
        self.encoder().validate(class)
    }

    /// transformers goes by `model_type` where diffusers goes by `_class_name`.
    fn to_map(&self) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("architectures".into(), vec![Self::CLASS].into());
        map.insert("model_type".into(), "clip_vision_model".into());
        match serde_json::to_value(self) {
            Ok(Value::Object(values)) => map.extend(values),
            other => unreachable!("a configuration is a JSON object: {other:?}"),
        }
        map
    }
}

impl CLIPVisionConfig {
    fn encoder(&self) -> CLIPEncoderConfig {
        CLIPEncoderConfig {
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            hidden_act: self.hidden_act,
            layer_norm_eps: self.layer_norm_eps,
            causal: false,
        }
    }

    /// A model with fresh weights, which are drawn when they are first used.
    ///
    /// # Panics
    /// If the number of heads does not divide the hidden size.
    pub fn init<B: Backend>(&self, device: &B::Device) -> CLIPVisionModel<B> {
        let size = self.hidden_size;
        let norm = LayerNormConfig::new(size).with_eps(self.layer_norm_eps);
        let mut patch_embedding = Conv2dConfig::new([self.num_channels, size], self.patch_size)
            .with_stride(self.patch_size)
            .init(device);
        patch_embedding.bias = None;
        let patches = (self.image_size / self.patch_size).pow(2);
        let initializer = Initializer::Normal {
            mean: 0.0,
            std: (size as f64).powf(-0.5),
        };
        CLIPVisionModel {
            vision_model: CLIPVisionTransformer {
                embeddings: CLIPVisionEmbeddings {
                    class_embedding: initializer.init([size], device),
                    patch_embedding,
                    position_embedding: EmbeddingConfig::new(patches + 1, size).init(device),
                },
                pre_layrnorm: norm.init(device),
                encoder: self.encoder().init(device),
                post_layernorm: norm.init(device),
            },
            config: self.clone(),
        }
    }
}

/// Embeddings of the patches, after that of the class token.
#[derive(Module, Debug)]
pub struct CLIPVisionEmbeddings<B: Backend> {
    /// `[hidden_size]`
    pub class_embedding: Param<Tensor<B, 1>>,
    /// A convolution without bias whose stride is its size.
    pub patch_embedding: Conv2d<B>,
    /// A vector a position.
    pub position_embedding: Embedding<B>,
}

impl<B: Backend> CLIPVisionEmbeddings<B> {
    /// `[batch, num_channels, image_size, image_size]` to `[batch, 1 + patches, hidden_size]`.
    pub fn forward(&self, pixel_values: Tensor<B, 4>) -> Tensor<B, 3> {
        let [batch, _, _, _] = pixel_values.dims();
        let patches = ops::image_to_tokens(self.patch_embedding.forward(pixel_values));
        let class = self.class_embedding.val().unsqueeze::<3>();
        let embeddings = Tensor::cat(vec![class.repeat_dim(0, batch), patches], 1);
        let positions = self.position_embedding.weight.val();
        let dtype = embeddings.dtype();
        embeddings + positions.cast(dtype).unsqueeze()
    }
}

/// The model under the name that published files have it under.
#[derive(Module, Debug)]
pub struct CLIPVisionTransformer<B: Backend> {
    /// Before the layers.
    pub embeddings: CLIPVisionEmbeddings<B>,
    /// Before the layers; the name is misspelled in published files.
    pub pre_layrnorm: LayerNorm<B>,
    /// The layers.
    pub encoder: CLIPEncoder<B>,
    /// Of the class token, after the layers.
    pub post_layernorm: LayerNorm<B>,
}

/// The output of a [`CLIPVisionModel`].
#[derive(Debug, Clone)]
pub struct VisionOutput<B: Backend> {
    /// After the last layer, without a norm: `[batch, 1 + patches, hidden_size]`.
    pub last_hidden_state: Tensor<B, 3>,
    /// The class token after the last norm: `[batch, hidden_size]`.
    pub pooler_output: Tensor<B, 2>,
}

/// CLIP's vision model, without the projection.
#[derive(Module, Debug)]
pub struct CLIPVisionModel<B: Backend> {
    /// All of it; published files have this level.
    pub vision_model: CLIPVisionTransformer<B>,
    #[module(skip)]
    config: CLIPVisionConfig,
}

impl<B: Backend> Pretrained<B> for CLIPVisionModel<B> {
    type Config = CLIPVisionConfig;

    fn config(&self) -> &CLIPVisionConfig {
        &self.config
    }

    fn from_config(config: &CLIPVisionConfig, device: &B::Device) -> Self {
        config.init(device)
    }

    /// Files of recent versions of transformers lack the `vision_model.` level; those of early ones
    /// list the positions.
    fn current_key(key: &str) -> Option<String> {
        if key.ends_with("embeddings.position_ids") {
            None
        } else if key.starts_with("vision_model.") {
            Some(key.to_string())
        } else {
            Some(format!("vision_model.{key}"))
        }
    }
}

impl<B: Backend> CLIPVisionModel<B> {
    /// Encodes images.
    ///
    /// # Shapes
    /// - `pixel_values`: `[batch, num_channels, image_size, image_size]`, normalised with CLIP's
    ///   mean and standard deviation, in the type that the model computes in
    ///
    /// # Panics
    /// If the images have another size.
    pub fn forward(&self, pixel_values: Tensor<B, 4>) -> VisionOutput<B> {
        let [batch, _, height, width] = pixel_values.dims();
        let (size, hidden) = (self.config.image_size, self.config.hidden_size);
        assert_eq!(
            [height, width],
            [size; 2],
            "the vision model takes images of {size} x {size}"
        );
        let model = &self.vision_model;
        ops::on_worker::<B, _>(|| {
            let embeddings = model.embeddings.forward(pixel_values);
            let layers = &model.encoder.layers;
            let last_hidden_state = layers
                .iter()
                .fold(model.pre_layrnorm.forward(embeddings), |x, layer| {
                    layer.forward(x)
                });
            let class = last_hidden_state.clone().narrow(1, 0, 1);
            VisionOutput {
                last_hidden_state,
                pooler_output: model.post_layernorm.forward(class).reshape([batch, hidden]),
            }
        })
    }
}
