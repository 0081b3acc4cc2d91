"""Turn the conversations of other APIs into messages of the chat endpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, BeforeValidator, PlainValidator, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from .fields import shown
from .protocol import ChatCompletionRequest

Json = dict[str, Any]


class Conversation:
    """Collect messages; what the same role says in a row becomes one message.

    Many templates refuse two messages of a role in a row, and APIs whose items are smaller than a message (a
    text, a tool call) have several for a turn of the assistant.
    """

    def __init__(self) -> None:
        self.messages: list[Json] = []
        self._functions: dict[str, str] = {}  # call ID -> name

    def say(self, role: str, texts: Sequence[str]) -> None:
        """Add texts to the last message if it is of this role, or to a new one."""
        parts = [{"type": "text", "text": text} for text in texts]
        self._message_of(role).setdefault("content", []).extend(parts)

    def think(self, text: str) -> None:
        """Add reasoning of the assistant."""
        message = self._message_of("assistant")
        earlier = message.get("reasoning_content")
        message["reasoning_content"] = text if earlier is None else f"{earlier}\n{text}"

    def call(self, call_id: str, name: str, arguments: str | Json) -> None:
        """Add a tool call of the assistant.

        Args:
            arguments: the arguments as an object, or as its JSON.
        """
        self._functions[call_id] = name
        call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        self._message_of("assistant").setdefault("tool_calls", []).append(call)

    def result(self, call_id: str, texts: Sequence[str]) -> None:
        """Add the result of a tool call."""
        message = {"role": "tool", "tool_call_id": call_id, "content": "\n".join(texts)}
        if call_id in self._functions:  # some templates write it
            message["name"] = self._functions[call_id]
        self.messages.append(message)

    def _message_of(self, role: str) -> Json:
        if not self.messages or self.messages[-1]["role"] != role:
            self.messages.append({"role": role})
        return self.messages[-1]


def texts_of(*kinds: str) -> BeforeValidator:
    """Return a validator that reads a string, or a list of parts with texts, as a list of strings.

    Args:
        kinds: types of the parts; the text of one stands under ``"text"``, that of a refusal under
            ``"refusal"``.
    """

    def read(value: Any) -> Any:
        if isinstance(value, str):
            return [value]
        if not isinstance(value, list):
            raise ValueError(f"must be a string or a list of parts, got {shown(value)}")
        return [text_of(part) for part in value]

    def text_of(part: Any) -> str:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in kinds:
            raise ValueError(
                f"parts of type {shown(kind)} are not supported; the model reads text only "
                f"({', '.join(kinds)})"
            )
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise ValueError(f"a part of type {kind!r} must have a string as its text, got {shown(text)}")
        return text

    return BeforeValidator(read, json_schema_input_type=str | list[dict[str, Any]])


def one_of(models: Mapping[str, type[BaseModel]], what: str, default: str | None = None) -> PlainValidator:
    """Return a validator that reads an object as the model that its ``"type"`` names.

    Errors then name the place within the object and nothing else, as for pydantic's own unions.

    Args:
        what: says what the objects are, for the error about an unknown type.
        default: type of objects that name none.
    """

    def read(value: Any) -> BaseModel:
        if not isinstance(value, dict):
            raise ValueError(f"must be an object, got {shown(value)}")
        kind = value.get("type", default)
        if not isinstance(kind, str) or kind not in models:
            raise ValueError(
                f"{what} of type {shown(kind)} are not supported; those there are: {', '.join(models)}"
            )
        return models[kind].model_validate(value)

    return PlainValidator(read, json_schema_input_type=dict[str, Any])


def as_chat(chat: Json, names: Mapping[str, str]) -> ChatCompletionRequest:
    """Return a request of the chat endpoint.

    Args:
        names: the other API's names of the chat endpoint's fields, for errors.

    Raises:
        pydantic.ValidationError: a field has a wrong value.
    """
    try:
        return ChatCompletionRequest.model_validate(chat)
    except ValidationError as error:
        first = error.errors()[0]
        place = tuple(names.get(field, field) if isinstance(field, str) else field for field in first["loc"])
        context = first.get("ctx", {})
        if first["type"] == "unsupported":
            context = {**context, "name": names.get(context["name"], context["name"])}
            kind = PydanticCustomError("unsupported", "{name} is not supported; {instead}", context)
        else:
            kind = PydanticCustomError(first["type"], first["msg"])
        details = InitErrorDetails(type=kind, loc=place, input=first["input"])
        raise ValidationError.from_exception_data(error.title, [details]) from None
