"""Stable Diffusion v1 and ddpm-cat-256 in full size with random weights, to be timed: 4.7 GB.

    models.py FOLDER

writes the pipelines FOLDER/sd and FOLDER/ddpm. The tokenizer is that of the tests. Needs torch, diffusers and
transformers.
"""

import pathlib
import sys

import torch
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline
from diffusers import UNet2DConditionModel, UNet2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENIZER = pathlib.Path(__file__).parents[2] / "crates/diffuse-pipelines/tests/reference/tokenizer"


def stable_diffusion():
    attending, plain = "CrossAttn{}Block2D", "{}Block2D"
    return StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=512,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)),
        tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER),
        unet=UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            down_block_types=(*[attending.format("Down")] * 3, plain.format("Down")),
            up_block_types=(plain.format("Up"), *[attending.format("Up")] * 3),
            cross_attention_dim=768,
            attention_head_dim=8,
        ),
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def ddpm():
    unet = UNet2DModel(
        sample_size=256,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=(*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )
    return DDPMPipeline(unet, DDPMScheduler())


def main():
    folder = pathlib.Path(sys.argv[1])
    torch.manual_seed(0)
    stable_diffusion().save_pretrained(folder / "sd")
    ddpm().save_pretrained(folder / "ddpm")


main()
