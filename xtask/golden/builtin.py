"""What the Python reference makes of the small models that the program carries.

    python builtin.py OUTPUT_FOLDER

Run from the workspace's folder, with cargo, which unpacks the models. Writes an image of each case in `cases.json`,
which it writes as well; the program's tests make the same images from the same seeds. Everything runs on the CPU in
float32.
"""

import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import diffusers
import torch
import transformers

UNPACK = ["cargo", "run", "--quiet", "--package", "diffuse-builtin", "--example", "unpack", "--"]
TEXT_CASES = {
    "house": ("a small red house on snow at night", 0, None),
    "trees": ("two trees and a moon over the sea", 1, None),
    "boat": ("a blue boat on the sea at sunset", 2, None),
    "dutch-angle": ("a red house and a tree in a meadow by day", 3, "dutch-angle"),
}
STEPS, GUIDANCE = 25, 2.0
DDPM_STEPS, DDPM_SEED = 100, 0


def main():
    if len(sys.argv) != 2:
        raise SystemExit("usage: builtin.py OUTPUT_FOLDER")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as models:
        subprocess.run([*UNPACK, models], check=True)
        make_images(Path(models), folder)


def make_images(models, folder):
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(models / "scenes", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    cases = []
    for name, (prompt, seed, lora) in TEXT_CASES.items():
        if lora:
            pipeline.load_lora_weights(models, weight_name=f"{lora}.safetensors")
        generator = torch.Generator("cpu").manual_seed(seed)
        options = dict(num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generator)
        pipeline(prompt, **options).images[0].save(folder / f"{name}.png")
        cases.append({"name": name, "prompt": prompt, "seed": seed, "lora": lora})

    pipeline = diffusers.DDPMPipeline.from_pretrained(models / "scenes-ddpm", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(DDPM_SEED)
    pipeline(num_inference_steps=DDPM_STEPS, generator=generator).images[0].save(folder / "ddpm.png")
    cases.append({"name": "ddpm", "prompt": None, "seed": DDPM_SEED, "lora": None})

    made_with = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    made_with["transformers"] = transformers.__version__
    print(made_with)
    text = json.dumps({"made_with": made_with, "cases": cases}, indent=1)
    (folder / "cases.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
