"""`sd/`: Stable Diffusion v1 checkpoints, what their parts compute, and runs of the text-to-image pipeline."""

import diffusers
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import checkpoints
import tokenizer as vocabulary
from compare import check_images, generators, other_code_path, record_blocks, tolerance
from weights import ConvFit, fill, generator, input_of, save_json, smooth_fields

LATENT_SCALE = 0.18215

LIGHTHOUSE = "a lighthouse on a cliff in the rain"
OWL = "an owl reading a newspaper, etching"
TEAPOT = "a green teapot on a blue table, watercolor"
TRAIN = "an old train crossing a bridge at night, 4k"
NEGATIVE, OTHER_NEGATIVE = "blurry, bad quality", "frame, signature"
UNICODE = "Übergröße: ein Bär 🐻 im Schnee, 雪の熊, “naïf”"
LONG = "a long row of lanterns over the water, " * 11 + "drawn with chalk"
PROMPTS = [LIGHTHOUSE, OWL, TEAPOT, TRAIN, NEGATIVE, OTHER_NEGATIVE, "", UNICODE, LONG]
IN_PIECES = {"owl", "lanterns", "etching"}


def case(name, prompt, scheduler=None, options=None, steps=8, guidance_scale=7.5, seed=0, **rest):
    opening = {"name": name, "pipeline": "StableDiffusionPipeline", "model": "base", "prompt": prompt}
    opening |= {"scheduler": scheduler, "scheduler_options": options or {}, "steps": steps}
    return opening | {"guidance_scale": guidance_scale, "seed": seed} | rest


DDIM, DDPM, PNDM = "DDIMScheduler", "DDPMScheduler", "PNDMScheduler"
EULER, UNIPC = "EulerDiscreteScheduler", "UniPCMultistepScheduler"
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}

CASES = [
    case("txt2img_pndm", LIGHTHOUSE, steps=10, seed=71, trace=True),
    case("txt2img_pndm_prk", OWL, PNDM, {"skip_prk_steps": False}, steps=5, seed=72),
    case("txt2img_pndm_trailing", TEAPOT, PNDM, {"timestep_spacing": "trailing"}, seed=73),
    case("txt2img_ddim", OWL, DDIM, steps=10, seed=74, trace=True),
    case("txt2img_ddim_trailing", LIGHTHOUSE, DDIM, {"timestep_spacing": "trailing"}, steps=5, seed=75),
    case("txt2img_ddim_zero_snr_v", TEAPOT, DDIM, ZERO_SNR, seed=76),
    case("txt2img_ddpm", TRAIN, DDPM, steps=10, seed=77),
    case("txt2img_ddpm_timesteps", OWL, DDPM, seed=78, timesteps=[980, 830, 640, 470, 300, 150, 60, 2]),
    case("txt2img_euler", TRAIN, EULER, steps=10, seed=79, trace=True),
    case("txt2img_euler_karras", TEAPOT, EULER, {"use_karras_sigmas": True}, seed=80),
    case("txt2img_euler_exponential", OWL, EULER, {"use_exponential_sigmas": True}, seed=81),
    case("txt2img_euler_beta", LIGHTHOUSE, EULER, {"use_beta_sigmas": True}, seed=82),
    case("txt2img_euler_trailing", TRAIN, EULER, {"timestep_spacing": "trailing"}, steps=5, seed=83),
    case("txt2img_unipc", LIGHTHOUSE, UNIPC, steps=10, seed=84, trace=True),
    case("txt2img_unipc_3_karras", TEAPOT, UNIPC, {"solver_order": 3, "use_karras_sigmas": True}, seed=85),
    case("txt2img_unipc_leading", OWL, UNIPC, {"timestep_spacing": "leading"}, seed=86),
    case("txt2img_timesteps", TEAPOT, EULER, seed=87, timesteps=[999, 870, 720, 560, 410, 270, 140, 20]),
    case("txt2img_sigmas", LIGHTHOUSE, EULER, seed=88, sigmas=[14.615, 7.1, 4.2, 2.6, 1.7, 1.1, 0.6, 0.2, 0.0]),
    case("txt2img_guidance_0", OWL, DDIM, guidance_scale=0.0, seed=89),
    case("txt2img_guidance_1", TRAIN, EULER, guidance_scale=1.0, seed=90),
    case("txt2img_guidance_3", TEAPOT, UNIPC, guidance_scale=3.0, seed=91),
    case("txt2img_guidance_rescale", LIGHTHOUSE, DDIM, seed=92, guidance_rescale=0.7),
    case("txt2img_guidance_rescale_v", [OWL, TRAIN], DDIM, {"prediction_type": "v_prediction"}, seed=93,
         guidance_rescale=0.5),
    case("txt2img_clip_skip_1", TRAIN, EULER, seed=94, clip_skip=1),
    case("txt2img_clip_skip_2", TRAIN, EULER, seed=94, clip_skip=2, negative_prompt=NEGATIVE),
    case("txt2img_eta", TEAPOT, DDIM, seed=95, eta=0.5),
    case("txt2img_eta_unused", OWL, EULER, seed=96, eta=1.0),
    case("txt2img_negative", LIGHTHOUSE, seed=97, negative_prompt=NEGATIVE),
    case("txt2img_negative_ignored", LIGHTHOUSE, DDIM, guidance_scale=1.0, seed=98, negative_prompt=NEGATIVE),
    case("txt2img_two_prompts", [LIGHTHOUSE, TRAIN], UNIPC, seed=99, negative_prompt=[NEGATIVE, OTHER_NEGATIVE]),
    case("txt2img_two_images", TEAPOT, DDPM, seed=100, num_images_per_prompt=2, negative_prompt=OTHER_NEGATIVE),
    case("txt2img_two_prompts_seeds", [OWL, TEAPOT], DDPM, seed=[101, 102]),
    case("txt2img_72x104", OWL, EULER, steps=5, seed=103, width=72, height=104),
    case("txt2img_64x128", TRAIN, DDIM, steps=5, seed=104, width=64, height=128),
    # One of the two alone is ignored.
    case("txt2img_latents", LIGHTHOUSE, EULER, seed=105, latents="inputs/latents.safetensors"),
    case("txt2img_empty_prompt", "", DDIM, seed=106),
    case("txt2img_long_prompt", LONG, UNIPC, seed=107, negative_prompt=LONG[::-1]),
    case("txt2img_unicode", UNICODE, seed=108),
    case("form_f32", TEAPOT, DDIM, seed=109),
    case("form_bin", TEAPOT, DDIM, seed=109) | {"model": "bin"},
    case("form_fp16_variant", TEAPOT, DDIM, seed=109, variant="fp16"),
]


