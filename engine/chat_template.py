"""Render conversations to prompts by the chat template of the model's tokenizer."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .prompts import Prompt
from .time_limit import run_within

# Time limit of a template, which usually takes milliseconds. Nested loops over a client's input may not end.
_SECONDS = 10.0

Json = dict[str, Any]

_TOOLS_AS_TEXT = """You can call these functions, each given as JSON:
{tools}
To call one, write its name and its arguments as JSON between <tool_call> tags:
<tool_call>
{{"name": "the function's name", "arguments": {{"a parameter's name": "its value"}}}}
</tool_call>"""


def template_of(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None, tools: Sequence[Json] | None = None
) -> str | None:
    """Return the template that renders a conversation; None if there is none.

    Args:
        chat_template: a template in place of the tokenizer's.
        tools: functions that the model may call; some models have a template of its own for them.
    """
    if not (chat_template or tokenizer.chat_template):
        return None
    return tokenizer.get_chat_template(chat_template, tools=list(tools) if tools else None)


def knows_tools(template: str) -> bool:
    """Return whether a template renders the functions that the model may call."""
    return re.search(r"\btools\b", template) is not None


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Json],
    *,
    max_characters: int,
    tools: Sequence[Json] | None = None,
    chat_template: str | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """Return a conversation as text.

    Where the template does not know tools, they are described in the system message, and calls and their
    results stand in messages of the assistant and the user, as models of the Hermes family have them.

    Args:
        messages: the messages, as `Message.for_template` returns them.
        max_characters: maximum number of characters; longer texts have too many tokens for a sequence and
            are not tokenized, as that would delay other requests.
        tools: functions that the model may call, in OpenAI's format.
        chat_template: a template in place of the tokenizer's.
        add_generation_prompt: end with the beginning of an assistant's message; by default unless the last
            message is continued.
        continue_final_message: let the model continue the last message.
        chat_template_kwargs: other variables of the template.

    Raises:
        ValueError: there is no template, or it refuses the messages or their settings.
    """
    settings = dict(chat_template_kwargs or {})
    _check_settings(settings)
    if add_generation_prompt is None:
        add_generation_prompt = not continue_final_message
    if add_generation_prompt and continue_final_message:
        raise ValueError(
            "continue_final_message: the last message is either continued or followed by another one: "
            "set add_generation_prompt to false, or leave it out"
        )
    template = template_of(tokenizer, chat_template, tools)
    if template is None:
        raise ValueError("messages: the model has no chat template; use /v1/completions")
    if continue_final_message and not messages[-1].get("content"):
        raise ValueError("continue_final_message: the last message has no content to be continued")
    messages = _with_known_roles(messages, template)
    if tools and not knows_tools(template):
        messages, tools = _with_tools_as_text(messages, tools), None
    if "tool_calls" not in template:
        messages = [_without_calls(message) for message in messages]
    if tools:
        settings["tools"] = list(tools)

    def apply() -> str:
        return tokenizer.apply_chat_template(  # type: ignore[return-value]
            list(messages),
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **settings,
        )

    try:
        text = run_within(_SECONDS, apply)
    except TemplateError as error:  # its message usually comes from the template
        raise ValueError(f"messages: the model's chat template refuses them: {error}") from error
    except Exception as error:
        raise ValueError(
            f"messages: the model's chat template failed: {type(error).__name__}: {error}; change them, or "
            "chat_template_kwargs"
        ) from error
    if len(text) > max_characters:
        raise ValueError(
            f"messages: they have {len(text)} characters, and as many tokens as a sequence may have have at "
            f"most {max_characters}: shorten them"
        )
    return text


def rendered_prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Tokenize the result of `render`.

    Raises:
        ValueError: the tokenizer refuses it.
    """
    try:
        # The text already contains the special tokens.
        token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    except (TypeError, UnicodeError) as error:
        raise ValueError(f"messages: the tokenizer refuses their text: {error}") from error
    return {"prompt": text, "prompt_token_ids": token_ids}


def _check_settings(names: Iterable[str]) -> None:
    """Check that settings are variables of the template, not arguments of ``apply_chat_template``.

    A client's own template, above all, would be a program that could run here without end.

    Raises:
        ValueError: a name is such an argument.
    """
    arguments = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    for name in names:
        if name in arguments and name not in ("tools", "documents"):
            raise ValueError(f"chat_template_kwargs must be variables of the template; leave {name!r} out")


def _with_known_roles(messages: Sequence[Json], template: str) -> list[Json]:
    """Return the messages with the developer's as the system's, unless the template tells them apart."""
    if "developer" in template:
        return list(messages)
    return [
        {**message, "role": "system"} if message["role"] == "developer" else message for message in messages
    ]


def _with_tools_as_text(messages: Sequence[Json], tools: Sequence[Json]) -> list[Json]:
    """Return the messages with the functions described in the first one, the system's."""
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = _TOOLS_AS_TEXT.format(tools=functions)
    first = messages[0]
    if first["role"] == "system":
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _without_calls(message: Json) -> Json:
    """Return a message with its calls, or the result of a call, in its text."""
    if message.get("tool_calls"):
        calls = [
            f"<tool_call>\n{json.dumps(_name_and_arguments(call), ensure_ascii=False)}\n</tool_call>"
            for call in message["tool_calls"]
        ]
        rest = {name: value for name, value in message.items() if name != "tool_calls"}
        return {**rest, "content": "\n".join([message["content"], *calls] if message["content"] else calls)}
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    return message


def _name_and_arguments(call: Json) -> Json:
    return {name: call["function"][name] for name in ("name", "arguments")}
