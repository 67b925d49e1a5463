"""The same operations as `examples/cpu-speed.rs`, in PyTorch: a line of the input is a name and sizes, the answer the seconds.

    cpu.py THREADS [torch|compile|openvino|onnxruntime]

Convolutions, norms and networks run in channels_last, PyTorch's faster layout on CPUs. The others have networks only, in f32:
PyTorch compiled (`torch.compile`, with its weights as constants, which needs a C++ compiler), OpenVINO and ONNX Runtime.
Needs torch and diffusers; openvino; onnxruntime, onnx and onnxscript.
"""

import sys
import tempfile
import time

import torch
import torch.nn.functional as F

AT_LEAST = 0.2


def image(*shape):
    return torch.randn(*shape).to(memory_format=torch.channels_last)


def network(name, folder, sizes, runtime):
    from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel

    classes = {"unet": UNet2DConditionModel, "ddpm": UNet2DModel, "vae": AutoencoderKL}
    model = classes[name].from_pretrained(folder).eval().to(memory_format=torch.channels_last)
    if name == "vae":
        model.forward = model.decode
        inputs = [image(1, model.config.latent_channels, *sizes)]
    elif name == "ddpm":
        inputs = [image(sizes[0], model.config.in_channels, *sizes[1:]), torch.tensor(500)]
    else:
        batch, height, width, tokens = sizes
        x = image(batch, model.config.in_channels, height, width)
        inputs = [x, torch.tensor(500), torch.randn(batch, tokens, model.config.cross_attention_dim)]
    return RUNTIMES[runtime](model, inputs)


def torch_compiled(model, inputs):
    from torch._inductor import config

    config.freezing = True
    network = torch.compile(Sample(model))
    return lambda: network(*inputs)


def openvino_compiled(model, inputs):
    import openvino

    shapes = [tuple(each.shape) for each in inputs]
    converted = openvino.convert_model(Sample(model), example_input=tuple(inputs), input=shapes)
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    network = openvino.compile_model(converted, "CPU", options)
    arrays = [each.contiguous().numpy() for each in inputs]
    return lambda: network(arrays)


def onnxruntime_session(model, inputs):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/network.onnx"
        torch.onnx.export(Sample(model), tuple(inputs), path, dynamo=True, external_data=True, verbose=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    arrays = {to.name: each.contiguous().numpy() for to, each in zip(session.get_inputs(), inputs)}
    return lambda: session.run(None, arrays)


RUNTIMES = {
    "torch": lambda model, inputs: lambda: model(*inputs),
    "compile": torch_compiled,
    "openvino": openvino_compiled,
    "onnxruntime": onnxruntime_session,
}


class Sample(torch.nn.Module):
    """A network without the class that its result is in, for those who compile it."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, *inputs):
        return self.model(*inputs).sample


def operation(name, words, runtime):
    if name in ("unet", "ddpm", "vae"):
        return network(name, words[0], [int(word) for word in words[1:]], runtime)
    sizes = [int(word) for word in words]
    if name in ("conv", "conv_stride_2"):
        batch, channels, outputs, height, width, kernel = sizes
        stride = 1 if name == "conv" else 2
        layer = torch.nn.Conv2d(channels, outputs, kernel, stride, kernel // 2).to(memory_format=torch.channels_last)
        x = image(batch, channels, height, width)
        return lambda: layer(x)
    if name == "linear":
        rows, inputs, outputs = sizes
        layer, x = torch.nn.Linear(inputs, outputs), torch.randn(rows, inputs)
        return lambda: layer(x)
    if name == "attention":
        batch, tokens, context, heads, d = sizes
        query = torch.randn(batch, tokens, heads, d).transpose(1, 2)
        key, value = (torch.randn(batch, context, heads, d).transpose(1, 2) for _ in range(2))
        return lambda: F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, tokens, -1)
    if name == "group_norm_silu":
        x, norm = image(*sizes), torch.nn.GroupNorm(32, sizes[1])
        return lambda: F.silu(norm(x))
    if name == "layer_norm":
        x, norm = torch.randn(*sizes), torch.nn.LayerNorm(sizes[1])
        return lambda: norm(x)
    if name == "silu":
        x = torch.randn(*sizes)
        return lambda: F.silu(x)
    if name == "linear_geglu":
        rows, inputs, outputs = sizes
        layer, x = torch.nn.Linear(inputs, 2 * outputs), torch.randn(rows, inputs)
        def linear_geglu():
            value, gate = layer(x).chunk(2, dim=-1)
            return value * F.gelu(gate)
        return linear_geglu
    if name == "channel_bias":
        x, bias = image(*sizes), torch.randn(*sizes[:2])
        return lambda: x + bias[:, :, None, None]
    raise ValueError(f"unknown operation {name}")


def main():
    torch.set_num_threads(int(sys.argv[1]))
    runtime = sys.argv[2] if len(sys.argv) > 2 else "torch"
    for line in sys.stdin:
        name, *words = line.split()
        with torch.no_grad():
            run = operation(name, words, runtime)
            run()
            start, calls = time.perf_counter(), 0
            while calls == 0 or time.perf_counter() - start < AT_LEAST:
                run()
                calls += 1
            print((time.perf_counter() - start) / calls, flush=True)
        del run


if __name__ == "__main__":
    main()
