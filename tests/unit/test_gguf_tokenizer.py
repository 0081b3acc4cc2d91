"""GGUF files' names of pre-tokenizers: every one cuts as llama.cpp does, or is refused by name.

The patterns here are llama.cpp's (src/llama-vocab.cpp), character for character, matched by the `regex`
module; the engine's are matched by the tokenizers library.
"""

from __future__ import annotations

import random
import unicodedata

import pytest
import regex
import torch
import transformers as tf
from gguf import GGUFWriter, TokenType
from tokenizers import pre_tokenizers

from cupaged.engine.model import gguf_tokenizer, loader

SUFFIXES = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = SUFFIXES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + END
QWEN2 = SUFFIXES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + END
BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + SUFFIXES + "?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + SUFFIXES + "?|"
)
ASCII_CASED = (
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+SUFFIX|"
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*SUFFIX|"
)
SYMBOLS_AND_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|" + END
PUNCTUATED = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
)
CJK = "[一-龥ࠀ-一가-퟿]+"
KANA_HAN = "[一-龥぀-ゟ゠-ヿ]+"
LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5"
    "\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba"
    "\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    "\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102"
    "\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
WIDE = "".join(rf"|\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)) + r"|\s{1,2}(?!\S)|\s{1}"

FAMILIES = {
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert exaone4 "
    "jina-v1-en jina-v2-code roberta-bpe mpt olmo jais trillion granite-docling": [GPT2],
    "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2": [r"\p{N}", GPT2],
    "falcon": [r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"],
    "chameleon": [
        *("<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", "([\\t\\n]|    |  )"),
        *(r"\p{N}", r"[\p{P}!-/:-@\[-`{-~]", GPT2),
    ],
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano dbrx smaug-bpe glm4 "
    "chatglm-bpe": [LLAMA3],
    "jais-2": [LLAMA3.replace(r"|\s+(?!\S)|\s+", WIDE)],
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": [QWEN2],
    "qwen35": [SUFFIXES + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + END],
    "laguna": [r"[^\n]+|[\n]+", QWEN2],
    "ufakzeka": [r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + END],
    "bailingmoe bailingmoe2 llada-moe": [
        r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    ],
    "seed-coder": [
        SUFFIXES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "exaone-moe": [
        SUFFIXES + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
    ],
    "minicpm5": [
        r"\p{N}{1,3}",
        SUFFIXES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|" + END,
    ],
    "poro-chat bloom gpt3-finnish": [BLOOM],
    "viking": [BLOOM, r"\p{N}"],
    "tekken": [ASCII_CASED.replace("SUFFIX", "") + r"\p{N}|" + SYMBOLS_AND_SLASHES],
    "gpt-4o llama4 kanana2 talkie minimax-m2": [
        ASCII_CASED.replace("SUFFIX", SUFFIXES + "?") + r"\p{N}{1,3}|" + SYMBOLS_AND_SLASHES
    ],
    "granite-embed-multi-97m": [
        ASCII_CASED.replace("SUFFIX", SUFFIXES + "?").replace(r"(?=[\p{L}])", r"(?=[\p{L}\p{M}])")
        + r"\p{N}{1,3}|"
        + SYMBOLS_AND_SLASHES
    ],
    "tiny_aya cohere2moe": [r"\d{1,3}(?=(?:\d{3})*\b)", CASED + r"\p{N}{1,3}|" + SYMBOLS_AND_SLASHES],
    "youtu": [
        r"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+",
        CASED + r"\p{N}|" + SYMBOLS_AND_SLASHES,
    ],
    "superbpe": [r"\p{N}+", r"(?=(\d{3})+(?!\d))"],
    "deepseek-llm": [
        *("[\r\n]", rf"\s?[{LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+\Z", CJK, r"\p{N}+")
    ],
    "deepseek-coder": ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}"],
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": [r"\p{N}{1,3}", KANA_HAN, PUNCTUATED + r"[\r\n]*|" + END],
    "spark2_5": [
        *(r"\p{N}{1,3}", KANA_HAN, PUNCTUATED + r"|[\r\n]|\s+(?!\S)|\s+", r"\p{N}"),
    ],
    "afmoe": [
        r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))",  # what llama.cpp has a loop for
        "[一-鿿㐀-䶿\uf900-\ufaff぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+",
        PUNCTUATED + r"[\r\n]*|" + END,
    ],
}
NAMES = {name: patterns for names, patterns in FAMILIES.items() for name in names.split()}


def cut(patterns: list[str], text: str) -> list[str]:
    """What llama.cpp does: each pattern cuts what the one before it left."""
    pieces = [text]
    for pattern in patterns:
        found = []
        for piece in pieces:
            end = 0
            for match in regex.finditer(pattern, piece):
                found += [piece[end : match.start()], match[0]]
                end = match.end()
            found.append(piece[end:])
        pieces = [piece for piece in found if piece]
    return pieces


