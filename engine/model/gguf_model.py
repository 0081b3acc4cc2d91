"""Models and tokenizers out of GGUF files, which transformers reads."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from . import gguf_tokenizer
from .weights import load_weights

_log = logging.getLogger("cupaged.engine")


def load(
    path: Path, *, dtype: torch.dtype, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a GGUF file, its weights dequantised.

    Args:
        options: further ones of ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        ValueError: transformers cannot read it, it lacks tensors, or its text would be cut into other tokens
            than the model's.
    """
    try:
        header = _Header.of(path)
        pre = gguf_tokenizer.check(header.tokenizer, header.pre)  # before gigabytes are read
        model = load_weights(path.parent, gguf_file=path.name, dtype=dtype, **_dequantise_option(), **options)
        _log.info("the weights of %s are dequantised to %s", path.name, str(dtype).removeprefix("torch."))
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # the reader raises whatever it meets
        raise ValueError(f"{path} cannot be loaded as a GGUF model: {error}") from error
    if pre is not None:
        gguf_tokenizer.settle(tokenizer, pre, header.add_bos)
    return model, tokenizer


def _dequantise_option() -> dict[str, Any]:
    """Ask newer releases of transformers not to keep weights packed, for kernels of their own."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def context_length(path: Path) -> int | None:
    """Return the maximum number of tokens that the model was made for; None where the file does not say.

    Raises:
        ValueError: the file cannot be read.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except Exception as error:
        raise ValueError(f"{path} cannot be loaded as a GGUF model: {error}") from error
    architecture = reader.get_field("general.architecture")
    field = None if architecture is None else reader.get_field(f"{architecture.contents()}.context_length")
    return None if field is None else int(field.contents())


@dataclass(frozen=True)
class _Header:
    """Hold what a file says about its tokenizer."""

    tokenizer: str | None
    pre: str | None
    add_bos: bool | None

    @classmethod
    def of(cls, path: Path) -> _Header:
        from gguf import GGUFReader

        reader = GGUFReader(path)
        keys = (f"tokenizer.ggml.{name}" for name in ("model", "pre", "add_bos_token"))
        return cls(*(None if field is None else field.contents() for field in map(reader.get_field, keys)))
