//! CLIP's text encoder (Radford et al. 2021, <https://arxiv.org/abs/2103.00020>, section 2.4): a
//! causal transformer with the layer norms before its parts.

use burn::module::{Module, Param};
use burn::nn::{Embedding, EmbeddingConfig};
use burn::tensor::{DType, Int, Tensor, backend::Backend};
use diffuse_nn::config::{ConfigError, MAX_CHANNELS, ModelConfig, check_size};
use diffuse_nn::pretrained::Pretrained;
use diffuse_nn::{Activation, LayerNorm, LayerNormConfig, ops};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::encoder::{CLIPEncoder, CLIPEncoderConfig};

/// What a [`CLIPTextModel`]'s `config.json` holds; defaults are the reference's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CLIPTextConfig {
    /// Number of token ids.
    pub vocab_size: usize,
    /// Size of the embeddings.
    pub hidden_size: usize,
    /// Size between the two layers of each feed-forward part.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Number of attention heads.
    pub num_attention_heads: usize,
    /// The most tokens a text may have.
    pub max_position_embeddings: usize,
    /// Activation of the feed-forward parts.
    pub hidden_act: Activation,
    /// Epsilon of all norms.
    pub layer_norm_eps: f64,
}

impl Default for CLIPTextConfig {
    fn default() -> Self {
        Self {
            vocab_size: 49408,
            hidden_size: 512,
            intermediate_size: 2048,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
        }
    }
}

impl ModelConfig for CLIPTextConfig {
    const CLASS: &'static str = "CLIPTextModel";
    const WEIGHTS: [&'static str; 2] = ["model", "pytorch_model"];
    const ONLY: &'static [(&'static str, &'static [&'static str])] =
        &[("model_type", &["\"clip_text_model\""])];

    /// The text part of the whole CLIP's configuration.
    fn section(mut map: Map<String, Value>) -> Map<String, Value> {
        let is_whole = map.get("model_type").is_some_and(|kind| kind == "clip");
        match map.remove("text_config") {
            Some(Value::Object(text)) if is_whole => text,
            Some(other) => {
                map.insert("text_config".into(), other);
                map
            }
            None => map,
        }
    }

    fn validate(&self) -> Result<(), ConfigError> {
        let class = Self::CLASS;
        check_size(class, "vocab_size", self.vocab_size, 1 << 24)?;
        let positions = self.max_position_embeddings;
        check_size(class, "max_position_embeddings", positions, MAX_CHANNELS)?;
        self.encoder().validate(class)
    }

    /// transformers goes by `model_type` where diffusers goes by `_class_name`.
    fn to_map(&self) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("architectures".into(), vec![Self::CLASS].into());
        map.insert("model_type".into(), "clip_text_model".into());
        match serde_json::to_value(self) {
            Ok(Value::Object(values)) => map.extend(values),
            other => unreachable!("a configuration is a JSON object: {other:?}"),
        }
        map
    }
}

impl CLIPTextConfig {
    fn encoder(&self) -> CLIPEncoderConfig {
        CLIPEncoderConfig {
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            hidden_act: self.hidden_act,
            layer_norm_eps: self.layer_norm_eps,
            causal: true,
        }
    }

    /// A model with fresh weights, which are drawn when they are first used.
    ///
    /// # Panics
    /// If the number of heads does not divide the hidden size.
    pub fn init<B: Backend>(&self, device: &B::Device) -> CLIPTextModel<B> {
        let size = self.hidden_size;
        let norm = LayerNormConfig::new(size).with_eps(self.layer_norm_eps);
        let embedding = |count| EmbeddingConfig::new(count, size).init(device);
        CLIPTextModel {
            text_model: CLIPTextTransformer {
                embeddings: CLIPTextEmbeddings {
                    token_embedding: embedding(self.vocab_size),
                    position_embedding: embedding(self.max_position_embeddings),
                },
                encoder: self.encoder().init(device),
                final_layer_norm: norm.init(device),
            },
            config: self.clone(),
        }
    }
}

/// Token and position embeddings.
#[derive(Module, Debug)]
pub struct CLIPTextEmbeddings<B: Backend> {
    /// A vector a token id.
    pub token_embedding: Embedding<B>,
    /// A vector a position.
    pub position_embedding: Embedding<B>,
}

impl<B: Backend> CLIPTextEmbeddings<B> {
    /// `[batch, tokens]` to `[batch, tokens, hidden_size]` in type `dtype`, in which the embeddings
    /// need not be kept.
    pub fn forward(&self, input_ids: Tensor<B, 2, Int>, dtype: DType) -> Tensor<B, 3> {
        let [_, tokens] = input_ids.dims();
        let positions = self.position_embedding.weight.val().narrow(0, 0, tokens);
        let embeddings = self.token_embedding.forward(input_ids);
        embeddings.cast(dtype) + positions.cast(dtype).unsqueeze()
    }
}

/// The encoder under the name that published files have it under.
#[derive(Module, Debug)]
pub struct CLIPTextTransformer<B: Backend> {
    /// Before the layers.
    pub embeddings: CLIPTextEmbeddings<B>,
    /// The layers.
    pub encoder: CLIPEncoder<B>,
    /// After the layers.
    pub final_layer_norm: LayerNorm<B>,
}

