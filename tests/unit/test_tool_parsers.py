"""Parsers of tool calls: what they find does not depend on how the text is cut, and nothing is lost."""

from __future__ import annotations

import json
import keyword
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cupaged.engine.server.reasoning import REASONING, ReasoningParser
from cupaged.engine.server.reasoning import guess as guess_reasoning
from cupaged.engine.server.tools.base import ToolParser
from cupaged.engine.server.tools.events import Arguments, BrokenCall, CallStart, Reasoning, Text
from cupaged.engine.server.tools.forced import ForcedCall, ForcedCalls
from cupaged.engine.server.tools.registry import PARSERS, guess

from .call_texts import WRITERS

FAMILIES = list(WRITERS)
# Characters that formats have a use for, and others.
AWKWARD = st.text(st.sampled_from("ab \n\t\"'\\{}[](),:;<>/=|é漢😀\u2028\u00a0`"), max_size=12)
NUMBERS = st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | AWKWARD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(AWKWARD, inner, max_size=3),
    max_leaves=6,
)
NAMES = st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True).filter(lambda name: not keyword.iskeyword(name))
CALLS = st.lists(
    st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=4)),
    min_size=1,
    max_size=3,
    unique_by=lambda call: call[0],  # of one name they could have parameters of different types
)
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


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10)
@given(calls=CALLS, random=st.randoms(use_true_random=False))
def test_any_cut_of_a_text_gives_the_calls_that_were_written(family, calls, random):
    text = WRITERS[family](calls)
    for pieces in ([text], list(text), cut(text, random)):
        answer, found = read(parser_of(family, schemas(calls)), pieces)
        assert answer == ""
        assert [(name, json.loads(arguments)) for name, arguments in found] == calls


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10)
@given(calls=CALLS, random=st.randoms(use_true_random=False), data=st.data())
def test_broken_calls_are_text_and_no_cut_changes_what_is_found(family, calls, random, data):
    text = WRITERS[family](calls)
    position = data.draw(st.integers(0, len(text)))
    change = data.draw(st.sampled_from(["cut", "drop", "insert", "double"]))
    if change == "cut":
        text = text[:position]
    elif change == "drop":
        text = text[:position] + text[position + data.draw(st.integers(1, 5)) :]
    elif change == "insert":
        text = text[:position] + data.draw(AWKWARD) + text[position:]
    else:
        text = text[:position] + text
    whole = read(parser_of(family, schemas(calls)), [text])
    for pieces in (list(text), cut(text, random)):
        assert read(parser_of(family, schemas(calls)), pieces) == whole
    answer, found = whole
    if not found:
        assert answer == text
    for _, arguments in found:
        assert isinstance(json.loads(arguments), dict)


# Formats that a text may precede; the others are told by the first character.
AFTER_TEXT = [f for f in FAMILIES if f != "pythonic" and (not f.startswith("llama3_json") or "tag" in f)]
CALL = ("look", {"city": "Ulm", "days": 3})


@pytest.mark.parametrize("family", AFTER_TEXT)
def test_text_around_calls_is_the_answer(family):
    text = f"Let me see.\n\n{WRITERS[family]([CALL])}\n"
    answer, calls = read(parser_of(family, schemas([CALL])), text)
    assert answer == "Let me see."
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [CALL]
    answer, calls = read(parser_of(family, schemas([CALL])), text + "Done. ")
    assert answer.startswith("Let me see.\n\n")
    assert answer.endswith("\nDone.")
    assert len(calls) == 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "text", ["", " \n", "Hello.\n", '{"answer": 42}', "[1, 2] ", "[link](x)", "<tool", "a < b > c"]
)
def test_an_answer_without_calls_is_unchanged(family, text):
    assert read(parser_of(family, {"look": {}}), text) == (text, [])


