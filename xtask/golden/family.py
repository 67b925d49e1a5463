"""`family/`: relatives of Stable Diffusion v1 and of DDPM, and the latents of short runs.

    python family.py OUTPUT_FOLDER

OUTPUT_FOLDER is `crates/diffuse-pipelines/tests/reference` and has `sd/base`. Weights are pseudo-random and
stored in half precision; they are widened before computing. `family/README.md` describes the folders.
"""

import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMPipeline, DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from transformers import CLIPTextConfig, CLIPTextModel

import checkpoints
import ddpm
from compare import generators, other_code_path, tolerance
from golden import quiet
from weights import fill, generator, save_json

PROMPTS = ["a lighthouse on a cliff in the rain", "an owl reading a newspaper, etching"]
NEGATIVE = "blurry, bad quality"


def halved(model):
    """Weights that half precision holds exactly."""
    model.load_state_dict(checkpoints.half(checkpoints.state(model)))
    return model


def save(folder, config, tensors, name="diffusion_pytorch_model"):
    checkpoints.save_config(folder / "config.json", config)
    checkpoints.save_tensors(folder / f"{name}.safetensors", checkpoints.half(tensors))


def make_component(kind, folder, config, label):
    model = halved(fill(kind.from_config(checkpoints.without_private(config)), label))
    save(folder, config, checkpoints.state(model))
    return model


def small_vae(**changes):
    return checkpoints.vae(block_out_channels=[4, 4, 4, 8], **changes)


# --- Stable Diffusion 2 ---------------------------------------------------------------------------

SD2_WIDTH = 8
# What `probe` finds: below -1 is velocity.
SD2_PROBE = -1.6
SD2_UNET = checkpoints.two_levels(
    attention_head_dim=[2, 4],
    block_out_channels=[8, 8],
    cross_attention_dim=SD2_WIDTH,
    use_linear_projection=True,
)
# OpenCLIP's encoder has 24 layers, of which the last is not used.
SD2_TEXT = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_size": SD2_WIDTH,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 2 * SD2_WIDTH,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 2,
    "num_hidden_layers": 23,
    "pad_token_id": 1,
    "projection_dim": 16,
    "torch_dtype": "float32",
    "transformers_version": "4.25.0.dev0",
    "vocab_size": 641,
}
SD2_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.8.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
TURBO_SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.24.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "sigma_max": None,
    "sigma_min": None,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
    "timestep_type": "discrete",
    "trained_betas": None,
    "use_karras_sigmas": False,
}


def make_text_encoder(folder, config, label):
    encoder = fill(CLIPTextModel(CLIPTextConfig(**config)), label)
    save(folder, config, checkpoints.text_model_names(checkpoints.state(encoder)), "model")


def index(scheduler, **changes):
    values = checkpoints.SD_INDEX | {"scheduler": ["diffusers", scheduler["_class_name"]]}
    return values | changes


def save_tokenizer(source, folder, pad=None):
    shutil.copytree(source, folder)
    if pad:
        # Version 2 pads with "!", which is token 0.
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            text = (folder / name).read_text()
            (folder / name).write_text(text.replace('"pad_token": "<|endoftext|>"', f'"pad_token": "{pad}"'))


def probe(unet):
    """How A1111 tells velocity from noise: the mean of output less input for a constant input."""
    x = torch.full((1, 4, 8, 8), 0.5)
    context = torch.full((1, 2, unet.config.cross_attention_dim), 0.5)
    return float((unet(x, torch.tensor([999]), context).sample - x).mean())


def make_sd2(folder, base):
    """`sd2`, and the scheduler of `sd-turbo` to be laid over it."""
    unet = fill(UNet2DConditionModel.from_config(checkpoints.without_private(SD2_UNET)), "family/sd2/unet")
    unet.conv_out.bias += SD2_PROBE - probe(unet)
    print(f"  sd2: mean of output less input {probe(halved(unet)):.2f}")
    save(folder / "sd2" / "unet", SD2_UNET, checkpoints.state(unet))
    make_component(AutoencoderKL, folder / "sd2" / "vae", small_vae(), "family/sd2/vae")
    make_text_encoder(folder / "sd2" / "text_encoder", SD2_TEXT, "family/sd2/text_encoder")
    save_tokenizer(base / "tokenizer", folder / "sd2" / "tokenizer", "!")
    for name, scheduler in [("sd2", SD2_SCHEDULER), ("sd-turbo", TURBO_SCHEDULER)]:
        checkpoints.save_config(folder / name / "scheduler" / "scheduler_config.json", scheduler)
        checkpoints.save_config(folder / name / "model_index.json", index(scheduler))


