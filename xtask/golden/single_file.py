"""`single_file/`: checkpoints in one file, in the original layout (LDM), and files of other kinds.

    python single_file.py OUTPUT_FOLDER

OUTPUT_FOLDER is `crates/diffuse-pipelines/tests/reference` and has `sd/base`, `sd/inpaint` and `family/sd2`
(see family.py), whose weights the files repeat. Each is read by Diffusers and compared with its folder.
`single_file/README.md` describes the files.
"""

import json
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

import checkpoints
import ldm
from family import probe
from golden import quiet
from weights import generator, save_json

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."


def random(label, *shape):
    return torch.randn(shape, generator=generator(f"single_file/{label}")).half()


def prefixed(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def schedule():
    """Buffers of the noise schedule that trainers save along."""
    first, last = checkpoints.PNDM_SCHEDULER["beta_start"] ** 0.5, checkpoints.PNDM_SCHEDULER["beta_end"] ** 0.5
    betas = torch.linspace(first, last, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
    variance = betas * (1 - before) / (1 - alphas)
    buffers = {
        "betas": betas,
        "alphas_cumprod": alphas,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": alphas.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alphas).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alphas).log(),
        "sqrt_recip_alphas_cumprod": (1 / alphas).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alphas - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - alphas),
        "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - alphas),
        "logvar": torch.zeros(1000),
    }
    return {name: tensor.half() for name, tensor in buffers.items()}


class Source:
    """The weights of the folders, with the names that Diffusers has today."""

    def __init__(self, reference):
        self.reference = reference
        self.unet_config = checkpoints.unet()
        self.vae_config = checkpoints.vae()
        self.unet = self.read("sd/base/unet/diffusion_pytorch_model.fp16.safetensors")
        self.vae = self.today(self.read("sd/base/vae/diffusion_pytorch_model.fp16.safetensors"))
        self.text = self.read("sd/base/text_encoder/model.fp16.safetensors")
        self.text = {name: t for name, t in self.text.items() if "position_ids" not in name}
        self.inpaint_config = checkpoints.three_levels(in_channels=9)
        self.inpaint = self.read("sd/inpaint/unet/diffusion_pytorch_model.safetensors")

    def read(self, path):
        return {name: t.half() for name, t in load_file(str(self.reference / path)).items()}

    @staticmethod
    def today(vae):
        for new, old in checkpoints.OLD_ATTENTION.items():
            vae = {name.replace(f".{old}.", f".{new}."): tensor for name, tensor in vae.items()}
        return vae


def ema(unet):
    """Averaged weights: half of the others, which half precision holds exactly."""
    result = {"model_ema." + (UNET + name).split(".", 1)[1].replace(".", ""): t / 2 for name, t in unet.items()}
    return result | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(470000).int()}


def base_file(source):
    tensors = prefixed(UNET, ldm.unet(source.unet, source.unet_config))
    tensors |= prefixed(VAE, ldm.vae(source.vae, source.vae_config))
    return tensors | prefixed(TEXT + "transformer.", source.text)


def make_v1(folder, source):
    checkpoints.save_tensors(folder / "v1.safetensors", base_file(source))

    # As PyTorch Lightning saves a training run.
    tensors = base_file(source) | schedule()
    tensors[TEXT + "transformer.text_model.embeddings.position_ids"] = torch.arange(77).unsqueeze(0)
    tensors[VAE + "loss.logvar"] = torch.tensor(0.0)
    tensors[VAE + "loss.discriminator.main.0.weight"] = random("discriminator", 4, 3, 4, 4)
    run = {
        "epoch": 12,
        "global_step": 470000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": dict(sorted(tensors.items())),
        "callbacks": {},
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 1e-05, "betas": (0.9, 0.999), "params": [0, 1]}]}],
        "lr_schedulers": [{"last_epoch": 470000, "base_lrs": [1.0], "_step_count": 470001, "verbose": False}],
    }
    torch.save(run, str(folder / "v1.ckpt"))

    unet = ldm.unet(source.inpaint, source.inpaint_config)
    tensors = prefixed(UNET, unet) | ema(unet)
    tensors |= prefixed(VAE, ldm.vae(*small_vae(source))) | prefixed(TEXT + "transformer.", source.text)
    checkpoints.save_tensors(folder / "v1-inpaint-ema.safetensors", tensors)

    # A merge: no outer level in the text encoder, another prefix for the autoencoder, its attention not as
    # convolutions and with Diffusers' names.
    vae = ldm.vae(source.vae, source.vae_config)
    tensors = prefixed(UNET, unet)
    for name, tensor in vae.items():
        for today, original in ldm.VAE_ATTENTION.items():
            if today != "group_norm" and f".attn_1.{original}." in name:
                name = name.replace(f".attn_1.{original}.", f".attn_1.{today}.")
                tensor = tensor.flatten(1) if tensor.dim() == 4 else tensor
                break
        tensors["vae." + name] = tensor
    tensors |= prefixed(TEXT + "transformer.", {n.removeprefix("text_model."): t for n, t in source.text.items()})
    checkpoints.save_tensors(folder / "v1-inpaint-merge.safetensors", tensors)


