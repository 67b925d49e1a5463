"""`lora/`: adapters of every form for the checkpoint `sd/base`, and the weights that they make of it.

    python lora.py OUTPUT_FOLDER

OUTPUT_FOLDER is `crates/diffuse-pipelines/tests/reference` and has `sd/base`. Needs also `peft` and
`lycoris-lora`, and a `transformers` that accepts this `peft`. `lora/README.md` describes the files.
"""

import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import checkpoints
import ldm
from compare import other_code_path, tolerance
from golden import quiet
from weights import generator, save_json

TEXT = "text_encoder.text_model."
DOWN = "down_blocks.0.attentions.0.transformer_blocks.0."
MID = "mid_block.attentions.0.transformer_blocks.0."
UP = "up_blocks.3.attentions.1.transformer_blocks.0."

# Linear layers of all kinds, and a 1x1 convolution.
UNET_LINEAR = [
    DOWN + "attn1.to_q",
    DOWN + "attn2.to_k",
    MID + "attn2.to_out.0",
    MID + "ff.net.0.proj",
    UP + "attn1.to_v",
]
UNET_PROJ = ["down_blocks.1.attentions.0.proj_in", "up_blocks.3.attentions.1.proj_out"]
# Convolutions of 3x3 and 1x1, and the linear layer of a resnet.
UNET_CONV = [
    "conv_in",
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.downsamplers.0.conv",
    "down_blocks.1.resnets.0.conv_shortcut",
    "mid_block.resnets.1.time_emb_proj",
    "up_blocks.0.upsamplers.0.conv",
    "up_blocks.3.resnets.1.conv2",
]
TEXT_LINEAR = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.1.self_attn.out_proj", "encoder.layers.2.mlp.fc1"]

RUN = {
    "prompt": "a green teapot on a blue table, watercolor",
    "height": 64,
    "width": 64,
    "num_inference_steps": 3,
    "guidance_scale": 5.0,
    "seed": 211,
    "scheduler": "DDIMScheduler",
}
RUN_LCM = RUN | {"num_inference_steps": 2, "guidance_scale": 1.0, "seed": 212, "scheduler": "LCMScheduler"}


def random(label, shape, dtype=torch.float16, gain=0.5):
    """Distinct weights that `dtype` holds exactly."""
    noise = torch.randn(shape, generator=generator(f"lora/{label}"))
    fan_in = noise[0].numel() if len(shape) > 1 else 25
    return (noise * (gain / fan_in**0.5)).to(dtype)


