"""Where models come from: a Hugging Face directory, a hub id, a GGUF file, or the demo model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import gguf_model
from .demo_model import demo_model_dir


def load_model(
    model: str | None, *, dtype: str, device: str, attn_implementation: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a decoder and its tokenizer, ready to run.

    Args:
        model: a directory, a hub id, a path to a ``.gguf`` file, or None for the demo model.
        dtype: "float32", "float16", "bfloat16", or "auto": the checkpoint's, unless the CPU is slow at it.
        device: of the weights, as torch names it.
        attn_implementation: the name under which the attention is registered with transformers.

    Raises:
        ValueError: there is no such model, or it is not a decoder that supports attention interfaces.
    """
    source = str(demo_model_dir()) if model is None else model
    path = Path(source).expanduser()
    options = {"attn_implementation": attn_implementation}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"model {source!r} is not a file; --model takes the path of a .gguf file")
        # Quantised weights have no dtype to follow; 16 bits hold them.
        chosen = _torch_dtype(dtype, torch.bfloat16, device)
        loaded, tokenizer = gguf_model.load(path, dtype=chosen, **options)
    else:
        place = _directory_or_hub_id(source, path)
        config = _config(place)
        chosen = _torch_dtype(dtype, getattr(config, "dtype", None), device)
        loaded = _checked_load(place, config, chosen, attn_implementation)
        tokenizer = _tokenizer(place)
    return loaded.to(device).eval().requires_grad_(False), tokenizer  # type: ignore[arg-type]


def _directory_or_hub_id(source: str, path: Path) -> str:
    if path.is_dir():
        if not (path / "config.json").is_file():
            ggufs = sorted(p.name for p in path.glob("*.gguf"))
            hint = f"; name its file: {path / ggufs[0]}" if ggufs else ""
            raise ValueError(f"model {source!r} is a directory without a config.json{hint}")
        return str(path)
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise ValueError(f"model {source!r} does not exist; it must be a directory, a .gguf file or a hub id")
    return source


def _config(place: str) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {place!r} cannot be loaded: {error}") from error


def _checked_load(
    place: str, config: PretrainedConfig, dtype: torch.dtype, attention: str
) -> PreTrainedModel:
    if config.is_encoder_decoder:
        raise ValueError(f"model {place!r} ({config.model_type}) has an encoder; only decoders are served")
    try:
        return AutoModelForCausalLM.from_pretrained(place, dtype=dtype, attn_implementation=attention)
    except (OSError, ValueError, KeyError) as error:
        # Some models choose among classes of their own, by the name.
        unknown = isinstance(error, KeyError) and error.args == (attention,)
        why = "its attention is not an interface of transformers" if unknown else error
        raise ValueError(
            f"model {place!r} ({config.model_type}) cannot be loaded as a decoder: {why}"
        ) from error


def _tokenizer(place: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model {place!r} has no tokenizer that transformers can load: {error}") from error


def _torch_dtype(dtype: str, checkpoint: torch.dtype | None, device: str) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    if checkpoint not in (torch.float16, torch.bfloat16):
        return torch.float32
    if torch.device(device).type != "cpu":
        return checkpoint
    # On a CPU 16 bits pay only where it multiplies bfloat16 itself.
    return torch.bfloat16 if _cpu_multiplies_bfloat16() else torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    """AVX512-BF16 or AMX."""
    probes = (
        getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    return any(probe is not None and probe() for probe in probes)