def public(config):
    return checkpoints.without_private(config)


def text_states(model, ids, clip_skip=None):
    result = model(ids, output_hidden_states=True)
    if clip_skip is None:
        return result.last_hidden_state
    inner = getattr(model, "text_model", model)
    return inner.final_layer_norm(result.hidden_states[-(clip_skip + 1)])


def with_text_model(encoder):
    """Diffusers asks for `text_encoder.text_model` when layers are skipped; newer transformers have no such part."""
    if not hasattr(encoder, "text_model"):
        object.__setattr__(encoder, "text_model", encoder)


def padded(tokenizer, prompts):
    options = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
    return tokenizer(list(prompts), **options).input_ids


def fit_decoder(model):
    """Latents are three colours and a sum of them, an eighth of the image's size; `fit_encoder` agrees."""
    rng, regression = generator("sd/vae/decoder fit"), ConvFit(model.decoder.conv_out)
    for height, width in [(8, 8), (9, 13), (8, 8), (12, 8)]:
        colours = 0.4 * smooth_fields(rng, 24, 3, height, width)
        latents = latents_of(colours)
        latents = latents + 0.3 * torch.randn(latents.shape, generator=rng)
        image = F.interpolate(colours, (8 * height, 8 * width), mode="bilinear").tanh()
        regression.add(input_of(model.decoder.conv_out, lambda: model.decode(latents)), image)
    regression.solve()


def latents_of(colours):
    total = colours[:, :1] - colours[:, 1:2] + colours[:, 2:]
    return 2.5 / LATENT_SCALE * torch.cat([colours, 0.6 * total], dim=1)


