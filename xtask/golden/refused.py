"""`refused.json`: configurations and calls that the reference refuses, with the class and text of its error."""

import json

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMPipeline, DDPMPipeline, StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel
from transformers import CLIPTextConfig, CLIPTextModel

from weights import save_json

FOLDERS = {
    "unet": "sd/base/unet",
    "unet_2d": "ddpm/cat",
    "vae": "sd/base/vae",
    "text_encoder": "sd/base/text_encoder",
}
CLASSES = {"unet": UNet2DConditionModel, "unet_2d": UNet2DModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}


def config(component, name, **overrides):
    return {"name": f"{component}_{name}", "component": component, "base": FOLDERS[component], "config": overrides}


def call(name, *, base="sd/base", pipeline="StableDiffusionPipeline", scheduler=None, options=None, **arguments):
    row = {"name": f"pipeline_{name}", "component": "pipeline", "pipeline": pipeline, "base": base}
    row |= {"scheduler": scheduler, "scheduler_options": options or {}}
    if pipeline == "StableDiffusionPipeline" and not {"prompt", "prompt_embeds"} & set(arguments):
        arguments = {"prompt": "a lighthouse"} | arguments
    return row | {"call": arguments}


def zeros(*shape):
    """Stands for a tensor of zeros in the arguments of a call."""
    return {"zeros": list(shape)}


DDIM, DDPM, PNDM = "DDIMScheduler", "DDPMScheduler", "PNDMScheduler"
EULER, UNIPC = "EulerDiscreteScheduler", "UniPCMultistepScheduler"

ROWS = [
    config("unet", "fewer_up_blocks", up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]),
    config("unet", "fewer_channels", block_out_channels=[16, 8, 16]),
    config("unet", "head_dims_length", attention_head_dim=[2, 4]),
    config("unet", "layers_length", layers_per_block=[1, 1, 1]),
    config("unet", "cross_dims_length", cross_attention_dim=[24, 24]),
    config("unet", "only_cross_length", only_cross_attention=[True, False]),
    config("unet", "num_attention_heads", num_attention_heads=8),
    config("unet", "unknown_down_block", down_block_types=["CrossAttnDownBlock2D"] * 3 + ["SidewaysBlock2D"]),
    config("unet", "unknown_up_block", up_block_types=["SidewaysBlock2D"] + ["CrossAttnUpBlock2D"] * 3),
    config("unet", "unknown_mid_block", mid_block_type="SidewaysMidBlock2D"),
    config("unet", "unknown_activation", act_fn="sigmoidal"),
    config("unet", "groups_do_not_divide", norm_num_groups=3),
    config("unet", "unknown_time_embedding", time_embedding_type="learned"),
    config("unet", "projection_without_width", class_embed_type="projection"),
    config("unet_2d", "fewer_up_blocks", up_block_types=["UpBlock2D", "AttnUpBlock2D"]),
    config("unet_2d", "fewer_channels", block_out_channels=[8, 16]),
    config("unet_2d", "unknown_down_block", down_block_types=["DownBlock2D", "SidewaysBlock2D", "DownBlock2D"]),
    config("unet_2d", "unknown_activation", act_fn="sigmoidal"),
    config("unet_2d", "groups_do_not_divide", norm_num_groups=5),
    config("vae", "unknown_down_block", down_block_types=["DownEncoderBlock2D"] * 3 + ["SidewaysBlock2D"]),
    config("vae", "unknown_up_block", up_block_types=["UpDecoderBlock2D"] * 3 + ["SidewaysBlock2D"]),
    config("vae", "unknown_activation", act_fn="sigmoidal"),
    config("vae", "groups_do_not_divide", norm_num_groups=3),
    config("text_encoder", "heads_do_not_divide", num_attention_heads=5),
    config("text_encoder", "unknown_activation", hidden_act="sigmoidal"),
    call("height", width=64, height=60),
    call("width", width=100, height=64),
    call("prompt_and_embeds", prompt="a lighthouse", prompt_embeds=zeros(1, 1, 2)),
    call("no_prompt", prompt=None),
    call("prompt_is_number", prompt=5),
    call("negative_of_other_type", prompt=["a lighthouse", "a boat"], negative_prompt="blurry"),
    call("negative_of_other_length", prompt=["a lighthouse", "a boat"], negative_prompt=["blurry"]),
    call("negative_and_embeds", negative_prompt="blurry", negative_prompt_embeds=zeros(1, 1, 2)),
    call("embeds_of_other_shape", prompt_embeds=zeros(1, 77, 24), negative_prompt_embeds=zeros(2, 77, 24)),
    call("callback_steps", callback_steps=0),
    call("callback_tensors", callback_on_step_end_tensor_inputs=["noise"]),
    call("timesteps_and_sigmas", scheduler=EULER, timesteps=[900, 500], sigmas=[10.0, 0.0]),
    call("pndm_timesteps", scheduler=PNDM, timesteps=[900, 500]),
    call("ddim_timesteps", scheduler=DDIM, timesteps=[900, 500]),
    call("unipc_timesteps", scheduler=UNIPC, timesteps=[900, 500]),
    call("ddpm_sigmas", scheduler=DDPM, sigmas=[10.0, 0.0]),
    call("ddpm_timesteps_rising", scheduler=DDPM, timesteps=[500, 900]),
    call("ddpm_timesteps_too_late", scheduler=DDPM, timesteps=[1000, 500]),
    call("euler_timesteps_karras", scheduler=EULER, options={"use_karras_sigmas": True}, timesteps=[900, 500]),
    call("euler_two_spacings", scheduler=EULER, options={"use_karras_sigmas": True, "use_beta_sigmas": True}),
    call("ddim_too_many_steps", scheduler=DDIM, num_inference_steps=1001),
    call("ddpm_too_many_steps", scheduler=DDPM, num_inference_steps=1001),
    call("generators", prompt=["a lighthouse", "a boat"], generators=3),
    call("generators_for_images", num_images_per_prompt=2, generators=1),
    call("latents_of_other_channels", latents=zeros(1, 3, 8, 8)),
    call("ddim_generators", base="ddpm/cat", pipeline="DDIMPipeline", batch_size=2, generators=3),
]


def build(folder, row):
    kind = CLASSES[row["component"]]
    values = json.loads((folder / row["base"] / "config.json").read_text()) | row["config"]
    values = {key: value for key, value in values.items() if not key.startswith("_")}
    if kind is CLIPTextModel:
        kind(CLIPTextConfig(**values))
    else:
        kind.from_config(values)


def invoke(folder, row):
    kinds = {kind.__name__: kind for kind in (StableDiffusionPipeline, DDPMPipeline, DDIMPipeline)}
    pipeline = kinds[row["pipeline"]].from_pretrained(str(folder / row["base"]))
    pipeline.set_progress_bar_config(disable=True)
    if row["scheduler"]:
        kind = getattr(diffusers, row["scheduler"])
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **row["scheduler_options"])
    arguments = {"num_inference_steps": 2}
    for key, value in row["call"].items():
        if key == "generators":
            arguments["generator"] = [torch.Generator("cpu").manual_seed(i) for i in range(value)]
        elif isinstance(value, dict):
            arguments[key] = torch.zeros(value["zeros"])
        else:
            arguments[key] = value
    pipeline(**arguments)


def make(folder):
    rows = []
    for row in ROWS:
        try:
            (invoke if row["component"] == "pipeline" else build)(folder, row)
        except Exception as error:
            rows.append(row | {"error": type(error).__name__, "message": str(error)})
        else:
            raise SystemExit(f"{row['name']} is not refused")
    save_json(folder / "refused.json", rows)
