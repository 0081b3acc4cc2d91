"""The schema of answers that must be calls."""

from __future__ import annotations

import json

import jsonschema
import llguidance
import pytest
from pydantic import BaseModel

from cupaged.engine.server.tool_requests import Tool, calls_schema


class City(BaseModel):
    name: str


class Trip(BaseModel):
    cities: list[City]
    then: Trip | None = None


class Other(BaseModel):
    """Its definitions have the same names as the other's."""

    class City(BaseModel):
        number: int

    city: City


TOOLS = [
    Tool.model_validate({"type": "function", "function": function})
    for function in (
        {"name": "now"},
        {
            "name": "trip",
            "parameters": {**Trip.model_json_schema(), "$schema": "http://json-schema.org/draft-07/schema"},
        },
        {"name": "other", "parameters": Other.model_json_schema()},
        {
            "name": "odd",
            "parameters": {"type": "object", "properties": {"$id": {"type": "integer"}}, "required": ["$id"]},
        },
    )
]
TRIP = {"cities": [{"name": "Ulm"}], "then": {"cities": []}}
CALLS = [("now", {}), ("trip", TRIP), ("other", {"city": {"number": 5}}), ("odd", {"$id": 5})]
WRONG = [
    ("now", None),
    ("never", {}),
    ("trip", {"cities": [{"name": 5}]}),
    ("trip", {"cities": [], "then": {"cities": 5}}),
    ("other", {"city": {"name": "Ulm"}}),
    ("odd", {"$id": "5"}),
]


def answer(*calls) -> list[dict]:
    return [{"name": name, "parameters": arguments} for name, arguments in calls]


def accepts(schema: dict, value) -> bool:
    """Whether structured output lets a model write this."""
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_json_schema(schema))
    assert not matcher.get_error()
    text = json.dumps(value).encode()
    return matcher.try_consume_tokens(list(text)) == len(text) and matcher.is_accepting()


@pytest.mark.parametrize("check", ["jsonschema", "llguidance"])
def test_answers_are_lists_of_calls_of_the_tools(check):
    def valid(value, parallel: bool = True) -> bool:
        schema = calls_schema(TOOLS, parallel)
        if check == "llguidance":
            return accepts(schema, value)
        return jsonschema.Draft202012Validator(schema).is_valid(value)

    assert valid(answer(*CALLS))
    for call in CALLS:
        assert valid(answer(call), parallel=False)
    for call in WRONG:
        assert not valid(answer(call))
        assert not valid(answer(CALLS[0], call))
    assert not valid([])
    assert not valid(answer(*CALLS[:2]), parallel=False)
