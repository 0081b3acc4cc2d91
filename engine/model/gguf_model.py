"""Load models and tokenizers from GGUF files through transformers."""

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
    """Load a model and its tokenizer from a GGUF file; the weights are dequantized.

    Args:
        dtype: dtype of the weights.
        options: further options of ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        ValueError: transformers cannot read the file, it lacks tensors, or its tokenizer is not supported.
    """
    try:
        header = _Header.of(path)
        pre = gguf_tokenizer.check(header.tokenizer, header.pre)  # before the weights are read
        model = load_weights(path.parent, gguf_file=path.name, dtype=dtype, **_dequantise_option(), **options)
        _log.info("the weights of %s are dequantised to %s", path.name, str(dtype).removeprefix("torch."))
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # the reader may raise any exception
        raise ValueError(f"{path} cannot be loaded as a GGUF model: {error}") from error
    if pre is not None:
        gguf_tokenizer.configure(tokenizer, pre, header.add_bos)
    return model, tokenizer


def _dequantise_option() -> dict[str, Any]:
    """Return the option that makes newer releases of transformers dequantize the weights."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def context_length(path: Path) -> int | None:
    """Return the maximum number of tokens that the model was trained for; None if the file has none.

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
    """Hold a file's metadata of its tokenizer."""

    tokenizer: str | None
    pre: str | None
    add_bos: bool | None

    @classmethod
    def of(cls, path: Path) -> _Header:
        from gguf import GGUFReader

        reader = GGUFReader(path)
        keys = (f"tokenizer.ggml.{name}" for name in ("model", "pre", "add_bos_token"))
        return cls(*(None if field is None else field.contents() for field in map(reader.get_field, keys)))
