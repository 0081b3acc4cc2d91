"""Choose the parser of tool calls by name, or by the model's chat template."""

from __future__ import annotations

import re

from .base import ToolParser
from .json_calls import (
    DeepSeekV3,
    DeepSeekV31,
    Granite,
    Hermes,
    InternLM,
    Jamba,
    KimiK2,
    Llama3Json,
    Mistral,
    Phi4MiniJson,
)
from .pythonic import Pythonic
from .tagged import Glm45, Qwen3Coder

# Under vLLM's names.
PARSERS: dict[str, type[ToolParser]] = {
    "deepseek_v3": DeepSeekV3,
    "deepseek_v31": DeepSeekV31,
    "glm45": Glm45,
    "granite": Granite,
    "hermes": Hermes,
    "internlm": InternLM,
    "jamba": Jamba,
    "kimi_k2": KimiK2,
    "llama3_json": Llama3Json,
    "llama4_pythonic": Pythonic,
    "mistral": Mistral,
    "phi4_mini_json": Phi4MiniJson,
    "pythonic": Pythonic,
    "qwen3_coder": Qwen3Coder,
}

# A pattern in a chat template -> the parser of the calls that it shows; the first that is found counts.
_GUESSES = {
    r"<\|tool_call_argument_begin\|>": "kimi_k2",
    r"<｜tool▁sep｜>[\s\S]*```json": "deepseek_v3",
    r"<｜tool▁calls▁begin｜>": "deepseek_v31",
    r"\[TOOL_CALLS\]": "mistral",
    r"<function=[\s\S]*<parameter=": "qwen3_coder",
    r"<arg_key>": "glm45",
    r"functools|<\|tool\|>": "phi4_mini_json",
    r"<\|tool_call\|>": "granite",
    r"<\|action_start\|>": "internlm",
    r"<tool_calls>": "jamba",
    r"<tool_call>": "hermes",
    r"<\|python_start\|>": "llama4_pythonic",
    r"\[\s*\w+\(\w+=": "pythonic",
    r"<\|python_tag\|>|\"parameters\": dictionary": "llama3_json",
}


def guess(template: str) -> str | None:
    """Return the name of the parser for a model with this chat template; None if nothing tells."""
    return next((name for pattern, name in _GUESSES.items() if re.search(pattern, template)), None)