class Adapters:
    def __init__(self, reference):
        self.reference, self.folder, self.cases = reference, reference / "lora", []
        for path in self.folder.glob("*"):
            if path.name != "README.md":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        (self.folder / "expected").mkdir(parents=True, exist_ok=True)
        self.base = self.weights(self.pipeline())

    def pipeline(self, scheduler=None):
        loaded = StableDiffusionPipeline.from_pretrained(str(self.reference / "sd" / "base"), dtype=torch.float32)
        loaded.set_progress_bar_config(disable=True)
        kind = {None: None, "DDIMScheduler": DDIMScheduler, "LCMScheduler": LCMScheduler}[scheduler]
        if kind:
            loaded.scheduler = kind.from_config(loaded.scheduler.config)
        return loaded

    def weights(self, loaded):
        """Every parameter, named as its file has it, after the name of its component."""
        result = {f"unet.{name}": t for name, t in loaded.unet.state_dict().items()}
        for name, tensor in loaded.text_encoder.state_dict().items():
            if "position_ids" not in name:
                result[TEXT + name.removeprefix("text_model.")] = tensor
        return {name: tensor.detach().clone() for name, tensor in result.items()}

    def save(self, name, tensors, metadata=None):
        """A file of kohya's or LyCORIS's scripts, or of an old trainer."""
        path = self.folder / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {key: t.detach().clone().contiguous() for key, t in sorted(tensors.items())}
        save_file(tensors, str(path), metadata=metadata)
        sort_header(path)
        return path

    def case(self, name, by, merged, *, files=None, strength=1.0, text_strength=None, suffix="", run=None, note=None,
             same_as=None):
        """Records the tensors that the adapter changes; all others stay as they are."""
        changed = {key: t for key, t in merged.items() if not torch.equal(t, self.base[key])}
        if not changed:
            raise SystemExit(f"{name} changes nothing")
        expected = f"expected/{same_as or name.replace('/', '_') + suffix}.safetensors"
        if same_as:
            recorded = load_file(str(self.folder / expected))
            assert recorded.keys() == changed.keys()
            close(name, recorded, changed)
        checkpoints.save_tensors(self.folder / expected, {key: t.float() for key, t in changed.items()})
        if files is None:
            files = [{"file": f"{name}.safetensors", "strength": strength}]
            if text_strength is not None:
                files[0]["text_encoder_strength"] = text_strength
        row = {"name": name + suffix, "adapters": files, "by": by, "weights": expected, "changed": len(changed)}
        if note:
            row["note"] = note
        if run:
            row |= self.run(row["name"], merged, run)
        self.cases.append(row)
        print(f"  {row['name']}: {len(changed)} tensors, by {by}")

    def run(self, name, merged, run):
        """Latents of a run with the merged weights."""
        loaded = self.pipeline(run["scheduler"])
        load_weights(loaded, merged)

        def latents(loaded):
            options = {key: value for key, value in run.items() if key not in ("seed", "scheduler")}
            rng = torch.Generator("cpu").manual_seed(run["seed"])
            result = loaded(generator=rng, output_type="latent", **options).images
            return result, loaded.image_processor.postprocess(decode(loaded, result))

        first, images = latents(loaded)
        with other_code_path(loaded):
            other, other_images = latents(loaded)
        checkpoints.save_tensors(self.folder / f"expected/{name}.latents.safetensors", {"latents": first})
        allowed = tolerance("latents_atol", first, other, images, other_images)
        without, _ = latents(self.pipeline(run["scheduler"]))
        print(f"    latents differ from those without the adapter by {(first - without).abs().max():.2f}")
        return {
            "run": run,
            "latents": f"expected/{name}.latents.safetensors",
            "latents_atol": allowed["latents_atol"],
            "differs_from_base_by": round(float((first - without).abs().max()), 2),
        }

    def by_diffusers(self, sources, strengths=(1.0,), **options):
        """Weights after `fuse_lora`; a strength may be one number, or one for each component."""
        loaded = self.pipeline()
        names = []
        for i, source in enumerate(sources):
            names.append(f"adapter_{i}")
            loaded.load_lora_weights(source, adapter_name=names[-1], **options)
        loaded.set_adapters(names, adapter_weights=list(strengths))
        loaded.fuse_lora(adapter_names=names)
        loaded.unload_lora_weights()
        return self.weights(loaded)


def decode(loaded, latents):
    with torch.no_grad():
        return loaded.vae.decode(latents / loaded.vae.config.scaling_factor, return_dict=False)[0]


def load_weights(loaded, merged):
    loaded.unet.load_state_dict({k.removeprefix("unet."): t for k, t in merged.items() if k.startswith("unet.")})
    flat = not hasattr(loaded.text_encoder, "text_model")
    prefix = TEXT if flat else "text_encoder."
    text = {k.removeprefix(prefix): t for k, t in merged.items() if k.startswith(TEXT)}
    loaded.text_encoder.load_state_dict(text, strict=False)


def fill_peft(model, label, dtype):
    """New values for the adapter's parameters; magnitudes stay near those of the layer."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                factor = 1 + random(f"{label}/{name}", parameter.shape, gain=1.0).float()
                parameter.copy_((parameter * factor).to(dtype))
            elif "lora_" in name:
                parameter.copy_(random(f"{label}/{name}", parameter.shape, dtype))


def text_names(tensors):
    """Text encoders of published files have an outer level that today's transformers leave out."""
    return {name if "text_model." in name else "text_model." + name: t for name, t in tensors.items()}


# --- PEFT, saved by Diffusers ---------------------------------------------------------------------


def diffusers_peft(all_, name, unet_config, text_config=None, metadata=True, dtype=torch.float16, **case):
    loaded = all_.pipeline()
    loaded.unet.add_adapter(unet_config)
    fill_peft(loaded.unet, f"{name}/unet", dtype)
    layers = {"unet_lora_layers": {k: t.to(dtype) for k, t in get_peft_model_state_dict(loaded.unet).items()}}
    parts = {"unet": loaded.unet}
    if text_config:
        loaded.text_encoder.add_adapter(text_config)
        fill_peft(loaded.text_encoder, f"{name}/text_encoder", dtype)
        text = get_peft_model_state_dict(loaded.text_encoder, adapter_name="default")
        layers["text_encoder_lora_layers"] = text_names({k: t.to(dtype) for k, t in text.items()})
        parts["text_encoder"] = loaded.text_encoder
    for component in parts.values():
        for adapter in component.peft_config.values():
            adapter.target_modules = sorted(adapter.target_modules)
    extra = _collate_lora_metadata(parts) if metadata else {}
    StableDiffusionPipeline.save_lora_weights(
        str(all_.folder), weight_name=f"{name}.safetensors", **layers, **extra
    )
    sort_metadata(all_.folder / f"{name}.safetensors")
    return all_.folder / f"{name}.safetensors"


