"""`files/`: the weights of components of `family`, in other forms of files.

    python files.py OUTPUT_FOLDER

OUTPUT_FOLDER is `crates/diffuse-pipelines/tests/reference` and has `family` (see family.py). Each folder is
read by Diffusers or transformers, and has exactly the values of `equals`. `files/README.md` describes them.
"""

import io
import json
import pickle
import pickletools
import shutil
import sys
from collections import OrderedDict
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextModel

import checkpoints
from golden import quiet
from weights import generator, save_json

TEXT, UNET = "family/distilled/text_encoder", "family/unet-only-cross"
KINDS = {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel}


def random(label, *shape):
    return torch.randn(shape, generator=generator(f"files/{label}")).half()


class Files:
    def __init__(self, reference):
        self.reference, self.folder, self.rows = reference, reference / "files", []
        self.folder.mkdir(exist_ok=True)
        for path in self.folder.glob("*"):
            if path.name != "README.md":
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def tensors(self, source):
        file = "model" if source == TEXT else "diffusion_pytorch_model"
        return load_file(str(self.reference / source / f"{file}.safetensors"))

    def start(self, name, source, config=True):
        (self.folder / name).mkdir()
        if config:
            shutil.copy(self.reference / source / "config.json", self.folder / name / "config.json")
        return self.folder / name

    def done(self, name, source, ignored=(), equals=None):
        """Compares the tensors that Diffusers or transformers loads with the expected ones."""
        kind = KINDS[name.split("-")[0]]
        options = {"use_safetensors": False} if list((self.folder / name).glob("*.bin")) else {}
        model = kind.from_pretrained(str(self.folder / name), dtype=torch.float32, **options)
        wanted = {k.removeprefix("text_model."): t.float() for k, t in (equals or self.tensors(source)).items()}
        got = {k.removeprefix("text_model."): t for k, t in model.state_dict().items() if "position_ids" not in k}
        assert got.keys() == wanted.keys(), got.keys() ^ wanted.keys()
        for key, tensor in wanted.items():
            assert torch.equal(got[key], tensor), f"{name}: {key}"
        row = {"folder": name, "component": name.split("-")[0], "equals": source}
        self.rows.append(row | ({"ignored": sorted(ignored)} if ignored else {}))
        print(f"  {name}")


def make_surplus(all_):
    extra = {
        "text_projection.weight": random("text_projection", 8, 8),
        "logit_scale": torch.tensor(4.6052).half(),
        "text_model.embeddings.position_ids": torch.arange(77).unsqueeze(0),
    }
    at = all_.start("text_encoder-surplus", TEXT)
    checkpoints.save_tensors(at / "model.safetensors", all_.tensors(TEXT) | extra)
    all_.done(at.name, TEXT, extra)

    # Left over from an adapter's training, and from an average of the weights.
    processor = "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight"
    extra = {processor: random("to_q_lora", 2, 4), "num_updates": torch.tensor(7)}
    at = all_.start("unet-surplus", UNET)
    checkpoints.save_tensors(at / "diffusion_pytorch_model.safetensors", all_.tensors(UNET) | extra)
    all_.done(at.name, UNET, extra)


def make_whole_clip(all_):
    """A whole CLIP model, of which the text encoder is a part."""
    text = json.loads((all_.reference / TEXT / "config.json").read_text())
    text = {key: value for key, value in text.items() if key not in ("architectures", "torch_dtype")}
    vision = {
        "hidden_act": "quick_gelu", "hidden_size": 8, "image_size": 8, "intermediate_size": 16,
        "model_type": "clip_vision_model", "num_attention_heads": 2, "num_hidden_layers": 1, "patch_size": 4,
        "projection_dim": 8,
    }
    config = {
        "architectures": ["CLIPModel"], "initializer_factor": 1.0, "logit_scale_init_value": 2.6592,
        "model_type": "clip", "projection_dim": 8, "text_config": text, "torch_dtype": "float32",
        "transformers_version": "4.22.0.dev0", "vision_config": vision,
    }
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    extra = {k: random(k, *t.shape) for k, t in whole.named_parameters() if not k.startswith("text_model.")}
    extra |= {f"{part}.embeddings.position_ids": torch.arange(n).unsqueeze(0)
              for part, n in (("text_model", 77), ("vision_model", 5))}
    for name, tensors in [("text_encoder-whole-clip", all_.tensors(TEXT) | extra),
                          ("text_encoder-whole-clip-config", all_.tensors(TEXT))]:
        at = all_.start(name, TEXT, config=False)
        checkpoints.save_config(at / "config.json", config)
        checkpoints.save_tensors(at / "model.safetensors", tensors)
        all_.done(name, TEXT, extra if tensors.keys() & extra.keys() else ())


