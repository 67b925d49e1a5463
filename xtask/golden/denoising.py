"""`denoising/`: runs with ControlNets, with FreeU and with DeepCache.

    python denoising.py OUTPUT_FOLDER

OUTPUT_FOLDER is `crates/diffuse-pipelines/tests/reference`, and has `sd/base` and `image_to_image`. Needs `DeepCache` and
`opencv-python-headless` beside Diffusers. `denoising/README.md` describes the files.
"""

import contextlib
import shutil
import sys
from pathlib import Path

import cv2
import diffusers
import numpy as np
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from PIL import Image

import checkpoints
import image_to_image
import ldm
from golden import quiet
from image_to_image import smooth_image
from stable_diffusion import LIGHTHOUSE, NEGATIVE, OWL, TEAPOT, TRAIN, public, text_states, with_text_model
from weights import fill, generator, save_json

PIPELINES = {
    "StableDiffusionPipeline": StableDiffusionPipeline,
    "StableDiffusionControlNetPipeline": StableDiffusionControlNetPipeline,
    "StableDiffusionControlNetImg2ImgPipeline": StableDiffusionControlNetImg2ImgPipeline,
    "StableDiffusionControlNetInpaintPipeline": StableDiffusionControlNetInpaintPipeline,
}
BASE, INPUTS = "../sd/base", "../image_to_image/inputs"
IMAGE, OTHER, ODD = f"{INPUTS}/image.png", f"{INPUTS}/other.png", f"{INPUTS}/odd.png"


def case(name, prompt, scheduler=None, options=None, steps=6, guidance_scale=7.5, seed=0, **rest):
    opening = {"name": name, "pipeline": "StableDiffusionPipeline", "model": BASE, "prompt": prompt}
    opening |= {"scheduler": scheduler, "scheduler_options": options or {}, "steps": steps}
    return opening | {"guidance_scale": guidance_scale, "seed": seed} | rest


def control(name, prompt, scheduler=None, options=None, kind="", controlnet=("first",), **rest):
    rest = {"control_image": OTHER} | rest
    pipeline = f"StableDiffusionControlNet{kind}Pipeline"
    return case(name, prompt, scheduler, options, **rest) | {"pipeline": pipeline, "controlnet": list(controlnet)}


DDIM, DDPM, HEUN = "DDIMScheduler", "DDPMScheduler", "HeunDiscreteScheduler"
EULER, EULER_A, UNIPC = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "UniPCMultistepScheduler"
BOTH = {"controlnet": ("first", "bgr"), "control_image": [OTHER, IMAGE]}
SIZE = {"width": 64, "height": 64}
MASK = {"image": IMAGE, "mask_image": f"{INPUTS}/mask.png", **SIZE}