# --- smaller relatives of version 1 ----------------------------------------------------------------

V1_WIDTH = 8
V1_TEXT = SD2_TEXT | {"hidden_act": "quick_gelu", "num_hidden_layers": 2, "projection_dim": V1_WIDTH}
SMALL_UNET = checkpoints.two_levels(
    attention_head_dim=2, block_out_channels=[8, 8], cross_attention_dim=V1_WIDTH, layers_per_block=1
)
# As the distilled models of BK-SDM: every level attends, and nothing lies between down and up.
DISTILLED_UNET = SMALL_UNET | {
    "down_block_types": ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2,
    "mid_block_type": None,
}
LCM_UNET = SMALL_UNET | {"time_cond_proj_dim": 12}
LCM_SCHEDULER = {
    "_class_name": "LCMScheduler",
    "_diffusers_version": "0.22.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "num_train_timesteps": 1000,
    "original_inference_steps": 50,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "thresholding": False,
    "timestep_scaling": 10.0,
    "timestep_spacing": "leading",
    "trained_betas": None,
}


def make_v1(folder, base):
    """`distilled`, and the UNet and scheduler of `lcm` to be laid over it."""
    make_component(AutoencoderKL, folder / "distilled" / "vae", small_vae(), "family/distilled/vae")
    make_text_encoder(folder / "distilled" / "text_encoder", V1_TEXT, "family/distilled/text_encoder")
    save_tokenizer(base / "tokenizer", folder / "distilled" / "tokenizer")
    parts = [
        ("distilled", DISTILLED_UNET, checkpoints.PNDM_SCHEDULER, {}),
        ("lcm", LCM_UNET, LCM_SCHEDULER, {"_class_name": "LatentConsistencyModelPipeline"}),
    ]
    for name, config, scheduler, changes in parts:
        make_component(UNet2DConditionModel, folder / name / "unet", config, f"family/{name}/unet")
        checkpoints.save_config(folder / name / "scheduler" / "scheduler_config.json", scheduler)
        checkpoints.save_config(folder / name / "model_index.json", index(scheduler, **changes))


# --- unconditional models --------------------------------------------------------------------------

