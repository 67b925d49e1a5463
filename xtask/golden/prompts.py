"""Makes the fixtures of `diffuse-clip`, and the vocabulary that it carries.

    python prompts.py OUTPUT_FOLDER

The folder then holds

    folders.json        tokenizer folders in many forms, and what transformers makes of prompts with each
    inversions/         textual inversion files in every form, the embeddings after Diffusers loaded them, and prompts
    parsed.json         prompts in A1111's syntax, with their runs of text and weight
    chunked.json        names with their numbers of vectors, then prompts with the ids and weights of each chunk
    weighted.*          weighted prompts, encoded
    made_with.json      the versions it was made with

It reads the vocabulary and the tiny text encoder that `golden.py` makes, and writes also `crates/diffuse-clip/src/tokenizer/merges.txt.gz`.
"""

import copy
import gzip
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from golden import quiet
from tokenizer import END, SPECIAL_TOKENS, START, TOKENIZER_CONFIG, WHOLE_SIZE, vocabulary
from weights import pseudo_random, save_json

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "crates/diffuse-pipelines/tests/reference"
BASE = REFERENCE / "sd/base"
ASSET = ROOT / "crates/diffuse-clip/src/tokenizer/merges.txt.gz"


def compress_vocabulary():
    """CLIP's merges, from which its vocabulary follows."""
    text = (REFERENCE / "tokenizer/merges.txt").read_text(encoding="utf-8").removeprefix("#version: 0.2\n")
    merges = [tuple(line.split(" ")) for line in text.splitlines()]
    assert vocabulary(merges) == json.loads((REFERENCE / "tokenizer/vocab.json").read_text(encoding="utf-8"))
    assert len(merges) == WHOLE_SIZE - 514
    ASSET.parent.mkdir(parents=True, exist_ok=True)
    ASSET.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))


# Tokenizer folders


def flags(content, **changed):
    defaults = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "special": False}
    return {"content": content} | defaults | changed


def whole_file(folder, change=lambda file: None):
    """The `tokenizer.json` that transformers writes for a folder."""
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as saved:
        CLIPTokenizer.from_pretrained(folder).save_pretrained(saved)
        file = json.loads((Path(saved) / "tokenizer.json").read_text())
    change(file)
    return file


def with_other_parts(file):
    file["normalizer"] = {"type": "Lowercase"}
    file["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    file["post_processor"] = file["decoder"] = None


def with_words(*words):
    def change(file):
        for word in words:
            file["added_tokens"].append({"id": 639 + len(file["added_tokens"])} | word)

    return change


def with_padding(file):
    file["truncation"] = {"direction": "Right", "max_length": 20, "strategy": "LongestFirst", "stride": 0}
    file["padding"] = {
        "strategy": {"Fixed": 20}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "!",
    }


MARKS = {"639": flags(START, special=True), "640": flags(END, special=True, normalized=False)}
PLAIN_CONFIG = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}


