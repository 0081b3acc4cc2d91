"""Models and tokenizers out of GGUF files, which transformers reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load(
    path: Path, *, dtype: torch.dtype, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a GGUF file, its weights dequantised.

    Args:
        options: further ones of ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        ValueError: transformers cannot read it.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype, **options)
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


def pre_tokenizer_name(path: Path) -> str | None:
    """What the file says about how text is cut before merging, as "smollm" or "llama-bpe"."""
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    return None if field is None else str(field.contents())