DDPM_TODAY = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.12.0.dev0",
    "beta_end": 0.02,
    "beta_schedule": "squaredcos_cap_v2",
    "beta_start": 0.0001,
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "variance_type": "fixed_small",
}
TWO_LEVELS_2D = checkpoints.unet_2d(
    attention_head_dim=4,
    block_out_channels=[4, 8],
    down_block_types=["DownBlock2D", "AttnDownBlock2D"],
    layers_per_block=1,
    up_block_types=["AttnUpBlock2D", "UpBlock2D"],
)
TODAY_2D = {
    "act_fn": "silu",
    "add_attention": True,
    "attention_head_dim": 4,
    "attn_norm_num_groups": None,
    "class_embed_type": None,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2D",
    "norm_eps": 1e-05,
    "num_class_embeds": None,
    "num_train_timesteps": None,
    "resnet_time_scale_shift": "default",
    "upsample_type": "conv",
}
UNETS_2D = {
    # The butterflies of Diffusers' training tutorial, in subfolders.
    "butterflies": checkpoints.unet_2d(
        **TODAY_2D,
        block_out_channels=[4, 4, 8, 8],
        layers_per_block=1,
        down_block_types=["DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    ),
    # google/ddpm-cifar10-32.
    "cifar": checkpoints.unet_2d(
        block_out_channels=[4, 8, 8],
        down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    ),
    "attention-everywhere": TWO_LEVELS_2D
    | {"down_block_types": ["AttnDownBlock2D"] * 2, "up_block_types": ["AttnUpBlock2D"] * 2},
    "resnet-samplers": TWO_LEVELS_2D
    | {
        "down_block_types": ["AttnDownBlock2D"] * 2,
        "up_block_types": ["AttnUpBlock2D"] * 2,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "resnet-blocks": TWO_LEVELS_2D
    | {
        "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
    },
    "no-attention": TWO_LEVELS_2D
    | {"add_attention": False, "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2},
    "gelu": TWO_LEVELS_2D | {"act_fn": "gelu"},
    "grey": TWO_LEVELS_2D | {"in_channels": 1, "out_channels": 1, "resnet_time_scale_shift": "scale_shift"},
}
FOLDERS_2D = {"butterflies", "resnet-blocks"}


def make_ddpm(folder):
    for name, config in UNETS_2D.items():
        parts = name in FOLDERS_2D
        at = folder / name
        model = fill(UNet2DModel.from_config(checkpoints.without_private(config)), f"family/{name}")
        ddpm.fit(model, f"family/{name}")
        save(at / "unet" if parts else at, config, checkpoints.state(model))
        scheduler = checkpoints.DDPM_SCHEDULER
        if name == "butterflies":
            scheduler = DDPM_TODAY
        elif name == "cifar":
            scheduler = scheduler | {"variance_type": "fixed_large"}
        checkpoints.save_config((at / "scheduler" if parts else at) / "scheduler_config.json", scheduler)
        checkpoints.save_config(at / "model_index.json", checkpoints.DDPM_INDEX)


# --- one evaluation of a network --------------------------------------------------------------------

TINY_UNET = checkpoints.two_levels(
    attention_head_dim=2, block_out_channels=[4, 4], cross_attention_dim=4, layers_per_block=1, norm_num_groups=2
)
STAGES = {
    "unet-only-cross": TINY_UNET | {"only_cross_attention": True},
    "unet-gelu": TINY_UNET | {"act_fn": "gelu"},
    "unet-mid-without-attention": TINY_UNET | {"mid_block_type": "UNetMidBlock2D"},
    "unet-transformer-layers": TINY_UNET | {"transformer_layers_per_block": [2, 1]},
    "unet-kernels": TINY_UNET | {"conv_in_kernel": 1, "conv_out_kernel": 5},
    "unet-layers": TINY_UNET | {"layers_per_block": [1, 2]},
    "unet-resnet-blocks": TINY_UNET
    | {
        "down_block_types": ["ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
    },
    "unet-classes": TINY_UNET | {"num_class_embeds": 5},
    "unet-class-timestep": TINY_UNET | {"class_embed_type": "timestep"},
    "unet-class-identity": TINY_UNET | {"class_embed_type": "identity"},
    "unet-class-projection": TINY_UNET
    | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 6},
    "unet-class-concat": TINY_UNET
    | {
        "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": 6,
        "class_embeddings_concat": True,
    },
    "unet_2d-classes": TWO_LEVELS_2D | {"num_class_embeds": 5},
    "unet_2d-class-timestep": TWO_LEVELS_2D | {"class_embed_type": "timestep"},
    "unet_2d-fourier": TWO_LEVELS_2D | {"time_embedding_type": "fourier", "freq_shift": 16},
    "unet_2d-no-mid": TWO_LEVELS_2D | {"mid_block_type": None},
}


def class_labels(config, rng):
    if config.get("num_class_embeds"):
        return torch.tensor([3, 1])
    if config["class_embed_type"] == "timestep":
        return torch.tensor([20.0, 350.0])
    if config["class_embed_type"] == "identity":
        return torch.randn(2, 4 * config["block_out_channels"][0], generator=rng)
    return torch.randn(2, config["projection_class_embeddings_input_dim"], generator=rng)


def make_stages(folder, manifest):
    for name, config in STAGES.items():
        kind = UNet2DModel if name.startswith("unet_2d") else UNet2DConditionModel
        model = make_component(kind, folder / name, config, f"family/{name}")
        rng = generator(f"family/{name}/stage")
        stage = {
            "sample": torch.randn(2, config["in_channels"], 8, 8, generator=rng),
            "timestep": torch.tensor([961, 240]),
        }
        if config.get("time_embedding_type") == "fourier":
            # These networks take the noise's deviation, and divide by it.
            stage["timestep"] = torch.tensor([7.5, 0.4])
        if kind is UNet2DConditionModel:
            stage["encoder_hidden_states"] = torch.randn(2, 7, config["cross_attention_dim"], generator=rng)
        if config.get("num_class_embeds") or config.get("class_embed_type"):
            stage["class_labels"] = class_labels(config, rng)
        stage["output"] = model(**stage).sample
        checkpoints.save_tensors(folder / name / "stage.safetensors", stage)
        manifest.append({"name": name, "kind": "stage", "class": kind.__name__, "stage": f"{name}/stage.safetensors"})
        print(f"  {name}: output {stage['output'].std():.2f}")


# --- runs --------------------------------------------------------------------------------------------

PLAIN = {"prompt": PROMPTS[0], "guidance_scale": 7.5}
ONE_STEP = {"prompt": PROMPTS[0], "guidance_scale": 0.0, "num_inference_steps": 1}
LCM = ["distilled", "lcm"]
RUNS = [
    ("sd2", "sd2", PLAIN | {"num_inference_steps": 3, "seed": 31, "negative_prompt": NEGATIVE}),
    ("sd2_two_prompts", "sd2", PLAIN | {"prompt": PROMPTS, "num_inference_steps": 2, "seed": 32}),
    ("sd2_clip_skip", "sd2", PLAIN | {"num_inference_steps": 2, "seed": 33, "clip_skip": 1}),
    ("sd-turbo", ["sd2", "sd-turbo"], ONE_STEP | {"seed": 34}),
    ("distilled", "distilled", PLAIN | {"num_inference_steps": 3, "seed": 35}),
    ("lcm", LCM, {"prompt": PROMPTS[1], "guidance_scale": 8.5, "num_inference_steps": 3, "seed": 36}),
    ("lcm_guidance_2", LCM, PLAIN | {"guidance_scale": 2.0, "num_inference_steps": 2, "seed": 37}),
] + [(f"ddpm_{name}", name, {"num_inference_steps": 3, "seed": 41 + i}) for i, name in enumerate(UNETS_2D)]


def load(folders):
    """The pipeline of the first folder, with the files of the others laid over it."""
    with tempfile.TemporaryDirectory() as together:
        for folder in folders:
            shutil.copytree(folder, together, dirs_exist_ok=True)
        loaded = DiffusionPipeline.from_pretrained(together, dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    if hasattr(loaded, "text_encoder") and not hasattr(loaded.text_encoder, "text_model"):
        object.__setattr__(loaded.text_encoder, "text_model", loaded.text_encoder)
    return loaded


def run(loaded, options):
    """The final latents, or the final sample of an unconditional model, and the images."""
    call = {key: value for key, value in options.items() if key != "seed"} | {"generator": generators(options["seed"])}
    if not isinstance(loaded, DDPMPipeline):
        size = 8 * loaded.unet.config.sample_size
        latents = loaded(**call, height=size, width=size, output_type="latent").images
        image = loaded.vae.decode(latents / loaded.vae.config.scaling_factor, return_dict=False)[0]
        return latents, loaded.image_processor.postprocess(image)
    samples, step = [], loaded.scheduler.step

    def remembering(*arguments, **rest):
        result = step(*arguments, **rest)
        samples.append(result.prev_sample.clone())
        return result

    loaded.scheduler.step = remembering
    images = loaded(**call).images
    loaded.scheduler.step = step
    return samples[-1], images


def evaluation(unet, label):
    """One evaluation: clipping hides much of a network of this size in the samples."""
    size, rng = unet.config.sample_size, generator(label)
    sample, timestep = torch.randn(1, unet.config.in_channels, size, size, generator=rng), torch.tensor([437])
    return {"network.sample": sample, "network.timestep": timestep, "network.output": unet(sample, timestep).sample}


def make_runs(folder, manifest):
    for name, model, options in RUNS:
        folders = [model] if isinstance(model, str) else model
        loaded = load([folder / one for one in folders])
        latents, images = run(loaded, options)
        with other_code_path(loaded):
            other, other_images = run(loaded, options)
        key = "sample" if isinstance(loaded, DDPMPipeline) else "latents"
        tensors = {key: latents}
        if key == "sample":
            tensors |= evaluation(loaded.unet, f"family/{name}/evaluation")
        checkpoints.save_tensors(folder / f"expected/{name}.safetensors", tensors)
        row = {"name": name, "kind": "run", "pipeline": type(loaded).__name__, "folders": folders} | options
        row |= {"expected": f"expected/{name}.safetensors"}
        row["tolerance"] = tolerance(f"{key}_atol", latents, other, images, other_images)
        if not latents.isfinite().all() or latents.std() < 0.05:
            raise SystemExit(f"{name} is not a useful run")
        print(f"  {name}: deviation {latents.std():.2f}, largest {latents.abs().max():.2f}")
        manifest.append(row)


def main():
    if len(sys.argv) != 2:
        raise SystemExit("usage: family.py OUTPUT_FOLDER")
    reference = Path(sys.argv[1])
    folder = reference / "family"
    quiet()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    for path in folder.glob("*"):
        if path.name != "README.md":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    manifest = []
    with torch.no_grad():
        make_sd2(folder, reference / "sd" / "base")
        make_v1(folder, reference / "sd" / "base")
        make_ddpm(folder)
        make_runs(folder, manifest)
        make_stages(folder, manifest)
    save_json(folder / "cases.json", manifest)
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "numpy")}
    save_json(folder / "made_with.json", versions)


if __name__ == "__main__":
    main()
