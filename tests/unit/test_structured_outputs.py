"""What an output has to be: what is refused before any engine sees it, and that the message names it."""

from __future__ import annotations

import pytest

from cupaged.engine import SamplingParams, StructuredOutputsParams

CIRCLE: dict = {}
CIRCLE["properties"] = CIRCLE

BAD = {
    "json": [1, "{", "[1]", "3", [], {"a": {1}}, {"const": float("nan")}, CIRCLE, ("type", "object")],
    "json_object": [1, "yes"],
    "regex": ["", 1, ["a"]],
    "choice": ["ab", [], [1], ["a", ""], {"a": 1}, 5],
    "grammar": ["", 1, b"start: A"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_a_bad_value_is_refused_by_name(name, value):
    with pytest.raises(
        ValueError, match=rf"^structured_outputs: {name} (must be .*, got|is not a JSON schema)"
    ):
        StructuredOutputsParams(**{name: value})


@pytest.mark.parametrize(
    ("fields", "given"),
    [
        ({}, "none"),
        ({"json_object": False}, "none"),
        ({"disable_any_whitespace": True}, "none"),
        ({"regex": "a", "json": {}}, "json and regex"),
        ({"choice": ["a"], "json_object": True}, "json_object and choice"),
    ],
)
def test_there_is_exactly_one_kind(fields, given):
    with pytest.raises(ValueError, match=rf"^structured_outputs must have exactly one of .*, got {given}$"):
        StructuredOutputsParams(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"regex": "a", "disable_any_whitespace": True}, "disable_any_whitespace is for json"),
        ({"choice": ["a"], "whitespace_pattern": " ?"}, "whitespace_pattern is for json"),
        ({"json": {}, "whitespace_pattern": ""}, "whitespace_pattern must be a string"),
        ({"json": {}, "disable_any_whitespace": 1}, "disable_any_whitespace must be True or False"),
        (
            {"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True},
            "whitespace_pattern does not go with disable_any_whitespace",
        ),
    ],
)
def test_whitespace_is_that_of_json(fields, message):
    with pytest.raises(ValueError, match=f"^structured_outputs: {message}"):
        StructuredOutputsParams(**fields)


def test_a_schema_is_kept_as_text_in_its_own_order():
    schema = {"properties": {"b": {}, "a": {"const": "\u00e9"}}}
    params = StructuredOutputsParams(json=schema)
    schema["properties"]["c"] = {}
    assert params.json == '{"properties": {"b": {}, "a": {"const": "\u00e9"}}}'
    assert StructuredOutputsParams(json=params.json) == params
    assert (params.kind, params.size) == ("json", len(params.json))


def test_kinds_and_sizes():
    assert StructuredOutputsParams(json="true").kind == "json"
    choice = StructuredOutputsParams(choice=iter(["one", "three"]))
    assert (choice.kind, choice.choice, choice.size) == ("choice", ("one", "three"), 8)
    anything = StructuredOutputsParams(json_object=True)
    assert (anything.kind, anything.size) == ("json_object", 0)


def test_beams_are_refused():
    with pytest.raises(ValueError, match=r"^structured_outputs does not go with beam search"):
        SamplingParams(beam_width=2, structured_outputs=StructuredOutputsParams(regex="a"))
