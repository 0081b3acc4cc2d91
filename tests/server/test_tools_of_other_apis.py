"""Tools, reasoning and structured output over the Responses API and Anthropic's, by their clients."""

from __future__ import annotations

import json

import anthropic
import pytest
from pydantic import BaseModel

from tests import tiny_models

from .conftest import MODEL, Running, saying

# Writes tools, calls and results as models of the Hermes family have them, and marks reasoning.
TEMPLATE = """{%- if tools -%}
<start>system: You may call these: {{ tools | tojson }} in <tool_call> tags.<end>
{%- endif -%}
{%- for m in messages -%}
<start>{{ m.role }}: {{ m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor -%}
<end>
{%- endfor -%}
{%- if add_generation_prompt -%}
<start>assistant: {% if enable_thinking %}<think>
{% endif %}{% endif -%}"""
SIZE = {"max_model_len": 1024, "max_num_batched_tokens": 512, "num_gpu_blocks_override": 200}
QUESTION = "Weather in Ulm?"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CALLS = [("weather", {"city": "Ulm", "days": 3}), ("now", {})]
ANSWER = "I look.\n" + "\n".join(
    f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
    for name, arguments in CALLS
)
FUNCTIONS = [
    {
        "type": "function",
        "name": "weather",
        "description": "Return it.",
        "parameters": SCHEMA,
        "strict": False,
    },
    {"type": "function", "name": "now", "parameters": {"type": "object", "properties": {}}, "strict": False},
]
TOOLS = [
    {"name": "weather", "description": "Return it.", "input_schema": SCHEMA},
    {"name": "now", "input_schema": {"type": "object", "properties": {}}},
]


class City(BaseModel):
    name: str
    large: bool


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tools")
    tiny_models.save("llama", directory, max_position_embeddings=4096)
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    with Running(str(directory), **SIZE) as running:
        yield running


@pytest.fixture
def claude(server):
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60) as found:
        yield found


def test_calls_of_a_response_and_their_results(server, client):
    request = {"model": MODEL, "input": QUESTION, "tools": FUNCTIONS}
    with saying(server, ANSWER):
        whole = client.responses.create(**request)
        with client.responses.stream(**request) as stream:
            kinds = [event.type for event in stream]
            streamed = stream.get_final_response()
    assert "response.function_call_arguments.delta" in kinds
    for response in (whole, streamed):
        assert response.status == "completed"
        assert response.output_text.strip() == "I look."
        calls = [item for item in response.output if item.type == "function_call"]
        assert [(call.name, json.loads(call.arguments)) for call in calls] == CALLS
        assert len({call.call_id for call in calls} | {None}) == 3
    items = [{"role": "user", "content": QUESTION}, *whole.output]
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "3"}
        for item in whole.output
        if item.type == "function_call"
    ]
    with saying(server, "Rain."):
        last = client.responses.create(model=MODEL, input=[*items, *results], tools=FUNCTIONS)
    assert last.output_text == "Rain."
    message = {"role": "assistant", "content": whole.output_text, "tool_calls": []}
    for name, arguments in CALLS:
        function = {"name": name, "arguments": json.dumps(arguments)}
        message["tool_calls"].append({"id": name, "type": "function", "function": function})
    messages = [{"role": "user", "content": QUESTION}, message]
    messages += [{"role": "tool", "tool_call_id": name, "content": "3"} for name, _ in CALLS]
    functions = [
        {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}} for tool in FUNCTIONS
    ]
    with saying(server, "Rain."):
        answer = client.chat.completions.create(model=MODEL, messages=messages, tools=functions)
    assert last.usage.input_tokens == answer.usage.prompt_tokens


def test_calls_of_a_message_and_their_results(server, claude):
    request = {"model": MODEL, "max_tokens": 500, "tools": TOOLS}
    question = {"role": "user", "content": QUESTION}
    with saying(server, ANSWER):
        whole = claude.messages.create(messages=[question], **request)
        with claude.messages.stream(messages=[question], **request) as stream:
            streamed = stream.get_final_message()
    for message in (whole, streamed):
        text, *calls = message.content
        assert text.text.strip() == "I look."
        assert [(call.name, call.input) for call in calls] == CALLS
        assert message.stop_reason == "tool_use"
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": "3"} for call in whole.content[1:]]
    messages = [
        question,
        {"role": "assistant", "content": whole.content},
        {"role": "user", "content": [*results, {"type": "text", "text": "And?"}]},
    ]
    with saying(server, "Rain."):
        last = claude.messages.create(messages=messages, **request)
    assert [block.text for block in last.content] == ["Rain."]
    counted = claude.messages.count_tokens(messages=messages, model=MODEL, tools=TOOLS)
    assert counted.input_tokens == last.usage.input_tokens + last.usage.cache_read_input_tokens
    without = claude.messages.count_tokens(messages=messages, model=MODEL)
    assert without.input_tokens < counted.input_tokens


