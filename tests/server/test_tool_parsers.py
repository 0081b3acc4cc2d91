"""Parsers of tool calls: what they find does not depend on how the text is cut, and nothing is lost."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cupaged.engine.server.tools.base import ToolParser
from cupaged.engine.server.tools.events import Arguments, BrokenCall, CallStart, Text
from cupaged.engine.server.tools.registry import PARSERS

from .call_texts import WRITERS

FAMILIES = list(WRITERS)
# Characters that formats have a use for, and others.
AWKWARD = st.text(st.sampled_from("ab \n\t\"'\\{}[](),:;<>/=|é漢😀\u2028\u00a0`"), max_size=12)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | AWKWARD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(AWKWARD, inner, max_size=3),
    max_leaves=6,
)
NAMES = st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True).filter(lambda name: name not in KEYWORDS)
KEYWORDS = {
    "as",
    "if",
    "in",
    "is",
    "or",
    "and",
    "def",
    "del",
    "for",
    "not",
    "try",
    "elif",
    "else",
    "from",
    "pass",
    "with",
}
KEYWORDS |= {
    "async",
    "await",
    "break",
    "class",
    "raise",
    "while",
    "yield",
    "assert",
    "except",
    "global",
    "import",
}
KEYWORDS |= {"lambda", "return", "finally", "continue", "nonlocal"}
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=4)), min_size=1, max_size=3)
TYPES = {
    type(None): "null",
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}


def schemas(calls) -> dict:
    """Functions with the parameters of these calls."""
    found: dict = {}
    for name, arguments in calls:
        properties = found.setdefault(name, {"type": "object", "properties": {}})["properties"]
        for key, value in arguments.items():
            properties[key] = {"type": TYPES[type(value)]}
    return found


def parser_of(family: str, tools: dict) -> ToolParser:
    return PARSERS[family.partition(",")[0]](tools)


def read(parser: ToolParser, pieces) -> tuple[str, list[list[str]]]:
    """The text of the answer, and the names and arguments of the calls."""
    text, calls = "", []
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    for event in events:
        match event:
            case Text():
                text += event.text
            case CallStart():
                calls.append([event.name, ""])
            case Arguments():
                calls[-1][1] += event.text
            case BrokenCall():
                calls.pop()
                text += event.text
    return text, calls


def cut(text: str, random: random.Random) -> list[str]:
    """The text in pieces, often of one character."""
    pieces = []
    while text:
        length = random.choice([1, 1, 2, 3, 10, 1000])
        pieces.append(text[:length])
        text = text[length:]
    return pieces


def distinct(calls):
    """Calls without two of one name whose parameters have different types."""
    return list({name: (name, arguments) for name, arguments in calls}.values())


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25)
@given(calls=CALLS.map(distinct), random=st.randoms(use_true_random=False))
def test_any_cut_of_a_text_gives_the_calls_that_were_written(family, calls, random):
    text = WRITERS[family](calls)
    for pieces in ([text], list(text), cut(text, random)):
        answer, found = read(parser_of(family, schemas(calls)), pieces)
        assert answer == ""
        assert [(name, json.loads(arguments)) for name, arguments in found] == calls
