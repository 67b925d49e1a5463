"""Names of the original layout (LDM) for the names that Diffusers gives to the same tensors."""

import re

import torch

UNET_OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def renamed(name, table):
    """`name` with its first part replaced, if the table has it."""
    for today, ldm in table.items():
        if name == today or name.startswith(today + "."):
            return ldm + name[len(today) :]
    return name


def unet_name(name, config):
    """The name of a UNet's module or tensor; a block has `layers_per_block` layers on the way down, and one
    more on the way up."""
    layers = config["layers_per_block"]
    if match := re.match(r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)\.(.+)", name):
        block, kind, layer, rest = int(match[1]), match[2], int(match[3]), match[4]
        place = 1 + block * (layers + 1) + (layers if kind == "downsamplers" else layer)
        if kind == "downsamplers":
            return f"input_blocks.{place}.0.{renamed(rest, {'conv': 'op'})}"
        return f"input_blocks.{place}.{int(kind == 'attentions')}.{renamed(rest, UNET_RESNET)}"
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        place = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"middle_block.{place}.{renamed(match[3], UNET_RESNET)}"
    if match := re.match(r"up_blocks\.(\d+)\.(resnets|attentions|upsamplers)\.(\d+)\.(.+)", name):
        block, kind, layer, rest = int(match[1]), match[2], int(match[3]), match[4]
        place = block * (layers + 1) + (layers if kind == "upsamplers" else layer)
        if kind == "upsamplers":
            return f"output_blocks.{place}.{1 + ('Attn' in config['up_block_types'][block])}.{rest}"
        return f"output_blocks.{place}.{int(kind == 'attentions')}.{renamed(rest, UNET_RESNET)}"
    return renamed(name, UNET_OUTER)


def vae_name(name, config):
    """The name of an autoencoder's tensor; the decoder's levels are counted from the other end."""
    last = len(config["block_out_channels"]) - 1
    name = name.replace(".conv_norm_out.", ".norm_out.").replace(".conv_shortcut.", ".nin_shortcut.")
    if match := re.match(r"encoder\.down_blocks\.(\d+)\.(.+)", name):
        name = f"encoder.down.{match[1]}.{match[2]}"
    elif match := re.match(r"decoder\.up_blocks\.(\d+)\.(.+)", name):
        name = f"decoder.up.{last - int(match[1])}.{match[2]}"
    elif match := re.match(r"(encoder|decoder)\.mid_block\.resnets\.(\d+)\.(.+)", name):
        return f"{match[1]}.mid.block_{int(match[2]) + 1}.{match[3]}"
    elif match := re.match(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)", name):
        return f"{match[1]}.mid.attn_1.{renamed(match[2], VAE_ATTENTION)}"
    name = name.replace(".resnets.", ".block.")
    return name.replace(".downsamplers.0.", ".downsample.").replace(".upsamplers.0.", ".upsample.")


CONTROLNET_OUTER = {
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
    "controlnet_mid_block": "middle_block_out.0",
}


def controlnet_name(name, config):
    """The name of a ControlNet's tensor; an activation function follows each convolution of the image's embedding."""
    if match := re.match(r"controlnet_cond_embedding\.(?:blocks\.(\d+)|conv_out)\.(.+)", name):
        count = 2 * len(config["conditioning_embedding_out_channels"]) - 2
        block = count if match[1] is None else int(match[1])
        return f"input_hint_block.{2 * block + 2}.{match[2]}"
    if match := re.match(r"controlnet_down_blocks\.(\d+)\.(.+)", name):
        return f"zero_convs.{match[1]}.0.{match[2]}"
    if name.startswith(("controlnet_cond_embedding.", "controlnet_mid_block.")):
        return renamed(name, CONTROLNET_OUTER)
    return unet_name(name, config)


def unet(tensors, config):
    return {unet_name(name, config): tensor for name, tensor in tensors.items()}


def vae(tensors, config):
    """The attention's matrices are 1x1 convolutions in this layout."""
    result = {}
    for name, tensor in tensors.items():
        ldm = vae_name(name, config)
        result[ldm] = tensor[:, :, None, None] if ".attn_1." in ldm and tensor.dim() == 2 else tensor
    return result


def open_clip(tensors, projection):
    """A text encoder as OpenCLIP has it: query, key and value are one matrix."""
    result = {"text_projection": projection, "logit_scale": torch.tensor(4.6052)}
    outer = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    for name, tensor in tensors.items():
        name = name.removeprefix("text_model.")
        if match := re.match(r"encoder\.layers\.(\d+)\.(.+)", name):
            prefix = f"transformer.resblocks.{match[1]}."
            if match[2].startswith("self_attn.q_proj."):
                rows = [tensors_of(tensors, name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
                result[prefix + "attn.in_proj_" + name.split(".")[-1]] = torch.cat(rows)
            elif not match[2].startswith(("self_attn.k_proj.", "self_attn.v_proj.")):
                result[prefix + renamed(match[2], OPEN_CLIP_LAYER)] = tensor
        elif name in outer:
            result[outer[name]] = tensor
    return result


def tensors_of(tensors, name):
    return tensors["text_model." + name] if "text_model." + name in tensors else tensors[name]
