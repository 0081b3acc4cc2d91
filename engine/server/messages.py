"""Validate the messages of a conversation and convert them for chat templates."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from .fields import Closed, Strict, shown

_log = logging.getLogger("cupaged.server")


class _Function(Strict):
    """Hold the name and the arguments of a function that the assistant called."""

    model_config = ConfigDict(extra="allow")

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)

    @field_validator("arguments", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        """Parse the arguments, which the API has as JSON and templates read as an object.

        They were written by a model: as in vLLM, invalid JSON becomes empty arguments, so that the
        conversation can continue.
        """
        if isinstance(value, dict):
            return value
        if not isinstance(value, str):
            raise ValueError(f"must be an object as JSON in a string, got {shown(value)}")
        try:
            parsed = json.loads(value or "{}")
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, dict):
            _log.warning("a tool call has arguments that are no JSON object: the template gets none")
            return {}
        return parsed


class _ToolCall(Strict):
    """Hold a tool call of the assistant; templates get all members, even unknown ones."""

    model_config = ConfigDict(extra="allow")

    id: str | None = None
    type: Literal["function"] = "function"
    function: _Function


class Message(Closed):
    """Hold a message; the template gets every field that is set."""

    role: str
    name: str | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # vLLM's other name of the same
    refusal: str | None = None  # text of an assistant's refusal, in place of the content or after it
    content: str = Field(default=None, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _without_empty_lists(cls, data: Any) -> Any:
        """Remove empty lists, which answers that clients send back contain."""
        if isinstance(data, dict):
            empty = [name for name in ("tool_calls", "annotations") if data.get(name) == []]
            return {name: value for name, value in data.items() if name not in empty}
        return data

    @field_validator("content", mode="before")
    @classmethod
    def _join_texts(cls, content: Any, info: ValidationInfo) -> Any:
        fields = info.data  # the valid fields that are declared before this one
        if content is None:
            if fields.get("role") != "assistant" or not any(
                fields.get(name) for name in ("tool_calls", "refusal", "reasoning_content", "reasoning")
            ):
                raise ValueError("must be a string or a list of parts; only one with tool_calls has none")
            content = []
        if isinstance(content, str):
            texts = [content]
        elif isinstance(content, list):
            texts = [_text_of(part, fields.get("role") == "assistant") for part in content]
        else:
            return content
        if fields.get("refusal"):
            texts.append(fields["refusal"])
        return "\n".join(texts)

    def for_template(self) -> dict[str, Any]:
        """Return the message as a dictionary for a chat template."""
        message = self.model_dump(exclude_none=True, exclude={"refusal"})
        reasoning = self.reasoning_content or self.reasoning
        if reasoning is not None:  # templates use either of the names
            message = {"reasoning_content": reasoning, "reasoning": reasoning, **message}
        return message


def read_messages(messages: Iterable[Any]) -> list[dict[str, Any]]:
    """Return messages, given as dictionaries in OpenAI's format, for a chat template.

    Raises:
        ValueError: one is malformed; the message names it.
    """
    read = []
    for position, message in enumerate(messages):
        try:
            read.append(Message.model_validate(message).for_template())
        except ValidationError as error:
            first = error.errors()[0]
            place = "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in first["loc"])
            problem = first["msg"].removeprefix("Value error, ")
            raise ValueError(f"messages[{position}]{place}: {problem}") from None
    if not read:
        raise ValueError("messages must have at least one message, got none")
    return read


def _text_of(part: Any, of_assistant: bool) -> str:
    kinds = ("text", "refusal") if of_assistant else ("text",)
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in kinds:
        wanted = " or ".join(map(repr, kinds))
        raise ValueError(
            f"content parts must be of type {wanted}, got {shown(kind)}; the model reads nothing else"
        )
    if not isinstance(part.get(kind), str):
        raise ValueError(f"a content part of type {kind!r} must have a string {kind!r}")
    for name, value in part.items():
        if name not in ("type", kind) and value is not None:
            raise ValueError(f"{shown(name)} of a content part is not supported; leave it out")
    return part[kind]