def make_vae(folder, source):
    checkpoints.save_tensors(folder / "vae.safetensors", ldm.vae(source.vae, source.vae_config))
    # The autoencoder's own training run.
    small = small_vae(source)
    tensors = ldm.vae(*small) | {"loss.logvar": torch.tensor(0.0)}
    torch.save({"state_dict": dict(sorted(tensors.items())), "global_step": 840000}, str(folder / "vae-small.ckpt"))


def small_vae(source):
    folder = source.reference / "family" / "sd2" / "vae"
    config = json.loads((folder / "config.json").read_text())
    return source.read("family/sd2/vae/diffusion_pytorch_model.safetensors"), config


def make_v2(folder, source):
    """Version 2; the file that predicts noise differs in one bias."""
    at = source.reference / "family" / "sd2"
    config = json.loads((at / "unet" / "config.json").read_text())
    unet = source.read("family/sd2/unet/diffusion_pytorch_model.safetensors")
    text = source.read("family/sd2/text_encoder/model.safetensors")
    width = text["text_model.final_layer_norm.weight"].shape[0]
    # The encoder's last layer, which is not used.
    for name in [name for name in text if ".layers.22." in name]:
        text[name.replace(".layers.22.", ".layers.23.")] = random(name, *text[name].shape) / width**0.5
    tensors = prefixed(UNET, ldm.unet(unet, config)) | prefixed(VAE, ldm.vae(*small_vae(source)))
    tensors |= prefixed(TEXT + "model.", ldm.open_clip(text, random("text_projection", width, width)))
    tensors[TEXT + "model.attn_mask"] = torch.full((77, 77), -torch.inf).triu(1).half()
    checkpoints.save_tensors(folder / "v2-velocity.safetensors", tensors)

    model = UNet2DConditionModel.from_config(checkpoints.without_private(config))
    model.load_state_dict({name: t.float() for name, t in unet.items()})
    velocity = probe(model)
    bias = (unet["conv_out.bias"].float() + (-0.2 - velocity)).half()
    model.conv_out.bias.copy_(bias.float())
    tensors[UNET + "out.2.bias"] = bias
    checkpoints.save_tensors(folder / "v2-epsilon.safetensors", tensors)
    return {"velocity": velocity, "epsilon": probe(model), "epsilon_bias": bias.float().tolist()}


# --- comparison with the folders --------------------------------------------------------------------


def folder_of(source, unet, scratch):
    """A pipeline folder: `sd/base`, if asked with another UNet."""
    at = Path(scratch) / (unet or "base").replace("/", "_")
    if not at.exists():
        shutil.copytree(source.reference / "sd" / "base", at)
        if unet:
            shutil.copy(source.reference / unet / "config.json", at / "unet" / "config.json")
            shutil.copy(source.reference / "family" / "sd2" / "vae" / "config.json", at / "vae" / "config.json")
    return str(at)


def compare(name, got, wanted):
    wanted = {key.removeprefix("text_model."): t.float() for key, t in wanted.items()}
    got = {key.removeprefix("text_model."): t for key, t in got.items() if "position_ids" not in key}
    if got.keys() != wanted.keys():
        raise SystemExit(f"{name}: {sorted(got.keys() ^ wanted.keys())[:6]}")
    for key, tensor in wanted.items():
        if not torch.equal(got[key], tensor):
            raise SystemExit(f"{name}: {key} differs")