def test_one_call_where_parallel_ones_are_not_wanted(server, client, claude):
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    question = {"role": "user", "content": QUESTION}
    with saying(server, ANSWER):
        response = client.responses.create(
            model=MODEL, input=QUESTION, tools=FUNCTIONS, parallel_tool_calls=False
        )
        message = claude.messages.create(
            model=MODEL, max_tokens=500, messages=[question], tools=TOOLS, tool_choice=choice
        )
    assert [item.name for item in response.output if item.type == "function_call"] == ["weather"]
    assert [block.name for block in message.content if block.type == "tool_use"] == ["weather"]


def test_reasoning_is_an_item_and_a_block(server, client, claude):
    settings = {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}
    question = {"role": "user", "content": QUESTION}
    thinking = {"type": "enabled", "budget_tokens": 1024}
    with saying(server, "Hm.</think>Rain."):
        response = client.responses.create(model=MODEL, input=QUESTION, **settings)
        events = list(client.responses.create(model=MODEL, input=QUESTION, stream=True, **settings))
        request = {"model": MODEL, "max_tokens": 2000, "messages": [question], "thinking": thinking}
        message = claude.messages.create(**request)
        with claude.messages.stream(**request) as stream:
            streamed = stream.get_final_message()
    for answer in (response, events[-1].response):
        reasoning, said = answer.output
        assert (reasoning.type, reasoning.content[0].text) == ("reasoning", "Hm.")
        assert said.content[0].text == "Rain."
    deltas = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert "".join(deltas) == "Hm."
    for answer in (message, streamed):
        thought, said = answer.content
        assert (thought.type, thought.thinking, said.text) == ("thinking", "Hm.", "Rain.")


def test_an_answer_goes_on_from_a_prefill(server, claude):
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "It is so"}]
    with saying(server, ", dry."):
        message = claude.messages.create(model=MODEL, max_tokens=50, messages=messages)
    assert message.content[0].text == ", dry."
    counted = claude.messages.count_tokens(model=MODEL, messages=messages).input_tokens
    begun = [messages[0], {"role": "assistant", "content": "It is so, dry."}]
    assert claude.messages.count_tokens(model=MODEL, messages=begun).input_tokens == counted + len(", dry.")


def test_a_call_that_is_required(server, client, claude):
    choices = [
        ("required", {"type": "any"}),
        ({"type": "function", "name": "now"}, {"type": "tool", "name": "now"}),
    ]
    for text, (choice, theirs) in zip(['[{"name": "now", "parameters": {}}]', "{}"], choices):
        with saying(server, text):
            response = client.responses.create(
                model=MODEL, input=QUESTION, tools=FUNCTIONS, tool_choice=choice
            )
            message = claude.messages.create(
                model=MODEL,
                max_tokens=100,
                messages=[{"role": "user", "content": QUESTION}],
                tools=TOOLS,
                tool_choice=theirs,
            )
        [call], [block] = response.output, message.content
        assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "now", {})
        assert (block.type, block.name, block.input) == ("tool_use", "now", {})
        assert message.stop_reason == "tool_use"


def test_texts_that_follow_a_schema(server, client, claude):
    schema = {"enum": ["Ulm"]}
    form = {"type": "json_schema", "name": "city", "schema": schema}
    response = client.responses.create(model=MODEL, input=QUESTION, text={"format": form})
    assert response.output_text == '"Ulm"'
    request = {"model": MODEL, "max_tokens": 50, "messages": [{"role": "user", "content": QUESTION}]}
    config = {"format": {"type": "json_schema", "schema": schema}}
    assert claude.messages.create(**request, output_config=config).content[0].text == '"Ulm"'
    with saying(server, '{"name": "Ulm", "large": false}'):
        parsed = client.responses.parse(model=MODEL, input=QUESTION, text_format=City)
        with client.responses.stream(model=MODEL, input=QUESTION, text_format=City) as stream:
            streamed = stream.get_final_response()
        message = claude.messages.parse(**request, output_format=City)
    city = City(name="Ulm", large=False)
    assert parsed.output_parsed == streamed.output_parsed == message.parsed_output == city
    assert parsed.text.format.name == "City"
