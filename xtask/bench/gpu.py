"""PyTorch's side of `cargo xtask bench gpu`, which feeds this file to Python: it needs no other.

    gpu.py < LINES

Times operations and networks on the first card, as `crates/diffuse-pipelines/examples/gpu-speed.rs`
does. A line is a name, a float type, sizes (networks have none) and a number of calls, as in
`conv f16 2 320 320 64 64 3 100` or `unet f16 20`; the answer is the seconds of a call, or `failed`
with the reason on stderr. `graph unet f16 20` replays the same network from a CUDA graph, which
takes no time on the CPU. `card` and `versions` are answered with text.

All run eagerly, images in channels_last, with the algorithms that cuDNN's benchmark mode finds
fastest. In f32, PyTorch's defaults hold: convolutions round to TF32, products do not.
Needs torch; for networks also diffusers and transformers.
"""

import functools
import importlib.metadata
import sys
import time
import traceback

import torch
import torch.nn.functional as F

DEVICE = "cuda"
TYPES = {"f16": torch.float16, "f32": torch.float32}


def seconds(call, calls):
    """Seconds of a call, after two that are not counted."""
    call()
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


# Operations: `call_` and the name; arguments are the type and the sizes.


def image(dtype, *shape):
    x = torch.randn(*shape, device=DEVICE, dtype=dtype)
    return x.to(memory_format=torch.channels_last)


def call_conv(dtype, batch, channels, outputs, height, width, kernel, stride=1):
    layer = torch.nn.Conv2d(channels, outputs, kernel, stride, kernel // 2)
    layer = layer.to(DEVICE, dtype, memory_format=torch.channels_last)
    x = image(dtype, batch, channels, height, width)
    return lambda: layer(x)


def call_conv_stride_2(dtype, *sizes):
    return call_conv(dtype, *sizes, stride=2)


def call_linear(dtype, rows, inputs, outputs):
    layer = torch.nn.Linear(inputs, outputs, device=DEVICE, dtype=dtype)
    x = torch.randn(rows, inputs, device=DEVICE, dtype=dtype)
    return lambda: layer(x)


def call_linear_geglu(dtype, rows, inputs, outputs):
    layer = call_linear(dtype, rows, inputs, 2 * outputs)

    def linear_geglu():
        value, gate = layer().chunk(2, dim=-1)
        return value * F.gelu(gate)

    return linear_geglu


def call_product(dtype, rows, inputs, outputs):
    a = torch.randn(rows, inputs, device=DEVICE, dtype=dtype)
    b = torch.randn(inputs, outputs, device=DEVICE, dtype=dtype)
    return lambda: a @ b


def call_attention(dtype, batch, tokens, context, heads, d):
    def split(tokens):
        x = torch.randn(batch, tokens, heads, d, device=DEVICE, dtype=dtype)
        return x.transpose(1, 2)

    query, key, value = split(tokens), split(context), split(context)

    def attention():
        y = F.scaled_dot_product_attention(query, key, value)
        return y.transpose(1, 2).reshape(batch, tokens, heads * d)

    return attention


def call_group_norm_silu(dtype, *shape):
    norm, x = torch.nn.GroupNorm(32, shape[1], device=DEVICE, dtype=dtype), image(dtype, *shape)
    return lambda: F.silu(norm(x))


def call_layer_norm(dtype, rows, width):
    norm = torch.nn.LayerNorm(width, device=DEVICE, dtype=dtype)
    x = torch.randn(rows, width, device=DEVICE, dtype=dtype)
    return lambda: norm(x)


# Networks of the published sizes; `models.py` writes the same ones to files. Their packages take
# seconds to import, so operations do not import them.


def unet():
    from diffusers import UNet2DConditionModel

    attending, plain = "CrossAttn{}Block2D", "{}Block2D"
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        down_block_types=(*[attending.format("Down")] * 3, plain.format("Down")),
        up_block_types=(plain.format("Up"), *[attending.format("Up")] * 3),
        cross_attention_dim=768,
        attention_head_dim=8,
    )


def vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    )


def text_encoder():
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    )


def ddpm():
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=256,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=(*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )


def on_card(make, dtype):
    # Weights are drawn on the GPU, which is much faster.
    with torch.device(DEVICE):
        network = make()
    # Diffusers warns of `to` with a type.
    network = network.half() if dtype == torch.float16 else network.float()
    return network.to(memory_format=torch.channels_last).eval()


def call_unet(dtype):
    network, x = on_card(unet, dtype), image(dtype, 2, 4, 64, 64)
    context = torch.randn(2, 77, 768, device=DEVICE, dtype=dtype)
    # A Python number would be copied to the GPU in each call, which waits for it.
    timestep = torch.tensor(500, device=DEVICE)
    return lambda: network(x, timestep, context).sample


def call_vae(dtype):
    network, x = on_card(vae, dtype), image(dtype, 1, 4, 64, 64)
    return lambda: network.decode(x).sample


def call_text(dtype):
    network = on_card(text_encoder, dtype)
    ids = torch.ones(2, 77, device=DEVICE, dtype=torch.long)
    return lambda: network(ids).last_hidden_state


def call_ddpm(dtype):
    network, x = on_card(ddpm, dtype), image(dtype, 1, 3, 256, 256)
    timestep = torch.tensor(500, device=DEVICE)
    return lambda: network(x, timestep).sample


# Usually the last one is timed again.


@functools.lru_cache(maxsize=1)
def eager(name, dtype, *sizes):
    return globals()["call_" + name](TYPES[dtype], *map(int, sizes))


@functools.lru_cache(maxsize=1)
def graph(*words):
    call = eager(*words)
    # Lazy initialisation must not happen during the capture.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        call()
    return captured.replay


def versions():
    found = [f"torch {torch.__version__}", f"CUDA {torch.version.cuda}"]
    found.append(f"cuDNN {torch.backends.cudnn.version()}")
    for name in ("diffusers", "transformers"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            pass
    return ", ".join(found)


def answer(line):
    if line == "card":
        return torch.cuda.get_device_name(0)
    if line == "versions":
        return versions()
    *words, calls = line.split()
    make = eager
    if words[0] == "graph":
        make, words = graph, words[1:]
    return seconds(make(*words), int(calls))


@torch.inference_mode()
def main():
    torch.backends.cudnn.benchmark = True
    # Only results go to stdout, whatever a library prints.
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            said = answer(line.strip())
        except Exception:
            traceback.print_exc()
            said = "failed"
            graph.cache_clear()
            eager.cache_clear()
            # After a device error, the program ends and is restarted.
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        print(said, file=answers, flush=True)


if __name__ == "__main__":
    main()