def fit_encoder(model):
    """The inverse of the decoder, with a small and varying variance."""
    rng, regression = generator("sd/vae/encoder fit"), ConvFit(model.encoder.conv_out)
    mixing = model.quant_conv.weight[:, :, 0, 0].double()
    for _ in range(4):
        image = (0.4 * smooth_fields(rng, 24, 3, 64, 64)).tanh()
        colours = F.avg_pool2d(image, 8).clamp(-0.95, 0.95).atanh()
        moments = torch.cat([latents_of(colours), -3 + colours.repeat(1, 2, 1, 1)[:, :4]], dim=1)
        before = moments - model.quant_conv.bias.view(1, -1, 1, 1)
        before = torch.einsum("ij,bjhw->bihw", torch.linalg.inv(mixing), before.double())
        regression.add(input_of(model.encoder.conv_out, lambda: model.encode(image)), before)
    regression.solve()


def alphas():
    first, last = checkpoints.PNDM_SCHEDULER["beta_start"] ** 0.5, checkpoints.PNDM_SCHEDULER["beta_end"] ** 0.5
    return torch.cumprod(1 - torch.linspace(first, last, 1000) ** 2, 0)


def fit_unet(model, encoder):
    """Noise in noisy smooth latents; the level of the latents depends on the prompt."""
    rng, regression, levels = generator("sd/unet/fit"), ConvFit(model.conv_out), alphas()
    to_level = torch.randn(checkpoints.TEXT_WIDTH, 4, generator=rng) / checkpoints.TEXT_WIDTH**0.5
    marks = encoder.config.vocab_size
    for height, width in [(8, 8)] * 8 + [(9, 13), (16, 8)] * 2:
        ids = torch.full((48, 77), marks - 1)
        for row in ids:
            length = int(torch.randint(1, 14, (1,), generator=rng))
            row[0] = marks - 2
            row[1 : length + 1] = torch.randint(256, marks - 2, (length,), generator=rng)
        states = text_states(encoder, ids)
        level = states.mean(dim=1)
        level = (level - level.mean(dim=0)) / level.std() @ to_level
        latents = 0.7 * smooth_fields(rng, 48, 4, height, width) + 0.6 * level[:, :, None, None]
        noise = torch.randn(latents.shape, generator=rng)
        timestep = torch.randint(0, 1000, (48,), generator=rng)
        alpha = levels[timestep].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        features = input_of(model.conv_out, lambda: model(noisy, timestep, states))
        regression.add(features, noise, weight=((1 - alpha) / alpha).clamp(0.05, 10).flatten())
    regression.solve()


def save_models(folder, encoder, unet, vae, configs, merges):
    components = {
        "text_encoder": ("model", "pytorch_model", checkpoints.text_model_names(checkpoints.state(encoder))),
        "unet": ("diffusion_pytorch_model", "diffusion_pytorch_model", checkpoints.state(unet)),
        "vae": ("diffusion_pytorch_model", "diffusion_pytorch_model", checkpoints.state(vae)),
    }
    for name, (stem, pickle_stem, tensors) in components.items():
        if name == "text_encoder":
            tensors["text_model.embeddings.position_ids"] = torch.arange(77).unsqueeze(0)
        old = checkpoints.old_attention_names(tensors) if name == "vae" else tensors
        checkpoints.save_tensors(folder / "base" / name / f"{stem}.safetensors", old)
        checkpoints.save_tensors(folder / "base" / name / f"{stem}.fp16.safetensors", checkpoints.half(old))
        checkpoints.save_pickle(folder / "bin" / name / f"{pickle_stem}.bin", checkpoints.half(tensors))
    for form in ("base", "bin"):
        for name, config in configs.items():
            checkpoints.save_config(folder / form / name / "config.json", config)
        checkpoints.save_config(folder / form / "scheduler" / "scheduler_config.json", checkpoints.PNDM_SCHEDULER)
        checkpoints.save_config(folder / form / "model_index.json", checkpoints.SD_INDEX)
        (folder / form / "tokenizer").mkdir(parents=True, exist_ok=True)
        vocabulary.save(folder / form / "tokenizer", merges)


def make_text_encoder(config, label):
    return fill(CLIPTextModel(CLIPTextConfig(**public(config))), label)