CASES = [
    control("control_pndm", LIGHTHOUSE, seed=301, trace=True),
    control("control_scale", OWL, DDIM, seed=302, controlnet_conditioning_scale=0.6, negative_prompt=NEGATIVE),
    control("control_bgr", TEAPOT, EULER, seed=303, controlnet=("bgr",)),
    control("control_part", TRAIN, UNIPC, steps=8, seed=304, control_guidance_start=0.2, control_guidance_end=0.7),
    # Heun has 11 timesteps.
    control("control_part_heun", OWL, HEUN, seed=305, control_guidance_start=0.1, control_guidance_end=0.5),
    control("control_guess", LIGHTHOUSE, DDIM, seed=306, guess_mode=True, guidance_scale=4.0),
    control("control_guess_unguided", TEAPOT, DDIM, seed=307, guess_mode=True, guidance_scale=1.0),
    control("control_pooled", TRAIN, EULER, seed=308, controlnet=("pooled",)),
    control("control_two", OWL, UNIPC, seed=309, **BOTH, controlnet_conditioning_scale=[0.7, 0.4],
            control_guidance_start=[0.0, 0.3], control_guidance_end=[0.8, 1.0]),
    control("control_two_guess", TEAPOT, DDIM, seed=310, **BOTH, guess_mode=True, guidance_scale=4.0),
    control("control_odd_size", LIGHTHOUSE, EULER, seed=311, control_image=ODD),
    control("control_resized", TRAIN, DDIM, seed=312, control_image=ODD, width=72, height=80),
    control("control_two_prompts", [OWL, TRAIN], EULER_A, seed=[313, 314, 315, 316], control_image=[OTHER, IMAGE],
            num_images_per_prompt=2),
    control("control_two_images", TEAPOT, DDPM, seed=317, num_images_per_prompt=2),
    control("control_img2img", LIGHTHOUSE, EULER_A, kind="Img2Img", seed=321, image=IMAGE, strength=0.7,
            control_guidance_start=0.2, controlnet_conditioning_scale=0.8),
    control("control_inpaint_4", OWL, DDIM, kind="Inpaint", seed=322, **MASK, controlnet_conditioning_scale=1.0),
    control("control_inpaint_9", TRAIN, EULER, kind="Inpaint", seed=323, **MASK, strength=0.8,
            controlnet_conditioning_scale=0.5,
            unet="../image_to_image/inpaint", controlnet=("two-levels",), guidance_scale=4.0),
    case("freeu", LIGHTHOUSE, DDIM, seed=331, freeu=[0.9, 0.2, 1.5, 1.6], trace=True),
    case("freeu_odd_size", OWL, EULER, seed=332, freeu=[0.6, 0.4, 1.1, 1.2], width=72, height=104),
    case("freeu_unguided", TEAPOT, UNIPC, seed=333, freeu=[1.2, 0.9, 0.8, 1.3], guidance_scale=1.0),
    case("deep_cache_2", LIGHTHOUSE, DDIM, seed=341, cache_interval=2, cache_branch_id=0, trace=True),
    case("deep_cache_3", OWL, EULER, steps=8, seed=342, cache_interval=3, cache_branch_id=1),
    case("deep_cache_two_images", TEAPOT, DDPM, seed=343, cache_interval=2, cache_branch_id=1, num_images_per_prompt=2),
]


def config(unet, **changes):
    """A ControlNet's configuration for a UNet's."""
    ours = ["act_fn", "attention_head_dim", "block_out_channels", "cross_attention_dim", "down_block_types"]
    ours += ["downsample_padding", "flip_sin_to_cos", "freq_shift", "in_channels", "layers_per_block"]
    ours += ["mid_block_scale_factor", "norm_eps", "norm_num_groups"]
    own = {"_class_name": "ControlNetModel", "_diffusers_version": "0.18.0"} | {key: unet[key] for key in ours}
    return own | {"conditioning_embedding_out_channels": [4, 4, 8, 8]} | changes


def make_networks(folder):
    networks = {
        "first": config(checkpoints.unet()),
        "bgr": config(checkpoints.unet(), controlnet_conditioning_channel_order="bgr"),
        "pooled": config(checkpoints.unet(), global_pool_conditions=True),
        "two-levels": config(checkpoints.two_levels(layers_per_block=1)),
    }
    for name, values in networks.items():
        model = fill(ControlNetModel.from_config(public(values)), f"denoising/{name}")
        tensors = checkpoints.half(checkpoints.state(model))
        checkpoints.save_tensors(folder / name / "diffusion_pytorch_model.safetensors", tensors)
        checkpoints.save_config(folder / name / "config.json", values)
    make_original(folder, networks["first"])


def controlnet(folder, name):
    return ControlNetModel.from_pretrained(str(folder / name), dtype=torch.float32)


def make_original(folder, values):
    """`first` in the original layout, which Diffusers reads back."""
    tensors = {name: t.half() for name, t in checkpoints.state(controlnet(folder, "first")).items()}
    original = {f"control_model.{ldm.controlnet_name(name, values)}": tensor for name, tensor in tensors.items()}
    back = convert_controlnet_checkpoint(dict(original), values)
    if back.keys() != tensors.keys() or any((back[name] != tensors[name]).any() for name in back):
        raise SystemExit("Diffusers reads other tensors from the original layout")
    checkpoints.save_tensors(folder / "original.safetensors", original)


