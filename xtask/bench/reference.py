"""One run of Python Diffusers, timed: prints seconds a stage and the peak memory in bytes as JSON.

    reference.py MODEL STEPS WIDTH HEIGHT THREADS DTYPE DEVICE

WIDTH and HEIGHT are 0 for the model's own size. Needs torch, diffusers and transformers. On the CPU the models run in
channels_last, which is PyTorch's faster layout there.
"""

import json
import os
import resource
import sys
import time

import torch
from diffusers import DDPMPipeline, StableDiffusionPipeline

PROMPT = "a photograph of an astronaut riding a horse"


def timed(function, device):
    start = time.perf_counter()
    result = function()
    if device != "cpu":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def main():
    model, steps, width, height, threads, dtype, device = sys.argv[1:]
    steps, width, height = int(steps), int(width), int(height)
    torch.set_num_threads(int(threads))
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    index = json.load(open(os.path.join(model, "model_index.json")))
    is_ddpm = index["_class_name"].startswith("DD")
    pipeline_class = DDPMPipeline if is_ddpm else StableDiffusionPipeline

    def load():
        options = {} if is_ddpm else {"safety_checker": None, "requires_safety_checker": False}
        pipeline = pipeline_class.from_pretrained(model, torch_dtype=dtype, **options).to(device)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.unet.to(memory_format=torch.channels_last)
        if not is_ddpm:
            pipeline.vae.to(memory_format=torch.channels_last)
        return pipeline

    pipeline, load_seconds = timed(load, device)
    generator = torch.Generator().manual_seed(0)
    stages = {"load": load_seconds}
    if is_ddpm:
        _, stages["denoise"] = timed(
            lambda: pipeline(num_inference_steps=steps, generator=generator, output_type="np"), device
        )
        stages["calls"] = steps
    else:
        sized = {"width": width, "height": height} if width else {}
        encode = lambda: pipeline.encode_prompt(PROMPT, device, 1, True)
        (positive, negative), stages["encode"] = timed(encode, device)
        calls = []
        run = lambda: pipeline(
            prompt_embeds=positive,
            negative_prompt_embeds=negative,
            num_inference_steps=steps,
            generator=generator,
            output_type="latent",
            callback_on_step_end=lambda *_: calls.append(1) or {},
            **sized,
        ).images
        latents, stages["denoise"] = timed(run, device)
        with torch.no_grad():
            decode = lambda: pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
            _, stages["decode"] = timed(decode, device)
        stages["calls"] = len(calls)
    stages["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(stages))


with torch.no_grad():
    main()