def make_text_stages(folder, tokenizer, encoder, config):
    ids = padded(tokenizer, PROMPTS)
    rows = []
    for text, row in zip(PROMPTS, ids.tolist()):
        rows.append({"text": text, "ids": tokenizer(text, verbose=False).input_ids, "padded_to_77": row})
    save_json(folder / "stages" / "tokens.json", rows)

    few, long = ids[[0, 6, 7]], ids[[8]]
    stage = {
        "input_ids": few,
        "last_hidden_state": text_states(encoder, few),
        "clip_skip_1": text_states(encoder, few, 1),
        "clip_skip_2": text_states(encoder, few, 2),
        "long.input_ids": long,
        "long.last_hidden_state": text_states(encoder, long),
    }
    checkpoints.save_tensors(folder / "stages" / "text_encoder.safetensors", stage)

    config = config | {"hidden_act": "gelu", "num_hidden_layers": 2, "num_attention_heads": 3}
    other = make_text_encoder(config, "sd/gelu/text_encoder")
    tensors = {name.removeprefix("text_model."): t for name, t in checkpoints.state(other).items()}
    checkpoints.save_tensors(folder / "gelu" / "text_encoder" / "model.safetensors", tensors)
    checkpoints.save_config(folder / "gelu" / "text_encoder" / "config.json", config)
    stage = {"input_ids": few[:2], "last_hidden_state": text_states(other, few[:2])}
    stage["clip_skip_1"] = text_states(other, few[:2], 1)
    checkpoints.save_tensors(folder / "stages" / "text_encoder_gelu.safetensors", stage)
    return text_states(encoder, few[:2])


def make_unet_stage(folder, name, model, states, timestep, size, blocks=False, **conditions):
    rng, batch = generator(f"sd/stages/{name}"), len(states)
    sample = torch.randn(batch, model.config.in_channels, *size, generator=rng)
    levels = range(len(model.config.block_out_channels))
    names = ["time_embedding", "conv_in", "mid_block"]
    names += [f"{side}_blocks.{i}" for side in ("down", "up") for i in levels]
    output, seen = record_blocks(
        model, names if blocks else [], lambda: model(sample, timestep, states, **conditions).sample
    )
    stage = {"sample": sample, "timestep": timestep, "encoder_hidden_states": states, "output": output}
    checkpoints.save_tensors(folder / "stages" / f"{name}.safetensors", stage | seen | conditions)


def make_unet_variants(folder, states):
    """UNets with one peculiarity each, which only have a stage."""
    linear = {
        "attention_head_dim": [2, 4, 8],
        "resnet_time_scale_shift": "scale_shift",
        "use_linear_projection": True,
    }
    configs = {
        "inpaint": checkpoints.three_levels(in_channels=9),
        "linear": checkpoints.three_levels(**linear, **checkpoints.RESAVED_UNET),
        "lcm": checkpoints.two_levels(time_cond_proj_dim=12),
    }
    for name, config in configs.items():
        model = fill(UNet2DConditionModel.from_config(public(config)), f"sd/{name}/unet")
        tensors = checkpoints.state(model)
        if name == "inpaint":
            tensors = checkpoints.half(tensors)
            model.load_state_dict(tensors)
        checkpoints.save_tensors(folder / name / "unet" / "diffusion_pytorch_model.safetensors", tensors)
        checkpoints.save_config(folder / name / "unet" / "config.json", config)
        conditions = {}
        if name == "lcm":
            scale = torch.tensor([7.5, 2.0]) - 1
            embed = StableDiffusionPipeline.get_guidance_scale_embedding
            conditions["timestep_cond"] = embed(None, scale, embedding_dim=config["time_cond_proj_dim"])
        rows = states if name == "lcm" else states[:1]
        timestep = torch.tensor([741, 341])[: len(rows)]
        make_unet_stage(folder, f"unet_{name}", model, rows, timestep, (8, 8), blocks=True, **conditions)


def make_vae_stage(folder, model):
    rng = generator("sd/stages/vae")
    image = (0.4 * smooth_fields(rng, 2, 3, 64, 64)).tanh()
    posterior = model.encode(image).latent_dist
    latents = posterior.mean[:1] + torch.randn(1, 4, 8, 8, generator=rng)
    odd = latents_of(0.4 * smooth_fields(rng, 1, 3, 5, 7))
    stage = {
        "encode.image": image,
        "encode.moments": posterior.parameters,
        "encode.mean": posterior.mean,
        "encode.logvar": posterior.logvar,
        "encode.sample_seed_17": posterior.sample(torch.Generator("cpu").manual_seed(17)),
        "decode.latents": latents,
        "decode.image": model.decode(latents).sample,
        "decode_odd.latents": odd,
        "decode_odd.image": model.decode(odd).sample,
    }
    checkpoints.save_tensors(folder / "stages" / "vae.safetensors", stage)
    again = stage["decode.image"] - image[:1]
    print(f"  vae: image {image.std():.2f}, error of a reconstruction {again.std():.2f}")