def check(folder, source, epsilon_bias):
    """Diffusers reads the files, and finds the weights of the folders in them."""
    sd2 = source.reference / "family" / "sd2"
    unet2 = source.read("family/sd2/unet/diffusion_pytorch_model.safetensors")
    text2 = source.read("family/sd2/text_encoder/model.safetensors")
    rows = [
        ("v1.safetensors", None, source.unet, source.vae, source.text, {}),
        ("v1.ckpt", None, source.unet, source.vae, source.text, {}),
        ("v1-inpaint-ema.safetensors", "sd/inpaint/unet", source.inpaint, small_vae(source)[0], source.text, {}),
        ("v1-inpaint-ema.safetensors", "sd/inpaint/unet", {n: t / 2 for n, t in source.inpaint.items()}, None, None,
         {"extract_ema": True}),
        ("v2-velocity.safetensors", sd2, unet2, small_vae(source)[0], text2, {}),
        ("v2-epsilon.safetensors", sd2, unet2 | {"conv_out.bias": torch.tensor(epsilon_bias)}, small_vae(source)[0],
         text2, {}),
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for name, config, unet, vae, text, options in rows:
            config = str(config) if config == sd2 else folder_of(source, config, scratch)
            if options:
                model = UNet2DConditionModel.from_single_file(
                    str(folder / name), config=config, subfolder="unet", **options
                )
                compare(name, model.state_dict(), unet)
                continue
            loaded = StableDiffusionPipeline.from_single_file(
                str(folder / name), config=config, dtype=torch.float32, local_files_only=True
            )
            compare(f"{name} unet", loaded.unet.state_dict(), unet)
            compare(f"{name} vae", loaded.vae.state_dict(), vae)
            compare(f"{name} text encoder", loaded.text_encoder.state_dict(), text)
            print(f"  {name}: as its folder")
        for name, weights, config in [
            ("vae.safetensors", source.vae, str(source.reference / "sd" / "base" / "vae")),
            ("vae-small.ckpt", small_vae(source)[0], str(sd2 / "vae")),
        ]:
            model = AutoencoderKL.from_single_file(str(folder / name), config=config)
            compare(name, model.state_dict(), weights)
            print(f"  {name}: as its folder")


def check_merge(folder, source):
    """Diffusers does not know these names; the tensors are compared one by one."""
    tensors = load_file(str(folder / "v1-inpaint-merge.safetensors"))
    for name, tensor in source.text.items():
        assert torch.equal(tensors.pop(TEXT + "transformer." + name.removeprefix("text_model.")), tensor)
    for name, tensor in source.inpaint.items():
        assert torch.equal(tensors.pop(UNET + ldm.unet_name(name, source.inpaint_config)), tensor)
    assert len(tensors) == len(source.vae)
    assert torch.equal(tensors["vae.encoder.mid.attn_1.to_out.0.weight"],
                       source.vae["encoder.mid_block.attentions.0.to_out.0.weight"])


# --- files of other kinds ---------------------------------------------------------------------------


def make_kinds(folder):
    """A few tensors each, whose names tell what the whole file would be."""
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    kohya = "lora_unet_" + block.replace(".", "_")
    kinds = {
        "sdxl": ("Stable Diffusion XL", {
            UNET + "input_blocks.0.0.weight": (4, 4, 3, 3),
            UNET + "input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (4, 8),
            UNET + "label_emb.0.0.weight": (4, 8),
            VAE + "encoder.conv_in.weight": (4, 3, 3, 3),
            "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight": (4, 4),
            "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (4,),
        }),
        "sdxl-refiner": ("Stable Diffusion XL refiner", {
            UNET + "input_blocks.0.0.weight": (4, 4, 3, 3),
            UNET + "label_emb.0.0.weight": (4, 8),
            "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias": (4,),
            "conditioner.embedders.0.model.text_projection": (4, 4),
        }),
        "upscaler-x4": ("Stable Diffusion x4 upscaler", {
            UNET + "input_blocks.0.0.weight": (4, 7, 3, 3),
            UNET + "input_blocks.10.0.skip_connection.bias": (4,),
            UNET + "label_emb.weight": (5, 4),
            TEXT + "model.token_embedding.weight": (6, 4),
        }),
        "instruct-pix2pix": ("InstructPix2Pix", {
            UNET + "input_blocks.0.0.weight": (4, 8, 3, 3),
            UNET + "output_blocks.11.0.skip_connection.weight": (4, 8, 1, 1),
            VAE + "encoder.conv_in.weight": (4, 3, 3, 3),
            TEXT + "transformer.text_model.embeddings.position_embedding.weight": (4, 4),
        }),
        "controlnet": ("ControlNet", {
            "control_model.time_embed.0.weight": (8, 4),
            "control_model.input_blocks.0.0.weight": (4, 4, 3, 3),
            "control_model.input_hint_block.0.weight": (4, 3, 3, 3),
            "control_model.zero_convs.0.0.weight": (4, 4, 1, 1),
        }),
        "controlnet-diffusers": ("ControlNet", {
            "conv_in.weight": (4, 4, 3, 3),
            "time_embedding.linear_1.weight": (8, 4),
            "controlnet_cond_embedding.conv_in.weight": (4, 3, 3, 3),
            "controlnet_down_blocks.0.weight": (4, 4, 1, 1),
        }),
        "lora": ("LoRA", {
            f"{kohya}.lora_down.weight": (2, 4), f"{kohya}.lora_up.weight": (4, 2), f"{kohya}.alpha": (),
        }),
        "lora-peft": ("LoRA", {f"unet.{block}.lora_A.weight": (2, 4), f"unet.{block}.lora_B.weight": (4, 2)}),
        "loha": ("LoRA", {
            f"{kohya}.hada_w1_a": (4, 2), f"{kohya}.hada_w1_b": (2, 4), f"{kohya}.hada_w2_a": (4, 2),
            f"{kohya}.hada_w2_b": (2, 4), f"{kohya}.alpha": (),
        }),
        "vae-ldm": ("VAE", {
            "encoder.conv_in.weight": (4, 3, 3, 3),
            "encoder.down.0.block.0.conv1.weight": (4, 4, 3, 3),
            "decoder.up.3.block.0.conv1.weight": (4, 4, 3, 3),
            "quant_conv.weight": (8, 8, 1, 1),
        }),
        "vae-diffusers": ("VAE", {
            "encoder.conv_in.weight": (4, 3, 3, 3),
            "encoder.down_blocks.0.resnets.0.conv1.weight": (4, 4, 3, 3),
            "decoder.up_blocks.0.resnets.0.conv1.weight": (4, 4, 3, 3),
            "quant_conv.weight": (8, 8, 1, 1),
        }),
        "taesd": ("TAESD", {"encoder.layers.0.weight": (4, 3, 3, 3), "decoder.layers.1.weight": (4, 4, 3, 3)}),
        "textual-inversion": ("textual inversion", {"<cat-toy>": (2, 24)}),
        "textual-inversion-a1111": ("textual inversion", {"emb_params": (2, 24)}),
        "textual-inversion-sdxl": ("textual inversion", {"clip_l": (2, 24), "clip_g": (2, 32)}),
        "unet-ldm": ("UNet", {
            UNET + "input_blocks.0.0.weight": (4, 4, 3, 3), UNET + "time_embed.0.weight": (8, 4),
        }),
        "unet-diffusers": ("UNet", {
            "conv_in.weight": (4, 4, 3, 3), "time_embedding.linear_1.weight": (8, 4), block + ".weight": (4, 4),
        }),
        "text-encoder": ("CLIP text encoder", {
            "text_model.embeddings.token_embedding.weight": (6, 4),
            "text_model.embeddings.position_embedding.weight": (4, 4),
            "text_model.final_layer_norm.weight": (4,),
        }),
        "upscaler-realesrgan": ("upscaler", {
            "params_ema.conv_first.weight": (4, 3, 3, 3), "params_ema.body.0.rdb1.conv1.weight": (4, 4, 3, 3),
        }),
        "upscaler-esrgan": ("upscaler", {
            "model.0.weight": (4, 3, 3, 3), "model.1.sub.0.RDB1.conv1.0.weight": (4, 4, 3, 3),
        }),
        "sd3": ("Stable Diffusion 3", {
            UNET + "x_embedder.proj.weight": (4, 16, 2, 2),
            UNET + "joint_blocks.0.context_block.adaLN_modulation.1.bias": (4,),
            UNET + "pos_embed": (1, 9, 4),
        }),
        "flux": ("Flux", {
            "img_in.weight": (4, 4), "double_blocks.0.img_attn.norm.key_norm.scale": (4,),
            "single_blocks.0.linear1.weight": (4, 4),
        }),
        "flux-prefix": ("Flux", {
            UNET + "img_in.weight": (4, 4), UNET + "double_blocks.0.img_attn.norm.key_norm.scale": (4,),
        }),
        "motion-module": ("AnimateDiff", {
            "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.pos_encoder.pe":
                (1, 24, 4),
        }),
        "ip-adapter": ("IP-Adapter", {"image_proj.proj.weight": (4, 4), "ip_adapter.1.to_k_ip.weight": (4, 4)}),
        "t2i-adapter": ("T2I-Adapter", {"conv_in.weight": (4, 12, 3, 3), "body.0.block1.weight": (4, 4, 3, 3)}),
        "unknown": (None, {"layers.0.kernel": (4, 4), "layers.0.offset": (4,)}),
    }
    rows = []
    for name, (kind, shapes) in kinds.items():
        tensors = {key: random(f"{name}/{key}", *shape) for key, shape in shapes.items()}
        checkpoints.save_tensors(folder / "kinds" / f"{name}.safetensors", tensors)
        rows.append({"file": f"kinds/{name}.safetensors", "kind": kind})
    pickles = {
        "textual-inversion.bin": ("textual inversion", {"<cat-toy>": random("bin", 24)}),
        "textual-inversion.pt": ("textual inversion", {
            "string_to_token": {"*": 265}, "string_to_param": {"*": random("pt", 2, 24)}, "name": "cat-toy",
            "step": 500, "sd_checkpoint": None, "sd_checkpoint_name": None,
        }),
        "hypernetwork.pt": ("hypernetwork", {
            "step": 100, "name": "style", "layer_structure": [1, 2, 1], "activation_func": "relu",
            24: [{"linear.0.weight": random("hyper", 4, 4)}],
        }),
        "upscaler-realesrgan.pth": ("upscaler", {"params_ema": {
            "conv_first.weight": random("pth", 4, 3, 3, 3), "body.0.rdb1.conv1.weight": random("pth1", 4, 4, 3, 3),
        }}),
    }
    for name, (kind, value) in pickles.items():
        torch.save(value, str(folder / "kinds" / name))
        rows.append({"file": f"kinds/{name}", "kind": kind})
    save_json(folder / "kinds.json", rows)


def main():
    if len(sys.argv) != 2:
        raise SystemExit("usage: single_file.py OUTPUT_FOLDER")
    reference = Path(sys.argv[1])
    folder = reference / "single_file"
    quiet()
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*"):
        if path.name != "README.md":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    source = Source(reference)
    with torch.no_grad():
        make_v1(folder, source)
        make_vae(folder, source)
        facts = make_v2(folder, source)
        make_kinds(folder)
        check(folder, source, facts["epsilon_bias"])
        check_merge(folder, source)

    half = "diffusion_pytorch_model.fp16.safetensors"
    base = {
        "unet": f"sd/base/unet/{half}", "vae": f"sd/base/vae/{half}",
        "text_encoder": "sd/base/text_encoder/model.fp16.safetensors",
    }
    inpaint = base | {"unet": "sd/inpaint/unet/diffusion_pytorch_model.safetensors"}
    plain = "diffusion_pytorch_model.safetensors"
    second = {
        "unet": f"family/sd2/unet/{plain}", "vae": f"family/sd2/vae/{plain}",
        "text_encoder": "family/sd2/text_encoder/model.safetensors",
    }
    epsilon = {"prediction_type": "epsilon", "probe": facts["epsilon"]}
    epsilon |= {"unet_except": {"conv_out.bias": facts["epsilon_bias"]}}
    save_json(folder / "files.json", [
        {"file": "v1.safetensors", "kind": "v1", "equals": base, "diffusers": True},
        {"file": "v1.ckpt", "kind": "v1", "equals": base, "diffusers": True},
        {"file": "v1-inpaint-ema.safetensors", "kind": "v1 inpainting", "equals": inpaint | {"vae": second["vae"]},
         "diffusers": True,
         "ema": "half of each tensor of the UNet"},
        {"file": "v1-inpaint-merge.safetensors", "kind": "v1 inpainting", "equals": inpaint, "diffusers": False},
        {"file": "v2-velocity.safetensors", "kind": "v2", "equals": second, "diffusers": True,
         "prediction_type": "v_prediction", "probe": facts["velocity"]},
        {"file": "v2-epsilon.safetensors", "kind": "v2", "equals": second, "diffusers": True} | epsilon,
        {"file": "vae.safetensors", "kind": "VAE", "equals": {"vae": base["vae"]}, "diffusers": True},
        {"file": "vae-small.ckpt", "kind": "VAE", "equals": {"vae": second["vae"]}, "diffusers": True},
    ])
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "numpy")}
    save_json(folder / "made_with.json", versions)


if __name__ == "__main__":
    main()
