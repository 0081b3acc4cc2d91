"""Refuse models that cannot be divided among ranks, before any of their weights are loaded."""

from __future__ import annotations

import math
from typing import Any

from transformers import AutoConfig

from ..config import EngineConfig
from ..model.demo_model import demo_model_dir
from ..model.model_files import check_files

_OF_ATTENTION = ("attn", "attention", "mixer")
# Classes that transformers does not divide rightly, and why.
_WRONG = {"youtu": "transformers sets the padding token's embedding to zero when it divides the model"}
# Names of a configuration's numbers, with what they count.
_HEADS = {"num_attention_heads": "attention heads", "num_key_value_heads": "KV heads"}
_WIDTHS = {
    "intermediate_size": "an MLP of",
    "ffn_dim": "an MLP of",
    "moe_intermediate_size": "experts of",
    "shared_expert_intermediate_size": "a shared expert of",
}


def check_divides(model: str | None, config: EngineConfig) -> None:
    """Check that a model can be divided among as many ranks as the config says.

    Args:
        model: a directory, a hub ID, a path to a ``.gguf`` file, or None for the demo model.

    Raises:
        ValueError: it cannot; the message has the numbers of ranks that it can be divided among.
    """
    size = config.tensor_parallel_size
    source = str(demo_model_dir()) if model is None else model
    path = check_files(source, config.max_model_len)
    if path is not None and path.is_file():
        raise ValueError(
            f"tensor_parallel_size {size}: a GGUF file is loaded whole; take the model's safetensors"
        )
    try:
        of_model = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    except Exception:  # the loader says what is wrong
        return
    check_sizes(of_model.get_text_config(decoder=True), size)


def check_sizes(config: Any, size: int) -> None:
    """Check that the parts of a model that are divided divide by a number of ranks.

    Args:
        config: a configuration of transformers, of the text model.

    Raises:
        ValueError: one does not, or transformers does not know how to divide the model.
    """
    kind = config.model_type
    plan = getattr(config, "base_model_tp_plan", None)
    if not plan:
        raise ValueError(
            f"tensor_parallel_size {size}: transformers has no tensor parallel plan for {kind}; it can "
            "only be 1"
        )
    if kind in _WRONG:
        raise ValueError(f"tensor_parallel_size {size}: {_WRONG[kind]} ({kind}); it can only be 1")
    parts = divided_parts(config, plan)
    if all(count % size == 0 for count, _ in parts):
        return
    listed = ", ".join(text for _, text in parts)
    common = math.gcd(*(count for count, _ in parts))
    fitting = [str(number) for number in range(2, common + 1) if common % number == 0]
    remedy = f"it can be {' or '.join(fitting)}" if fitting else "it can only be 1"
    raise ValueError(
        f"tensor_parallel_size {size} does not divide the {kind} model, which has {listed}: {remedy}"
    )


def divided_parts(config: Any, plan: dict[str, str]) -> list[tuple[int, str]]:
    """Return the numbers that have to divide by the number of ranks, with what they count."""
    by_columns = [name for name, style in plan.items() if style in ("colwise", "packed_colwise")]
    of_attention = [name for name in by_columns if any(word in name for word in _OF_ATTENTION)]
    parts: dict[str, int] = {}
    if of_attention:
        for name, what in _HEADS.items():
            for count in _numbers(config, name):
                parts[f"{count} {what}"] = count
    if len(by_columns) > len(of_attention):
        for name, what in _WIDTHS.items():
            for count in _numbers(config, name):
                parts[f"{what} {count}"] = count
    return [(count, text) for text, count in parts.items()]


def _numbers(config: Any, name: str) -> list[int]:
    """Return a number of a configuration, or those of all layers."""
    value = getattr(config, name, None)
    values = value if isinstance(value, (list, tuple)) else [value]
    return [number for number in values if isinstance(number, int) and number > 0]