def folders():
    """Names and files; null removes a file of the tiny tokenizer, which the others are laid over."""
    both = {"vocab.json": None, "merges.txt": None}
    bare = {"special_tokens_map.json": None, "tokenizer_config.json": None}
    file = lambda *changes: whole_file(BASE / "tokenizer", lambda file: [change(file) for change in changes])
    return {
        "as it is": {},
        "without configurations": bare,
        "a word": {"added_tokens.json": {"<cat-toy>": 641, "<dog>": 642}},
        "words of several vectors": {
            "added_tokens.json": {"<y>_1": 645, "<x>": 641, "<x>_1": 642, "<x>_2": 643, "<y>": 644, "sks style": 646},
        },
        "upper case, marks and letters": {
            "added_tokens.json": {"<Cat-Toy>": 641, "Ünï": 642, "猫": 643, "ﬁre": 644, "e\u0301": 645, "art": 646},
        },
        "flags": {
            "tokenizer_config.json": TOKENIZER_CONFIG | {
                "added_tokens_decoder": MARKS | {
                    "641": flags("<left>", lstrip=True),
                    "642": flags("<right>", rstrip=True),
                    "643": flags("<exact>", normalized=False),
                    "644": flags("cat", single_word=True),
                    "645": flags("<special>", special=True, normalized=False),
                    "519": flags("on", single_word=True, normalized=False),
                    "646": {"content": "<short>"},
                    "647": {"content": "<Short Special>", "special": True},
                },
            },
        },
        "as transformers 4 saves it": {
            "added_tokens.json": {"<cat-toy>": 641, "<cat-toy>_1": 642},
            "tokenizer_config.json": TOKENIZER_CONFIG | {
                "added_tokens_decoder": MARKS | {"641": flags("<cat-toy>"), "642": flags("<cat-toy>_1")},
            },
        },
        "added_tokens_decoder hides the other files": {
            "added_tokens.json": {"<dog>": 641},
            "special_tokens_map.json": {"pad_token": "!", "additional_special_tokens": ["<more>"]},
            "tokenizer_config.json": TOKENIZER_CONFIG | {"added_tokens_decoder": MARKS | {"641": flags("<cat-toy>")}},
        },
        "tokenizer.json beside the others": {"tokenizer.json": file(with_words(flags("<cat-toy>"), flags("<dog>")))},
        "tokenizer.json with a configuration": both | {
            "tokenizer.json": file(with_words(flags("<cat-toy>"), flags("<cat-toy>_1"))),
            "special_tokens_map.json": None,
        },
        "tokenizer.json alone": both | bare | {"tokenizer.json": file(with_words(flags("<cat-toy>", lstrip=True)))},
        "tokenizer.json with other parts": both | bare | {"tokenizer.json": file(with_other_parts)},
        "tokenizer.json cuts and pads": both | {"tokenizer.json": file(with_padding)},
        "tokenizer.json and added_tokens.json": both | {
            "tokenizer.json": file(with_words(flags("<cat-toy>", normalized=False))),
            "added_tokens.json": {"<cat-toy>": 641, "<dog>": 642},
        },
        "another word for padding": {
            "special_tokens_map.json": SPECIAL_TOKENS | {"pad_token": "!"},
            "tokenizer_config.json": TOKENIZER_CONFIG | {"pad_token": "!"},
        },
        "padding by the map alone": {"special_tokens_map.json": SPECIAL_TOKENS | {"pad_token": "<pad>"}},
        "padding by the configuration alone": {
            "special_tokens_map.json": None, "tokenizer_config.json": TOKENIZER_CONFIG | {"pad_token": "!"},
        },
        "a new first word": {"special_tokens_map.json": SPECIAL_TOKENS | {"bos_token": "<s>", "eos_token": "</s>"}},
        "more special words": {
            "special_tokens_map.json": SPECIAL_TOKENS | {
                "additional_special_tokens": ["<more>", "<even more>"], "mask_token": "<mask>", "image_token": "<image>",
            },
            "added_tokens.json": {"<cat-toy>": 641},
        },
        "special words that are added": {
            "special_tokens_map.json": None,
            "tokenizer_config.json": TOKENIZER_CONFIG | {"additional_special_tokens": ["<More>", "<Less>"]},
            "added_tokens.json": {"<cat-toy>": 641, "<More>": 642},
        },
        "special words of the map that are added": {
            "special_tokens_map.json": SPECIAL_TOKENS | {
                "additional_special_tokens": ["<More>"], "image_token": "<Image>", "mask_token": "<Mask>",
            },
            "added_tokens.json": {"<More>": 641, "<Image>": 642, "<Mask>": 643},
        },
        "special words of objects that are added": {
            "special_tokens_map.json": None,
            "tokenizer_config.json": TOKENIZER_CONFIG | {
                "mask_token": flags("<Mask>", __type="AddedToken"), "cls_token": "<Cls>",
                "additional_special_tokens": [flags("<More>", __type="AddedToken"), "<Less>"],
            },
            "added_tokens.json": {"<More>": 641, "<Mask>": 642, "<Cls>": 643, "<Less>": 644},
        },
        "named words": {
            "special_tokens_map.json": None,
            "tokenizer_config.json": TOKENIZER_CONFIG | {"extra_special_tokens": {"first_token": "<first>"}},
        },
        "no null": {"tokenizer_config.json": TOKENIZER_CONFIG | {"sep_token": None, "additional_special_tokens": None}},
        "short": {"tokenizer_config.json": TOKENIZER_CONFIG | {"model_max_length": 20}},
        "by its older name": {"tokenizer_config.json": {"max_len": 30}},
        "keeps case, it says": {"tokenizer_config.json": TOKENIZER_CONFIG | {"do_lower_case": False}},
    }