def metadata_of(path):
    with safe_open(str(path), "pt") as file:
        return file.metadata()


def sort_metadata(path):
    """Sets have no order: lists made of them are sorted, so that two runs write the same file."""
    metadata = metadata_of(path)
    if "lora_adapter_metadata" in metadata:
        values = json.loads(metadata["lora_adapter_metadata"])
        values = {k: sorted(v) if isinstance(v, list) else v for k, v in sorted(values.items())}
        values |= {k: None for k in values if k.endswith("base_model_name_or_path")}
        metadata["lora_adapter_metadata"] = json.dumps(values, indent=2, sort_keys=True)
    save_file(load_file(str(path)), str(path), metadata=metadata)
    sort_header(path)


def sort_header(path):
    """The safetensors package writes metadata in any order."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def lora_config(targets, rank, alpha, **options):
    options.setdefault("init_lora_weights", "gaussian")
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **options)


def make_diffusers_peft(all_):
    linear = lora_config(UNET_LINEAR, 4, 6)
    text = lora_config(TEXT_LINEAR, 2, 3)
    name = "peft_metadata"
    path = diffusers_peft(all_, name, linear, text)
    all_.case(name, "diffusers", all_.by_diffusers([path]), run=RUN)
    all_.case(name, "diffusers", all_.by_diffusers([path], [0.65]), strength=0.65, suffix="_0.65")
    both = [{"unet": 0.8, "text_encoder": -0.4}]
    merged = all_.by_diffusers([path], both)
    all_.case(name, "diffusers", merged, strength=0.8, text_strength=-0.4, suffix="_two_strengths")

    # Without metadata nobody knows alpha: it is taken for the rank.
    name = "peft_plain"
    path = diffusers_peft(all_, name, linear, text, metadata=False)
    all_.case(name, "diffusers", all_.by_diffusers([path]))

    name = "peft_bf16"
    path = diffusers_peft(all_, name, linear, metadata=False, dtype=torch.bfloat16)
    all_.case(name, "diffusers", all_.by_diffusers([path], [0.5]), strength=0.5)

    # The layers of an LCM LoRA; ranks and alphas differ by layer.
    patterns = {"rank_pattern": {"conv_shortcut": 2}, "alpha_pattern": {"conv_shortcut": 5}}
    convolutions = lora_config(UNET_CONV + UNET_PROJ, 4, 4, **patterns)
    name = "peft_conv_patterns"
    path = diffusers_peft(all_, name, convolutions)
    all_.case(name, "diffusers", all_.by_diffusers([path]), run=RUN_LCM)

    name = "peft_rslora"
    path = diffusers_peft(all_, name, lora_config(UNET_LINEAR[:3], 4, 3, use_rslora=True))
    all_.case(name, "diffusers", all_.by_diffusers([path], [0.9]), strength=0.9)

    name = "peft_dora"
    path = diffusers_peft(all_, name, lora_config(UNET_LINEAR[:3] + UNET_CONV[1:4], 2, 3, use_dora=True))
    all_.case(name, "diffusers", all_.by_diffusers([path]))
    ends = ".lora_magnitude_vector"
    longer = {k + ".weight" if k.endswith(ends) else k: t for k, t in load_file(str(path)).items()}
    all_.save("peft_dora_weight", longer, metadata_of(path))
    all_.case("peft_dora_weight", "diffusers", all_.by_diffusers([path]), same_as="peft_dora",
              note="the magnitudes' keys end in `.weight`")

    files = [all_.folder / "peft_metadata.safetensors", all_.folder / "peft_conv_patterns.safetensors"]
    rows = [{"file": files[0].name, "strength": 0.7}, {"file": files[1].name, "strength": -0.4}]
    all_.case("two_adapters", "diffusers", all_.by_diffusers(files, [0.7, -0.4]), files=rows, run=RUN)


# --- PEFT's own folders ---------------------------------------------------------------------------


def make_raw_peft(all_):
    def merge(component, folder, strength):
        loaded = all_.pipeline()
        model = PeftModel.from_pretrained(getattr(loaded, component), str(folder))
        for module in model.modules():
            if hasattr(module, "scale_layer"):
                module.scale_layer(strength)
        merged = model.merge_and_unload()
        names = {f"{component}.{k}": t.detach().clone() for k, t in merged.state_dict().items()}
        if component == "text_encoder":
            names = {TEXT + k.removeprefix("text_encoder.").removeprefix("text_model."): t for k, t in names.items()}
        return all_.base | {k: t for k, t in names.items() if k in all_.base}

    rows = [
        ("peft_folder_unet", "unet", lora_config(UNET_LINEAR, 4, 10), 0.75),
        ("peft_folder_rslora", "unet", lora_config(UNET_LINEAR, 4, 3, use_rslora=True,
            rank_pattern={"ff.net.0.proj": 2}, alpha_pattern={"attn2.to_k": 7}), 1.0),
        ("peft_folder_dora", "unet", lora_config(UNET_LINEAR[:3] + UNET_CONV[1:2], 2, 3, use_dora=True), 1.0),
        ("peft_folder_text_encoder", "text_encoder", lora_config(TEXT_LINEAR, 2, 5), 1.0),
    ]
    for name, component, config, strength in rows:
        model = get_peft_model(getattr(all_.pipeline(), component), config)
        fill_peft(model, name, torch.float16)
        model = model.half()
        folder = all_.folder / name
        model.save_pretrained(str(folder))
        (folder / "README.md").unlink()
        values = json.loads((folder / "adapter_config.json").read_text())
        values = {k: v for k, v in values.items() if k != "auto_mapping"} | {"base_model_name_or_path": None}
        values["target_modules"] = sorted(values["target_modules"])
        save_json(folder / "adapter_config.json", values, indent=2, sort_keys=True)
        path = folder / "adapter_model.safetensors"
        tensors = dict(sorted(load_file(str(path)).items()))
        save_file(tensors, str(path), metadata={"format": "pt"})
        merged = merge(component, folder, strength)
        note = None
        if component == "text_encoder":
            # As transformers before 5.6 named the layers.
            prefix = "base_model.model."
            tensors = {prefix + "text_model." + k.removeprefix(prefix).removeprefix("text_model."): t
                       for k, t in tensors.items()}
            save_file(tensors, str(path), metadata={"format": "pt"})
        files = [{"file": name, "component": component, "strength": strength}]
        all_.case(name, "peft", merged, files=files, note=note)

    # The same tensors in a lone file: without `adapter_config.json` alpha is taken for the rank.
    tensors = load_file(str(all_.folder / "peft_folder_unet" / "adapter_model.safetensors"))
    all_.save("peft_no_config", tensors)
    plain = {k.replace("base_model.model.", "unet."): t for k, t in tensors.items()}
    all_.case("peft_no_config", "diffusers", all_.by_diffusers([plain]), note="read with the prefix `unet.`")
    # The name of the adapter inside the key.
    named = {k.replace(".weight", ".default.weight"): t for k, t in tensors.items()}
    all_.save("peft_default_in_name", named)
    all_.case("peft_default_in_name", "diffusers", all_.by_diffusers([plain]), same_as="peft_no_config",
              note="read as `peft_no_config`")


# --- old names of Diffusers, kohya ----------------------------------------------------------------


def pairs(all_, label, modules, rank, dtype=torch.float16):
    """Matrices `down` and `up` for each module of the UNet or the text encoder, by its name in `all_.base`."""
    result = {}
    for i, module in enumerate(modules):
        weight = all_.base[module + ".weight"]
        r = rank[i % len(rank)] if isinstance(rank, list) else rank
        kernel = weight.shape[2:]
        result[module] = (
            random(f"{label}/{module}/down", (r, weight.shape[1], *kernel), dtype),
            random(f"{label}/{module}/up", (weight.shape[0], r, *[1] * len(kernel)), dtype),
        )
    return result


def kohya_name(module):
    if module.startswith("unet."):
        return "lora_unet_" + module.removeprefix("unet.").replace(".", "_")
    return "lora_te_" + module.removeprefix("text_encoder.").replace(".", "_")


def ldm_kohya_name(module, config):
    if not module.startswith("unet."):
        return kohya_name(module)
    return "lora_unet_" + ldm.unet_name(module.removeprefix("unet."), config).replace(".", "_")


def kohya(weights, name_of, alpha):
    tensors = {}
    for i, (module, (down, up)) in enumerate(weights.items()):
        tensors[f"{name_of(module)}.lora_down.weight"] = down
        tensors[f"{name_of(module)}.lora_up.weight"] = up
        if (value := alpha(i, down.shape[0])) is not None:
            tensors[f"{name_of(module)}.alpha"] = value
    return tensors


def by_arithmetic(all_, weights, scales, strength=1.0):
    """W + strength * scale * up @ down, in double precision."""
    merged = dict(all_.base)
    for (module, (down, up)), scale in zip(weights.items(), scales):
        base = merged[module + ".weight"]
        delta = up.flatten(1).double() @ down.flatten(1).double()
        merged[module + ".weight"] = (base.double() + strength * scale * delta.view(base.shape)).float()
    return merged


def close(name, a, b):
    for key in a:
        if not torch.allclose(a[key], b[key], atol=2e-6, rtol=2e-6):
            raise SystemExit(f"{name}: {key} differs by {(a[key] - b[key]).abs().max()}")


def make_old_diffusers(all_):
    attention = [m for m in UNET_LINEAR if ".attn" in m]
    weights = pairs(all_, "attn_procs", ["unet." + m for m in attention], 4)
    tensors = {}
    for module, (down, up) in weights.items():
        head, last = module.removeprefix("unet.").replace(".to_out.0", ".to_out").rsplit(".", 1)
        tensors[f"{head}.processor.{last}_lora.down.weight"] = down
        tensors[f"{head}.processor.{last}_lora.up.weight"] = up
    all_.save("attn_procs", tensors)
    merged = by_arithmetic(all_, weights, [1.0] * len(weights), 0.8)
    prefixed = {"unet." + k: t for k, t in tensors.items()}
    close("attn_procs", merged, all_.by_diffusers([prefixed], [0.8]))
    all_.case("attn_procs", "diffusers", merged, strength=0.8, note="read with the prefix `unet.`")
    torch.save(dict(sorted(tensors.items())), str(all_.folder / "pytorch_lora_weights.bin"))
    files = [{"file": "pytorch_lora_weights.bin", "strength": 0.8}]
    all_.case("attn_procs_bin", "diffusers", merged, files=files, same_as="attn_procs")

    # Before PEFT: processors of the UNet, `lora_linear_layer` in the text encoder.
    text = pairs(all_, "old_text", [TEXT + m for m in TEXT_LINEAR], 2)
    for module, (down, up) in text.items():
        prefixed[f"{module}.lora_linear_layer.down.weight"] = down
        prefixed[f"{module}.lora_linear_layer.up.weight"] = up
    all_.save("old_unet_and_text_encoder", prefixed)
    merged = by_arithmetic(all_, weights | text, [1.0] * 9)
    close("old", merged, all_.by_diffusers([all_.folder / "old_unet_and_text_encoder.safetensors"]))
    all_.case("old_unet_and_text_encoder", "diffusers", merged)

    # Older still: the text encoder's names are those of attention processors.
    older = {k: t for k, t in prefixed.items() if k.startswith("unet.")}
    short = {"q_proj": "to_q", "out_proj": "to_out"}
    text = {m: pair for m, pair in text.items() if ".self_attn." in m}
    for module, (down, up) in text.items():
        head, last = module.rsplit(".", 1)
        older[f"{head}.{short[last]}_lora.down.weight"] = down
        older[f"{head}.{short[last]}_lora.up.weight"] = up
    all_.save("old_text_encoder_processors", older)
    merged = by_arithmetic(all_, weights | text, [1.0] * 9)
    close("older", merged, all_.by_diffusers([all_.folder / "old_text_encoder_processors.safetensors"]))
    all_.case("old_text_encoder_processors", "diffusers", merged)


def make_kohya(all_):
    linear = ["unet." + m for m in UNET_LINEAR + UNET_PROJ] + [TEXT + m for m in TEXT_LINEAR]
    facts = {"ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "2.0"}
    config = checkpoints.unet()

    weights = pairs(all_, "kohya", linear, 4)
    scalar = lambda _, __: torch.tensor(2.0, dtype=torch.float16)
    path = all_.save("kohya", kohya(weights, kohya_name, scalar), facts)
    merged = all_.by_diffusers([path])
    close("kohya", merged, by_arithmetic(all_, weights, [0.5] * 99))
    all_.case("kohya", "diffusers", merged, run=RUN)

    # The text encoder's prefix of files for two encoders.
    first = {k.replace("lora_te_", "lora_te1_"): t for k, t in load_file(str(path)).items()}
    path = all_.save("kohya_te1", first, facts)
    all_.case("kohya_te1", "diffusers", all_.by_diffusers([path]), same_as="kohya")

    weights = pairs(all_, "kohya_bf16", linear, 2, torch.bfloat16)
    one = lambda _, __: torch.tensor([1.0], dtype=torch.bfloat16)
    path = all_.save("kohya_bf16_alpha_1d", kohya(weights, kohya_name, one), facts)
    merged = all_.by_diffusers([path])
    close("kohya_bf16", merged, by_arithmetic(all_, weights, [0.5] * 99))
    all_.case("kohya_bf16_alpha_1d", "diffusers", merged)

    weights = pairs(all_, "kohya_no_alpha", linear[:4], 3)
    path = all_.save("kohya_no_alpha", kohya(weights, kohya_name, lambda _, __: None))
    merged = all_.by_diffusers([path])
    close("kohya_no_alpha", merged, by_arithmetic(all_, weights, [1.0] * 99))
    all_.case("kohya_no_alpha", "diffusers", merged)

    weights = pairs(all_, "kohya_zero_alpha", linear[:2], 3)
    path = all_.save("kohya_zero_alpha", kohya(weights, kohya_name, lambda _, __: torch.tensor(0.0).half()))
    all_.case("kohya_zero_alpha", "arithmetic", by_arithmetic(all_, weights, [1.0] * 99),
              note="kohya's scripts take an alpha of zero for the rank")

    ranks = [2, 4, 3]
    weights = pairs(all_, "kohya_mixed", linear, ranks)
    alphas = [0.5, 2.0, 1.0, 8.0, 3.0]
    mixed = lambda i, _: torch.tensor(alphas[i % 5], dtype=torch.float16)
    all_.save("kohya_mixed_alpha", kohya(weights, kohya_name, mixed))
    scales = [alphas[i % 5] / down.shape[0] for i, (down, _) in enumerate(weights.values())]
    merged = by_arithmetic(all_, weights, scales, 0.7)
    close("kohya_mixed", merged, by_lycoris_file(all_, all_.folder / "kohya_mixed_alpha.safetensors", 0.7))
    all_.case("kohya_mixed_alpha", "lycoris", merged, strength=0.7)

    # Modules named as in the original layout: attention by Diffusers, the whole network by arithmetic.
    attention = [m for m in linear if m.startswith("unet.")]
    weights = pairs(all_, "kohya_ldm", attention, 4)
    path = all_.save("kohya_ldm_names", kohya(weights, lambda m: ldm_kohya_name(m, config), scalar), facts)
    merged = all_.by_diffusers([path], unet_config=all_.pipeline().unet.config)
    close("kohya_ldm", merged, by_arithmetic(all_, weights, [0.5] * 99))
    all_.case("kohya_ldm_names", "diffusers", merged)
    everywhere = ["unet." + m for m in UNET_CONV + ["conv_out", "time_embedding.linear_1", "time_embedding.linear_2"]]
    weights = pairs(all_, "kohya_ldm_conv", everywhere, 2)
    all_.save("kohya_ldm_names_conv", kohya(weights, lambda m: ldm_kohya_name(m, config), scalar), facts)
    all_.case("kohya_ldm_names_conv", "arithmetic", by_arithmetic(all_, weights, [1.0] * 99))


# --- LyCORIS --------------------------------------------------------------------------------------


def by_lycoris_file(all_, path, strength):
    """LyCORIS's own merge of a file of low-rank pairs."""
    from lycoris.modules import get_module, make_module

    loaded, merged = all_.pipeline(), dict(all_.base)
    tensors = {k: t.float() for k, t in load_file(str(path)).items()}
    for key in all_.base:
        if not key.endswith(".weight"):
            continue
        module = key.removesuffix(".weight")
        kind, parameters = get_module(tensors, kohya_name(module))
        if kind is not None:
            layer = submodule(loaded, module)
            lycoris = make_module(kind, parameters, kohya_name(module), layer)
            merged[key] = lycoris.get_merged_weight(strength)[0].detach().clone()
    return merged


