"""`image_to_image/`: runs of the image-to-image and inpainting pipelines, and images resized by Pillow.

    python image_to_image.py OUTPUT_FOLDER

OUTPUT_FOLDER is `crates/diffuse-pipelines/tests/reference` and has `sd/base`. `image_to_image/README.md`
describes the files.
"""

import shutil
import sys
from pathlib import Path

import diffusers
import numpy as np
import PIL
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import load_image
from PIL import Image
from safetensors.torch import load_file

import checkpoints
from compare import check_images, generators, other_code_path, tolerance
from golden import quiet
from stable_diffusion import LIGHTHOUSE, NEGATIVE, OWL, TEAPOT, TRAIN, alphas, public, text_states, with_text_model
from weights import ConvFit, fill, generator, input_of, save_json, smooth_fields

IMG2IMG, INPAINT = "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"
BASE, NINE = "../sd/base", "inpaint"


def case(name, prompt, scheduler=None, options=None, steps=8, guidance_scale=7.5, seed=0, **rest):
    kind = IMG2IMG if name.startswith("img2img") else INPAINT
    opening = {"name": name, "pipeline": kind, "model": BASE, "prompt": prompt}
    if name.startswith("inpaint_9"):
        opening["unet"] = NINE
    opening |= {"scheduler": scheduler, "scheduler_options": options or {}, "steps": steps}
    opening |= {"guidance_scale": guidance_scale, "seed": seed, "image": "inputs/image.png"}
    if kind == INPAINT:
        opening["mask_image"] = "inputs/mask.png"
    return opening | rest


DDIM, DDPM, PNDM, LCM = "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LCMScheduler"
EULER, EULER_A, HEUN = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"
KDPM2_A = "KDPM2AncestralDiscreteScheduler"
UNIPC, DPM = "UniPCMultistepScheduler", "DPMSolverMultistepScheduler"
BOTH = ["inputs/image.png", "inputs/other.png"]
BOTH_MASKS = ["inputs/mask.png", "inputs/other_mask.png"]
TWO = [LIGHTHOUSE, TRAIN]

