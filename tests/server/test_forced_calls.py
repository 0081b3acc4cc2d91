"""Calls that a request demands: structured output makes a random model write them."""

from __future__ import annotations

import enum
import json
import random

import jsonschema
import pytest
from pydantic import BaseModel, ConfigDict, Field

from .conftest import MODEL, Running
from .test_tools import SIZE, USER, functions, langchain, model, post, whole_and_streamed


class City(enum.Enum):
    ULM = "Ulm"
    BONN = "Bonn"


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")  # a random model would add members without end


class Place(Closed):
    city: City
    floor: int = Field(ge=0, le=9)


class Visit(Closed):
    """Visit a place."""

    place: Place
    others: list[Place] = Field(max_length=1)


VISIT = {"type": "function", "function": {"name": "visit", "parameters": Visit.model_json_schema()}}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [NOW, VISIT]
SCHEMAS = {"visit": Visit.model_json_schema(), "now": {"type": "object"}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Running(model(tmp_path_factory.mktemp("forced")), **SIZE) as running:
        yield running


def check(calls: list[dict]) -> None:
    for call in calls:
        jsonschema.validate(call["arguments"], SCHEMAS[call["name"]])


def test_a_call_is_required(server, client, seed):
    for answer in whole_and_streamed(
        client,
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        seed=random.Random(seed).randrange(10**6),
        temperature=2.0,
        max_tokens=400,
    ):
        [call] = functions(answer)
        check([call])
        assert answer["finish_reason"] == "tool_calls"
        assert "content" not in answer


def test_calls_may_be_several(server, client):
    answer = whole_and_streamed(client, tools=TOOLS, tool_choice="required", max_tokens=150, temperature=0)[0]
    if answer["finish_reason"] == "tool_calls":
        check(functions(answer))
    else:  # a random model goes on and on
        assert answer["finish_reason"] == "length"


def test_a_function_is_demanded_by_its_name(server, client, seed):
    choice = {"type": "function", "function": {"name": "visit"}}
    for answer in whole_and_streamed(client, tools=TOOLS, tool_choice=choice, max_tokens=400, seed=seed):
        [call] = functions(answer)
        assert call["name"] == "visit"
        check([call])
        assert answer["finish_reason"] == "stop"  # as in OpenAI's API
        assert "content" not in answer


def test_arguments_that_the_end_has_cut_are_the_calls(server, client):
    choice = {"type": "function", "function": {"name": "visit"}}
    whole, streamed = whole_and_streamed(client, tools=TOOLS, tool_choice=choice, max_tokens=5, temperature=0)
    assert whole["finish_reason"] == streamed["finish_reason"] == "length"
    arguments = whole["tool_calls"][0]["function"]["arguments"]
    assert arguments == streamed["tool_calls"][0]["arguments"] != ""


def test_a_schema_that_is_none_is_refused(server):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "no such type"}}}
    response = post(server, tools=[tool], tool_choice="required")
    assert response.status_code == 400
    assert "no such type" in response.json()["error"]["message"]
    assert post(server, tools=[tool]).status_code == 200  # whose arguments the model chooses


def test_a_forced_call_prevails_over_the_format_of_the_answer(server, client):
    request = {"response_format": {"type": "json_object"}, "tool_choice": "required", "max_tokens": 400}
    answer = client.chat.completions.create(
        model=MODEL, messages=USER, tools=[NOW], parallel_tool_calls=False, **request
    )
    assert answer.choices[0].message.tool_calls[0].function.name == "now"


def test_an_answer_of_a_given_format_has_no_reasoning(server, client):
    extra = {"chat_template_kwargs": {"think": True}, "structured_outputs": {"choice": ["yes", "no"]}}
    for answer in whole_and_streamed(client, extra_body=extra, max_tokens=9):
        assert answer["content"] in ("yes", "no")
        assert "reasoning" not in answer


@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
def test_langchain_has_structured_output(server, method, seed):
    model = langchain(server, max_tokens=800, seed=seed).with_structured_output(Visit, method=method)
    assert isinstance(model.invoke("Where?"), Visit)


def test_langchain_demands_any_tool(server):
    model = langchain(server, max_tokens=400).bind_tools(
        [Visit], tool_choice="any", parallel_tool_calls=False
    )
    [call] = model.invoke("Where?").tool_calls
    assert call["name"] == "Visit"
    Visit.model_validate_json(json.dumps(call["args"]))
