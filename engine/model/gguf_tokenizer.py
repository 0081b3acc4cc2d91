"""Build the pre-tokenizers that GGUF files name in ``tokenizer.ggml.pre``, as llama.cpp does.

A name stands for a list of regular expressions. Each one splits the pieces that the one before it produced:
every match is a piece, and so is the text between two matches. The expressions are those of llama.cpp, which
for some models differ from the model's tokenizer.json in accents and letters beyond ASCII.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerBase

_log = logging.getLogger("cupaged.engine")


@dataclass(frozen=True)
class PreTokenizer:
    """Describe a pre-tokenizer.

    Args:
        patterns: regular expressions, in the order of their application.
        ignore_merges: a piece that is in the vocabulary becomes that token, without applying the merges.
        add_bos: prompts begin with the BOS token unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """Return the equivalent of the tokenizers library, for byte-level BPE."""
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence(
            [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )


_SUFFIX = "'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])"
_SPACES = r"\s+(?!\S)|\s+"
_NEWLINES = r"\s*[\r\n]+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_START, _END = (
    r"(?<![\s\S])",
    r"(?![\s\S])",
)  # of a piece, in every dialect

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = rf"{_SUFFIX}|{_LETTERS}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_NEWLINES}|{_SPACES}"
_QWEN2 = rf"{_SUFFIX}|{_LETTERS}|\p{{N}}|{_SYMBOLS}|{_NEWLINES}|{_SPACES}"
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"


def _cased(upper: str, lower: str, suffix: str, digits: str) -> str:
    """Return the pattern of tokenizers that split words at capitals, as between "Token" and "Count"."""
    word = rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{suffix}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{suffix}"
    return rf"{word}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_NEWLINES}|{_SPACES}"


_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_NO_SMALL, _NO_CAPITAL = r"(?:(?![a-z])\p{L})", r"(?:(?![A-Z])\p{L})"
_NO_SMALL_OR_MARK, _NO_CAPITAL_OR_MARK = r"(?:(?![a-z])[\p{L}\p{M}])", r"(?:(?![A-Z])[\p{L}\p{M}])"

# Letters that have a case, as llama.cpp lists them: without small Armenian letters and recent additions.
_DEEPSEEK_LETTERS = (
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
_DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_KANA_HAN = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_PUNCTUATED = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_DEEPSEEK3 = rf"{_PUNCTUATED}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_NEWLINES}|{_SPACES}"
_YOUTU_SCRIPTS = (
    "[\uac00-\ud7a3\u3131-\u318e]+"
    "|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    f"|[\u3105-\u312f]+|{_KANA_HAN}"
)
_AFMOE_SCRIPTS = (
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
# Groups of three digits from the right: all digits, then the one or two at the left, then the groups.
_AFMOE_DIGITS = (r"\p{N}+", rf"{_START}\p{{N}}{{1,2}}(?=(?:\p{{N}}{{3}})+{_END})", r"\p{N}{3}")
# Groups of three decimal digits from the right. llama.cpp's single pattern looks ahead from every digit to
# the end, which takes minutes for a long number; here only the first three digits do.
_SUPERBPE_DIGITS = (
    r"(?:(?<!\d)|(?<=\A\d|\D\d)|(?<=\A\d\d|\D\d\d))(?=(?:\d{3})+(?!\d))",
    r"\d{3}(?=\d)",
)

_FAMILIES = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jina-v1-en "
    "jina-v2-code roberta-bpe mpt olmo jais trillion granite-docling exaone4": PreTokenizer((_GPT2,)),
    "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2": PreTokenizer((r"\p{N}", _GPT2)),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "chameleon": PreTokenizer(
        (
            "<sentinel:[0-9]+>",
            "IMGIMG[A-I]{1,4}Z",
            "[\\t\\n]|    |  ",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        add_bos=True,
    ),
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": PreTokenizer(
        (_LLAMA3,), ignore_merges=True, add_bos=True
    ),
    "dbrx smaug-bpe glm4 chatglm-bpe": PreTokenizer((_LLAMA3,)),
    "jais-2": PreTokenizer(
        (
            rf"{_SUFFIX}|{_LETTERS}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_NEWLINES}"
            r"|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)"
            r"|\s{4}(?!\S)|\s{1,2}(?!\S)|\s",
        )
    ),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": PreTokenizer(
        (_QWEN2,)
    ),
    "qwen35": PreTokenizer(
        (
            rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
            rf"|{_NEWLINES}|{_SPACES}",
        )
    ),
    "laguna": PreTokenizer((r"[^\n]+|\n+", _QWEN2)),
    "ufakzeka": PreTokenizer((rf"{_LETTERS}|\p{{N}}|{_SYMBOLS}|{_NEWLINES}|{_SPACES}",)),
    "bailingmoe bailingmoe2 llada-moe": PreTokenizer(
        (rf"{_SUFFIX}|{_LETTERS}|\p{{N}}|{_SYMBOLS}|\s*[\r\n]|{_SPACES}",)
    ),
    "seed-coder": PreTokenizer(
        (rf"{_SUFFIX}|{_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_NEWLINES}|{_SPACES}",)
    ),
    "exaone-moe": PreTokenizer(
        (
            rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|{_SPACES}",
        )
    ),
    "minicpm5": PreTokenizer(
        (r"\p{N}{1,3}", rf"{_SUFFIX}|{_LETTERS}|\p{{N}}+|{_SYMBOLS}|{_NEWLINES}|{_SPACES}"),
        ignore_merges=True,
    ),
    "poro-chat bloom gpt3-finnish": PreTokenizer((_BLOOM,)),
    "viking": PreTokenizer((_BLOOM, r"\p{N}")),
    "tekken": PreTokenizer((_cased(_NO_SMALL, _NO_CAPITAL, "", r"\p{N}"),), ignore_merges=True, add_bos=True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": PreTokenizer(
        (_cased(_NO_SMALL, _NO_CAPITAL, f"(?:{_SUFFIX})?", r"\p{N}{1,3}"),)
    ),
    "granite-embed-multi-97m": PreTokenizer(
        (_cased(_NO_SMALL_OR_MARK, _NO_CAPITAL_OR_MARK, f"(?:{_SUFFIX})?", r"\p{N}{1,3}"),),
        ignore_merges=True,
    ),
    "tiny_aya cohere2moe": PreTokenizer(
        (r"\d{1,3}(?=(?:\d{3})*\b)", _cased(_UPPER, _LOWER, f"(?:{_SUFFIX})?", r"\p{N}{1,3}"))
    ),
    "youtu": PreTokenizer(
        (_YOUTU_SCRIPTS, _cased(_UPPER, _LOWER, f"(?:{_SUFFIX})?", r"\p{N}")), ignore_merges=True
    ),
    "superbpe": PreTokenizer((r"\p{N}+", *_SUPERBPE_DIGITS)),
    "deepseek-llm": PreTokenizer(
        (
            "[\r\n]",
            rf"\s?[{_DEEPSEEK_LETTERS}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            rf"\s+{_END}",
            _DEEPSEEK_CJK,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": PreTokenizer(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}")),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": PreTokenizer((r"\p{N}{1,3}", _KANA_HAN, _DEEPSEEK3)),
    "spark2_5": PreTokenizer(
        (
            r"\p{N}{1,3}",
            _KANA_HAN,
            rf"{_PUNCTUATED}| ?[\p{{P}}\p{{S}}]+|[\r\n]|{_SPACES}",
            r"\p{N}",
        )
    ),
    "afmoe": PreTokenizer((*_AFMOE_DIGITS, _AFMOE_SCRIPTS, _DEEPSEEK3)),
}