def make_shards(all_):
    rows = [
        ("text_encoder-sharded", TEXT, "model", "safetensors"),
        ("text_encoder-sharded-bin", TEXT, "pytorch_model", "bin"),
        ("unet-sharded", UNET, "diffusion_pytorch_model", "safetensors"),
    ]
    for name, source, stem, ending in rows:
        at, tensors = all_.start(name, source), dict(sorted(all_.tensors(source).items()))
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        shards = [{}, {}, {}]
        passed = 0
        for key, tensor in tensors.items():
            shards[min(2, 3 * passed // total)][key] = tensor
            passed += tensor.numel() * tensor.element_size()
        weights = {}
        for i, shard in enumerate(shards):
            file = f"{stem}-{i + 1:05}-of-{len(shards):05}.{ending}"
            if ending == "bin":
                torch.save(shard, str(at / file))
            else:
                save_file(shard, str(at / file), metadata={"format": "pt"})
            weights |= dict.fromkeys(shard, file)
        index = {"metadata": {"total_size": total}, "weight_map": weights}
        save_json(at / f"{stem}.{ending}.index.json", index, indent=2)
        all_.done(name, source)


def number_storages(path):
    """The format before 1.6 names storages by their addresses, and sorts them by these; here by their place."""
    data = path.read_bytes()
    stream = io.BytesIO(data)
    for _ in range(3):
        pickle.load(stream)
    opening = stream.tell()
    for _ in pickletools.genops(stream):
        pass
    tree = data[opening : stream.tell()]
    addresses = pickle.load(stream)
    storages = {}
    for address in addresses:
        count = stream.read(8)
        storages[address] = count + stream.read(2 * int.from_bytes(count, "little"))
    assert not stream.read()
    addresses.sort(key=lambda address: tree.index(address.encode()))
    names = {address: f"{94000000000000 + 64 * i}" for i, address in enumerate(addresses)}
    for address, name in names.items():
        old, new = ((b"X" + len(text).to_bytes(4, "little") + text.encode()) for text in (address, name))
        tree = tree.replace(old, new)
    keys = pickle.dumps(list(names.values()), protocol=2)
    path.write_bytes(data[:opening] + tree + keys + b"".join(storages[address] for address in addresses))


def make_pickles(all_):
    rows = [
        ("unet-bin-channels-last", UNET, "diffusion_pytorch_model", {}),
        ("unet-bin-before-1.6", UNET, "diffusion_pytorch_model", {"_use_new_zipfile_serialization": False}),
        ("text_encoder-bin-before-1.6", TEXT, "pytorch_model", {"_use_new_zipfile_serialization": False}),
        ("text_encoder-bin-one-storage", TEXT, "pytorch_model", {}),
        ("text_encoder-bin-parameters", TEXT, "pytorch_model", {}),
    ]
    for name, source, stem, options in rows:
        at, tensors = all_.start(name, source), dict(sorted(all_.tensors(source).items()))
        if name.endswith("channels-last"):
            tensors = {k: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
                       for k, t in tensors.items()}
        elif name.endswith("one-storage"):
            # Every tensor is a part of one vector, matrices are transposed views.
            flat = [t.T.flatten() if t.dim() == 2 else t.flatten() for t in tensors.values()]
            parts = torch.cat(flat).split([len(t) for t in flat])
            tensors = {k: p.view(t.shape[::-1]).T if t.dim() == 2 else p.view(t.shape)
                       for (k, t), p in zip(tensors.items(), parts)}
        elif name.endswith("parameters"):
            tensors = OrderedDict((k, torch.nn.Parameter(t)) for k, t in tensors.items())
            tensors._metadata = OrderedDict({"": {"version": 1}})
        torch.save(tensors, str(at / f"{stem}.bin"), **options)
        if options:
            number_storages(at / f"{stem}.bin")
        all_.done(name, source)


def make_types(all_):
    """8-bit floats, and every value that they have."""
    name = "text_encoder-f8"
    at = all_.start(name, TEXT)
    tensors = {k: t.to(torch.float8_e4m3fn) if t.dim() == 2 else t for k, t in all_.tensors(TEXT).items()}
    checkpoints.save_tensors(at / "model.safetensors", tensors)
    (all_.folder / "expected").mkdir(exist_ok=True)
    # Half precision holds all values of 8 bits.
    halved = {k: t.half() for k, t in tensors.items()}
    checkpoints.save_tensors(all_.folder / "expected" / f"{name}.safetensors", halved)
    all_.done(name, f"files/expected/{name}.safetensors", equals=tensors)

    every = torch.arange(256, dtype=torch.uint8)
    values = {"f8_e4m3": every.view(torch.float8_e4m3fn), "f8_e5m2": every.view(torch.float8_e5m2)}
    values["bf16"] = torch.arange(-128, 128).mul(257).to(torch.int16).view(torch.bfloat16)
    values["f64"] = random("f64", 16).double() / 3
    checkpoints.save_tensors(all_.folder / "values.safetensors", values)
    checkpoints.save_tensors(all_.folder / "expected" / "values.safetensors", {k: t.float() for k, t in values.items()})


def main():
    if len(sys.argv) != 2:
        raise SystemExit("usage: files.py OUTPUT_FOLDER")
    quiet()
    torch.set_num_threads(1)
    all_ = Files(Path(sys.argv[1]))
    with torch.no_grad():
        make_surplus(all_)
        make_whole_clip(all_)
        make_shards(all_)
        make_pickles(all_)
        make_types(all_)
    save_json(all_.folder / "files.json", all_.rows)
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "safetensors")}
    save_json(all_.folder / "made_with.json", versions)


if __name__ == "__main__":
    main()