def submodule(loaded, module):
    if module.startswith("unet."):
        return loaded.unet.get_submodule(module.removeprefix("unet."))
    inner = module.removeprefix(TEXT)
    return getattr(loaded.text_encoder, "text_model", loaded.text_encoder).get_submodule(inner)


def effective(lycoris, layer):
    """What LyCORIS's forward pass adds to the layer's weight and bias."""
    seen = {}

    def op(_, weight, bias=None, **__):
        seen.update(weight=weight, bias=bias)
        return 0

    lycoris.op, lycoris.org_forward = op, lambda x, *_: x
    lycoris.eval()
    lycoris.forward(torch.zeros(1))
    weight = layer.weight + seen["weight"]
    bias = None if seen["bias"] is None else layer.bias + seen["bias"]
    return weight.detach().clone(), None if bias is None else bias.detach().clone()


def make_lycoris(all_, name, kind, modules, rank, alpha, *, strength=1.0, options=None, dtype=torch.float16, **case):
    """One module of LyCORIS for each layer, with weights of its own; they are saved and merged by its code."""
    loaded, tensors, merged = all_.pipeline(), {}, dict(all_.base)
    dora = (options or {}).get("weight_decompose")
    for module in modules:
        layer = submodule(loaded, module)
        arguments = {} if kind is NormModule else {"lora_dim": rank, "alpha": alpha} | (options or {})
        lycoris = kind(kohya_name(module), layer, 1.0, **arguments)
        with torch.no_grad():
            for key, parameter in lycoris.named_parameters():
                if key == "dora_scale":
                    continue
                gain = 1.5 if "hada" in key else 1.0 if "lokr" in key else 0.5
                parameter.copy_(random(f"{name}/{module}/{key}", parameter.shape, dtype, gain))
            if dora:
                scale = lycoris.dora_scale
                factor = 1 + random(f"{name}/{module}/dora_scale", scale.shape, gain=0.2).float()
                lycoris.dora_scale = torch.nn.Parameter((scale * factor).to(dtype).float())
        lycoris.multiplier = 1.0 if dora else strength
        if kind is NormModule:
            weight, bias = (t.detach().clone() for t in lycoris.get_merged_weight(strength))
        else:
            weight, bias = effective(lycoris, layer)
        if dora and strength != 1:
            weight = layer.weight.detach() + strength * (weight - layer.weight.detach())
        merged[module + ".weight"] = weight
        if bias is not None:
            merged[module + ".bias"] = bias
        saved = lycoris.custom_state_dict()
        if kind is NormModule:
            saved = dict(lycoris.named_parameters())
        elif kind is FullModule:
            # Its own dictionary takes the layer's weight off what is a difference already.
            saved = {"diff": lycoris.weight, "diff_b": lycoris.bias}
        for key, tensor in saved.items():
            if tensor is None:
                continue
            tensors[f"{kohya_name(module)}.{key}"] = tensor.detach().to(dtype)
    all_.save(name, tensors, case.pop("metadata", None))
    by = "arithmetic" if dora and strength != 1 else "lycoris"
    all_.case(name, by, merged, strength=strength, **case)


