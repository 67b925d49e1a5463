"""`autoencoders/`: AutoencoderTiny, tiled encoding and decoding, and runs of pipelines with both.

    python autoencoders.py OUTPUT_FOLDER

OUTPUT_FOLDER is `crates/diffuse-pipelines/tests/reference` and has `sd/base` and `image_to_image`.
`autoencoders/README.md` describes the files.
"""

import shutil
import sys
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel

import checkpoints
import image_to_image
from compare import check_images, other_code_path, tolerance
from golden import quiet
from image_to_image import IMG2IMG, INPAINT
from stable_diffusion import LIGHTHOUSE, OWL, TEAPOT, TRAIN, with_text_model
from weights import ConvFit, fill, generator, input_of, save_json, smooth_fields

TXT2IMG = "StableDiffusionPipeline"
PIPELINES = {"txt2img": TXT2IMG, "img2img": IMG2IMG, "inpaint": INPAINT}
INPUTS = "../image_to_image/inputs"

TINY = {
    "_class_name": "AutoencoderTiny",
    "_diffusers_version": "0.20.0.dev0",
    "act_fn": "relu",
    "decoder_block_out_channels": [5, 5, 5, 5],
    "encoder_block_out_channels": [5, 5, 5, 5],
    "force_upcast": False,
    "in_channels": 3,
    "latent_channels": 4,
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "num_decoder_blocks": [3, 1, 2, 1],
    "num_encoder_blocks": [1, 2, 1, 2],
    "out_channels": 3,
    "scaling_factor": 1.0,
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
}


def case(name, prompt, scheduler=None, steps=5, seed=0, **rest):
    kind = name.partition("_")[0]
    opening = {"name": name, "pipeline": PIPELINES[kind], "model": "../sd/base", "prompt": prompt}
    opening |= {"scheduler": scheduler, "scheduler_options": {}, "steps": steps, "guidance_scale": 7.5, "seed": seed}
    if kind != "txt2img":
        opening["image"] = f"{INPUTS}/image.png"
    if kind == "inpaint":
        opening["mask_image"] = f"{INPUTS}/mask.png"
    return opening | rest


DDIM, DDPM, EULER_A = "DDIMScheduler", "DDPMScheduler", "EulerAncestralDiscreteScheduler"
TILED, WITH_TINY = {"vae_tiling": True}, {"vae": "tiny"}

CASES = [
    case("txt2img_tiling", LIGHTHOUSE, DDIM, seed=301, width=104, height=72, **TILED),
    case("img2img_tiling", OWL, DDPM, seed=302, strength=0.8, image=f"{INPUTS}/odd.png", **TILED),
    case("inpaint_tiling", TEAPOT, DDIM, seed=303, width=72, height=80, **TILED),
    case("txt2img_tiny", TRAIN, seed=311, width=80, height=64, **WITH_TINY),
    case("img2img_tiny", LIGHTHOUSE, EULER_A, seed=312, strength=0.8, **WITH_TINY),
    case("img2img_tiny_two_outputs_seeds", OWL, DDPM, seed=[313, 314], strength=0.8, num_images_per_prompt=2,
         **WITH_TINY),
    case("inpaint_tiny", TEAPOT, DDPM, seed=315, strength=0.8, **WITH_TINY),
    case("inpaint_tiny_9", TRAIN, EULER_A, seed=316, guidance_scale=4.0, strength=0.8,
         unet="../image_to_image/inpaint", **WITH_TINY),
]


def latents_of(colours):
    total = colours[:, :1] - colours[:, 1:2] + colours[:, 2:]
    return 2.5 * torch.cat([colours, 0.6 * total], dim=1)


def fit(model):
    """Latents are three colours and a sum of them, an eighth of the image's size, as in `sd/base`."""
    rng, regression = generator("autoencoders/tiny/decoder fit"), ConvFit(model.decoder.layers[-1])
    for height, width in [(8, 8), (9, 13), (12, 8)]:
        colours = 0.4 * smooth_fields(rng, 24, 3, height, width)
        latents = latents_of(colours)
        latents = latents + 0.3 * torch.randn(latents.shape, generator=rng)
        image = F.interpolate(colours, (8 * height, 8 * width), mode="bilinear").tanh()
        features = input_of(model.decoder.layers[-1], lambda: model.decode(latents))
        regression.add(features, (image + 1) / 2)
    regression.solve()
    rng, regression = generator("autoencoders/tiny/encoder fit"), ConvFit(model.encoder.layers[-1])
    for _ in range(3):
        image = (0.4 * smooth_fields(rng, 24, 3, 64, 64)).tanh()
        colours = F.avg_pool2d(image, 8).clamp(-0.95, 0.95).atanh()
        regression.add(input_of(model.encoder.layers[-1], lambda: model.encode(image)), latents_of(colours))
    regression.solve()


def make_tiny(folder):
    config = checkpoints.without_private(TINY)
    model = fill(AutoencoderTiny.from_config(config), "autoencoders/tiny")
    fit(model)
    model.load_state_dict(checkpoints.half(checkpoints.state(model)))
    tensors = checkpoints.half(checkpoints.state(model))
    checkpoints.save_tensors(folder / "diffusion_pytorch_model.safetensors", tensors)
    checkpoints.save_config(folder / "config.json", TINY)
    return model


def in_original_layout(folder, model):
    """TAESD's two files. The decoder starts with a layer without weights."""
    tensors = checkpoints.half(checkpoints.state(model))
    encoder, decoder = {}, {}
    for name, tensor in tensors.items():
        part, _, index, rest = name.split(".", 3)
        if part == "encoder":
            encoder[f"{index}.{rest}"] = tensor
        else:
            decoder[f"{int(index) + 1}.{rest}"] = tensor
    checkpoints.save_pickle(folder / "taesd_encoder.pth", encoder)
    checkpoints.save_pickle(folder / "taesd_decoder.pth", decoder)


def make_tiny_stage(folder, model):
    rng = generator("autoencoders/stages/tiny")
    image = (0.4 * smooth_fields(rng, 1, 3, 56, 40)).tanh()
    latents = model.encode(image).latents
    # Beyond 3, where the decoder's input is limited.
    latents = latents + 2 * torch.randn(latents.shape, generator=rng)
    checkpoints.save_tensors(folder / "tiny.safetensors", {
        "encode.image": image,
        "encode.latents": model.encode(image).latents,
        "decode.latents": latents,
        "decode.image": model.decode(latents).sample,
    })


def make_tiling_stages(folder, base, tiny):
    """Tiles of 64 x 64 pixels; the last ones are a single latent wide, and higher than the overlap."""
    rng = generator("autoencoders/stages/tiling")
    base.enable_tiling()
    latents = latents_of(0.4 * smooth_fields(rng, 1, 3, 9, 13)) / base.config.scaling_factor
    latents = latents + torch.randn(latents.shape, generator=rng)
    image = base.decode(latents).sample
    posterior = base.encode(image).latent_dist
    checkpoints.save_tensors(folder / "tiling.safetensors", {
        "decode.latents": latents,
        "decode.image": image,
        "encode.mean": posterior.mean,
        "encode.logvar": posterior.logvar,
    })
    # Tiles of 512 x 512 pixels, of which the second row begins at 56 latents.
    tiny.enable_tiling()
    latents = latents_of(0.4 * smooth_fields(rng, 1, 3, 66, 57))
    image = tiny.decode(latents).sample
    checkpoints.save_tensors(folder / "tiny_tiling.safetensors", {
        "decode.latents": latents,
        "decode.every_eighth_pixel": image[:, :, 400::8, ::8],
        "encode.latents": tiny.encode(image).latents[:, :, 50:],
    })
    tiny.disable_tiling()


def load(folder, case):
    options = {"dtype": torch.float32}
    if "unet" in case:
        options["unet"] = UNet2DConditionModel.from_pretrained(str(folder / case["unet"]), dtype=torch.float32)
    if "vae" in case:
        options["vae"] = AutoencoderTiny.from_pretrained(str(folder / case["vae"]), dtype=torch.float32)
    pipeline = getattr(diffusers, case["pipeline"]).from_pretrained(str(folder / case["model"]), **options)
    pipeline.set_progress_bar_config(disable=True)
    with_text_model(pipeline.text_encoder)
    if case.get("vae_tiling"):
        pipeline.vae.enable_tiling()
    if case["scheduler"]:
        scheduler = getattr(diffusers, case["scheduler"])
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **case["scheduler_options"])
    return pipeline


def run(folder, pipeline, case):
    case = {key: value for key, value in case.items() if key not in ("vae", "vae_tiling")}
    steps, _, images = image_to_image.run(folder, pipeline, case)
    return steps[-1], images


def make_cases(folder):
    manifest = []
    for case in CASES:
        loaded = load(folder, case)
        latents, images = run(folder, loaded, case)
        with other_code_path(loaded):
            other_latents, other_images = run(folder, loaded, case)
        check_images(case["name"], images)
        expected = {
            "images": [f"expected/{case['name']}_{i}.png" for i in range(len(images))],
            "tensors": f"expected/{case['name']}.safetensors",
        }
        checkpoints.save_tensors(folder / expected["tensors"], {"latents": latents})
        for path, image in zip(expected["images"], images):
            image.save(folder / path)
        allowed = tolerance("latents_atol", latents, other_latents, images, other_images)
        manifest.append(case | {"expected": expected, "tolerance": allowed})
    save_json(folder / "cases.json", manifest)


README = """\
# Autoencoders

Made by `xtask/golden/autoencoders.py`; versions in `made_with.json`.

| Path | What |
|---|---|
| `tiny` | an `AutoencoderTiny` in half precision; the last convolutions are fitted |
| `taesd_encoder.pth`, `taesd_decoder.pth` | the same weights in the layout of TAESD's own files |
| `stages/tiny` | its encoder and decoder |
| `stages/tiling` | the autoencoder of `sd/base` with tiling; encoded is the decoded image |
| `stages/tiny_tiling` | `tiny` with tiling, from row 50 of the latents on; encoded is the whole decoded image |
| `cases.json`, `expected` | runs of pipelines, as in `image_to_image`; `vae` replaces the model's, `vae_tiling` enables tiling |
"""


@torch.no_grad()
def main():
    if len(sys.argv) != 2:
        raise SystemExit("usage: autoencoders.py OUTPUT_FOLDER")
    quiet()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    folder = Path(sys.argv[1]) / "autoencoders"
    shutil.rmtree(folder, ignore_errors=True)
    tiny = make_tiny(folder / "tiny")
    in_original_layout(folder, tiny)
    make_tiny_stage(folder / "stages", tiny)
    base = AutoencoderKL.from_pretrained(str(folder / "../sd/base/vae"), dtype=torch.float32)
    make_tiling_stages(folder / "stages", base, tiny)
    make_cases(folder)
    (folder / "README.md").write_text(README)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    save_json(folder / "made_with.json", versions)
    print(versions)


if __name__ == "__main__":
    main()