PRE_TOKENIZERS = {name: family for names, family in _FAMILIES.items() for name in names.split()}
# Names known to llama.cpp whose tokenizers need more than regular expressions and byte-level BPE.
REFUSED = {
    "kimi-k2": "merges no pairs, but takes ranks that the file does not have",
    **dict.fromkeys(
        ("gemma4", "granite-embed-multi-311m", "sarvam-moe", "whitespace"),
        "merges characters, and transformers reads a 'gpt2' vocabulary as bytes",
    ),
}
MODELS = ("gpt2", "llama", "t5", "gemma4")  # supported by transformers
_INSTEAD = "serve the Hugging Face directory that the file was made from, or another conversion of it"


def check(model: str | None, pre: str | None) -> PreTokenizer | None:
    """Return the pre-tokenizer of a file; None if its kind of tokenizer needs none.

    Args:
        model: ``tokenizer.ggml.model`` of the file, such as "gpt2" or "llama".
        pre: ``tokenizer.ggml.pre`` of the file.

    Raises:
        ValueError: the tokenizer is not supported, so tokens would differ from those of the model's training.
    """
    if model not in MODELS:
        raise ValueError(
            f"tokenizer.ggml.model is {model!r}, and only {', '.join(MODELS)} can be read: {_INSTEAD}"
        )
    if model != "gpt2":
        if pre in PRE_TOKENIZERS and pre != "default":
            raise ValueError(
                f"tokenizer.ggml.pre is {pre!r}, which is for byte-level BPE, and tokenizer.ggml.model is "
                f"{model!r}: {_INSTEAD}"
            )
        return None
    if pre is None:
        _log.warning(
            "the GGUF file does not say how text is cut before merging (tokenizer.ggml.pre): tokens may be "
            "others than those that the model was trained on; convert it again"
        )
        pre = "default"
    if pre in REFUSED:
        raise ValueError(f"tokenizer.ggml.pre is {pre!r}, which {REFUSED[pre]}: {_INSTEAD}")
    if pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"tokenizer.ggml.pre is {pre!r}, and how that cuts text is not known: {_INSTEAD} (llama.cpp's "
            "convert_hf_to_gguf.py writes names that are known)"
        )
    return PRE_TOKENIZERS[pre]


def configure(tokenizer: PreTrainedTokenizerBase, pre: PreTokenizer, add_bos: bool | None) -> None:
    """Set the pre-tokenizer of a tokenizer that transformers loaded, and its BOS token, in place.

    Args:
        add_bos: ``tokenizer.ggml.add_bos_token`` of the file; None if it has none.
    """
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre.build()
    backend.model.ignore_merges = pre.ignore_merges
    if add_bos is None and pre.add_bos:
        tokenizer.add_bos_token = True
