//! What a weights file is, by the keys in it.

use std::fmt;
use std::path::Path;

use diffuse_nn::checkpoint::{Checkpoint, CheckpointError};

/// What a weights file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileKind {
    /// A whole Stable Diffusion v1 or v2 in the original layout.
    StableDiffusion(StableDiffusionFile),
    /// An autoencoder.
    Vae,
    /// Stable Diffusion XL.
    StableDiffusionXl,
    /// The second stage of Stable Diffusion XL.
    StableDiffusionXlRefiner,
    /// Stable Diffusion 3.
    StableDiffusion3,
    /// Flux.
    Flux,
    /// A ControlNet.
    ControlNet,
    /// A network for upscaling.
    Upscaler,
    /// A network for editing images by instruction (InstructPix2Pix).
    InstructPix2Pix,
    /// A network that is conditioned on depth.
    Depth,
    /// Low-rank or similar adapters.
    Adapter,
    /// Textual inversion: embeddings of new words.
    TextualInversion,
    /// A UNet without the rest.
    UNet,
    /// A text encoder without the rest.
    TextEncoder,
    /// A tiny autoencoder (TAESD).
    TinyVae,
    /// A hypernetwork.
    Hypernetwork,
    /// A motion module of AnimateDiff.
    MotionModule,
    /// An IP-Adapter.
    IpAdapter,
    /// A T2I-Adapter.
    T2iAdapter,
    /// A network that enlarges images, such as ESRGAN.
    ImageUpscaler,
    /// Nothing that is known.
    Unknown,
}

/// Which Stable Diffusion a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StableDiffusionFile {
    /// 1 or 2.
    pub version: u8,
    /// Whether its UNet takes a mask and the masked image's latents, too.
    pub inpainting: bool,
}

impl fmt::Display for FileKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::StableDiffusion(file) => {
                let inpainting = if file.inpainting {
                    " for inpainting"
                } else {
                    ""
                };
                return write!(f, "Stable Diffusion v{}{inpainting}", file.version);
            }
            Self::Vae => "a VAE",
            Self::StableDiffusionXl => "Stable Diffusion XL",
            Self::StableDiffusionXlRefiner => "the refiner of Stable Diffusion XL",
            Self::StableDiffusion3 => "Stable Diffusion 3",
            Self::Flux => "Flux",
            Self::ControlNet => "a ControlNet",
            Self::Upscaler => "a Stable Diffusion upscaler",
            Self::InstructPix2Pix => "InstructPix2Pix",
            Self::Depth => "Stable Diffusion conditioned on depth",
            Self::Adapter => "a LoRA or another adapter",
            Self::TextualInversion => "a textual inversion",
            Self::UNet => "a UNet without text encoder and VAE",
            Self::TextEncoder => "a text encoder",
            Self::TinyVae => "a TAESD",
            Self::Hypernetwork => "a hypernetwork",
            Self::MotionModule => "a motion module of AnimateDiff",
            Self::IpAdapter => "an IP-Adapter",
            Self::T2iAdapter => "a T2I-Adapter",
            Self::ImageUpscaler => "an upscaler of images",
            Self::Unknown => "nothing known",
        })
    }
}

/// Parts of the keys of adapters.
const ADAPTERS: [&str; 9] = [
    ".lora_down.",
    ".lora_up.",
    ".lora_A.",
    ".lora_B.",
    "_lora.down.",
    "lora_linear_layer.",
    ".hada_w1",
    ".lokr_w",
    ".dora_scale",
];

impl FileKind {
    /// Tells what a file holds; no tensor is read.
    ///
    /// # Errors
    /// If it cannot be read, or is damaged.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        Ok(Self::of(&Checkpoint::open(path)?))
    }

    /// Tells what a file holds.
    pub fn of(checkpoint: &Checkpoint) -> Self {
        let tensors = checkpoint.tensors();
        let has = |key: &str| tensors.contains_key(key);
        let starts = |prefix: &str| tensors.keys().any(|key| key.starts_with(prefix));
        let contains = |part: &str| tensors.keys().any(|key| key.contains(part));

        if ADAPTERS.iter().any(|part| contains(part)) {
            return Self::Adapter;
        }
        let is_vectors = tensors
            .iter()
            .all(|(key, tensor)| tensor.shape.len() <= 2 && !key.ends_with(".weight"));
        if has("emb_params") || has("clip_l") || tensors.len() == 1 && is_vectors {
            return Self::TextualInversion;
        }
        if starts("control_model.")
            || starts("input_hint_block.")
            || starts("controlnet_cond_embedding.")
        {
            return Self::ControlNet;
        }
        if contains("joint_blocks.") {
            return Self::StableDiffusion3;
        }
        if contains("double_blocks.") {
            return Self::Flux;
        }
        let Some(unet) = super::keys::unet_prefix(checkpoint) else {
            return Self::of_part(checkpoint);
        };
        let first = &tensors[&format!("{unet}input_blocks.0.0.weight")];
        let inputs = first.shape.get(1);
        match inputs {
            Some(5) => return Self::Depth,
            Some(7) => return Self::Upscaler,
            Some(8) => return Self::InstructPix2Pix,
            _ => {}
        }
        if starts("conditioner.embedders.1.") || contains("label_emb.") && !starts("conditioner.") {
            return Self::StableDiffusionXl;
        }
        if starts("conditioner.") {
            return Self::StableDiffusionXlRefiner;
        }
        let inpainting = match inputs {
            Some(4) => false,
            Some(9) => true,
            _ => return Self::Unknown,
        };
        if !starts("cond_stage_model.") {
            return Self::UNet;
        }
        // OpenCLIP's text encoder, or the length of its embeddings.
        let version = match super::keys::text_width(checkpoint) {
            _ if starts("cond_stage_model.model.") => 2,
            Some(1024) => 2,
            _ => 1,
        };
        Self::StableDiffusion(StableDiffusionFile {
            version,
            inpainting,
        })
    }

    /// Whether such a file can be used, by itself or with a checkpoint.
    pub fn is_supported(self) -> bool {
        match self {
            Self::StableDiffusion(_) | Self::Vae | Self::TinyVae | Self::ControlNet => true,
            Self::Adapter | Self::TextualInversion => true,
            // Components, which a folder with their configurations makes usable.
            Self::UNet | Self::TextEncoder | Self::Unknown => true,
            Self::StableDiffusionXl
            | Self::StableDiffusionXlRefiner
            | Self::StableDiffusion3
            | Self::Flux
            | Self::Upscaler
            | Self::InstructPix2Pix
            | Self::Depth
            | Self::Hypernetwork
            | Self::MotionModule
            | Self::IpAdapter
            | Self::T2iAdapter
            | Self::ImageUpscaler => false,
        }
    }

    /// Of a file without a UNet in the original layout.
    fn of_part(checkpoint: &Checkpoint) -> Self {
        let tensors = checkpoint.tensors();
        let starts = |prefix: &str| tensors.keys().any(|key| key.starts_with(prefix));
        let contains = |part: &str| tensors.keys().any(|key| key.contains(part));
        // Hypernetworks are layers by the width of what they change; each half of a TAESD in the
        // original layout is a list of layers.
        let is_number = |key: &String| {
            key.split('.')
                .next()
                .is_some_and(|n| n.parse::<u16>().is_ok())
        };
        let kinds = [
            (contains(".motion_modules."), Self::MotionModule),
            (starts("ip_adapter."), Self::IpAdapter),
            (super::keys::vae_prefix(checkpoint).is_some(), Self::Vae),
            (
                starts("decoder.up_blocks.") || starts("decoder.mid_block."),
                Self::Vae,
            ),
            (
                starts("decoder.layers.")
                    || starts("encoder.layers.")
                    || contains(".conv.4.weight") && tensors.keys().all(is_number),
                Self::TinyVae,
            ),
            (starts("down_blocks.") || starts("up_blocks."), Self::UNet),
            (
                contains(".rdb1.") || contains(".RDB1."),
                Self::ImageUpscaler,
            ),
            (starts("body.") && starts("conv_in."), Self::T2iAdapter),
            (
                ["text_model.", "cond_stage_model.", "transformer.resblocks."]
                    .iter()
                    .any(|prefix| starts(prefix)),
                Self::TextEncoder,
            ),
            (tensors.keys().all(is_number), Self::Hypernetwork),
        ];
        let found = kinds.into_iter().find(|(fits, _)| *fits);
        found.map_or(Self::Unknown, |(_, kind)| kind)
    }
}
