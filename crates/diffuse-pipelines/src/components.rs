//! The classes of components: what their files are called, and what they hold.

use std::path::{Path, PathBuf};

use burn::tensor::backend::Backend;
use diffuse_clip::{CLIPTextConfig, CLIPTextModel};
use diffuse_nn::ModelPath;
use diffuse_nn::checkpoint::{Parameter, parameters};
use diffuse_nn::config::{ConfigError, ModelConfig};
use diffuse_nn::pretrained::{LoadOptions, PretrainedError, find_weights};
use diffuse_unet::{
    ClassEmbedType, ControlNetConfig, ControlNetModel, Pretrained, UNet2DConditionConfig,
    UNet2DConditionModel, UNet2DConfig, UNet2DModel,
};
use diffuse_vae::{
    Autoencoder, AutoencoderKL, AutoencoderKLConfig, AutoencoderTiny, AutoencoderTinyConfig,
};

use crate::PipelineKind;
use crate::safety_checker::{SafetyCheckerConfig, StableDiffusionSafetyChecker};

/// What a component is, by its class in Diffusers or transformers.
pub(crate) enum ComponentClass {
    /// A network with a configuration and weights.
    Model(ModelClass),
    /// CLIP's tokenizer.
    Tokenizer,
    /// A scheduler, perhaps one that is not supported.
    Scheduler,
    /// The image processor of the safety checker.
    FeatureExtractor,
}

impl ComponentClass {
    /// The class of this name, if it is known.
    pub fn of<B: Backend>(name: &str) -> Option<Self> {
        Some(match name {
            "UNet2DModel" => Self::Model(ModelClass::new::<B, UNet2DModel<B>>()),
            "UNet2DConditionModel" => Self::Model(ModelClass::new::<B, UNet2DConditionModel<B>>()),
            "ControlNetModel" => Self::Model(ModelClass::new::<B, ControlNetModel<B>>()),
            "AutoencoderKL" => Self::Model(ModelClass::new::<B, AutoencoderKL<B>>()),
            "AutoencoderTiny" => Self::Model(ModelClass::new::<B, AutoencoderTiny<B>>()),
            "CLIPTextModel" => Self::Model(ModelClass::new::<B, CLIPTextModel<B>>()),
            "CLIPTokenizer" | "CLIPTokenizerFast" => Self::Tokenizer,
            SafetyCheckerConfig::CLASS => {
                Self::Model(ModelClass::new::<B, StableDiffusionSafetyChecker<B>>())
            }
            _ if FEATURE_EXTRACTORS.contains(&name) => Self::FeatureExtractor,
            _ if name.ends_with("Scheduler") => Self::Scheduler,
            _ => return None,
        })
    }
}

/// A network's files.
pub(crate) struct ModelClass {
    /// Stems of its weights file, as `.safetensors` and as `.bin`.
    pub weights: [&'static str; 2],
    /// Today's key of a tensor; `None` for one that is not a weight.
    pub current_key: fn(&str) -> Option<String>,
    parameters: fn(&Path) -> Result<Vec<Parameter>, ConfigError>,
}

impl ModelClass {
    fn new<B: Backend, M: Pretrained<B>>() -> Self {
        Self {
            weights: M::Config::WEIGHTS,
            current_key: M::current_key,
            parameters: |config| {
                let config = M::Config::from_file(config)?;
                Ok(parameters(&M::from_config(&config, &B::Device::default())))
            },
        }
    }

    /// The parameters that a `config.json` describes.
    ///
    /// # Errors
    /// If the file cannot be read, or asks for something that is not computed here.
    pub fn parameters(&self, config: &Path) -> Result<Vec<Parameter>, ConfigError> {
        (self.parameters)(config)
    }
}

/// Classes of the safety checker's image processor.
pub(crate) const FEATURE_EXTRACTORS: [&str; 4] = [
    "CLIPImageProcessor",
    "CLIPImageProcessorFast",
    "CLIPImageProcessorPil",
    "CLIPFeatureExtractor",
];

/// Stems of the weights file of a class of models.
pub(crate) fn weights_stems(class: &str) -> Option<[&'static str; 2]> {
    let stems = [
        (UNet2DConfig::CLASS, UNet2DConfig::WEIGHTS),
        (UNet2DConditionConfig::CLASS, UNet2DConditionConfig::WEIGHTS),
        (ControlNetConfig::CLASS, ControlNetConfig::WEIGHTS),
        (AutoencoderKLConfig::CLASS, AutoencoderKLConfig::WEIGHTS),
        (AutoencoderTinyConfig::CLASS, AutoencoderTinyConfig::WEIGHTS),
        (CLIPTextConfig::CLASS, CLIPTextConfig::WEIGHTS),
        (SafetyCheckerConfig::CLASS, SafetyCheckerConfig::WEIGHTS),
    ];
    stems
        .into_iter()
        .find_map(|(name, stems)| (name == class).then_some(stems))
}

/// Checks that a network takes no class labels: the pipelines have none.
pub(crate) fn check_class_labels<C: ModelConfig>(
    class_embed_type: Option<ClassEmbedType>,
    num_class_embeds: Option<usize>,
) -> Result<(), ConfigError> {
    let supported = "only null in a pipeline";
    if class_embed_type.is_some() {
        let (key, value) = ("class_embed_type", class_embed_type);
        Err(ConfigError::unsupported(C::CLASS, key, value, supported))
    } else if num_class_embeds.is_some() {
        let (key, value) = ("num_class_embeds", num_class_embeds);
        Err(ConfigError::unsupported(C::CLASS, key, value, supported))
    } else {
        Ok(())
    }
}

/// Loads an autoencoder of a class, by default an [`AutoencoderKL`].
pub(crate) fn load_autoencoder<B: Backend>(
    class: Option<&str>,
    folder: &ModelPath,
    options: &LoadOptions,
    device: &B::Device,
) -> Result<Autoencoder<B>, PretrainedError> {
    Ok(match class {
        Some(AutoencoderTinyConfig::CLASS) => {
            AutoencoderTiny::from_pretrained_with(folder, options, device)?.into()
        }
        _ => AutoencoderKL::from_pretrained_with(folder, options, device)?.into(),
    })
}

/// Where a component's files are: in its own folder or, as in the DDPM repositories, in the
/// pipeline's.
pub fn component_folder(folder: &Path, component: &str) -> PathBuf {
    let folder = component_path(&folder.into(), component);
    folder.path().to_path_buf()
}

/// [`component_folder`] on disk or in memory.
pub(crate) fn component_path(folder: &ModelPath, component: &str) -> ModelPath {
    let own = folder.join(component);
    if own.is_dir() { own } else { folder.clone() }
}

/// How to load one component: as Diffusers does, from its plain weights where other components have
/// the variant that is asked for, but not this one.
pub(crate) fn component_options(
    folder: &ModelPath,
    kind: PipelineKind,
    component: &str,
    options: &LoadOptions,
) -> LoadOptions {
    let variant = options.variant.as_deref();
    let components = kind.components().iter().chain(kind.optional_components());
    let mut with_variant = components.filter(|(component, classes)| {
        let folder = component_path(folder, component);
        let stems = weights_stems(classes[0]);
        stems.is_some_and(|stems| find_weights(&folder, stems, variant).is_ok())
    });
    if let Some(variant) = variant
        && with_variant.clone().all(|(other, _)| *other != component)
        && with_variant.next().is_some()
    {
        log::warn!("`{component}` has no variant `{variant}`; its plain weights are loaded");
        return LoadOptions {
            variant: None,
            ..options.clone()
        };
    }
    options.clone()
}
