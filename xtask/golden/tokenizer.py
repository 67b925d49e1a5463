"""CLIP's vocabulary in the form Stable Diffusion v1 ships it, a small one cut from it, and prompts with their ids."""

import gzip
import importlib.util
import json
import re
from pathlib import Path

from transformers import CLIPTokenizer

from weights import save_json

START, END = "<|startoftext|>", "<|endoftext|>"
WHOLE_SIZE = 49408


def marker(text, **extra):
    return extra | {"content": text, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


SPECIAL_TOKENS = {
    "bos_token": marker(START),
    "eos_token": marker(END),
    "pad_token": END,
    "unk_token": marker(END),
}

TOKENIZER_CONFIG = {
    "add_prefix_space": False,
    "bos_token": marker(START, __type="AddedToken"),
    "do_lower_case": True,
    "eos_token": marker(END, __type="AddedToken"),
    "errors": "replace",
    "model_max_length": 77,
    "name_or_path": "openai/clip-vit-large-patch14",
    "pad_token": END,
    "special_tokens_map_file": "./special_tokens_map.json",
    "tokenizer_class": "CLIPTokenizer",
    "unk_token": marker(END, __type="AddedToken"),
}


def alphabet():
    """A printable character for each byte, in the order of the vocabulary: first the bytes that are printable
    themselves, then the others, written with the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def all_merges():
    """The merges of CLIP, in order of rank, out of the file that open_clip installs."""
    package = Path(importlib.util.find_spec("open_clip").origin).parent
    lines = gzip.open(package / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8").read().split("\n")
    # The file goes on; CLIP uses what fills its vocabulary beside 2 * 256 bytes and the two marks.
    return [tuple(line.split()) for line in lines[1 : 1 + WHOLE_SIZE - 514]]


def vocabulary(merges):
    letters = list(alphabet().values())
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges] + [START, END]
    return {token: i for i, token in enumerate(tokens)}


def merges_used(merges, words):
    """Those of `merges` that are applied to `words`, in their order of rank."""
    letters, ranks = alphabet(), {pair: rank for rank, pair in enumerate(merges)}
    used = set()
    for word in words:
        symbols = [letters[byte] for byte in word.encode()]
        symbols[-1] += "</w>"
        while True:
            pairs = [pair for pair in zip(symbols, symbols[1:]) if pair in ranks]
            if not pairs:
                break
            best = min(pairs, key=ranks.get)
            used.add(best)
            joined, i = [], 0
            while i < len(symbols):
                if tuple(symbols[i : i + 2]) == best:
                    joined.append("".join(best))
                    i += 2
                else:
                    joined.append(symbols[i])
                    i += 1
            symbols = joined
    return [pair for pair in merges if pair in used]


def small_merges(prompts, left_out):
    """Enough for `prompts`; the words of `left_out` fall into pieces."""
    words = {word for prompt in prompts for word in re.findall(r"[a-z]+|[^\sa-z]", prompt.lower())}
    return merges_used(all_merges(), sorted(words - set(left_out)))


def save(folder, merges):
    save_json(folder / "vocab.json", vocabulary(merges), ensure_ascii=False, separators=(",", ":"))
    text = (folder / "vocab.json").read_text(encoding="utf-8")
    (folder / "vocab.json").write_text(text.rstrip("\n"), encoding="utf-8")
    lines = ["#version: 0.2"] + [" ".join(pair) for pair in merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    save_json(folder / "special_tokens_map.json", SPECIAL_TOKENS, indent=2, sort_keys=True)
    save_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG, indent=2, sort_keys=True)


PROMPTS = [
    # nothing, and nothing but white space
    "", " ", "   ", "\n", "\r\n", "\t \n\u000b\u000c", "\u00a0", "\u3000", "\u2003\u2009", "\u200b", "\ufeff", "\u2028",
    # single characters and short words
    "x", "Z", "?", "7", "é", "猫", "🐈", "ok", "lighthouse", "Lighthouse", "LIGHTHOUSE",
    # ordinary prompts
    "a lighthouse on a cliff in the rain", "A Lighthouse On A Cliff, In The Rain.",
    "an owl reading a newspaper, etching, 4k, sharp focus", "portrait of my grandmother | pastel | soft light",
    "low-poly island::2 clouds::-0.5", "((masterpiece)), [sketch], {ink}, best_quality",
    "cat,dog;bird:fish.frog!toad?", "wait...what?!?! -- no way!!!", "a/b\\c @home #sunset $5 50% ^up &co *star* ~tilde",
    # contractions
    "she's they'd we'll I'm you've aren't o'er", "SHE'S THEY'D WE'LL I'M YOU'VE AREN'T", "'s't're've'm'll'd",
    "the dogs' bowls, y'all'd've", "it’s ‘quoted’ and “double” – dashed — long", "don''t '' 'twas",
    # numbers
    "1984", "007", "3,5 m x 12.75 cm", "1e-5 0x1F 10^6", "½ ¾ ² ³ ① Ⅻ", "٣٤٥ १२३ 一二三", "v2.1beta3", "90s 1920's",
    # white space of all kinds, also at the ends
    "  two   spaces ", "tab\tand\nnewline\r\nend", "non\u00a0breaking\u2007figure\u202fnarrow", "ideographic\u3000space",
    "zero\u200bwidth\u200djoiner\u2060word", "soft\u00adhyphen", "line\u2028para\u2029end", "next\u0085line",
    # Latin with marks, composed and not
    "Crème brûlée à la façon", "cafe\u0301 nai\u0308ve A\u030angstro\u0308m", "Ångström Smørrebrød Łódź Çeşme",
    "ÀÉÎÕÜ àéîõü", "straße STRASSE ẞ", "İstanbul ISTANBUL ıstanbul", "ﬁre ﬂow ﬃ", "Å Å å", "ǅ ǆ Ǆ", "e\u0301\u0323 q\u0307\u0323",
    "tiếng Việt phở", "Zalgo: h\u0335\u0321e\u0336\u0322l\u0337l\u0338o\u0338",
    # other scripts
    "Μεγάλη ΟΔΟΣ οδός", "Привет, МИР ёж", "გამარჯობა ᲗᲑᲘᲚᲘᲡᲘ", "שָׁלוֹם עולם", "مرحبا بالعالم", "سلام‌دنیا ۱۲۳",
    "नमस्ते दुनिया", "สวัสดีชาวโลก", "안녕하세요 세계", "각 \u1100\u1161\u11a8", "東京タワーの夜景、水彩", "ﾊﾝｶｸ ｶﾅ ＦＵＬＬ ｗｉｄｔｈ",
    "红楼梦 龍 𠮷野家", "𝔉𝔯𝔞𝔨𝔱𝔲𝔯 𝐁𝐨𝐥𝐝", "ꦲꦏ𐍈 𓀀", "ᓄᓇᕗᑦ ⴰⵣⵓⵍ", "text \u202eright to left\u202c again",
    # emoji and symbols
    "🎨🖌️ painting 🌅", "👨‍👩‍👧‍👦 family", "👍🏽 ok 🇫🇷", "☃️ ❄ ♥️ ☕", "→ ⇒ ± × ÷ ≈ ∞ √2 π", "€20 £30 ¥40 ₿", "™ © ® § ¶ † ‡", "a🐈b 1🐈2",
    "\ufffd \ue000 \U0001f9ff",
    # special tokens inside a prompt
    "<|startoftext|>", "<|endoftext|>", "<|STARTOFTEXT|> a b", "a <|EndOfText|> b", "x<|startoftext|>y<|endoftext|>z",
    "a <|endoftext|> b", "<|startoftext|>a dog<|endoftext|>", "< |endoftext|>", "<|endoftext", "|>", "<|pad|> <|unk|> </s> [CLS]",
    "<start_of_text> <end_of_text>", "</w> w</w> a</w>b",
    # markup
    "fish &amp; chips &lt;b&gt; &#39;x&#39; &eacute;", "&amp;amp; &nbsp;", "<b>bold</b> <img src='a.png'/>",
    "https://example.org/a?b=c&d=%20#e", "mail me@example.org", "C:\\temp\\new.txt", "{\"json\": [1, null]}", "snake_case camelCase kebab-case",
    # control characters
    "bell\u0007 null\u0000 escape\u001b[0m delete\u007f", "\u0001\u0002", "a\u009fb",
    # long
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "pneumonoultramicroscopicsilicovolcanoconiosis", "a" * 300, "ha" * 120 + "!", "!" * 100, "1" * 90, "-=" * 40, "é" * 60, "🐈" * 40,
    "a watercolour of a harbour with seventeen small boats, " * 9, "word " * 80,
]


def make(folder):
    folder.mkdir(parents=True, exist_ok=True)
    save(folder, all_merges())
    tokenizer = CLIPTokenizer.from_pretrained(str(folder))
    lines = []
    for text in PROMPTS:
        ids = tokenizer(text, truncation=False, verbose=False).input_ids
        lines.append(json.dumps({"text": text, "ids": ids}))
    head = {
        "vocabulary": "the vocab.json beside this file",
        "model_max_length": tokenizer.model_max_length,
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
    }
    opening = json.dumps(head)[:-1] + ',\n"cases": [\n'
    (folder / "prompts.json").write_text(opening + ",\n".join(lines) + "\n]}\n", encoding="utf-8")