impl<B: Backend> CLIPTextTransformer<B> {
    /// The embeddings in the type that the layers compute in.
    fn embed(&self, input_ids: Tensor<B, 2, Int>) -> Tensor<B, 3> {
        let dtype = self.final_layer_norm.weight.val().dtype();
        self.embeddings.forward(input_ids, dtype)
    }
}

/// What a [`CLIPTextModel`] computes.
#[derive(Debug, Clone)]
pub struct TextOutput<B: Backend> {
    /// After the final norm: `[batch, tokens, hidden_size]`.
    pub last_hidden_state: Tensor<B, 3>,
    /// The embeddings, then the result of each layer, without the final norm: `num_hidden_layers +
    /// 1` tensors.
    pub hidden_states: Vec<Tensor<B, 3>>,
}

/// CLIP's text encoder.
#[derive(Module, Debug)]
pub struct CLIPTextModel<B: Backend> {
    /// All of it; published files have this level.
    pub text_model: CLIPTextTransformer<B>,
    #[module(skip)]
    config: CLIPTextConfig,
}

impl<B: Backend> Pretrained<B> for CLIPTextModel<B> {
    type Config = CLIPTextConfig;

    fn config(&self) -> &CLIPTextConfig {
        &self.config
    }

    fn from_config(config: &CLIPTextConfig, device: &B::Device) -> Self {
        config.init(device)
    }

    /// Files of recent versions of transformers lack the `text_model.` level; those of early ones
    /// list the positions.
    fn current_key(key: &str) -> Option<String> {
        if key.ends_with("embeddings.position_ids") {
            None
        } else if key.starts_with("text_model.") {
            Some(key.to_string())
        } else {
            Some(format!("text_model.{key}"))
        }
    }
}

impl<B: Backend> CLIPTextModel<B> {
    /// The vectors of the tokens, by id: `[vocab_size, hidden_size]`.
    pub fn token_embedding(&self) -> Tensor<B, 2> {
        self.text_model.embeddings.token_embedding.weight.val()
    }

    /// Gives the tokens from id `first_id` on the vectors `rows`, and extends the vocabulary to
    /// hold them.
    ///
    /// # Shapes
    /// - `rows`: `[tokens, hidden_size]`, in any floating point type
    ///
    /// # Panics
    /// If the width is not `hidden_size`, or there are ids below `first_id` without a vector.
    pub fn set_token_embeddings(&mut self, first_id: usize, rows: Tensor<B, 2>) {
        let weight = self.token_embedding();
        let [size, width] = weight.dims();
        let [tokens, found] = rows.dims();
        assert_eq!(found, width, "vectors have {found} numbers, not {width}");
        assert!(
            first_id <= size,
            "ids from {size} to {first_id} have no vector"
        );
        let mut parts = vec![
            weight.clone().narrow(0, 0, first_id),
            rows.cast(weight.dtype()),
        ];
        let end = first_id + tokens;
        if end < size {
            parts.push(weight.narrow(0, end, size - end));
        }
        let embedding = &mut self.text_model.embeddings.token_embedding;
        embedding.weight = Param::from_tensor(Tensor::cat(parts, 0));
        self.config.vocab_size = size.max(end);
    }

    /// All hidden states of a batch of token ids.
    ///
    /// # Shapes
    /// - `input_ids`: `[batch, tokens]`, ids in `0..vocab_size`, at most `max_position_embeddings`
    ///   tokens
    pub fn forward(&self, input_ids: Tensor<B, 2, Int>) -> TextOutput<B> {
        let transformer = &self.text_model;
        ops::on_worker::<B, _>(|| {
            let mut hidden_states = vec![transformer.embed(input_ids)];
            for layer in &transformer.encoder.layers {
                let last = hidden_states[hidden_states.len() - 1].clone();
                hidden_states.push(layer.forward(last));
            }
            let last = hidden_states[hidden_states.len() - 1].clone();
            TextOutput {
                last_hidden_state: transformer.final_layer_norm.forward(last),
                hidden_states,
            }
        })
    }

    /// The final norm of the layer `clip_skip` before the last: `[batch, tokens, hidden_size]`.
    /// Zero is `last_hidden_state`.
    ///
    /// # Panics
    /// If there are fewer than `clip_skip` layers.
    pub fn forward_skip(&self, input_ids: Tensor<B, 2, Int>, clip_skip: usize) -> Tensor<B, 3> {
        let layers = &self.text_model.encoder.layers;
        assert!(
            clip_skip <= layers.len(),
            "cannot skip {clip_skip} of {} layers",
            layers.len()
        );
        ops::on_worker::<B, _>(|| {
            let embeddings = self.text_model.embed(input_ids);
            let hidden = layers[..layers.len() - clip_skip]
                .iter()
                .fold(embeddings, |hidden, layer| layer.forward(hidden));
            self.text_model.final_layer_norm.forward(hidden)
        })
    }
}