def make_all_lycoris(all_):
    linear = ["unet." + m for m in UNET_LINEAR[:4]] + [TEXT + TEXT_LINEAR[2]]
    convolutions = ["unet." + m for m in UNET_CONV]
    few = ["unet." + m for m in UNET_CONV[1:4]]
    make_lycoris(all_, "locon", LoConModule, linear + convolutions, 2, 1.0, strength=0.8)
    make_lycoris(all_, "locon_tucker", LoConModule, linear[:1] + few, 2, 1.0, options={"use_tucker": True})
    make_lycoris(all_, "locon_rslora", LoConModule, linear[:2], 4, 1.0, options={"rs_lora": True})
    make_lycoris(all_, "loha", LohaModule, linear + few, 2, 1.0, strength=0.7)
    make_lycoris(all_, "loha_tucker", LohaModule, few, 2, 1.0, options={"use_tucker": True})

    # lokr_w1, lokr_w2_a and lokr_w2_b; a kernel's is flattened.
    make_lycoris(all_, "lokr", LokrModule, linear + few, 1, 0.5, options={"factor": 2})
    # Both factored.
    both = {"decompose_both": True, "factor": 8}
    make_lycoris(all_, "lokr_both", LokrModule, ["unet." + UNET_LINEAR[3]], 1, 0.5, strength=1.5, options=both)
    both |= {"unbalanced_factorization": True}
    make_lycoris(all_, "lokr_both_conv", LokrModule, few[:1], 1, 0.5, options=both)
    # lokr_w1_a and lokr_w1_b with a full lokr_w2.
    first = {"decompose_both": True, "factor": 4, "unbalanced_factorization": True}
    make_lycoris(all_, "lokr_first", LokrModule, ["unet." + UNET_LINEAR[3]], 2, 0.5, options=first)
    # Neither: alpha has no meaning.
    make_lycoris(all_, "lokr_full", LokrModule, linear[:2] + few, 4, 1.0, options={"full_matrix": True})
    make_lycoris(all_, "lokr_tucker", LokrModule, few, 1, 0.5, options={"factor": 2, "use_tucker": True})

    out, into = {"weight_decompose": True}, {"weight_decompose": True, "wd_on_out": False}
    make_lycoris(all_, "dora_out", LoConModule, linear + few, 2, 1.0, options=out)
    make_lycoris(all_, "dora_in", LoConModule, linear + few, 2, 1.0, options=into)
    make_lycoris(all_, "dora_out_0.6", LoConModule, linear[:2], 2, 1.0, strength=0.6, options=out,
                 note="strength blends the layer and the decomposed weight, as ComfyUI does")
    make_lycoris(all_, "dora_loha", LohaModule, linear[:2], 2, 1.0, options=out)
    make_lycoris(all_, "dora_lokr", LokrModule, linear[:2], 1, 0.5, options=out | {"factor": 2})

    make_lycoris(all_, "full", FullModule, linear[3:4] + convolutions[:2], 4, 1.0, strength=0.5)
    norms = ["unet.down_blocks.0.resnets.0.norm1", "unet." + DOWN + "norm2", TEXT + "encoder.layers.1.layer_norm1"]
    make_lycoris(all_, "norms", NormModule, norms + ["unet.conv_norm_out"], 4, 1.0, strength=0.5)
    make_lycoris(all_, "glora", GLoRAModule, linear + few, 2, 1.0, strength=0.8)
    make_lycoris(all_, "locon_bf16", LoConModule, linear[:2] + few[:1], 2, 1.0, dtype=torch.bfloat16)


