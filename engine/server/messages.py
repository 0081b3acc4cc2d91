"""The messages of a conversation, as OpenAI's clients send them and as chat templates read them."""

from __future__ import annotations

import json
import logging
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from .fields import Closed, Strict, shown

_log = logging.getLogger("cupaged.server")


class _Function(Strict):
    """Which function an assistant called, and with what."""

    model_config = ConfigDict(extra="allow")

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)

    @field_validator("arguments", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        """Templates read an object where the API has the object's JSON.

        A model wrote it, and the conversation may go on after one that is no JSON: as in vLLM the arguments
        are empty then.
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
    """Templates get all of it, members that nobody knows here as well."""

    model_config = ConfigDict(extra="allow")

    id: str | None = None
    type: Literal["function"] = "function"
    function: _Function


class Message(Closed):
    """One message; the template gets every field that is set."""

    role: str
    name: str | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # another name of it, which vLLM has
    refusal: str | None = None  # of an assistant that says no: its text, in place of the content or after it
    content: str = Field(default=None, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _without_empty_lists(cls, data: Any) -> Any:
        """Answers that are sent back have these though there is nothing in them."""
        if isinstance(data, dict):
            empty = [name for name in ("tool_calls", "annotations") if data.get(name) == []]
            return {name: value for name, value in data.items() if name not in empty}
        return data

    @field_validator("content", mode="before")
    @classmethod
    def _join_texts(cls, content: Any, info: ValidationInfo) -> Any:
        others = info.data  # the fields before this one, as far as they are right
        if content is None:
            if others.get("role") != "assistant" or not any(
                others.get(name) for name in ("tool_calls", "refusal", "reasoning_content", "reasoning")
            ):
                raise ValueError("must be a string or a list of parts; only one with tool_calls has none")
            content = []
        if isinstance(content, str):
            texts = [content]
        elif isinstance(content, list):
            texts = [_text_of(part, others.get("role") == "assistant") for part in content]
        else:
            return content
        if others.get("refusal"):
            texts.append(others["refusal"])
        return "\n".join(texts)

    def for_template(self) -> dict[str, Any]:
        """The message as a chat template reads it."""
        found = self.model_dump(exclude_none=True, exclude={"refusal"})
        reasoning = self.reasoning_content or self.reasoning
        if reasoning is not None:  # some templates know the one name, some the other
            found = {"reasoning_content": reasoning, "reasoning": reasoning, **found}
        return found


def _text_of(part: Any, of_assistant: bool) -> str:
    kinds = ("text", "refusal") if of_assistant else ("text",)
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in kinds:
        wanted = " or ".join(map(repr, kinds))
        raise ValueError(f"content parts must be of type {wanted}; the model reads nothing else")
    if not isinstance(part.get(kind), str):
        raise ValueError(f"a content part of type {kind!r} must have a string {kind!r}")
    for name, value in part.items():
        if name not in ("type", kind) and value is not None:
            raise ValueError(f"{shown(name)} of a content part is not supported; leave it out")
    return part[kind]
