//! The configurations that the original layout leaves out: those of the published models.

use diffuse_clip::CLIPTextConfig;
use diffuse_nn::Activation;
use diffuse_schedulers::SchedulerConfig;
use diffuse_unet::{ControlNetConfig, PerLevel, SampleSize, UNet2DConditionConfig};
use diffuse_vae::{AutoencoderKLConfig, AutoencoderKLDownBlock, AutoencoderKLUpBlock};
use serde_json::{Value, json};

use super::StableDiffusionFile;

/// The UNet of Stable Diffusion.
pub fn unet(file: &StableDiffusionFile) -> UNet2DConditionConfig {
    let config = UNet2DConditionConfig {
        sample_size: Some(SampleSize::Square(64)),
        in_channels: if file.inpainting { 9 } else { 4 },
        cross_attention_dim: PerLevel::Same(768),
        attention_head_dim: PerLevel::Same(8),
        ..UNet2DConditionConfig::default()
    };
    if file.version == 1 {
        return config;
    }
    UNet2DConditionConfig {
        cross_attention_dim: PerLevel::Same(1024),
        attention_head_dim: PerLevel::Each(vec![5, 10, 20, 20]),
        use_linear_projection: true,
        ..config
    }
}

/// A ControlNet of Stable Diffusion, v2's if it takes its text embeddings.
pub fn controlnet(text_width: Option<usize>) -> ControlNetConfig {
    let version = if text_width == Some(1024) { 2 } else { 1 };
    let unet = unet(&StableDiffusionFile {
        version,
        inpainting: false,
    });
    ControlNetConfig {
        cross_attention_dim: if version == 2 { 1024 } else { 768 },
        attention_head_dim: unet.attention_head_dim,
        use_linear_projection: unet.use_linear_projection,
        ..ControlNetConfig::default()
    }
}

/// The autoencoder of Stable Diffusion.
pub fn vae() -> AutoencoderKLConfig {
    AutoencoderKLConfig {
        down_block_types: vec![AutoencoderKLDownBlock::DownEncoderBlock2D; 4],
        up_block_types: vec![AutoencoderKLUpBlock::UpDecoderBlock2D; 4],
        block_out_channels: vec![128, 256, 512, 512],
        layers_per_block: 2,
        sample_size: SampleSize::Square(512),
        ..AutoencoderKLConfig::default()
    }
}

/// The text encoder: OpenAI's ViT-L/14, or OpenCLIP's ViT-H/14 without its last layer.
pub fn text_encoder(file: &StableDiffusionFile) -> CLIPTextConfig {
    if file.version == 1 {
        CLIPTextConfig {
            hidden_size: 768,
            intermediate_size: 3072,
            num_attention_heads: 12,
            ..CLIPTextConfig::default()
        }
    } else {
        CLIPTextConfig {
            hidden_size: 1024,
            intermediate_size: 4096,
            num_attention_heads: 16,
            num_hidden_layers: 23,
            hidden_act: Activation::Gelu,
            ..CLIPTextConfig::default()
        }
    }
}

/// The scheduler: PNDM for networks that predict noise, DDIM for those that predict velocity, as in
/// the published repositories.
pub fn scheduler(predicts_velocity: bool) -> SchedulerConfig {
    let class = if predicts_velocity {
        "DDIMScheduler"
    } else {
        "PNDMScheduler"
    };
    let values = json!({
        "_class_name": class,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": if predicts_velocity { "v_prediction" } else { "epsilon" },
        "set_alpha_to_one": false,
        "skip_prk_steps": true,
        "steps_offset": 1,
        "clip_sample": false,
    });
    let Value::Object(values) = values else {
        unreachable!("a JSON object");
    };
    SchedulerConfig::from_values(values)
}
