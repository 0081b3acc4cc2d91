"""Read what generation_config.json asks for: sampling settings, and the tokens that end an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..sampling_params import SamplingParams

# What vLLM takes, under transformers' names and ours.
_SETTINGS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
_REMEDY = "correct it, or leave its sampling settings out with --generation-config vllm"


def generation_config(model: PreTrainedModel, source: str) -> GenerationConfig:
    """Return the generation config to follow.

    Args:
        source: the setting: "auto" and "vllm" are the model's own, anything else is a directory that has one.
    """
    if source in ("auto", "vllm"):
        return model.generation_config or GenerationConfig()
    return GenerationConfig.from_pretrained(Path(source).expanduser())


def sampling_defaults(config: GenerationConfig, source: str) -> dict[str, Any]:
    """Return the settings of `SamplingParams` that the generation config has, which is none for "vllm".

    Raises:
        ValueError: one of them is out of range.
    """
    if source == "vllm":
        return {}
    given = {ours: getattr(config, theirs, None) for theirs, ours in _SETTINGS.items()}
    found = {name: value for name, value in given.items() if value is not None}
    try:
        SamplingParams(**found)
    except ValueError as error:
        raise ValueError(f"generation_config.json of the model: {error}; {_REMEDY}") from error
    return found


def ending_token_ids(
    config: PretrainedConfig,
    generation: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int,
) -> frozenset[int]:
    """Return the tokens that end an answer: chat models name several.

    Args:
        num_tokens: how many tokens the model can sample. Those beyond are left out: they never come.
    """
    found = {tokenizer.eos_token_id}
    for source in (config, generation):
        eos = getattr(source, "eos_token_id", None)
        found |= set(eos) if isinstance(eos, (list, tuple)) else {eos}
    return frozenset(token for token in found if token is not None and 0 <= token < num_tokens)