def load(folder, case):
    options = {"dtype": torch.float32}
    if case.get("variant"):
        options["variant"] = case["variant"]
    if case["model"] == "bin":
        options["use_safetensors"] = False
    pipeline = StableDiffusionPipeline.from_pretrained(str(folder / case["model"]), **options)
    pipeline.set_progress_bar_config(disable=True)
    with_text_model(pipeline.text_encoder)
    if case["scheduler"]:
        kind = getattr(diffusers, case["scheduler"])
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **case["scheduler_options"])
    return pipeline


NOT_FOR_THE_CALL = {
    "name", "pipeline", "model", "scheduler", "scheduler_options", "steps", "seed", "trace", "variant", "latents",
}


def run(folder, pipeline, case):
    """The latents after each step, its timesteps, and the images."""
    call = {key: value for key, value in case.items() if key not in NOT_FOR_THE_CALL}
    if "latents" in case:
        call["latents"] = load_file(str(folder / case["latents"]))["latents"]
    steps, timesteps = [], []

    def remember(_, __, timestep, tensors):
        steps.append(tensors["latents"].clone())
        timesteps.append(timestep)
        return {}

    images = pipeline(
        num_inference_steps=case["steps"],
        generator=generators(case["seed"]),
        callback_on_step_end=remember,
        **call,
    ).images
    return torch.stack(steps), torch.stack(timesteps), images


def make_cases(folder):
    latents = torch.randn(1, 4, 8, 8, generator=generator("sd/inputs/latents"))
    checkpoints.save_tensors(folder / "inputs" / "latents.safetensors", {"latents": latents})
    manifest = []
    (folder / "expected").mkdir(parents=True, exist_ok=True)
    for case in CASES:
        loaded = load(folder, case)
        steps, timesteps, images = run(folder, loaded, case)
        with other_code_path(loaded):
            other_steps, _, other_images = run(folder, loaded, case)
        check_images(case["name"], images)
        expected = {
            "images": [f"expected/{case['name']}_{i}.png" for i in range(len(images))],
            "tensors": f"expected/{case['name']}.safetensors",
        }
        tensors = {"latents": steps[-1]}
        if case.get("trace"):
            tensors |= {"latents_after_each_step": steps, "timesteps": timesteps}
        checkpoints.save_tensors(folder / expected["tensors"], tensors)
        for path, image in zip(expected["images"], images):
            image.save(folder / path)
        allowed = tolerance("latents_atol", steps[-1], other_steps[-1], images, other_images)
        manifest.append(case | {"expected": expected, "tolerance": allowed})
    save_json(folder / "cases.json", manifest)


@torch.no_grad()
def make(folder):
    merges = vocabulary.small_merges(PROMPTS, IN_PIECES)
    configs = {
        "text_encoder": checkpoints.text_encoder(len(merges) + 514),
        "unet": checkpoints.unet(),
        "vae": checkpoints.vae(),
    }
    encoder = make_text_encoder(configs["text_encoder"], "sd/base/text_encoder")
    unet = fill(UNet2DConditionModel.from_config(public(configs["unet"])), "sd/base/unet")
    vae = fill(AutoencoderKL.from_config(public(configs["vae"])), "sd/base/vae")
    fit_unet(unet, encoder)
    fit_decoder(vae)
    fit_encoder(vae)
    save_models(folder, encoder, unet, vae, configs, merges)

    tokenizer = CLIPTokenizer.from_pretrained(str(folder / "base" / "tokenizer"))
    states = make_text_stages(folder, tokenizer, encoder, configs["text_encoder"])
    make_unet_stage(folder, "unet", unet, states, torch.tensor([981, 341]), (8, 8), blocks=True)
    make_unet_stage(folder, "unet_first_and_last_step", unet, states, torch.tensor([999, 0]), (8, 8))
    make_unet_stage(folder, "unet_fractional_timestep", unet, states[:1], torch.tensor(978.61), (16, 16))
    odd = torch.tensor([501])
    make_unet_stage(folder, "unet_not_multiple_of_8", unet, states[1:], odd, (9, 13), blocks=True)
    make_unet_variants(folder, states)
    make_vae_stage(folder, vae)
    make_cases(folder)