WORDS_IN_PROMPTS = [
    "a photo of <cat-toy> on the <cat-toy>beach, <CAT-TOY>", "<cat-toy>", "<cat-toy><cat-toy>", "<dog>,<cat-toy>!",
    "cat-toy <cat- toy> <cat-toy", "a <x> and <y>, <X> <x>_1", "a <x>,<y>.<x>_2<y>_1", "sks style, SKS  STYLE",
    "<Cat-Toy> ünï ÜNÏ U\u0308nï 猫猫 ﬁre FIRE é e\u0301 É art ARTist smart", "a  <left>  b  <right>  c <LEFT>",
    "<exact> <EXACT>", "cat concatenate cat's Cat a-cat 1cat cat_", "on ON onto, on. moon", "<special> <SPECIAL>",
    "<short> <Short> <short special> <Short Special>", "wow! !! hey!ho", "<s> </s> <pad> <PAD>", "<more> <even more>",
    "<mask> <image> <Image> <first> <Mask> <cls>", "<More> <more> <Less>", "<cat-toy>_1 <cat-toy> <CAT-TOY>_1", "",
    "A Cat ON the MAT", f"{START} a {END} b {END.upper()}", "a <cat-toy> " * 26, "wide <x> " * 16, "\u00e9 \n<dog>\t🐈<x>猫",
]


def folder_cases():
    from diffusers.loaders import TextualInversionLoaderMixin
    from transformers import CLIPTokenizer

    mixin = TextualInversionLoaderMixin()
    result = []
    for name, files in folders().items():
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(BASE / "tokenizer", folder, dirs_exist_ok=True)
            for file, content in files.items():
                if content is None:
                    (Path(folder) / file).unlink()
                else:
                    (Path(folder) / file).write_text(json.dumps(content))
            tokenizer = CLIPTokenizer.from_pretrained(folder)
        limit = min(tokenizer.model_max_length, 77)
        cases = []
        for text in WORDS_IN_PROMPTS:
            converted = mixin.maybe_convert_prompt(text, tokenizer)
            ids = tokenizer(text, truncation=False, verbose=False).input_ids
            padded = tokenizer(converted, padding="max_length", max_length=limit, truncation=True).input_ids
            case = {"text": text, "ids": ids}
            if text == "" or converted != text or len(ids) > limit:
                case |= {"converted": converted, "padded": padded}
            cases.append(case)
        added = [
            [i, token.content, token.special, token.normalized, token.lstrip, token.rstrip, token.single_word]
            for i, token in sorted(tokenizer.added_tokens_decoder.items())
        ]
        marks = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
        result.append(
            {"name": name, "files": files, "limit": limit, "marks": marks, "size": len(tokenizer), "added": added}
            | {"cases": cases}
        )
    return result


# Textual inversions

WIDTH = 24


def vectors(name, *shape):
    return 0.5 * pseudo_random(f"inversion/{name}", shape)