def cut_by_engine(name: str, text: str) -> list[str]:
    pieces = gguf_tokenizer.check("gpt2", name).build().pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in merged(pieces)]


def merged(pieces):
    """Offsets of byte-level pieces are those of the characters."""
    return [piece for piece in pieces if piece[1][0] < piece[1][1]]


KNOWN = {
    "refact": {"ab 123456": "ab| |1|2|3|4|5|6", "it's\n\n  x!": "it|'s|\n\n | x|!"},
    "starcoder": {"ab 123456": "ab| |1|2|3|4|5|6"},
    "gpt-2": {"ab 123456": "ab| 123456", "IT'S we'll": "IT|'|S| we|'ll"},
    "default": {"ab 1234567": "ab| |123|456|7", "a, b": "a|,| b"},
    "llama-bpe": {"ab 1234567": "ab| |123|456|7", "IT'S  ok\n\n": "IT|'S| | ok|\n\n", "中文,x": "中文|,x"},
    "qwen2": {"ab 1234": "ab| |1|2|3|4", "x=1\n \ny": "x|=|1|\n \n|y"},
    "falcon": {"ab 1234567.": "ab| |123|456|7|."},
    "deepseek-v3": {"x1234 日本ab": "x|123|4| |日本|ab", "a ~b": "a| ~|b"},
    "tekken": {"HelloWORLDs 12": "Hello|WORLDs| |1|2"},
    "gpt-4o": {"HelloWORLDs it'll": "Hello|WORLDs| it'll"},
    "afmoe": {"1234567 123456 12": "1|234|567| |123|456| |12"},
    "superbpe": {"x 1234567!": "x |1|234|567|!"},
    "tiny_aya": {"HelloWorld 1234567": "Hello|World| |1|234|567"},
    "bloom": {"ab, cd123": "ab|,| cd123"},
    "viking": {"ab, cd123": "ab|,| cd|1|2|3"},
    "chameleon": {"a    b<sentinel:12>": "a|    |b|<|sentinel|:|1|2|>"},
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_cuts(name):
    for text, expected in KNOWN[name].items():
        assert "|".join(cut(NAMES[name], text)) == expected
        assert "|".join(cut_by_engine(name, text)) == expected


PARTS = (
    *(" ", "  ", "   ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028"),
    *("1", "12", "1234", "1234567", "٣", "½", "Ⅷ", "'s", "'S", "'LL", "'re", "n't", "’s", "'"),
    *("a", "Word", "HTTP", "é", "e\u0301", "É", "ß", "Ω", "я", "ǅ", "ʰ", "ա", "ℵ", "ก", "ำ", "अ", "ि"),
    *("中", "文字", "ひ", "カ", "한", "ㄱ", "ㄅ", "￥", "、", "。", "，", "！", "…", "“", "—", "،", "।"),
    *(
        ".",
        ",",
        "!",
        "?",
        "(",
        ")",
        "[",
        "]",
        "{",
        "~",
        "`",
        "^",
        "$",
        "+",
        "<=>",
        "|",
        "/",
        "\\",
        "_",
        "-",
        "#",
    ),
    *("🙂", "👩\u200d💻", "\u200b", "€", "<sentinel:7>", "IMGIMGABZ", "x" * 30, " " * 20),
)


def draw_text(rng: random.Random) -> str:
    parts = rng.choices(PARTS, k=rng.randrange(1, 14))
    for _ in range(rng.randrange(3)):
        parts.insert(rng.randrange(len(parts) + 1), drawn_character(rng))
    return "".join(parts)


def drawn_character(rng: random.Random) -> str:
    """One that both libraries know: assigned in the Unicode of ten years ago, and a letter or not in both."""
    while True:
        character = chr(rng.randrange(0x110000))
        if unicodedata.ucd_3_2_0.category(character) not in ("Cn", "Cs", "Co") and character not in "ʕ²³¹¼½¾":
            return character


@pytest.mark.parametrize("name", NAMES)
def test_every_name_cuts_as_llama_cpp(name, seed):
    rng = random.Random(seed)
    for _ in range(150):
        text = draw_text(rng)
        if "½" in text and name in ("tiny_aya", "cohere2moe"):
            text = text.replace("½", "")  # the libraries differ in whether a word may have it
        assert cut_by_engine(name, text) == cut(NAMES[name], text), text


def test_every_name_is_here():
    assert set(gguf_tokenizer.PRE_TOKENIZERS) == set(NAMES)


def test_the_letters_of_deepseek_are_those_with_a_case():
    found = {chr(c) for c in range(0x20000) if regex.fullmatch(f"[{LETTERS}]", chr(c))}
    assert {unicodedata.category(c) for c in found - {"ʕ"}} == {"Lu", "Ll", "Lt"}
    old = unicodedata.ucd_3_2_0
    cased = {chr(c) for c in range(0x1D400) if old.category(chr(c)) in ("Lu", "Ll", "Lt")}
    missing = {c for c in cased - found if unicodedata.category(c) in ("Lu", "Ll", "Lt")}
    assert missing <= {*map(chr, range(0x561, 0x588))}  # small Armenian ones, in llama.cpp


MERGES = ("a b", "2 3", "1 23", "4 5", "45 6", "Ġ 123")


def write_gguf(path, pre: str | None, *, model: str | None = "gpt2", bos: bool | None = None):
    """A llama of one layer; its vocabulary is the byte alphabet, what the merges make, two words and <s>."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [merge.replace(" ", "") for merge in MERGES] + ["whole", "Ġword", "<s>"]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    if model is not None:
        writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.NORMAL] * (len(tokens) - 1) + [TokenType.CONTROL])
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)
    if bos is not None:
        writer.add_add_bos_token(bos)
    shapes = {"token_embd": (len(tokens), 32), "output": (len(tokens), 32), "output_norm": (32,)}
    layer = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    layer |= {"ffn_gate": (32, 32), "ffn_up": (32, 32), "ffn_down": (32, 32)}
    layer |= {"attn_norm": (32,), "ffn_norm": (32,)}
    for name, shape in {**shapes, **{f"blk.0.{name}": shape for name, shape in layer.items()}}.items():
        writer.add_tensor(f"{name}.weight", torch.zeros(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path) -> tf.PreTrainedTokenizerBase:
    return loader.load_model(str(path), dtype="float32", device="cpu", attn_implementation="sdpa")[1]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("refact", "ab|Ġ|1|2|3|4|5|6"),
        ("starcoder", "ab|Ġ|1|2|3|4|5|6"),
        ("smollm", "ab|Ġ|1|2|3|4|5|6"),
        ("gpt-2", "ab|Ġ123|456"),
        ("dbrx", "ab|Ġ|123|456"),
    ],
)
def test_the_tokens_of_a_file(tmp_path, pre, expected):
    tokenizer = load(write_gguf(tmp_path / "model.gguf", pre))
    assert "|".join(tokenizer.tokenize("ab 123456")) == expected
    text = " ab\n 123 é中🙂 it's\t"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(
    ("pre", "flag", "expected"),
    [
        ("llama-bpe", None, "<s>|whole|Ġword"),  # tokens of a whole piece, without merges that lead there
        ("llama-bpe", False, "whole|Ġword"),
        ("tekken", None, "<s>|whole|Ġword"),
        ("chameleon", None, "<s>|w|h|o|l|e|Ġ|w|o|r|d"),
        ("gpt-2", None, "w|h|o|l|e|Ġ|w|o|r|d"),
        ("gpt-2", True, "<s>|w|h|o|l|e|Ġ|w|o|r|d"),
        ("youtu", None, "whole|Ġword"),
    ],
)
def test_what_goes_with_a_name(tmp_path, pre, flag, expected):
    tokenizer = load(write_gguf(tmp_path / "model.gguf", pre, bos=flag))
    assert "|".join(tokenizer.convert_ids_to_tokens(tokenizer("whole word")["input_ids"])) == expected


@pytest.mark.parametrize(
    ("model", "pre", "message"),
    [
        ("gpt2", "foo-bpe", "tokenizer.ggml.pre is 'foo-bpe'.*not known.*Hugging Face directory"),
        ("gpt2", "kimi-k2", "tokenizer.ggml.pre is 'kimi-k2'.*Hugging Face directory"),
        ("gpt2", "sarvam-moe", "tokenizer.ggml.pre is 'sarvam-moe'.*Hugging Face directory"),
        ("llama", "qwen2", "'qwen2'.*tokenizer.ggml.model is 'llama'"),
        ("rwkv", "default", "tokenizer.ggml.model is 'rwkv'.*gpt2, llama.*Hugging Face directory"),
        ("bert", None, "tokenizer.ggml.model is 'bert'"),
        ("plamo2", None, "tokenizer.ggml.model is 'plamo2'"),
        (None, None, "tokenizer.ggml.model is None"),
    ],
)
def test_what_is_refused_is_named(tmp_path, monkeypatch, model, pre, message):
    """Before the weights are read."""
    monkeypatch.setattr("cupaged.engine.model.gguf_model.load_weights", None)
    path = write_gguf(tmp_path / "model.gguf", pre, model=model)
    with pytest.raises(ValueError, match=f"(?s)model.gguf.*{message}"):
        load(path)


def test_a_file_without_a_name_is_cut_by_default_and_says_so(tmp_path, caplog):
    tokenizer = load(write_gguf(tmp_path / "model.gguf", None))
    assert "|".join(tokenizer.tokenize("ab 123456")) == "ab|Ġ|123|456"
    assert "tokenizer.ggml.pre" in caplog.text
