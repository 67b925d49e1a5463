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
from PIL import Image

UNPACK = ["cargo", "run", "--quiet", "--package", "diffuse-builtin", "--example", "unpack", "--"]
TEXT_CASES = {
    "house": ("a small red house on snow at night", 0, None),
    "trees": ("two trees and a moon over the sea", 1, None),
    "boat": ("a blue boat on the sea at sunset", 2, None),
    "dutch-angle": ("a red house and a tree in a meadow by day", 3, "dutch-angle"),
}
# From the meadow's image: a house painted into it, then another time of day.
MEADOW = ("meadow", "a meadow by day", 2)
HOUSE = ("house-in-meadow", "a red house in a meadow by day", 0, [16, 44, 64, 68])
SUNSET = ("meadow-at-sunset", "a red house in a meadow at sunset", 0, 0.7)
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


def options(seed):
    generator = torch.Generator("cpu").manual_seed(seed)
    return dict(num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generator)


def make_paintings(pipeline, folder):
    name, prompt, seed = MEADOW
    meadow = pipeline(prompt, **options(seed)).images[0]
    meadow.save(folder / f"{name}.png")
    cases = [{"name": name, "prompt": prompt, "seed": seed, "lora": None}]

    inpaint = diffusers.StableDiffusionInpaintPipeline.from_pipe(pipeline)
    inpaint.set_progress_bar_config(disable=True)
    name, prompt, seed, (left, top, width, height) = HOUSE
    mask = Image.new("RGB", meadow.size)
    mask.paste((255, 255, 255), (left, top, left + width, top + height))
    house = inpaint(prompt, image=meadow, mask_image=mask, **options(seed)).images[0]
    house.save(folder / f"{name}.png")
    case = {"name": name, "prompt": prompt, "seed": seed, "lora": None, "image": MEADOW[0]}
    cases.append(case | {"mask_box": [left, top, width, height]})

    variant = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    variant.set_progress_bar_config(disable=True)
    name, prompt, seed, strength = SUNSET
    variant(prompt, image=house, strength=strength, **options(seed)).images[0].save(folder / f"{name}.png")
    case = {"name": name, "prompt": prompt, "seed": seed, "lora": None, "image": HOUSE[0]}
    cases.append(case | {"strength": strength})
    return cases


def make_images(models, folder):
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(models / "scenes", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    cases = make_paintings(pipeline, folder)
    for name, (prompt, seed, lora) in TEXT_CASES.items():
        if lora:
            pipeline.load_lora_weights(models, weight_name=f"{lora}.safetensors")
        pipeline(prompt, **options(seed)).images[0].save(folder / f"{name}.png")
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