def make_stages(folder):
    """What a ControlNet adds, and a UNet with it."""
    encoder = StableDiffusionPipeline.from_pretrained(str(folder / BASE), dtype=torch.float32).text_encoder
    unet = UNet2DConditionModel.from_pretrained(str(folder / BASE / "unet"), dtype=torch.float32)
    rng = generator("denoising/stages")
    ids = torch.full((2, 77), encoder.config.vocab_size - 1)
    ids[:, :5] = torch.randint(256, encoder.config.vocab_size - 2, (2, 5), generator=rng)
    given = {
        "sample": torch.randn(2, 4, 9, 6, generator=rng),
        "timestep": torch.tensor([981.0, 40.0]),
        "encoder_hidden_states": text_states(encoder, ids),
        "controlnet_cond": torch.rand(2, 3, 72, 48, generator=rng),
    }
    for name in ("first", "bgr", "pooled"):
        down, mid = controlnet(folder, name)(**given, return_dict=False)
        tensors = given | {f"down.{i}": tensor for i, tensor in enumerate(down)} | {"mid": mid}
        inputs = {key: value for key, value in given.items() if key != "controlnet_cond"}
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        tensors["output"] = unet(**inputs, **residuals).sample
        checkpoints.save_tensors(folder / "stages" / f"{name}.safetensors", tensors)


def load(folder, case):
    options = {"dtype": torch.float32}
    if "unet" in case:
        options["unet"] = UNet2DConditionModel.from_pretrained(str(folder / case["unet"]), dtype=torch.float32)
    if "controlnet" in case:
        networks = [controlnet(folder, name) for name in case["controlnet"]]
        options["controlnet"] = networks[0] if len(networks) == 1 else MultiControlNetModel(networks)
    pipeline = PIPELINES[case["pipeline"]].from_pretrained(str(folder / case["model"]), **options)
    pipeline.set_progress_bar_config(disable=True)
    with_text_model(pipeline.text_encoder)
    if case["scheduler"]:
        scheduler = getattr(diffusers, case["scheduler"])
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **case["scheduler_options"])
    if "freeu" in case:
        pipeline.enable_freeu(*case["freeu"])
    return pipeline


@contextlib.contextmanager
def deep_cache(pipeline, case):
    if "cache_interval" not in case:
        yield
        return
    helper = DeepCacheSDHelper(pipe=pipeline)
    helper.set_params(cache_interval=case["cache_interval"], cache_branch_id=case["cache_branch_id"])
    helper.enable()
    yield
    helper.disable()


NOT_FOR_THE_CALL = image_to_image.NOT_FOR_THE_CALL | {"controlnet", "freeu", "cache_interval", "cache_branch_id"}


def run(folder, pipeline, case):
    if case["pipeline"] == "StableDiffusionControlNetPipeline":
        case = {"image" if key == "control_image" else key: value for key, value in case.items()}
    with deep_cache(pipeline, case):
        return image_to_image.run(folder, pipeline, case, NOT_FOR_THE_CALL)


def make_edges(folder):
    """What OpenCV's `Canny` makes of an image."""
    (folder / "edges").mkdir()
    image = smooth_image("edges", 90, 61)
    image.save(folder / "edges" / "image.png")
    for low, high in [(100, 200), (20, 60), (200, 100), (0, 0)]:
        edges = cv2.Canny(np.asarray(image), low, high)
        Image.fromarray(edges).convert("RGB").save(folder / "edges" / f"{low}_{high}.png", optimize=True)


README = """\
# ControlNets, FreeU and DeepCache with `sd/base`

Made by `xtask/golden/denoising.py`; versions in `made_with.json`.

| Path | What |
|---|---|
| `cases.json`, `expected` | runs, as in `sd`; `controlnet` names folders, `control_image` what they see; `freeu` has `s1`, `s2`, `b1`, `b2`; `cache_interval` and `cache_branch_id` are DeepCache's |
| `first`, `bgr`, `pooled`, `two-levels` | ControlNets with pseudo-random weights, in half precision |
| `original.safetensors` | `first` in the original layout |
| `stages` | what a ControlNet adds, and the UNet's output with it |
| `edges` | what OpenCV's `Canny` makes of `image.png`, by both thresholds |
"""


@torch.no_grad()
def main():
    if len(sys.argv) != 2:
        raise SystemExit("usage: denoising.py OUTPUT_FOLDER")
    quiet()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    folder = Path(sys.argv[1]) / "denoising"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make_networks(folder)
    make_stages(folder)
    make_edges(folder)
    image_to_image.make_cases(folder, CASES, load, run)
    (folder / "README.md").write_text(README)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "opencv": cv2.__version__}
    save_json(folder / "made_with.json", versions)
    print(versions)


if __name__ == "__main__":
    main()
