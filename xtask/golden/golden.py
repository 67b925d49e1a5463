"""Makes the reference values that the tests compare with: small checkpoints, and what Python computes with them.

    python golden.py OUTPUT_FOLDER

The folder then holds

    ddpm/             UNet2DModel checkpoints, their stages, and runs of DDPMPipeline and DDIMPipeline
    sd/               Stable Diffusion v1 checkpoints, their stages, and runs of StableDiffusionPipeline
    tokenizer/        CLIP's vocabulary, and prompts with their ids
    full-size.json    names and shapes of the published models
    refused.json      configurations and calls that the reference refuses
    made_with.json    the versions it was made with

It needs no network and no graphics card, only a virtual environment:

    python -m venv venv
    venv/bin/pip install torch diffusers transformers open_clip_torch

(of open_clip_torch only the vocabulary file is read). Everything runs on the CPU with one thread in float32, every
random number comes from a generator seeded by a name, and two runs on one machine give the same files.
"""

import json
import shutil
import sys
import warnings
from pathlib import Path


def quiet():
    import diffusers
    import transformers

    warnings.filterwarnings("ignore")
    for package in (diffusers, transformers):
        package.utils.logging.set_verbosity_error()
        package.utils.logging.disable_progress_bar()


def main():
    if len(sys.argv) != 2:
        raise SystemExit("usage: golden.py OUTPUT_FOLDER")
    folder = Path(sys.argv[1])

    import diffusers
    import numpy
    import torch
    import transformers

    versions = {
        "set": "in-repo",
        "seed": 0,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
    }
    for package in ("torch", "diffusers", "transformers"):
        print(package, versions[package])
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    quiet()

    import ddpm
    import full_size
    import refused
    import stable_diffusion
    import tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    for part in ("ddpm", "sd", "tokenizer"):
        shutil.rmtree(folder / part, ignore_errors=True)
    print("tokenizer")
    tokenizer.make(folder / "tokenizer")
    print("ddpm")
    ddpm.make(folder / "ddpm")
    print("sd")
    stable_diffusion.make(folder / "sd")
    print("full size")
    full_size.make(folder)
    print("refused")
    refused.make(folder)
    (folder / "made_with.json").write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    main()
