"""Pseudo-random weights, and least-squares fits of a network's last convolution."""

import json
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F


def generator(label):
    """A generator whose seed depends on nothing but `label`."""
    return torch.Generator("cpu").manual_seed(zlib.crc32(label.encode()))


def pseudo_random(label, shape):
    """One tensor of weights. Normalisation weights lie around one; matrices and kernels keep the size of
    what passes through them; no tensor is constant, no bias zero."""
    noise = torch.randn(shape, generator=generator(label))
    if len(shape) == 1:
        return 1.0 + 0.2 * noise if label.endswith(".weight") else 0.1 * noise
    if "embedding.weight" in label:
        return 0.5 * noise
    fan_in = noise[0].numel()
    gain = 1.0
    if any(part in label for part in ("to_q", "to_k", "q_proj", "k_proj")):
        gain = 1.5
    elif any(part in label for part in ("conv2", "proj_out", "samplers")):
        gain = 0.4
    tensor = noise * (gain / fan_in**0.5)
    if "samplers" in label and len(shape) == 4 and shape[0] == shape[1]:
        # What is resized stays recognisable.
        tensor[:, :, 1, 1] += torch.eye(len(tensor))
    return tensor


@torch.no_grad()
def fill(model, label):
    """Replaces every parameter; two parameters never share a seed."""
    for name, parameter in model.named_parameters():
        parameter.copy_(pseudo_random(f"{label}/{name}", parameter.shape))
    return model.eval().requires_grad_(False)


def input_of(module, run):
    """What `module` receives while `run()` is computed."""
    seen = []
    hook = module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    run()
    hook.remove()
    return seen[-1]


class ConvFit:
    """Weighted ridge regression for a 3x3 convolution, collected batch by batch in double precision."""

    def __init__(self, conv):
        self.conv = conv
        size = conv.in_channels * 9 + 1
        self.gram = torch.zeros(size, size, dtype=torch.float64)
        self.energy = torch.zeros((), dtype=torch.float64)
        self.moment = torch.zeros(size, conv.out_channels, dtype=torch.float64)

    def add(self, features, target, weight=None):
        batch, channels = target.shape[:2]
        columns = F.unfold(features, 3, padding=1)
        columns = torch.cat([columns, torch.ones_like(columns[:, :1])], dim=1).double()
        wanted = target.reshape(batch, channels, -1).double()
        weight = torch.ones(batch) if weight is None else weight
        weighted = columns * weight.double().view(-1, 1, 1)
        self.gram += torch.einsum("bin,bjn->ij", weighted, columns)
        self.energy += (wanted**2 * weight.double().view(-1, 1, 1)).sum()
        self.moment += torch.einsum("bin,bjn->ij", weighted, wanted)

    @torch.no_grad()
    def solve(self, ridge=1e-5):
        penalty = ridge * self.gram.diagonal().mean()
        solution = torch.linalg.solve(self.gram + penalty * torch.eye(len(self.gram)), self.moment)
        self.conv.weight.copy_(solution[:-1].T.reshape(self.conv.weight.shape))
        self.conv.bias.copy_(solution[-1])
        explained = (self.moment * solution).sum() / self.energy
        print(f"  fitted: {explained:.0%} explained")


def smooth_fields(rng, batch, channels, height, width):
    """Random fields of unit size without fine detail: what the networks learn to call an image."""
    coarse = torch.randn(batch, channels, 3, 3, generator=rng)
    level = 0.5 * torch.randn(batch, channels, 1, 1, generator=rng)
    return level + F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)


def save_json(path, value, **layout):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    layout = layout or {"indent": 1}
    path.write_text(json.dumps(value, **layout) + "\n", encoding="utf-8")