def inversion_files():
    """File, name in prompts, and what is in it."""
    parameter = torch.nn.Parameter
    one = lambda name, rows: {
        "string_to_token": {"*": 265}, "string_to_param": {"*": rows}, "name": name, "step": 100,
        "sd_checkpoint": None, "sd_checkpoint_name": None,
    }
    return {
        "vector.bin": ("<cat-toy>", {"<cat-toy>": vectors("vector", WIDTH)}),
        "row.bin": ("<row>", {"<row>": parameter(vectors("row", 1, WIDTH))}),
        "two.bin": ("<two>", {"<another name>": vectors("two", 2, WIDTH).double()}),
        "raw.bin": ("raw style", vectors("raw", 3, WIDTH)),
        "emb.safetensors": ("emb", {"emb_params": vectors("emb", 2, WIDTH)}),
        "half.safetensors": ("Half", {"emb_params": vectors("half", 1, WIDTH).half()}),
        "webui.pt": ("webui", one("other", vectors("webui", 4, WIDTH).requires_grad_())),
        "parameters.pt": (
            "zz9",
            {
                "string_to_token": {"*": torch.tensor(265)}, "name": "other",
                "string_to_param": torch.nn.ParameterDict({"*": parameter(vectors("parameters", 2, WIDTH))}),
            },
        ),
    }


REFUSED_INVERSIONS = {
    "xl.safetensors": {"clip_l": vectors("clip_l", 1, 8), "clip_g": vectors("clip_g", 1, 12)},
    "several.bin": {"<a>": vectors("a", WIDTH), "<b>": vectors("b", WIDTH)},
    "wide.bin": {"<wide>": vectors("wide", 1, 1024)},
    "deep.safetensors": {"emb_params": vectors("deep", 1, 2, WIDTH)},
}

INVERSION_PROMPTS = [
    "a photo of <cat-toy>, <CAT-TOY> and <row>", "<two> on raw style. raw  style", "emb, webui;zz9",
    "half a Half, <two><two>embers", "webui " * 20,
]


def inversions(folder):
    from diffusers import StableDiffusionPipeline

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    pipeline = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
    files = []
    for file, (name, content) in inversion_files().items():
        save = save_file if file.endswith(".safetensors") else torch.save
        save(content, folder / file)
        with torch.no_grad():
            pipeline.load_textual_inversion(content, token=name)
        files.append({"file": file, "name": name, "size": len(pipeline.tokenizer)})
    for file, content in REFUSED_INVERSIONS.items():
        save = save_file if file.endswith(".safetensors") else torch.save
        save(content, folder / file)
    cases, tensors = [], {"token_embedding": pipeline.text_encoder.get_input_embeddings().weight[641:].detach().clone()}
    for i, text in enumerate(INVERSION_PROMPTS):
        converted = pipeline.maybe_convert_prompt(text, pipeline.tokenizer)
        ids = pipeline.tokenizer(converted, padding="max_length", max_length=77, truncation=True).input_ids
        cases.append({"text": text, "converted": converted, "ids": ids})
        with torch.no_grad():
            tensors[f"prompt_{i}"] = pipeline.encode_prompt(text, "cpu", 1, False)[0].contiguous()
    save_file(tensors, folder / "expected.safetensors")
    (folder / "expected.json").write_text(json.dumps({"files": files, "cases": cases}) + "\n")


# A1111's syntax, by its published rules

PIECES = re.compile(r"\\[\\()\[\]]|\\|[(\[\])]|:\s*([+-]?[.\d]+)\s*\)|[^\\()\[\]:]+|:")


def parse(prompt):
    """Runs of text and weight; a weight of None is a break."""
    runs, open_brackets = [], {"(": [], "[": []}

    def close(bracket, factor):
        start = open_brackets[bracket].pop()
        runs[start:] = [(text, weight and weight * factor) for text, weight in runs[start:]]

    for piece in PIECES.finditer(prompt):
        text = piece.group()
        if text.startswith("\\"):
            runs.append((text[1:], 1.0))
        elif text in open_brackets:
            open_brackets[text].append(len(runs))
        elif piece.group(1) and open_brackets["("]:
            close("(", float(piece.group(1)))
        elif text == ")" and open_brackets["("]:
            close("(", 1.1)
        elif text == "]" and open_brackets["["]:
            close("[", 1 / 1.1)
        else:
            for i, part in enumerate(re.split(r"\s*\bBREAK\b\s*", text)):
                runs += [("", None)] * (i > 0) + [(part, 1.0)]
    while open_brackets["("]:
        close("(", 1.1)
    while open_brackets["["]:
        close("[", 1 / 1.1)
    merged = []
    for text, weight in runs:
        if merged and merged[-1][1] == weight is not None:
            merged[-1] = (merged[-1][0] + text, weight)
        else:
            merged.append((text, weight))
    return [(text, weight) for text, weight in merged if text or weight is None]


