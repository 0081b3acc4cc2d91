"""Define the fields of requests that say what the text of an answer has to be: OpenAI's and vLLM's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ..structured_outputs import StructuredOutputsParams
from .fields import Closed, Strict, Strings, must_be

_Schema = Annotated[str | dict[str, Any], must_be("a JSON schema")]


class JsonSchemaFormat(Strict):
    name: str = ""
    description: str = ""
    json_schema: dict[str, Any] = Field(default_factory=lambda: {"type": "object"}, alias="schema")
    strict: bool = True  # answers follow the schema in any case


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputsFields(Closed):
    """Hold the fields of `StructuredOutputsParams`."""

    json_schema: _Schema | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Strings | None = None
    grammar: str | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None


class StructuredRequest(Strict):
    """Hold the fields of a request."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputsFields | None = None
    guided_json: _Schema | None = None
    guided_json_object: bool | None = None
    guided_regex: str | None = None
    guided_choice: Strings | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None

    def structure(self) -> StructuredOutputsParams | None:
        """Return what the text has to be; None where it may be anything.

        Raises:
            ValueError: there are two answers to that, or it is malformed.
        """
        asked = [of() for of in (self._of_response_format, self._of_structured_outputs, self._of_guided)]
        given = [fields for fields in asked if fields]
        if len(given) > 1:
            raise ValueError(
                "structured_outputs, response_format and guided_* say the same in different ways: give one"
            )
        return StructuredOutputsParams(**given[0]) if given else None

    def _of_response_format(self) -> dict[str, Any]:
        answer = self.response_format
        if answer is None or answer.type == "text":
            return {}
        if answer.type == "json_object":
            return {"json_object": True}
        if answer.json_schema is None:
            raise ValueError("response_format: json_schema is missing, whose schema the answer has to follow")
        return {"json": answer.json_schema.json_schema}

    def _of_structured_outputs(self) -> dict[str, Any]:
        if self.structured_outputs is None:
            return {}
        return self.structured_outputs.model_dump(by_alias=True, exclude_unset=True)

    def _of_guided(self) -> dict[str, Any]:
        names = ("json", "json_object", "regex", "choice", "grammar", "whitespace_pattern")
        fields = {name: getattr(self, f"guided_{name}") for name in names}
        return {name: value for name, value in fields.items() if value is not None and value is not False}