CASES = [
    case("img2img_pndm", LIGHTHOUSE, steps=10, seed=201, strength=0.5, trace=True, negative_prompt=NEGATIVE),
    case("img2img_default_strength", OWL, DPM, {"use_karras_sigmas": True}, seed=202),
    case("img2img_ddim", TEAPOT, DDIM, seed=203, strength=0.6, eta=0.5),
    case("img2img_ddpm", TRAIN, DDPM, seed=204, strength=0.5),
    case("img2img_euler", LIGHTHOUSE, EULER, seed=205, strength=0.5, trace=True),
    case("img2img_euler_a", OWL, EULER_A, seed=206, strength=0.75),
    case("img2img_heun", TEAPOT, HEUN, steps=6, seed=208, strength=0.5),
    case("img2img_kdpm2_a", TRAIN, KDPM2_A, steps=6, seed=209, strength=0.5),
    case("img2img_dpm_sde", OWL, DPM, {"algorithm_type": "sde-dpmsolver++"}, seed=210, strength=0.7),
    case("img2img_unipc", LIGHTHOUSE, UNIPC, seed=211, strength=0.6),
    case("img2img_lcm", TEAPOT, LCM, seed=212, strength=0.8),
    case("img2img_strength_1", TRAIN, DDIM, seed=213, strength=1.0),
    # 50 * 0.58 is 28.999999999999996.
    case("img2img_truncated_steps", OWL, DDIM, steps=50, seed=214, strength=0.58),
    case("img2img_timesteps", OWL, EULER, seed=215, strength=0.5,
         timesteps=[999, 870, 720, 560, 410, 270, 140, 20]),
    case("img2img_odd_size", LIGHTHOUSE, DDIM, seed=216, strength=0.5, image="inputs/odd.png"),
    case("img2img_two_outputs", TEAPOT, DDPM, seed=217, strength=0.5, num_images_per_prompt=2),
    case("img2img_two_outputs_seeds", TEAPOT, DDPM, seed=[218, 219], strength=0.5, num_images_per_prompt=2),
    case("img2img_two_inputs", TWO, EULER_A, seed=220, strength=0.6, image=BOTH),
    case("img2img_two_inputs_seeds", TWO, EULER_A, seed=[221, 222, 223, 224], strength=0.6, image=BOTH,
         num_images_per_prompt=2),
    case("img2img_no_guidance", TRAIN, guidance_scale=1.0, seed=225, strength=0.6, clip_skip=1),
    case("inpaint_4_pndm", LIGHTHOUSE, seed=231),
    case("inpaint_4_ddim", OWL, DDIM, seed=232, mask_image="inputs/soft_mask.png", trace=True),
    case("inpaint_4_ddpm", TEAPOT, DDPM, seed=233, strength=0.8),
    case("inpaint_4_euler", TRAIN, EULER, seed=234),
    case("inpaint_4_euler_a", TRAIN, EULER_A, seed=235, strength=0.6, negative_prompt=NEGATIVE),
    case("inpaint_4_heun", LIGHTHOUSE, HEUN, steps=5, seed=236, strength=0.8, trace=True),
    case("inpaint_4_dpm", OWL, DPM, seed=237, strength=0.8),
    case("inpaint_4_lcm", TEAPOT, LCM, seed=238, strength=0.8),
    case("inpaint_4_resized", TRAIN, DDIM, steps=5, seed=239, image="inputs/odd.png", width=80, height=72,
         mask_image="inputs/soft_mask.png"),
    case("inpaint_4_latents", OWL, EULER, seed=240, latents="../sd/inputs/latents.safetensors"),
    case("inpaint_4_two_outputs", TEAPOT, EULER_A, seed=241, num_images_per_prompt=2),
    case("inpaint_4_two_outputs_seeds", TEAPOT, DDPM, seed=[242, 243], strength=0.8, num_images_per_prompt=2),
    case("inpaint_4_two_inputs", TWO, DDPM, seed=244, strength=0.8, image=BOTH, mask_image=BOTH_MASKS),
    case("inpaint_4_two_inputs_seeds", TWO, DDPM, seed=[245, 246, 247, 248], strength=0.8, image=BOTH,
         mask_image=BOTH_MASKS, num_images_per_prompt=2),
    case("inpaint_4_no_guidance", OWL, guidance_scale=1.0, seed=249),
    case("inpaint_4_crop_tall", LIGHTHOUSE, DDIM, seed=250, image="inputs/odd.png", padding_mask_crop=4,
         mask_image="inputs/odd_mask_tall.png", width=64, height=64),
    case("inpaint_4_crop_wide", LIGHTHOUSE, DDIM, seed=251, image="inputs/odd.png", padding_mask_crop=3,
         mask_image="inputs/odd_mask_wide.png", width=64, height=72),
    case("inpaint_9_pndm", LIGHTHOUSE, seed=261, guidance_scale=4.0),
    case("inpaint_9_ddim", OWL, DDIM, seed=262, guidance_scale=4.0, mask_image="inputs/soft_mask.png", trace=True),
    case("inpaint_9_euler_a", TRAIN, EULER_A, seed=263, guidance_scale=4.0, strength=0.6),
    case("inpaint_9_two_outputs_seeds", TEAPOT, EULER_A, seed=[264, 265], guidance_scale=4.0, strength=0.8,
         num_images_per_prompt=2),
    case("inpaint_9_two_inputs", TWO, DDIM, seed=266, guidance_scale=4.0, image=BOTH, mask_image=BOTH_MASKS),
    case("inpaint_9_latents", OWL, EULER, seed=267, guidance_scale=4.0, latents="../sd/inputs/latents.safetensors"),
    case("inpaint_9_no_guidance", TEAPOT, guidance_scale=1.0, seed=268),
]