def chunks(prompt, tokenizer, concepts):
    """Ids and weights of each chunk. `concepts` are names with the ids of their vectors. They are found by their
    tokens; those that begin or end with punctuation, which is one token with its neighbours, are tokens themselves."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([name for name in concepts if not (name[0].isalnum() and name[-1].isalnum())])
    plain = lambda text: tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
    spelled = sorted(((plain(name), ids) for name, ids in concepts.items()), key=lambda item: -len(item[0]))
    comma = tokenizer.get_vocab().get(",</w>")
    done, chunk, last_comma = [], [], None

    def finish(rest=()):
        nonlocal chunk, last_comma
        padding = [(tokenizer.pad_token_id, 1.0)] * (75 - len(chunk))
        done.append([(tokenizer.bos_token_id, 1.0), *chunk, (tokenizer.eos_token_id, 1.0), *padding])
        chunk, last_comma = list(rest), None

    for text, weight in parse(prompt):
        if weight is None:
            finish()
            continue
        ids = plain(text)
        while ids:
            if ids[0] == comma:
                last_comma = len(chunk)
            elif len(chunk) == 75 and last_comma is not None and 75 - last_comma <= 20:
                moved, chunk = chunk[last_comma + 1 :], chunk[: last_comma + 1]
                finish(moved)
            if len(chunk) == 75:
                finish()
            for name, concept in spelled:
                if ids[: len(name)] == name:
                    if len(chunk) + len(concept) > 75:
                        finish()
                    chunk += [(token, weight) for token in concept]
                    ids = ids[len(name) :]
                    break
            else:
                chunk.append((ids.pop(0), weight))
    if chunk or not done:
        finish()
    return done


@torch.no_grad()
def encode(prompts, tokenizer, concepts, text_encoder, clip_skip):
    """`[batch, chunks * 77, hidden_size]`; the shorter prompts get empty chunks."""
    batch = [chunks(prompt, tokenizer, concepts) for prompt in prompts]
    empty = chunks("", tokenizer, {})
    length = max(map(len, batch))
    result = []
    for one in zip(*[prompt + empty * (length - len(prompt)) for prompt in batch]):
        ids = torch.tensor([[token for token, _ in chunk] for chunk in one])
        weights = torch.tensor([[weight for _, weight in chunk] for chunk in one])
        states = text_encoder(ids, output_hidden_states=True).hidden_states
        z = text_encoder.final_layer_norm(states[-1 - clip_skip])
        weighted = z * weights[..., None]
        result.append(weighted * (z.mean() / weighted.mean()))
    return torch.cat(result, 1)


PARSED = [
    # the table of the syntax's own documentation
    "normal text", "an (important) word", "(unbalanced", "\\(literal\\]", "(unnecessary)(parens)",
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
    # brackets
    "", "()", "[]", "(:1.2)", "((a)", "[(a", "a) b] c", "(a]", "[a)", "([a]:1.5)", "[[a]] (((b)))", "(a:1.1)(b)", "((a:0):2)", "(a)(b:1.1) c",
    # numbers
    "(a:1)", "(a: 1.25 )", "(a:.5)", "(a:2.)", "(a:-0.5)", "(a:+1.5)", "(a:b:1.5)", "(a:b)", "a:1.2)", "[a:1.2)", "(a:1,5)", "a: b", "(a :1.2) b",
    "(a:1.2", "((a:1.2)", "(時間:1.2)",
    # escapes
    "\\\\", "a\\b", "\\", "(a\\)", "(a\\):1.2)", "\\((a)\\)", "\\[a\\|b\\]", "smile \\(artist\\), (x)",
    # breaks
    "a BREAK b", "BREAK", "a BREAK BREAK b", "(a BREAK b:1.2)", "aBREAK BREAKb break", "a\nBREAK\n, b", "a,BREAK,b", "(a)BREAK(a)", "a BREAK",
    "[BREAK]", "BREAK_1 éBREAK",
]

SENTENCE = "a watercolour of a harbour with seventeen small boats"
LIST = "red boats, blue gulls, nets, a (long:1.2) pier, "
CHUNKED = [
    "", "a cat", "a (cat:1.5) BREAK [dog]", "BREAK", "a BREAK", "(word " * 80, f"{SENTENCE}, " * 9, LIST * 8, "ha" * 200, ", " * 80, "a " * 75, "a " * 76,
    "a " * 75 + ", b", "a " * 54 + ", " + "b " * 25, "a " * 55 + ", " + "b " * 25, "(con)catenate (CON)", "<|endoftext|> a",
    "a mygarden of (MyGarden:1.3), mygardens", "a " * 73 + "mygarden b", "a " * 60 + ", " + "b " * 12 + "mygarden c", "sks cat sks", "sks style here",
    "easynegative " * 20 + "BREAK sks", "a <toy>, (<Toy>:1.2)<toy>toys,<toy>", "a,_x _X, <toy>_x _xy",
]
CONCEPTS = {"<toy>": 2, "mygarden": 4, "_x": 1, "easynegative": 8, "sks": 1, "sks style": 2}

WEIGHTED = [
    (["a (cat:1.4) on the [mat]"], 0), (["a (cat:1.4) on the [mat]"], 1), (["plain words"], 0),
    (["a (dog:0.3), (((sky))) BREAK (sun:1.9) by the sea", "a tiny (house:1.2)"], 0), (["(zz9:1.3) and (zz9) [zz9x]"], 2),
    ([f"{LIST * 2}"], 0),
]


def syntax(folder):
    from transformers import CLIPTextModel, CLIPTokenizer

    parsed = [[text, parse(text)] for text in PARSED]
    tokenizer = CLIPTokenizer.from_pretrained(REFERENCE / "tokenizer")
    first, concepts = len(tokenizer), {}
    for name, count in CONCEPTS.items():
        concepts[name] = list(range(first, first + count))
        first += count
    chunked = []
    for text in CHUNKED:
        # Padding is cut off.
        pieces = []
        for chunk in chunks(text, tokenizer, concepts):
            end = max(i for i, (token, _) in enumerate(chunk[:-1]) if token != tokenizer.pad_token_id)
            pieces.append([list(part) for part in zip(*chunk[1 : end + 1])] or [[], []])
        chunked.append([text, pieces])

    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(BASE / "text_encoder").eval()
    first = len(tokenizer)
    text_encoder.resize_token_embeddings(first + 2, mean_resizing=False)
    text_encoder.get_input_embeddings().weight.data[first:] = vectors("parameters", 2, WIDTH)
    weighted, tensors = [], {}
    for i, (texts, clip_skip) in enumerate(WEIGHTED):
        tensors[f"weighted_{i}"] = encode(texts, tokenizer, {"zz9": [first, first + 1]}, text_encoder, clip_skip)
        weighted.append({"texts": texts, "clip_skip": clip_skip})
    save_file(tensors, folder / "weighted.safetensors")
    save_lines(folder / "parsed.json", parsed)
    save_lines(folder / "chunked.json", [CONCEPTS, *chunked])
    save_lines(folder / "weighted.json", weighted)


def save_lines(path, items):
    lines = ",\n".join(json.dumps(item, ensure_ascii=False, separators=(",", ":")) for item in items)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def main():
    if len(sys.argv) != 2:
        raise SystemExit("usage: prompts.py OUTPUT_FOLDER")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)

    import diffusers
    import tokenizers
    import transformers

    versions = {package.__name__: package.__version__ for package in (torch, diffusers, transformers, tokenizers)}
    for package, version in versions.items():
        print(package, version)
    torch.set_num_threads(1)
    quiet()
    compress_vocabulary()
    save_lines(folder / "folders.json", folder_cases())
    inversions(folder / "inversions")
    syntax(folder)
    save_json(folder / "made_with.json", versions, indent=1)


if __name__ == "__main__":
    main()
