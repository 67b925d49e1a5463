//! Class labels, which are embedded and added to the time embedding (Dhariwal & Nichol 2021,
//! <https://arxiv.org/abs/2105.05233>).

use std::marker::PhantomData;

use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig};
use burn::tensor::{DType, Int, Tensor, TensorData, backend::Backend};
use diffuse_nn::config::{ConfigError, MAX_CHANNELS, check_size};
use diffuse_nn::{Activation, Linear, LinearConfig, TimestepEmbedding, TimestepEmbeddingConfig};
use serde::{Deserialize, Serialize};

/// How class labels are embedded (`class_embed_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ClassEmbedType {
    /// Numbers, embedded as timesteps are.
    Timestep,
    /// Vectors of the size of the time embedding, as they are.
    Identity,
    /// Vectors, through two linear layers.
    Projection,
    /// Vectors, through one linear layer.
    SimpleProjection,
}

/// Class labels of a batch, one for each row.
#[derive(Debug, Clone)]
pub enum ClassLabels<B: Backend> {
    /// Indices of classes, for a network with `num_class_embeds`.
    Classes(Vec<usize>),
    /// Numbers, for [`ClassEmbedType::Timestep`].
    Numbers(Vec<f64>),
    /// Vectors, `[batch, features]`, for the other types.
    Features(Tensor<B, 2>),
}

impl<B: Backend> ClassLabels<B> {
    fn rows(&self) -> usize {
        match self {
            ClassLabels::Classes(classes) => classes.len(),
            ClassLabels::Numbers(numbers) => numbers.len(),
            ClassLabels::Features(features) => features.dims()[0],
        }
    }
}

/// What the keys of a configuration say about class labels.
pub(crate) struct ClassEmbeddingConfig {
    pub class_embed_type: Option<ClassEmbedType>,
    pub num_class_embeds: Option<usize>,
    /// Size of the labels of projections (`projection_class_embeddings_input_dim`).
    pub projection_dim: Option<usize>,
    /// Size of the embedding before the first linear layer.
    pub timestep_dim: usize,
    pub time_embed_dim: usize,
    pub act_fn: Activation,
}

impl ClassEmbeddingConfig {
    pub fn validate(&self, class: &'static str) -> Result<(), ConfigError> {
        match self.class_embed_type {
            None => check_size(
                class,
                "num_class_embeds",
                self.num_class_embeds.unwrap_or(1),
                MAX_CHANNELS,
            ),
            Some(ClassEmbedType::Projection | ClassEmbedType::SimpleProjection) => {
                let key = "projection_class_embeddings_input_dim";
                match self.projection_dim {
                    Some(dim) => check_size(class, key, dim, MAX_CHANNELS),
                    None => {
                        let supported = format!("1 to {MAX_CHANNELS} for projections");
                        Err(ConfigError::unsupported(class, key, (), supported))
                    }
                }
            }
            Some(ClassEmbedType::Timestep | ClassEmbedType::Identity) => Ok(()),
        }
    }

    pub fn init<B: Backend>(&self, device: &B::Device) -> Option<ClassEmbedding<B>> {
        let dim = self.time_embed_dim;
        let projection_dim = self.projection_dim.unwrap_or(0);
        let two_layers = |from| TimestepEmbeddingConfig::new(from, dim);
        Some(match self.class_embed_type {
            None => {
                let count = self.num_class_embeds?;
                ClassEmbedding::Classes(EmbeddingConfig::new(count, dim).init(device))
            }
            Some(ClassEmbedType::Timestep) => {
                let config = two_layers(self.timestep_dim).with_act_fn(self.act_fn);
                ClassEmbedding::Timestep(config.init(device))
            }
            Some(ClassEmbedType::Identity) => ClassEmbedding::Identity(PhantomData),
            Some(ClassEmbedType::Projection) => {
                ClassEmbedding::Projection(two_layers(projection_dim).init(device))
            }
            Some(ClassEmbedType::SimpleProjection) => {
                let config = LinearConfig::new(projection_dim, dim);
                ClassEmbedding::SimpleProjection(config.init(device))
            }
        })
    }
}

/// The embedding of class labels.
#[derive(Module, Debug)]
pub enum ClassEmbedding<B: Backend> {
    /// A vector a class.
    Classes(Embedding<B>),
    /// See [`ClassEmbedType::Timestep`].
    Timestep(TimestepEmbedding<B>),
    /// See [`ClassEmbedType::Identity`].
    Identity(PhantomData<B>),
    /// See [`ClassEmbedType::Projection`].
    Projection(TimestepEmbedding<B>),
    /// See [`ClassEmbedType::SimpleProjection`].
    SimpleProjection(Linear<B>),
}

impl<B: Backend> ClassEmbedding<B> {
    /// The embedding in `dtype`: `[batch, time_embed_dim]`. `time_proj` is the fixed embedding of
    /// numbers.
    ///
    /// # Panics
    /// If the labels are not of the kind that this network takes, their number is not `batch`, or a
    /// class does not exist.
    pub(crate) fn forward(
        &self,
        labels: &ClassLabels<B>,
        batch: usize,
        dtype: DType,
        time_proj: impl Fn(&[f64]) -> Tensor<B, 2>,
    ) -> Tensor<B, 2> {
        assert_eq!(labels.rows(), batch, "class labels and batch rows differ");
        match (self, labels) {
            (ClassEmbedding::Classes(embedding), ClassLabels::Classes(classes)) => {
                let weight = embedding.weight.val();
                let [count, _] = weight.dims();
                let known = classes.iter().all(|class| *class < count);
                assert!(known, "of {count} classes, {classes:?} do not all exist");
                let indices = classes.iter().map(|class| *class as i64).collect();
                let indices = TensorData::new::<i64, _>(indices, [batch]);
                let indices = Tensor::<B, 1, Int>::from_data(indices, &weight.device());
                weight.select(0, indices).cast(dtype)
            }
            (ClassEmbedding::Timestep(embedding), ClassLabels::Numbers(numbers)) => {
                embedding.forward(time_proj(numbers), None)
            }
            (ClassEmbedding::Identity(_), ClassLabels::Features(features)) => features.clone(),
            (ClassEmbedding::Projection(projection), ClassLabels::Features(features)) => {
                projection.forward(features.clone(), None)
            }
            (ClassEmbedding::SimpleProjection(projection), ClassLabels::Features(features)) => {
                projection.forward(features.clone())
            }
            (
                ClassEmbedding::Classes(_)
                | ClassEmbedding::Timestep(_)
                | ClassEmbedding::Identity(_)
                | ClassEmbedding::Projection(_)
                | ClassEmbedding::SimpleProjection(_),
                ClassLabels::Classes(_) | ClassLabels::Numbers(_) | ClassLabels::Features(_),
            ) => panic!("this network takes {}", self.takes()),
        }
    }

    fn takes(&self) -> &'static str {
        match self {
            ClassEmbedding::Classes(_) => "indices of classes",
            ClassEmbedding::Timestep(_) => "numbers as class labels",
            ClassEmbedding::Identity(_)
            | ClassEmbedding::Projection(_)
            | ClassEmbedding::SimpleProjection(_) => "vectors as class labels",
        }
    }
}