# --- adapters that do not fit ---------------------------------------------------------------------


def make_refused(all_):
    path = kohya_name("unet." + UNET_LINEAR[0])
    shape = {
        f"{path}.lora_down.weight": random("wrong_shape/down", (4, 320)),
        f"{path}.lora_up.weight": random("wrong_shape/up", (320, 4)),
        f"{path}.alpha": torch.tensor(4.0).half(),
    }
    all_.save("refused/wrong_shape", shape)
    xl = {}
    for module, width in [("lora_unet_input_blocks_8_1_transformer_blocks_9_attn1_to_q", 16),
                          ("lora_te2_text_model_encoder_layers_31_mlp_fc1", 24)]:
        xl[f"{module}.lora_down.weight"] = random(f"xl/{module}/down", (2, width))
        xl[f"{module}.lora_up.weight"] = random(f"xl/{module}/up", (width, 2))
        xl[f"{module}.alpha"] = torch.tensor(2.0).half()
    all_.save("refused/no_key_matches", xl)
    weights = pairs(all_, "half", ["unet." + UNET_LINEAR[1]], 2)
    half = kohya(weights, kohya_name, lambda _, __: torch.tensor(2.0).half())
    all_.save("partly/half_of_a_pair", {k: t for k, t in half.items() if "lora_up" not in k})
    all_.save("partly/some_keys_match", half | xl)
    merged = by_arithmetic(all_, weights, [1.0])
    all_.case("partly/some_keys_match", "arithmetic", merged,
              note="keys of another model beside those that match; `lora_unet_input_blocks_8_1...` and "
                   "`lora_te2_...` match nothing")
    save_json(all_.folder / "refused.json", [
        {"file": "refused/wrong_shape.safetensors", "why": "down is [4, 320], the layer has 16 inputs"},
        {"file": "refused/no_key_matches.safetensors", "why": "an adapter of SDXL: no module has these names"},
        {"file": "partly/half_of_a_pair.safetensors", "why": "lora_down and alpha without lora_up"},
    ])


def main():
    if len(sys.argv) != 2:
        raise SystemExit("usage: lora.py OUTPUT_FOLDER")
    quiet()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    all_ = Adapters(Path(sys.argv[1]))
    with torch.no_grad():
        make_diffusers_peft(all_)
        make_raw_peft(all_)
        make_old_diffusers(all_)
        make_kohya(all_)
        make_all_lycoris(all_)
        make_refused(all_)
    save_json(all_.folder / "cases.json", all_.cases)
    versions = {name: version(name) for name in
                ("torch", "diffusers", "transformers", "peft", "lycoris-lora", "numpy")}
    save_json(all_.folder / "made_with.json", versions)


if __name__ == "__main__":
    main()
