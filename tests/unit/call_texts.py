"""Tool calls as the models of each family write them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

Call = tuple[str, dict[str, Any]]  # a name, and arguments


def _objects(arguments: str) -> Callable[[Call], str]:
    return lambda call: json.dumps({"name": call[0], arguments: call[1]}, ensure_ascii=False)


_named, _parameters = _objects("arguments"), _objects("parameters")


def _hermes(calls: Sequence[Call]) -> str:
    return "\n".join(f"<tool_call>\n{_named(call)}\n</tool_call>" for call in calls)


def _hermes_reversed(calls: Sequence[Call]) -> str:
    """The arguments first, as some of the family write."""
    return "".join(
        f"<tool_call>{json.dumps({'arguments': arguments, 'name': name})}</tool_call>"
        for name, arguments in calls
    )


def _list(start: str, end: str, write: Callable[[Call], str] = _named) -> Callable[[Sequence[Call]], str]:
    return lambda calls: f"{start}[{', '.join(map(write, calls))}]{end}"


def _mistral_named(calls: Sequence[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(arguments)}" for name, arguments in calls)


def _mistral_ids(calls: Sequence[Call]) -> str:
    return "".join(
        f"[TOOL_CALLS]{name}[CALL_ID]abcdefgh{index}[ARGS]{json.dumps(arguments, indent=1)}"
        for index, (name, arguments) in enumerate(calls)
    )


def _python(value: Any) -> str:
    return repr(value)


def _pythonic(calls: Sequence[Call]) -> str:
    written = [
        f"{name}({', '.join(f'{key}={_python(value)}' for key, value in arguments.items())})"
        for name, arguments in calls
    ]
    return f"[{', '.join(written)}]"


def _tagged(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _qwen3_coder(calls: Sequence[Call]) -> str:
    return "\n".join(
        f"<tool_call>\n<function={name}>\n"
        + "".join(f"<parameter={key}>\n{_tagged(value)}\n</parameter>\n" for key, value in arguments.items())
        + "</function>\n</tool_call>"
        for name, arguments in calls
    )


def _glm45(calls: Sequence[Call]) -> str:
    return "\n".join(
        f"<tool_call>{name}\n"
        + "".join(
            f"<arg_key>{key}</arg_key>\n<arg_value>{_tagged(value)}</arg_value>\n"
            for key, value in arguments.items()
        )
        + "</tool_call>"
        for name, arguments in calls
    )


_DEEPSEEK = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>"


def _deepseek_v3(calls: Sequence[Call]) -> str:
    written = [
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{json.dumps(arguments)}\n```<｜tool▁call▁end｜>"
        for name, arguments in calls
    ]
    return _DEEPSEEK.format("\n".join(written))


def _deepseek_v31(calls: Sequence[Call]) -> str:
    written = [
        f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{json.dumps(arguments)}<｜tool▁call▁end｜>"
        for name, arguments in calls
    ]
    return _DEEPSEEK.format("".join(written))


def _kimi_k2(calls: Sequence[Call]) -> str:
    written = [
        f"<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>{json.dumps(arguments)}"
        "<|tool_call_end|>"
        for index, (name, arguments) in enumerate(calls)
    ]
    return f"<|tool_calls_section_begin|>{''.join(written)}<|tool_calls_section_end|>"


# A parser's name, and what else there is to say -> a writer of its calls.
WRITERS: dict[str, Callable[[Sequence[Call]], str]] = {
    "hermes": _hermes,
    "hermes, arguments first": _hermes_reversed,
    "llama3_json": lambda calls: "; ".join(map(_parameters, calls)),
    "llama3_json, in lines": lambda calls: "\n".join(map(_parameters, calls)),
    "llama3_json, after a tag": lambda calls: "<|python_tag|>" + ";".join(map(_parameters, calls)),
    "mistral": _list("[TOOL_CALLS]", ""),
    "mistral, with names": _mistral_named,
    "mistral, with ids": _mistral_ids,
    "pythonic": _pythonic,
    "llama4_pythonic": lambda calls: f"<|python_start|>{_pythonic(calls)}<|python_end|>",
    "qwen3_coder": _qwen3_coder,
    "glm45": _glm45,
    "granite": _list("<|tool_call|>", ""),
    "granite, another tag": _list("<tool_call>", "</tool_call>"),
    "phi4_mini_json": _list("functools", ""),
    "phi4_mini_json, a tag": _list("<|tool_call|>", "<|/tool_call|>"),
    "jamba": _list("<tool_calls>", "</tool_calls>"),
    "internlm": lambda calls: "\n".join(
        f"<|action_start|><|plugin|>\n{_parameters(call)}<|action_end|>" for call in calls
    ),
    "deepseek_v3": _deepseek_v3,
    "deepseek_v31": _deepseek_v31,
    "kimi_k2": _kimi_k2,
}