# Formats whose calls are reported when they are complete.
AT_ONCE = ("pythonic", "llama4_pythonic", "hermes, arguments first")


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in AT_ONCE])
def test_long_arguments_come_as_they_are_written(family):
    call = ("write", {"text": "line\n" * 100})
    text = WRITERS[family]([call])
    parser = parser_of(family, schemas([call]))
    events = [event for character in text[: len(text) // 2] for event in parser.feed(character)]
    assert sum(isinstance(event, CallStart) for event in events) == 1
    arguments = "".join(event.text for event in events if isinstance(event, Arguments))
    assert len(arguments) > len(text) // 3


@pytest.mark.parametrize("family", ["llama3_json", "pythonic"])
def test_bare_calls_are_those_of_known_functions(family):
    text = WRITERS[family]([CALL])
    assert read(parser_of(family, {"find": {}}), text) == (text, [])


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"name": "look", "arguments": "{\\"city\\": \\"Ulm\\"}"}', {"city": "Ulm"}),  # JSON in a string
        ('{"name": "look"}', {}),
        ('{"name": "look", "arguments": null}', {}),
        ('{"type": "function", "name": "look", "id": 5, "parameters": {"a": [1]}}', {"a": [1]}),
        ('{"name": "look", "arguments": {"city": "a\nb"}}', {"city": "a\nb"}),  # a raw line end
        ('{"name": "look", "arguments": {"x": "</tool_call>"}}', {"x": "</tool_call>"}),
    ],
)
def test_what_models_do_to_json(text, arguments):
    answer, calls = read(PARSERS["hermes"]({}), f"<tool_call>{text}</tool_call>")
    assert answer == ""
    assert [(name, json.loads(found)) for name, found in calls] == [("look", arguments)]


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "look", "arguments": [1]}',
        '{"name": 5, "arguments": {}}',
        '{"name": "", "arguments": {}}',
        '{"name": "\\ud800", "arguments": {}}',
        '{"arguments": {}}',
        '{"name": "look", "arguments": {"x": NaN}}',
        '{"name": "look", "arguments": {"x": 1,}}',
        '{"name": "look", "arguments": {"x": 1}, "arguments": {}}',
        '{"name": "look", "name": "find", "arguments": {}}',
        '{"name": "look", "arguments": ' + '{"x": ' * 5000 + "1" + "}" * 5001,
        "{'name': 'look', 'arguments': {}}",
        "look",
    ],
)
def test_what_is_no_call_is_text(text):
    whole = f"<tool_call>\n{text}\n</tool_call> "
    assert read(PARSERS["hermes"]({}), [whole]) == (whole, [])
    assert read(PARSERS["hermes"]({}), whole) == (whole, [])


def test_a_broken_call_does_not_hide_the_next_one():
    broken = '<tool_call>{"name": "look", "arguments": {</tool_call>\n'
    answer, calls = read(PARSERS["hermes"]({}), broken + WRITERS["hermes"]([CALL]))
    assert answer == broken.strip()
    assert [name for name, _ in calls] == ["look"]


def test_arguments_without_names_have_those_of_the_schema():
    tools = {"look": {"properties": {"city": {}, "days": {}}}}
    assert read(PARSERS["pythonic"](tools), ["[look('Ulm', days=-2.5)]"]) == (
        "",
        [["look", '{"city": "Ulm", "days": -2.5}']],
    )
    for text in (
        "[look('Ulm', 3, 4)]",
        "[look(city=now())]",
        "[look(*x)]",
        "[look(city={1})]",
        "[look(x=1e999)]",
    ):
        assert read(PARSERS["pythonic"](tools), [text]) == (text, [])


def test_values_between_tags_have_the_types_of_the_schema():
    properties = {
        "text": {"type": "string"},
        "number": {"type": "number"},
        "either": {"anyOf": [{"type": "string"}, {"type": "integer"}, {"type": "null"}]},
        "flag": {"type": ["boolean", "null"]},
        "list": {"type": "array"},
    }
    values = {
        "text": ("5", "5"),
        "number": ("5.5", 5.5),
        "either": ("7", 7),
        "flag": ("True", True),
        "list": ("['a']", ["a"]),
        "unknown": ("[1]", "[1]"),
    }
    text = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, (value, _) in values.items())
    parser = PARSERS["qwen3_coder"]({"f": {"properties": properties}})
    _, [[_, arguments]] = read(parser, f"<tool_call>\n<function=f>\n{text}</function>\n</tool_call>")
    assert json.loads(arguments) == {name: value for name, (_, value) in values.items()}


def test_identifiers_are_as_the_models_have_them():
    events = PARSERS["kimi_k2"]({}).feed(WRITERS["kimi_k2"]([CALL]))
    assert CallStart("look", "functions.look:0") in events
    assert len(PARSERS["mistral"].call_id()) == 9
    assert PARSERS["mistral"].call_id().isalnum()
    assert PARSERS["hermes"].call_id() != PARSERS["hermes"].call_id()


