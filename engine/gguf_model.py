"""Models and tokenizers out of GGUF files, which transformers reads."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .weights import load_weights

_log = logging.getLogger("cupaged.engine")


def load(
    path: Path, *, dtype: torch.dtype, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a GGUF file, its weights dequantised.

    Args:
        options: further ones of ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        ValueError: transformers cannot read it, or it lacks tensors.
    """
    try:
        model = load_weights(path.parent, gguf_file=path.name, dtype=dtype, **_dequantise_option(), **options)
        _log.info("the weights of %s are dequantised to %s", path.name, str(dtype).removeprefix("torch."))
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # the reader raises whatever it meets
        raise ValueError(f"{path} cannot be loaded as a GGUF model: {error}") from error
    if pre_tokenizer_name(path) == "smollm":
        # The import drops this step; without it numbers are cut otherwise than the model was trained on.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    return model, tokenizer


def _dequantise_option() -> dict[str, Any]:
    """Ask newer releases of transformers not to keep weights packed, for kernels of their own."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def pre_tokenizer_name(path: Path) -> str | None:
    """What the file says about how text is cut before merging, as "smollm" or "llama-bpe"."""
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    return None if field is None else str(field.contents())


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
