"""Read sampling settings and end-of-sequence tokens from generation_config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..sampling_params import SamplingParams

# The settings that vLLM reads: transformers' name -> name in `SamplingParams`.
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
        source: `EngineConfig.generation_config`: "auto" and "vllm" stand for the model's own config, another
            value is a directory with a generation_config.json.
    """
    if source in ("auto", "vllm"):
        return model.generation_config or GenerationConfig()
    return GenerationConfig.from_pretrained(Path(source).expanduser())


def sampling_defaults(config: GenerationConfig, source: str) -> dict[str, Any]:
    """Return the settings of `SamplingParams` that the generation config has; none if ``source`` is "vllm".

    Raises:
        ValueError: a setting is out of range.
    """
    if source == "vllm":
        return {}
    values = {ours: getattr(config, theirs, None) for theirs, ours in _SETTINGS.items()}
    settings = {name: value for name, value in values.items() if value is not None}
    try:
        SamplingParams(**settings)
    except ValueError as error:
        raise ValueError(f"generation_config.json of the model: {error}; {_REMEDY}") from error
    return settings


def ending_token_ids(
    config: PretrainedConfig,
    generation: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int,
) -> frozenset[int]:
    """Return the IDs of the tokens that end an output; chat models have several.

    Args:
        num_tokens: number of tokens that the model can sample; other token IDs are left out.
    """
    token_ids = {tokenizer.eos_token_id}
    for source in (config, generation):
        eos = getattr(source, "eos_token_id", None)
        token_ids |= set(eos) if isinstance(eos, (list, tuple)) else {eos}
    return frozenset(token for token in token_ids if token is not None and 0 <= token < num_tokens)
