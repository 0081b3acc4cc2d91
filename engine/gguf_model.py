"""Models and tokenizers out of GGUF files, which transformers reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from . import gguf_tokenizer


def load(
    path: Path, *, dtype: torch.dtype, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a GGUF file, its weights dequantised.

    Args:
        options: further ones of ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        ValueError: transformers cannot read it, or its text would be cut into other tokens than the model's.
    """
    try:
        header = _Header.of(path)
        pre = gguf_tokenizer.check(header.tokenizer, header.pre)  # before gigabytes are read
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # the reader raises whatever it meets
        raise ValueError(f"{path} cannot be loaded as a GGUF model: {error}") from error
    if pre is not None:
        gguf_tokenizer.settle(tokenizer, pre, header.add_bos)
    return model, tokenizer


@dataclass(frozen=True)
class _Header:
    """What a file says about its tokenizer."""

    tokenizer: str | None
    pre: str | None
    add_bos: bool | None

    @classmethod
    def of(cls, path: Path) -> _Header:
        from gguf import GGUFReader

        reader = GGUFReader(path)
        keys = (f"tokenizer.ggml.{name}" for name in ("model", "pre", "add_bos_token"))
        return cls(*(None if field is None else field.contents() for field in map(reader.get_field, keys)))
