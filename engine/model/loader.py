"""Load models from a Hugging Face directory, a hub ID, a GGUF file, or the demo model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import gguf_model
from .demo_model import demo_model_dir
from .model_files import check_files, check_length
from .weights import load_weights


def load_model(
    model: str | None,
    *,
    dtype: str,
    device: str,
    attn_implementation: str,
    max_model_len: int | None = None,
    trust_remote_code: bool = False,
    tensor_parallel_size: int = 1,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a decoder and its tokenizer, ready to run.

    Args:
        model: a directory, a hub ID, a path to a ``.gguf`` file, or None for the demo model.
        dtype: "float32", "float16", "bfloat16", or "auto": the checkpoint's, unless the CPU is slow at it.
        device: torch's name of the device for the weights.
        attn_implementation: name under which the attention is registered with transformers.
        max_model_len: maximum number of tokens of a sequence, checked before the weights are loaded.
        trust_remote_code: run Python files that come with the model.
        tensor_parallel_size: number of ranks among which the weights are divided; this process is one.

    Raises:
        ValueError: there is no such model, it lacks tensors, it was made for fewer than ``max_model_len``
            tokens, it needs code of its own that is not trusted, or it is not a decoder that supports
            attention interfaces.
    """
    source = str(demo_model_dir()) if model is None else model
    path = check_files(source, max_model_len)
    options: dict[str, Any] = {"attn_implementation": attn_implementation}
    if path is not None and path.is_file():
        if max_model_len is not None:
            check_length(max_model_len, gguf_model.context_length(path))
        # Quantized weights have no dtype of their own; bfloat16 is precise enough for them.
        chosen = _torch_dtype(dtype, torch.bfloat16, device)
        loaded, tokenizer = gguf_model.load(path, dtype=chosen, **options)
    else:
        place = source if path is None else str(path)
        trust = {"trust_remote_code": trust_remote_code}
        where = "is not here, and cannot be loaded from the hub" if path is None else "cannot be loaded"
        config = _load_part(AutoConfig, place, where, **trust)
        if config.is_encoder_decoder:
            kind = config.model_type
            raise ValueError(f"model {place!r} ({kind}) has an encoder; only decoders are served")
        if max_model_len is not None:
            check_length(max_model_len, model_length(config))
        chosen = _torch_dtype(dtype, getattr(config, "dtype", None), device)
        if tensor_parallel_size > 1:
            from transformers.distributed import DistributedConfig

            options["distributed_config"] = DistributedConfig(tp_size=tensor_parallel_size)
        loaded = _checked_load(place, config, dtype=chosen, **options, **trust)
        tokenizer = _load_part(AutoTokenizer, place, "has no tokenizer that transformers can load", **trust)
    return loaded.to(device).eval().requires_grad_(False), tokenizer  # type: ignore[arg-type]


def model_length(config: PretrainedConfig) -> int | None:
    """Return the maximum number of tokens that a model was made for; None if its configuration has none."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def _load_part(auto_class: Any, place: str, problem: str, **options: Any) -> Any:
    """Load the configuration or the tokenizer of a model.

    Raises:
        ValueError: it cannot be loaded; the message has the model's name and the ``problem``.
    """
    try:
        return auto_class.from_pretrained(place, **options)
    except Exception as error:  # transformers and its readers may raise any exception
        _refuse_code(place, error)
        raise ValueError(f"model {place!r} {problem}: {error}") from error


def _checked_load(place: str, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    kind = config.model_type
    try:
        return load_weights(place, **options)
    except Exception as error:
        _refuse_code(place, error)
        # Some models look up their own attention classes by this name.
        unknown = isinstance(error, KeyError) and error.args == (options["attn_implementation"],)
        why = "its attention is not an interface of transformers" if unknown else error
        raise ValueError(f"model {place!r} ({kind}) cannot be loaded as a decoder: {why}") from error


def _refuse_code(place: str, error: Exception) -> None:
    """Raise our own ValueError if the error is transformers' refusal of files with code."""
    if isinstance(error, ValueError) and "trust_remote_code" in str(error):
        raise ValueError(
            f"model {place!r} needs Python code that comes with it, which transformers does not have: read "
            "it, and if you trust it, start with --trust-remote-code (trust_remote_code=True)"
        ) from error


def _torch_dtype(dtype: str, checkpoint: torch.dtype | None, device: str) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    if checkpoint not in (torch.float16, torch.bfloat16):
        return torch.float32
    if torch.device(device).type != "cpu":
        return checkpoint
    # On a CPU 16 bits are faster only if it has instructions for bfloat16.
    return torch.bfloat16 if _cpu_multiplies_bfloat16() else torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    """Return whether the CPU has AVX512-BF16 or AMX."""
    probes = (
        getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    return any(probe is not None and probe() for probe in probes)
