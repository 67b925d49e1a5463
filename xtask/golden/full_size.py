"""`full-size.json`: the published configurations, and every name and shape of their files, without any weights."""

import json

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel

import checkpoints

CAT = checkpoints.unet_2d(
    block_out_channels=[128, 128, 256, 256, 512, 512],
    down_block_types=["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    norm_num_groups=32,
    sample_size=256,
    up_block_types=["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
)
CIFAR = checkpoints.unet_2d(
    block_out_channels=[128, 256, 256, 256],
    down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    norm_num_groups=32,
    sample_size=32,
    up_block_types=["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
)
UNET = checkpoints.unet(
    _diffusers_version="0.6.0",
    block_out_channels=[320, 640, 1280, 1280],
    cross_attention_dim=768,
    layers_per_block=2,
    norm_num_groups=32,
    sample_size=64,
)
VAE = checkpoints.vae(
    _diffusers_version="0.6.0",
    block_out_channels=[128, 256, 512, 512],
    layers_per_block=2,
    norm_num_groups=32,
    sample_size=512,
)
TEXT = checkpoints.text_encoder(
    49408,
    hidden_size=768,
    intermediate_size=3072,
    num_attention_heads=12,
    num_hidden_layers=12,
    projection_dim=768,
)
SAFETY_CHECKER = {
    "architectures": ["StableDiffusionSafetyChecker"],
    "model_type": "clip",
    "projection_dim": 768,
    "vision_config": {
        "hidden_act": "quick_gelu",
        "hidden_size": 1024,
        "image_size": 224,
        "intermediate_size": 4096,
        "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 512,
    },
}


def vision_model_names(tensors):
    """The names that CLIP's vision model has in the published file."""
    return {key.replace("vision_model.", "vision_model.vision_model.", 1): tensor for key, tensor in tensors.items()}


# The name, the class, its configuration, the names of the published file, and the known number of parameters.
MODELS = [
    ("ddpm-cat-256", UNet2DModel, CAT, checkpoints.old_attention_names, 113_673_219),
    ("ddpm-cifar10-32", UNet2DModel, CIFAR, checkpoints.old_attention_names, 35_746_307),
    ("sd-v1-unet", UNet2DConditionModel, UNET, dict, 859_520_964),
    ("sd-v1-inpaint-unet", UNet2DConditionModel, UNET | {"in_channels": 9}, dict, 859_535_364),
    ("sd-v1-vae", AutoencoderKL, VAE, checkpoints.old_attention_names, 83_653_863),
    ("sd-v1-text-encoder", CLIPTextModel, TEXT, checkpoints.text_model_names, 123_060_480),
    ("sd-v1-safety-checker", StableDiffusionSafetyChecker, SAFETY_CHECKER, vision_model_names, 303_981_588),
]

TRANSFORMERS = {CLIPTextModel: CLIPTextConfig, StableDiffusionSafetyChecker: CLIPConfig}


def make(folder):
    lines = []
    for name, kind, config, published_names, known in MODELS:
        public = checkpoints.without_private(config)
        with torch.device("meta"):
            if kind in TRANSFORMERS:
                model = kind(TRANSFORMERS[kind](**public))
            else:
                model = kind.from_config(public)
        tensors = {key: list(tensor.shape) for key, tensor in model.named_parameters()}
        parameters = sum(tensor.numel() for tensor in model.parameters())
        if parameters != known:
            raise SystemExit(f"{name} has {parameters} parameters, not {known}")
        row = {
            "class": kind.__name__,
            "config": config,
            "parameters": parameters,
            "tensors": dict(sorted(published_names(tensors).items())),
        }
        lines.append(f"{json.dumps(name)}:{json.dumps(row, separators=(',', ':'))}")
    (folder / "full-size.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