def smooth_image(name, width, height):
    """A smooth image with some fine detail, which shows how it is resampled."""
    rng = generator(f"image_to_image/inputs/{name}")
    smooth = 0.45 * smooth_fields(rng, 1, 3, height, width)[0] + 0.1 * torch.randn(3, height, width, generator=rng)
    levels = ((smooth.tanh() + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def mask(width, height, box, soft=0):
    """White in the box `left, top, right, bottom`, grey around it."""
    left, top, right, bottom = box
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    distance = np.maximum(np.maximum(left - x, x - right + 1), np.maximum(top - y, y - bottom + 1))
    levels = 255 * (distance <= 0) if soft == 0 else 255 - 255 * np.clip(distance, 0, soft) // soft
    return Image.fromarray(levels.astype(np.uint8))


def make_inputs(folder):
    folder.mkdir(parents=True)
    inputs = {
        "image": smooth_image("image", 64, 64),
        "other": smooth_image("other", 64, 64),
        "odd": smooth_image("odd", 100, 70),
        "mask": mask(64, 64, (20, 9, 48, 43)),
        "other_mask": mask(64, 64, (4, 30, 40, 60)),
        "soft_mask": mask(64, 64, (26, 18, 50, 44), soft=9),
        "odd_mask_tall": mask(100, 70, (70, 12, 84, 55), soft=5),
        "odd_mask_wide": mask(100, 70, (9, 40, 80, 58), soft=4),
    }
    for name, image in inputs.items():
        image.save(folder / f"{name}.png")
    return inputs


def fit_unet(model, encoder):
    """Noise in noisy smooth latents, of which a part is known through the other five channels."""
    rng, regression, levels = generator("image_to_image/unet/fit"), ConvFit(model.conv_out), alphas()
    for _ in range(10):
        ids = torch.full((48, 77), encoder.config.vocab_size - 1)
        ids[:, :9] = torch.randint(256, encoder.config.vocab_size - 2, (48, 9), generator=rng)
        latents = smooth_fields(rng, 48, 4, 8, 8)
        noise = torch.randn(latents.shape, generator=rng)
        timestep = torch.randint(0, 1000, (48,), generator=rng)
        alpha = levels[timestep].view(-1, 1, 1, 1)
        holes = (torch.rand(48, 1, 8, 8, generator=rng) < 0.5).float()
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        sample = torch.cat([noisy, holes, latents * (1 - holes)], dim=1)
        features = input_of(model.conv_out, lambda: model(sample, timestep, text_states(encoder, ids)))
        regression.add(features, noise, weight=((1 - alpha) / alpha).clamp(0.05, 10).flatten())
    regression.solve()


def make_unet(folder, encoder):
    config = checkpoints.two_levels(in_channels=9, layers_per_block=1)
    model = fill(UNet2DConditionModel.from_config(public(config)), "image_to_image/inpaint/unet")
    fit_unet(model, encoder)
    model.load_state_dict(checkpoints.half(checkpoints.state(model)))
    checkpoints.save_tensors(
        folder / "diffusion_pytorch_model.safetensors", checkpoints.half(checkpoints.state(model))
    )
    checkpoints.save_config(folder / "config.json", config)


def load(folder, case):
    kind = {IMG2IMG: StableDiffusionImg2ImgPipeline, INPAINT: StableDiffusionInpaintPipeline}[case["pipeline"]]
    options = {"dtype": torch.float32}
    if "unet" in case:
        options["unet"] = UNet2DConditionModel.from_pretrained(str(folder / case["unet"]), dtype=torch.float32)
    pipeline = kind.from_pretrained(str(folder / case["model"]), **options)
    pipeline.set_progress_bar_config(disable=True)
    with_text_model(pipeline.text_encoder)
    if case["scheduler"]:
        scheduler = getattr(diffusers, case["scheduler"])
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **case["scheduler_options"])
    return pipeline


NOT_FOR_THE_CALL = {"name", "pipeline", "model", "unet", "scheduler", "scheduler_options", "steps", "seed", "trace"}


def run(folder, pipeline, case, not_for_the_call=NOT_FOR_THE_CALL):
    """The latents after each step, its timesteps, and the images."""
    call = {key: value for key, value in case.items() if key not in not_for_the_call}
    for key in ("image", "mask_image", "control_image"):
        if isinstance(call.get(key), list):
            call[key] = [load_image(str(folder / path)) for path in call[key]]
        elif key in call:
            call[key] = load_image(str(folder / call[key]))
    if "latents" in call:
        call["latents"] = load_file(str(folder / call["latents"]))["latents"]
    steps, timesteps = [], []

    def remember(_, __, timestep, tensors):
        steps.append(tensors["latents"].clone())
        timesteps.append(timestep)
        return {}

    images = pipeline(
        num_inference_steps=case["steps"],
        generator=generators(case["seed"]),
        callback_on_step_end=remember,
        **call,
    ).images
    return torch.stack(steps), torch.stack(timesteps), images


def make_cases(folder, cases=CASES, load=load, run=run):
    manifest = []
    (folder / "expected").mkdir()
    for case in cases:
        loaded = load(folder, case)
        steps, timesteps, images = run(folder, loaded, case)
        with other_code_path(loaded):
            other_steps, _, other_images = run(folder, loaded, case)
        check_images(case["name"], images)
        expected = {
            "images": [f"expected/{case['name']}_{i}.png" for i in range(len(images))],
            "tensors": f"expected/{case['name']}.safetensors",
        }
        tensors = {"latents": steps[-1]}
        if case.get("trace"):
            tensors |= {"latents_after_each_step": steps, "timesteps": timesteps}
        checkpoints.save_tensors(folder / expected["tensors"], tensors)
        for path, image in zip(expected["images"], images):
            image.save(folder / path)
        allowed = tolerance("latents_atol", steps[-1], other_steps[-1], images, other_images)
        manifest.append(case | {"expected": expected, "tolerance": allowed})
    save_json(folder / "cases.json", manifest)


RESIZED = [(96, 64), (100, 64), (48, 70), (13, 9), (150, 33), (7, 171), (1, 1)]
FILLED = [(64, 64), (64, 72), (24, 97), (97, 24), (33, 20)]
REGIONS = [
    # Mask, size of the run, padding.
    ("odd_mask_tall", (64, 64), 0),
    ("odd_mask_tall", (64, 64), 32),
    ("odd_mask_tall", (128, 64), 5),
    ("odd_mask_wide", (64, 64), 0),
    ("odd_mask_wide", (64, 128), 7),
    ("odd_mask_wide", (128, 64), 90),
    ("mask", (64, 72), 3),
    ("other_mask", (72, 64), 1),
]


def make_resized(folder, inputs):
    """What Pillow and the image processor make of an image: to be equal to the byte."""
    (folder / "resized").mkdir()
    processor, rows = VaeImageProcessor(), []

    def row(kind, image, **rest):
        path = f"resized/{kind}_{len(rows)}.png"
        image.save(folder / path)
        rows.append({"kind": kind, "expected": path} | rest)

    odd = inputs["odd"]
    for size in RESIZED:
        row("lanczos", odd.resize(size, Image.LANCZOS), size=size)
        row("bicubic", odd.resize(size, Image.BICUBIC), size=size)
    for width, height in FILLED:
        row("fill", processor.resize(odd, height, width, "fill"), size=(width, height))
        row("crop", processor.resize(odd, height, width, "crop"), size=(width, height))
    for name, size, padding in REGIONS:
        region = processor.get_crop_region(inputs[name], *size, pad=padding)
        rows.append({"kind": "region", "mask": name, "size": size, "padding": padding, "expected": region})
    other = smooth_image("overlay", 100, 70)
    other.save(folder / "resized" / "overlay_input.png")
    row("overlay", processor.apply_overlay(inputs["odd_mask_tall"], odd, other), mask="odd_mask_tall")
    save_json(folder / "resized.json", rows)


def make_files(folder):
    """One image in each format, turned and with transparency where there is some, and what `load_image` reads."""
    image, exif = smooth_image("turned", 24, 16), Image.Exif()
    exif[0x0112] = 6
    alpha = Image.fromarray(np.arange(24 * 16, dtype=np.uint8).reshape(16, 24))
    clear = image.copy()
    clear.putalpha(alpha)
    clear.save(folder / "turned.png", exif=exif)
    clear.save(folder / "turned.webp", lossless=True, exact=True, exif=exif)
    image.save(folder / "turned.jpg", quality=98, subsampling=0, exif=exif)
    image.convert("L").save(folder / "grey.png")
    for name in ("turned.png", "turned.webp", "turned.jpg", "grey.png"):
        load_image(str(folder / name)).save(folder / f"{name}.expected.png")


README = """\
# Image to image and inpainting with `sd/base`

Made by `xtask/golden/image_to_image.py`; versions in `made_with.json`.

| Path | What |
|---|---|
| `cases.json`, `expected` | runs of `StableDiffusionImg2ImgPipeline` and `StableDiffusionInpaintPipeline`, as in `sd`; `unet` replaces the model's UNet |
| `inpaint` | a UNet that takes 9 channels, in half precision; its last convolution is fitted |
| `inputs` | images and masks; `NAME.expected.png` is what `load_image` reads from `NAME` |
| `resized.json`, `resized` | `lanczos`, `bicubic`: `odd.png` resized by Pillow; `fill`, `crop`: by the image processor's modes; `region`: the part that `padding_mask_crop` takes; `overlay`: `odd.png` over `overlay_input.png` where the mask is black |
"""


@torch.no_grad()
def main():
    if len(sys.argv) != 2:
        raise SystemExit("usage: image_to_image.py OUTPUT_FOLDER")
    quiet()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    folder = Path(sys.argv[1]) / "image_to_image"
    shutil.rmtree(folder, ignore_errors=True)
    inputs = make_inputs(folder / "inputs")
    make_files(folder / "inputs")
    make_resized(folder, inputs)
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(str(folder / BASE), dtype=torch.float32)
    make_unet(folder / NINE, pipeline.text_encoder)
    make_cases(folder)
    (folder / "README.md").write_text(README)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "pillow": PIL.__version__}
    save_json(folder / "made_with.json", versions)
    print(versions)


if __name__ == "__main__":
    main()
