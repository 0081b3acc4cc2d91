"""Define the tools of requests, and the schemas of answers that must be calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator

from .fields import Closed, Strict, must_be, shown

Json = dict[str, Any]


class FunctionDefinition(Strict):
    """Hold a function that the model may call; templates get all members, even unknown ones."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None

    @field_validator("name")
    @classmethod
    def _sendable(cls, name: str) -> str:
        if not name.isprintable():
            raise ValueError(f"must be printable, got {shown(name)}")
        return name


class Tool(Strict):
    model_config = ConfigDict(extra="allow")

    type: Literal["function"]
    function: FunctionDefinition

    def for_template(self) -> Json:
        """Return the tool as a dictionary for a chat template."""
        return self.model_dump(exclude_none=True)


class _Name(Strict):
    name: str


class NamedTool(Closed):
    """Name the function that the model must call."""

    type: Literal["function"] = "function"
    function: _Name


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedTool,
    must_be(
        '"none", "auto", "required" or {"type": "function", "function": {"name": "..."}}',
    ),
]


def parameters(tool: Tool) -> Json:
    """Return the schema of a function's arguments."""
    return tool.function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}


def calls_schema(tools: Sequence[Tool], parallel: bool) -> Json:
    """Return the schema of a list of calls, as an answer under ``tool_choice="required"``.

    Args:
        parallel: permit more than one call.
    """
    options = []
    for index, tool in enumerate(tools):
        place = f"#/items/anyOf/{index}/properties/parameters"
        options.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool.function.name},
                    "parameters": _moved(parameters(tool), place),
                },
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    schema: Json = {"type": "array", "minItems": 1, "items": {"anyOf": options}}
    return schema if parallel else {**schema, "maxItems": 1}


def _moved(schema: Any, place: str) -> Any:
    """Return a schema with its references to itself changed for its place in another one."""
    if isinstance(schema, list):
        return [_moved(element, place) for element in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {
        name: _moved(value, place)
        for name, value in schema.items()
        if not (name in ("$id", "$schema") and isinstance(value, str))
    }
    reference = moved.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved
