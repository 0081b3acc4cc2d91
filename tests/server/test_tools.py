"""Tools in chats: what the model is given, what is read in its answer, whole and streamed."""

from __future__ import annotations

import json
import threading

import httpx
import openai
import pytest
from pydantic import BaseModel

from cupaged.engine import LLM, SamplingParams
from cupaged.engine.server.chat_settings import ChatSettings
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
<start>assistant: {% if think %}<think>
{% endif %}{% endif -%}"""
# Few blocks, as all are checked at every step.
SIZE = {
    "max_model_len": 1024,
    "max_num_batched_tokens": 512,
    "block_size": 32,
    "num_gpu_blocks_override": 70,
}
USER = [{"role": "user", "content": "Weather in Ulm?"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Return the weather.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
            "strict": False,
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
ULM, NOW = {"name": "weather", "arguments": {"city": "Ulm", "days": 3}}, {"name": "now", "arguments": {}}


def called(*calls: dict) -> str:
    return "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)


def model(directory, template: str = TEMPLATE, special: tuple[str, ...] = ()) -> str:
    tiny_models.save("llama", directory, max_position_embeddings=4096)
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<pad>", "<start>", "<end>", *special]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> str:
    return model(tmp_path_factory.mktemp("tools"))


@pytest.fixture(scope="module")
def server(directory):
    with Running(directory, **SIZE) as running:
        yield running


def whole_and_streamed(client, **request) -> list[dict]:
    """The message of an answer with the reason why it ended, and the same from a stream."""
    request = {"model": MODEL, "messages": USER, **request}
    first = client.chat.completions.create(**request).choices[0]
    answers = [{**first.message.model_dump(exclude_none=True), "finish_reason": first.finish_reason}]
    built: dict = {"role": "assistant", "tool_calls": []}
    for chunk in client.chat.completions.create(**request, stream=True):
        [choice] = chunk.choices
        delta = choice.delta
        for name in ("content", "reasoning_content", "reasoning"):
            if getattr(delta, name, None):
                built[name] = built.get(name, "") + getattr(delta, name)
        for part in delta.tool_calls or []:
            if part.index == len(built["tool_calls"]):
                assert part.id
                assert part.type == "function"
                built["tool_calls"].append({"id": part.id, "name": part.function.name, "arguments": ""})
            else:
                assert part.index == len(built["tool_calls"]) - 1
                assert part.id is part.type is part.function.name is None
            built["tool_calls"][-1]["arguments"] += part.function.arguments
        if choice.finish_reason:
            built["finish_reason"] = choice.finish_reason
    answers.append(built)
    return answers


def functions(answer: dict) -> list[dict]:
    """The calls of an answer, without their IDs."""
    calls = [call.get("function", call) for call in answer.get("tool_calls", [])]
    return [{"name": call["name"], "arguments": json.loads(call["arguments"])} for call in calls]


@pytest.mark.parametrize("choice", [{}, {"tool_choice": "auto", "parallel_tool_calls": True}])
def test_calls_in_an_answer(server, client, choice):
    with saying(server, "Let me see.\n" + called(ULM, NOW)):
        for answer in whole_and_streamed(client, tools=TOOLS, **choice):
            assert answer["content"] == "Let me see."
            assert functions(answer) == [ULM, NOW]
            assert answer["finish_reason"] == "tool_calls"
            assert len({call["id"] for call in answer["tool_calls"]}) == 2


def test_calls_alone_have_no_content(server, client):
    with saying(server, "\n" + called(NOW) + "\n"):
        whole, streamed = whole_and_streamed(client, tools=TOOLS)
        assert "content" not in whole
        assert "content" not in streamed
        answer = client.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS)
        assert answer.choices[0].message.content is None


def test_arguments_are_streamed_as_they_are_written(server, client):
    """The model writes no further than some letters ahead of what has arrived."""
    call = {"name": "weather", "arguments": {"city": "U" * 100}}
    arrived = threading.Semaphore(80)  # what stands before the letters, and some of them
    with saying(server, called(call)), pytest.MonkeyPatch.context() as patch:
        launch = server.engine._sampler.launch

        def waiting(*arguments):
            assert arrived.acquire(timeout=20)
            return launch(*arguments)

        patch.setattr(server.engine._sampler, "launch", waiting)
        stream = client.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS, stream=True)
        pieces = []
        for part in (part for chunk in stream for part in chunk.choices[0].delta.tool_calls or []):
            pieces.append(part)
            arrived.release(len(part.function.arguments or ""))
    assert pieces[0].function.name == "weather"
    assert "".join(part.function.arguments or "" for part in pieces) == json.dumps(call["arguments"])
    assert len(pieces) > 3


def test_the_sdk_puts_a_stream_together(server, client):
    request = {"model": MODEL, "messages": USER, "tools": TOOLS}
    with saying(server, called(ULM)), client.chat.completions.stream(**request) as stream:
        message = stream.get_final_completion().choices[0].message
    assert json.loads(message.tool_calls[0].function.arguments) == ULM["arguments"]


def test_one_call_if_one_is_wanted(server, client):
    with saying(server, called(ULM, NOW)):
        for answer in whole_and_streamed(client, tools=TOOLS, parallel_tool_calls=False):
            assert functions(answer) == [ULM]


def test_every_choice_has_its_calls(server, client):
    with saying(server, called(ULM)):
        answer = client.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS, n=2)
    assert [json.loads(c.message.tool_calls[0].function.arguments) for c in answer.choices] == [
        ULM["arguments"]
    ] * 2
    assert answer.choices[0].message.tool_calls[0].id != answer.choices[1].message.tool_calls[0].id


def test_a_broken_call_is_content(server, client):
    text = '<tool_call>\n{"name": "weather", "arguments": {"city": }}\n</tool_call>'
    with saying(server, text):
        whole, streamed = whole_and_streamed(client, tools=TOOLS)
    assert whole == {"role": "assistant", "content": text, "finish_reason": "stop"}
    assert streamed["content"] == text


def test_a_call_that_is_cut_says_so(server, client):
    with saying(server, called(ULM)):
        whole, streamed = whole_and_streamed(client, tools=TOOLS, max_tokens=60)
    assert whole["finish_reason"] == streamed["finish_reason"] == "length"
    assert whole["content"] == called(ULM)[:60]


@pytest.mark.parametrize("request_", [{}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}])
def test_without_tools_a_call_is_text(server, client, request_):
    with saying(server, called(ULM)):
        for answer in whole_and_streamed(client, **request_):
            assert answer["content"] == called(ULM)
            assert answer["finish_reason"] == "stop"


def prompt_of(server: Running, **request) -> str:
    """The prompt that the engine is given."""
    prompts, add = [], server.engine.add_request
    server.engine.add_request = lambda *args, **more: (prompts.append(args[1]), add(*args, **more))
    try:
        body = {"model": MODEL, "messages": USER, "max_tokens": 1, **request}
        response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
        assert response.status_code == 200, response.text
    finally:
        del server.engine.add_request
    return prompts[0]["prompt"]


CALLED = [
    *USER,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
]


def test_the_template_writes_tools_and_calls(server):
    prompt = prompt_of(server, tools=TOOLS, messages=CALLED)
    tools = [json.loads(json.dumps(tool)) for tool in TOOLS]
    assert json.loads(prompt.partition("these: ")[2].partition(" in <tool")[0]) == tools
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Ulm"}}</tool_call>' in prompt
    assert prompt.endswith("<start>tool: sunny<end><start>assistant: ")
    assert "these" not in prompt_of(server, tools=TOOLS, tool_choice="none")


def test_a_conversation_goes_on_with_what_the_sdk_returns(server, client):
    messages = list(USER)
    with saying(server, called(ULM)):
        message = (
            client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS).choices[0].message
        )
    messages += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}]
    with saying(server, "It is sunny."):
        answer = client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS)
    assert answer.choices[0].message.content == "It is sunny."
    assert answer.choices[0].message.tool_calls is None


REFUSED = {
    "a tool without a name": ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    "a tool of another type": ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type"),
    "parameters that are no object": (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
        "tools[0].function.parameters",
    ),
    "a choice of nothing": ({"tool_choice": "required"}, "tool_choice"),
    "an unknown choice": ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
    "a function that there is not": (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
        "tool_choice",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content",
    ),
    "a template": ({"chat_template": "{{ 1 }}"}, "chat_template"),
    "two ends": ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    "an end of nothing": (
        {"messages": [*USER, CALLED[1]], "continue_final_message": True},
        "continue_final_message",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_by_name(server, name):
    request, param = REFUSED[name]
    body = {"model": MODEL, "messages": USER, "max_tokens": 1, **request}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert param in error["message"]


def test_the_last_message_is_continued(server, client):
    messages = [*USER, {"role": "assistant", "content": "It is"}]
    assert prompt_of(server, messages=messages, continue_final_message=True).endswith("assistant: It is")
    prompt = prompt_of(server, messages=messages, add_generation_prompt=False)
    assert prompt.endswith("assistant: It is<end>")


def test_reasoning_is_apart_from_the_answer(server, client):
    for thinks, text in ((False, "<think>\nhmm\n</think>\n\nHi."), (True, "hmm\n</think>\n\nHi.")):
        extra = {"extra_body": {"chat_template_kwargs": {"think": thinks}}}
        with saying(server, text):
            for answer in whole_and_streamed(client, **extra):
                assert answer["reasoning_content"] == answer["reasoning"] == "hmm"
                assert answer["content"] == "Hi."
            extra["extra_body"]["include_reasoning"] = False
            for answer in whole_and_streamed(client, **extra):
                assert answer["content"] == "Hi."
                assert "reasoning_content" not in answer


def test_a_model_thinks_before_it_calls(server, client):
    with saying(server, f"<think>They want {called(NOW)}?</think>\n{called(ULM)}"):
        for answer in whole_and_streamed(client, tools=TOOLS):
            assert answer["reasoning_content"] == f"They want {called(NOW)}?"
            assert functions(answer) == [ULM]
            assert "content" not in answer


def test_thinking_that_is_cut_is_reasoning(server, client):
    with saying(server, "<think>\nhmm, hmm"):
        for answer in whole_and_streamed(client, max_tokens=12):
            assert answer["reasoning_content"] == "hmm,"
            assert answer["finish_reason"] == "length"


class Weather(BaseModel):
    """Return the weather."""

    city: str
    days: int


def langchain(server: Running, **settings):
    """Return a `ChatOpenAI`, whose module takes a second to load."""
    from langchain_openai import ChatOpenAI

    url = f"{server.url}/v1"
    return ChatOpenAI(base_url=url, api_key="none", model=MODEL, max_retries=0, timeout=60, **settings)


def test_langchain_binds_tools(server):
    from langchain_core.messages import ToolMessage

    model = langchain(server).bind_tools([Weather])
    call = {"name": "Weather", "arguments": ULM["arguments"]}
    with saying(server, "Let me see." + called(call)):
        answer = model.invoke("Weather in Ulm?")
        pieces = list(model.stream("Weather in Ulm?"))
    streamed = pieces[0]
    for piece in pieces[1:]:
        streamed += piece
    for message in (answer, streamed):
        assert [(each["name"], each["args"]) for each in message.tool_calls] == [
            ("Weather", ULM["arguments"])
        ]
    with saying(server, "Sunny."):
        result = ToolMessage("sunny", tool_call_id=answer.tool_calls[0]["id"])
        assert model.invoke([("user", "Weather in Ulm?"), answer, result]).content == "Sunny."


def post(server: Running, **request) -> httpx.Response:
    body = {"model": MODEL, "messages": USER, "max_tokens": 1, **request}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


def test_settings_of_the_server(directory, tmp_path):
    """A template of the server's and of requests, another parser and none."""
    file = tmp_path / "template.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}|{% endfor %}{{ tools }}")
    settings = ChatSettings(chat_template=str(file), trust_request_chat_template=True)
    with Running(directory, life={"chat_settings": settings}, **SIZE) as server:
        assert server.engine.tokenizer.chat_template == file.read_text()
        assert prompt_of(server) == "Weather in Ulm?|None"
        assert prompt_of(server, chat_template="{{ messages | length }} message") == "1 message"
        response = post(server, tools=TOOLS)  # nothing tells how the model writes calls
        assert response.status_code == 400
        assert "--tool-call-parser" in response.json()["error"]["message"]
        assert post(server, tools=TOOLS, tool_choice="none").status_code == 200
    settings = ChatSettings(tool_call_parser="llama3_json", reasoning_parser="none")
    with (
        Running(directory, life={"chat_settings": settings}, **SIZE) as server,
        server.client() as client,
    ):
        with saying(server, json.dumps({"name": "now", "parameters": {}})):
            assert functions(whole_and_streamed(client, tools=TOOLS)[1]) == [NOW]
        with saying(server, "<think>hmm</think>"):
            assert whole_and_streamed(client)[0]["content"] == "<think>hmm</think>"


@pytest.mark.parametrize(
    ("setting", "value"),
    [("tool_call_parser", "gpt"), ("reasoning_parser", "gpt"), ("chat_template", "no/such/file.jinja")],
)
def test_a_wrong_setting_is_refused_by_name(setting, value):
    with pytest.raises(ValueError, match=f"^{setting} must be .*{value}"):
        ChatSettings(**{setting: value})


def test_marks_that_are_special_tokens_are_read(tmp_path):
    template = "{{ tools }}[TOOL_CALLS]{% for m in messages %}{{ m.content }}{% endfor %}"
    directory = model(tmp_path, template, special=("[TOOL_CALLS]",))
    text = f"[TOOL_CALLS][{json.dumps(ULM)}]"
    with Running(directory, **SIZE) as server, server.client() as client, saying(server, text):
        for answer in whole_and_streamed(client, tools=TOOLS):
            assert functions(answer) == [ULM]
            assert len(answer["tool_calls"][0]["id"]) == 9
        for answer in whole_and_streamed(client):
            assert answer["content"] == f"[{json.dumps(ULM)}]"  # special tokens are left out as ever


def test_a_template_without_tools_has_them_in_the_system_message(tmp_path):
    directory = model(tmp_path, tiny_models.CHAT_TEMPLATE)
    with Running(directory, **SIZE) as server, server.client() as client:
        prompt = prompt_of(server, tools=TOOLS, messages=[{"role": "system", "content": "Be kind."}, *CALLED])
        assert prompt.startswith("<start>system: Be kind.\n\nYou can call")
        for tool in TOOLS:
            assert json.dumps(tool["function"]) in prompt
        assert called({"name": "weather", "arguments": {"city": "Ulm"}}) in prompt
        assert "<start>user: <tool_response>\nsunny\n</tool_response><end>" in prompt
        with saying(server, called(ULM)):
            for answer in whole_and_streamed(client, tools=TOOLS):
                assert functions(answer) == [ULM]


def test_offline_chats_have_the_servers_prompts(server, directory):
    llm = LLM(directory, device="cpu", **SIZE)
    assert llm.get_tokenizer() is llm.engine.tokenizer
    params = SamplingParams(max_tokens=1, temperature=0)
    developer = [
        {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "kind."}]}
    ]
    conversations = [CALLED, [*developer, *USER]]
    outputs = llm.chat(
        conversations, params, tools=TOOLS, chat_template_kwargs={"think": True}, use_tqdm=False
    )
    for messages, output in zip(conversations, outputs):
        kwargs = {"chat_template_kwargs": {"think": True}}
        assert output.prompt == prompt_of(server, messages=messages, tools=TOOLS, **kwargs)
    assert "system: Be\nkind." in outputs[1].prompt
    messages = [*USER, {"role": "assistant", "content": "It is"}]
    [output] = llm.chat(messages, params, continue_final_message=True, use_tqdm=False)
    assert output.prompt.endswith("assistant: It is")
    [output] = llm.chat(USER, params, chat_template="{{ messages[0].content }}!", use_tqdm=False)
    assert output.prompt == "Weather in Ulm?!"
    assert len(output.outputs[0].token_ids) == 1
    for wrong, message in (
        ([{"role": "user"}], r"^messages\[0\]\.content"),
        ([{"role": "user", "content": "x", "colour": 1}], r"^messages\[0\]\.colour"),
        ([USER, [{"role": "user", "content": [{"type": "image_url"}]}]], r"^conversation 1: .*image_url"),
    ):
        with pytest.raises(ValueError, match=message):
            llm.chat(wrong, params)
    with pytest.raises(openai.BadRequestError), server.client() as client:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x", "colour": 1}])
