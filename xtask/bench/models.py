"""Stable Diffusion v1 and ddpm-cat-256 in full size with random weights, to be timed: 4.7 GB.

    models.py FOLDER

writes the pipelines FOLDER/sd and FOLDER/ddpm. The tokenizer is that of the tests. Needs torch, diffusers and
transformers.
"""

import pathlib
import sys

import torch
from diffusers import DDPMPipeline, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline
from transformers import CLIPTokenizer

from gpu import ddpm, text_encoder, unet, vae

TOKENIZER = pathlib.Path(__file__).parents[2] / "crates/diffuse-pipelines/tests/reference/tokenizer"


def stable_diffusion():
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER),
        unet=unet(),
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main():
    folder = pathlib.Path(sys.argv[1])
    torch.manual_seed(0)
    stable_diffusion().save_pretrained(folder / "sd")
    DDPMPipeline(ddpm(), DDPMScheduler()).save_pretrained(folder / "ddpm")


main()