@given(calls=CALLS, random=st.randoms(use_true_random=False))
@settings(max_examples=10)
def test_answers_that_must_be_calls(calls, random):
    text = json.dumps([{"name": name, "parameters": arguments} for name, arguments in calls], indent=1)
    answer, found = read(ForcedCalls(schemas(calls)), cut(text, random))
    assert answer == ""
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls
    name, arguments = calls[0]
    text = json.dumps(arguments)
    assert read(ForcedCall(name), cut("\n " + text, random)) == ("", [[name, text]])
    assert read(ForcedCall(name), [text[:-1]]) == ("", [[name, text[:-1]]])


# Parts of templates that tell the format.
TEMPLATES = {
    "hermes": "{%- for t in tools %}{{ t | tojson }}{%- endfor %}<tool_call>\n{'name': ...}\n</tool_call>",
    "llama3_json": 'Respond with {"name": function name, "parameters": dictionary of names and values}',
    "mistral": "{{ '[TOOL_CALLS][' }}{{ message.tool_calls }}{{ ']' }}",
    "pythonic": "Answer with [name(parameter=value, ...), ...] where you call {{ tools }}",
    "llama4_pythonic": "<|python_start|>{{ call }}<|python_end|>",
    "qwen3_coder": "<tool_call>\n<function=name>\n<parameter=key>\n",
    "glm45": "<tool_call>{{ name }}<arg_key>{{ k }}</arg_key><arg_value>{{ v }}</arg_value></tool_call>",
    "granite": "{{ '<|tool_call|>' + calls | tojson }}",
    "phi4_mini_json": "<|tool|>{{ tools }}<|/tool|>",
    "jamba": "<tool_calls>{{ calls }}</tool_calls>",
    "internlm": "<|action_start|><|plugin|>{{ call }}<|action_end|>",
    "deepseek_v3": "<｜tool▁calls▁begin｜>{{ type }}<｜tool▁sep｜>{{ name }}\n```json\n",
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{{ name }}<｜tool▁sep｜>",
    "kimi_k2": "<|tool_call_begin|>{{ id }}<|tool_call_argument_begin|>",
}


@pytest.mark.parametrize("name", PARSERS)
def test_the_template_tells_the_format(name):
    assert guess(TEMPLATES[name]) == name


def test_a_template_may_tell_nothing():
    assert guess("{{ messages }} {{ tools }}") is None
    assert guess_reasoning("{{ messages }}") is None
    assert guess_reasoning("{{ content.split('</think>')[-1] }}") == "qwen3"


def think(name: str, prompt: str, pieces, continued: bool = False) -> tuple[str, str]:
    """The reasoning and the answer."""
    parser = ReasoningParser(REASONING[name], prompt, continued)
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    return tuple("".join(e.text for e in events if isinstance(e, kind)) for kind in (Reasoning, Text))


@pytest.mark.parametrize(
    ("name", "prompt", "text", "expected"),
    [
        ("qwen3", "Hi", "<think>\nhmm\n\n</think>\n\nHello. ", ("hmm", "Hello. ")),
        ("qwen3", "Hi", " Hello.\n", ("", " Hello.\n")),
        ("qwen3", "Hi <think>\n", "hmm\n</think>\n\nHello.", ("hmm", "Hello.")),
        ("qwen3", "Hi <think>\n", "<think>hmm</think>Hello.", ("hmm", "Hello.")),
        ("qwen3", "Hi <think>\n\n</think>\n\n", "Hello.", ("", "Hello.")),
        ("qwen3", "<think>a</think> <think>b</think>", "Hello.</think>", ("", "Hello.</think>")),
        ("qwen3", "Hi", "<think>hmm", ("hmm", "")),
        ("qwen3", "Hi", "<thin", ("", "<thin")),
        ("qwen3", "Hi", "<think></think>Hello.", ("", "Hello.")),
        ("deepseek_r1", "Hi", "hmm</think>Hello.", ("hmm", "Hello.")),
        ("deepseek_r1", "Hi <think>\n</think>\n", "Hello.", ("", "Hello.")),
        ("mistral", "Hi", "[THINK]a < b[/THINK]Hello.", ("a < b", "Hello.")),
    ],
)
def test_reasoning_is_split_off(name, prompt, text, expected):
    rng = random.Random(0)
    for pieces in ([text], list(text), *(cut(text, rng) for _ in range(5))):
        assert think(name, prompt, pieces) == expected


def test_a_message_is_continued_within_its_reasoning_or_after_it():
    assert think("qwen3", "Hi <think>\nWell,", ["so</think>Hello."], True) == ("so", "Hello.")
    assert think("deepseek_r1", "Hi <think>so</think>Hel", ["lo."], True) == ("", "lo.")
