"""How far apart two runs of the reference may be, and what a stage records."""

import contextlib
import math

import numpy as np
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor


def generators(seed):
    """One generator for all images, or one for each image."""
    if isinstance(seed, list):
        return [torch.Generator("cpu").manual_seed(one) for one in seed]
    return torch.Generator("cpu").manual_seed(seed)


def round_up(value):
    """Two significant digits, never below `value`."""
    if value == 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.1e}")


@contextlib.contextmanager
def other_code_path(pipeline):
    """Convolutions without oneDNN, and attention spelled out as matrix products and a softmax."""
    saved = []
    for component in pipeline.components.values():
        if not isinstance(component, torch.nn.Module):
            continue
        if hasattr(component, "set_attn_implementation"):
            saved.append((component.set_attn_implementation, component.config._attn_implementation))
            component.set_attn_implementation("eager")
        for module in component.modules():
            if isinstance(module, Attention):
                saved.append((module.set_processor, module.processor))
                module.set_processor(AttnProcessor())
    try:
        with torch.backends.mkldnn.flags(enabled=False, allow_tf32=False):
            yield
    finally:
        for restore, before in saved:
            restore(before)


def tolerance(key, value, other, images, other_images):
    noise = float((value - other).abs().max())
    pixels = [np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)) for a, b in zip(images, other_images)]
    pixel_noise = max(int(p.max()) for p in pixels)
    mean_noise = max(float(p.mean()) for p in pixels)
    return {
        key: round_up(max(10 * noise, 2e-4 * float(value.abs().max()))),
        "image_max": max(2, pixel_noise + 2),
        "image_mean": max(0.2, round_up(10 * mean_noise)),
        "reference_noise": round_up(noise),
        "reference_pixel_noise": pixel_noise,
    }


def check_images(name, images):
    """Images worth comparing are neither constant nor saturated."""
    pixels = np.stack([np.asarray(image, np.float32) for image in images])
    deviation = pixels.std()
    saturated = np.mean((pixels <= 0) | (pixels >= 255))
    print(f"  {name}: mean {pixels.mean():.0f}, deviation {deviation:.0f}, saturated {saturated:.1%}")
    if deviation < 8 or saturated > 0.35:
        raise SystemExit(f"{name} is not a useful image")


def record_blocks(model, names, run):
    """`run()`, and the results of the named submodules for the first row of the batch."""
    seen, hooks = {}, []

    def keep(name):
        def hook(_, __, result):
            result = result[0] if isinstance(result, tuple) else result
            seen[f"block.{name}"] = result[:1].clone()

        return hook

    for name in names:
        hooks.append(model.get_submodule(name).register_forward_hook(keep(name)))
    result = run()
    for hook in hooks:
        hook.remove()
    return result, seen
