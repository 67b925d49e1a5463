"""`ddpm/`: UNet2DModel checkpoints, their blocks' results, and runs of the DDPM and DDIM pipelines."""

import torch
from diffusers import DDIMPipeline, DDPMPipeline, UNet2DModel

import checkpoints
from compare import check_images, generators, other_code_path, record_blocks, tolerance
from weights import ConvFit, fill, generator, input_of, save_json, smooth_fields

MODELS = {
    "cat": checkpoints.unet_2d(),
    "new-names": checkpoints.unet_2d(
        attention_head_dim=4,
        block_out_channels=[8, 16],
        down_block_types=["DownBlock2D", "AttnDownBlock2D"],
        layers_per_block=1,
        up_block_types=["AttnUpBlock2D", "UpBlock2D"],
    ),
    "scale-shift": checkpoints.unet_2d(
        attention_head_dim=8,
        block_out_channels=[8, 16],
        center_input_sample=True,
        down_block_types=["DownBlock2D", "AttnDownBlock2D"],
        downsample_padding=1,
        flip_sin_to_cos=True,
        freq_shift=0,
        layers_per_block=1,
        mid_block_scale_factor=1.4,
        norm_eps=1e-05,
        norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
        up_block_types=["AttnUpBlock2D", "UpBlock2D"],
    ),
}
STAGE_ONLY = {"scale-shift"}

CASES = [
    {"name": "cat_ddpm_a", "steps": 25, "seed": 3},
    {"name": "cat_ddpm_batch", "steps": 10, "seed": 11, "batch_size": 2},
    {"name": "cat_ddpm_seeds", "steps": 10, "seed": [3, 29], "batch_size": 2},
    {"name": "cat_ddpm_fixed_large", "steps": 25, "seed": 5, "scheduler_options": {"variance_type": "fixed_large"}},
    {"name": "cat_ddpm_trailing", "steps": 10, "seed": 8, "scheduler_options": {"timestep_spacing": "trailing"}},
    {"name": "cat_ddim_a", "steps": 25, "seed": 3},
    {"name": "cat_ddim_eta", "steps": 10, "seed": 21, "eta": 0.6, "batch_size": 2},
    {"name": "cat_ddim_eta1_clipped", "steps": 10, "seed": 40, "eta": 1.0, "use_clipped_model_output": True},
    {"name": "cat_ddim_linspace", "steps": 10, "seed": 13, "scheduler_options": {"timestep_spacing": "linspace"}},
    {"name": "new-names_ddpm_a", "steps": 10, "seed": 3},
    {"name": "new-names_ddim_a", "steps": 10, "seed": 17},
    {"name": "new-names_ddim_seeds", "steps": 5, "seed": [1, 2], "batch_size": 2, "eta": 0.3},
]


def noise_levels():
    betas = torch.linspace(checkpoints.DDPM_SCHEDULER["beta_start"], checkpoints.DDPM_SCHEDULER["beta_end"], 1000)
    return torch.cumprod(1 - betas, 0)


def fit(model, label):
    """The last convolution learns to tell the noise in noisy smooth images."""
    rng, alphas = generator(f"{label}/fit"), noise_levels()
    size, channels = model.config.sample_size, model.config.in_channels
    regression = ConvFit(model.conv_out)
    for _ in range(12):
        image = 0.45 * smooth_fields(rng, 64, channels, size, size)
        noise = torch.randn(image.shape, generator=rng)
        timestep = torch.randint(0, 1000, (64,), generator=rng)
        alpha = alphas[timestep].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * image + (1 - alpha).sqrt() * noise
        features = input_of(model.conv_out, lambda: model(noisy, timestep))
        regression.add(features, noise, weight=((1 - alpha) / alpha).clamp(0.05, 10).flatten())
    regression.solve()


def make_model(folder, name, config):
    model = fill(UNet2DModel.from_config(checkpoints.without_private(config)), f"ddpm/{name}")
    fit(model, f"ddpm/{name}")
    tensors = checkpoints.state(model)
    if name == "cat":
        tensors = checkpoints.old_attention_names(tensors)
    checkpoints.save_tensors(folder / name / "diffusion_pytorch_model.safetensors", tensors)
    checkpoints.save_config(folder / name / "config.json", config)
    if name not in STAGE_ONLY:
        checkpoints.save_config(folder / name / "scheduler_config.json", checkpoints.DDPM_SCHEDULER)
        checkpoints.save_config(folder / name / "model_index.json", checkpoints.DDPM_INDEX)
    return model


def make_stage(folder, name, model):
    rng = generator(f"ddpm/{name}/stage")
    size = model.config.sample_size
    sample = torch.randn(2, model.config.in_channels, size, size, generator=rng)
    timestep = torch.tensor([999, 340])
    levels = len(model.config.block_out_channels)
    names = ["time_embedding", "mid_block"]
    names += [f"down_blocks.{i}" for i in range(levels)] + [f"up_blocks.{i}" for i in range(levels - 1)]
    output, blocks = record_blocks(model, names, lambda: model(sample, timestep).sample)
    stage = {"sample": sample, "timestep": timestep, "output": output} | blocks
    checkpoints.save_tensors(folder / "stages" / f"{name}.safetensors", stage)


def load(folder, case):
    kind = DDIMPipeline if case["pipeline"] == "DDIMPipeline" else DDPMPipeline
    pipeline = kind.from_pretrained(str(folder / case["model"]))
    pipeline.set_progress_bar_config(disable=True)
    scheduler = pipeline.scheduler
    pipeline.scheduler = type(scheduler).from_config(scheduler.config, **case.get("scheduler_options", {}))
    return pipeline


def run(pipeline, case):
    """The last sample before it becomes an image, and the images."""
    rng = generators(case["seed"])
    extra = {key: case[key] for key in ("batch_size", "eta", "use_clipped_model_output") if key in case}
    samples = []
    step = pipeline.scheduler.step

    def remembering(*arguments, **options):
        result = step(*arguments, **options)
        samples.append(result.prev_sample.clone())
        return result

    pipeline.scheduler.step = remembering
    try:
        images = pipeline(generator=rng, num_inference_steps=case["steps"], **extra).images
    finally:
        pipeline.scheduler.step = step
    return samples[-1], images


def make_cases(folder):
    manifest = []
    for case in CASES:
        model = case["name"].split("_")[0]
        pipeline = "DDIMPipeline" if "_ddim_" in case["name"] else "DDPMPipeline"
        rest = {key: value for key, value in case.items() if key != "name"}
        case = {"name": case["name"], "model": model, "pipeline": pipeline} | rest
        loaded = load(folder, case)
        sample, images = run(loaded, case)
        with other_code_path(loaded):
            other, other_images = run(loaded, case)
        check_images(case["name"], images)
        case["expected"] = {
            "images": [f"expected/{case['name']}_{i}.png" for i in range(len(images))],
            "tensors": f"expected/{case['name']}.safetensors",
        }
        case["tolerance"] = tolerance("sample_atol", sample, other, images, other_images)
        checkpoints.save_tensors(folder / case["expected"]["tensors"], {"sample": sample})
        for path, image in zip(case["expected"]["images"], images):
            image.save(folder / path)
        manifest.append(case)
    save_json(folder / "cases.json", manifest)


@torch.no_grad()
def make(folder):
    (folder / "expected").mkdir(parents=True, exist_ok=True)
    for name, config in MODELS.items():
        model = make_model(folder, name, config)
        make_stage(folder, name, model)
    make_cases(folder)
