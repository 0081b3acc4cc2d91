"""The serving engine: `from cupaged.engine import LLM, SamplingParams`.

The names below are loaded at their first use, so that importing a part of the engine loads only that part.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .async_llm import AsyncLLM
    from .beam_search import BeamSearchOutput, BeamSearchParams, BeamSearchSequence
    from .config import EngineConfig
    from .llm import LLM
    from .llm_engine import LLMEngine
    from .outputs import CompletionOutput, Logprob, RequestOutput
    from .sampling_params import SamplingParams
    from .structured_outputs import StructuredOutputsParams

_MODULES = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "BeamSearchOutput": "beam_search",
    "BeamSearchParams": "beam_search",
    "BeamSearchSequence": "beam_search",
    "LLMEngine": "llm_engine",
    "EngineConfig": "config",
    "SamplingParams": "sampling_params",
    "RequestOutput": "outputs",
    "CompletionOutput": "outputs",
    "Logprob": "outputs",
    "StructuredOutputsParams": "structured_outputs",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "CompletionOutput",
    "EngineConfig",
    "LLMEngine",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
