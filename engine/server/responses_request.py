"""Define the requests of OpenAI's Responses API and translate them for the chat endpoint."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from .conversation import Conversation, one_of, texts_of
from .fields import Closed, Integer, Strict, Strings, refuse_unsupported, shown

Json = dict[str, Any]

NAMES = {  # of the chat endpoint's fields
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}

# Fields that would change the answer, with values that have no effect.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "background_options": ({},),
    "context_management": ([],),
    "conversation": (),
    "moderation": (),
    "previous_response_id": (),
    "prompt": (),
}
_INSTEAD = {
    "conversation": "the server keeps no answers: send all items of the conversation as input",
    "previous_response_id": "the server keeps no answers: send all items of the conversation as input",
}
# Fields of the chat endpoint that are passed on as they are, as vLLM takes them.
_EXTENSIONS = (
    "allowed_token_ids",
    "bad_words",
    "cache_salt",
    "chat_template_kwargs",
    "frequency_penalty",
    "ignore_eos",
    "include_stop_str_in_output",
    "logit_bias",
    "min_p",
    "min_tokens",
    "presence_penalty",
    "priority",
    "repetition_penalty",
    "seed",
    "skip_special_tokens",
    "stop",
    "stop_token_ids",
    "structured_outputs",
    "top_k",
)
LOGPROBS = "message.output_text.logprobs"  # in `include`


class _Message(Strict):
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[list[str], texts_of("input_text", "output_text", "text", "refusal")]

    def add_to(self, conversation: Conversation) -> None:
        conversation.say(self.role, self.content)


class _FunctionCall(Strict):
    call_id: str
    name: str
    arguments: str

    def add_to(self, conversation: Conversation) -> None:
        conversation.call(self.call_id, self.name, self.arguments)


class _FunctionCallOutput(Strict):
    call_id: str
    output: Annotated[list[str], texts_of("input_text", "output_text", "text")]

    def add_to(self, conversation: Conversation) -> None:
        conversation.result(self.call_id, self.output)


class _Reasoning(Strict):
    summary: Annotated[list[str], texts_of("summary_text")] = Field(default_factory=list)
    content: Annotated[list[str], texts_of("reasoning_text")] = Field(default_factory=list)

    def add_to(self, conversation: Conversation) -> None:
        for text in self.content or self.summary:
            conversation.think(text)


_ITEMS: dict[str, type[Strict]] = {
    "message": _Message,
    "function_call": _FunctionCall,
    "function_call_output": _FunctionCallOutput,
    "reasoning": _Reasoning,
}
_Item = Annotated[Any, one_of(_ITEMS, "items", default="message")]


def _as_items(value: Any) -> Any:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise ValueError(f"must be a string or a list of items, got {shown(value)}")
    return value


_AS_ITEMS = BeforeValidator(_as_items, json_schema_input_type=str | list[dict[str, Any]])


class _FunctionTool(Strict):
    model_config = ConfigDict(extra="allow")

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def for_chat(self) -> Json:
        function = self.model_dump(include={"name", "description", "parameters", "strict"}, exclude_none=True)
        return {"type": "function", "function": function}


_Tool = Annotated[Any, one_of({"function": _FunctionTool}, "tools")]


class _Mode(Strict):
    type: Literal["none", "auto", "required"]

    def echo(self) -> str:
        return self.type


class _FunctionChoice(Strict):
    type: Literal["function"]
    name: str

    def echo(self) -> Json:
        return self.model_dump()


class _AllowedTools(Strict):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[_FunctionChoice] = Field(min_length=1)

    def echo(self) -> Json:
        return self.model_dump()


_CHOICES: dict[str, type[Strict]] = {
    "none": _Mode,
    "auto": _Mode,
    "required": _Mode,
    "function": _FunctionChoice,
    "allowed_tools": _AllowedTools,
}


def _as_object(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


_AS_OBJECT = BeforeValidator(_as_object, json_schema_input_type=str | dict[str, Any])
_Choice = Annotated[Any, one_of(_CHOICES, "choices"), _AS_OBJECT]


class _TextFormat(Strict):
    type: Literal["text"]

    def for_chat(self) -> Json | None:
        return None


class _JsonObjectFormat(Strict):
    type: Literal["json_object"]

    def for_chat(self) -> Json:
        return {"type": "json_object"}


class _JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    description: str | None = None

    def for_chat(self) -> Json:
        schema = self.model_dump(by_alias=True, exclude_none=True, exclude={"type"})
        return {"type": "json_schema", "json_schema": schema}


_FORMATS: dict[str, type[Strict]] = {
    "text": _TextFormat,
    "json_object": _JsonObjectFormat,
    "json_schema": _JsonSchemaFormat,
}


_Format = Annotated[Any, one_of(_FORMATS, "formats")]


class _Text(Strict):
    format: _Format = Field(default_factory=lambda: _TextFormat(type="text"))
    verbosity: Literal["medium"] | None = None


class _ReasoningSettings(Strict):
    effort: str | None = None
    summary: str | None = None


class _StreamOptions(Closed):
    include_obfuscation: Literal[False] = False


class ResponsesRequest(Strict):
    """Hold a request; unknown fields are ignored, as by the chat endpoint."""

    model_config = ConfigDict(extra="allow")

    model: str
    input: Annotated[list[_Item], _AS_ITEMS] = Field(min_length=1, fail_fast=True)
    instructions: str | None = None
    max_output_tokens: Integer | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    tools: list[_Tool] = Field(default_factory=list, fail_fast=True)
    tool_choice: _Choice = Field(default_factory=lambda: _Mode(type="auto"))
    parallel_tool_calls: bool = True
    text: _Text = Field(default_factory=_Text)
    reasoning: _ReasoningSettings = Field(default_factory=_ReasoningSettings)
    top_logprobs: Integer | None = Field(default=None, ge=0, le=20)
    include: Strings = Field(default_factory=list)
    stream: bool = False
    stream_options: _StreamOptions | None = None
    store: bool = False
    truncation: Literal["auto", "disabled"] = "disabled"
    metadata: dict[str, str] = Field(default_factory=dict)
    max_tool_calls: Integer | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if isinstance(data, dict):
            refuse_unsupported(data, _UNSUPPORTED, _INSTEAD)
        return data

    @property
    def logprobs(self) -> bool:
        """Return whether the answer has the tokens' log probabilities."""
        return LOGPROBS in self.include or bool(self.top_logprobs)

    def for_chat(self) -> Json:
        """Return the request of the chat endpoint, not validated yet."""
        extra = self.model_extra or {}
        chat = {name: extra[name] for name in _EXTENSIONS if name in extra}
        chat.update(
            model=self.model,
            messages=self._messages(),
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            response_format=self.text.format.for_chat(),
            reasoning_effort=self.reasoning.effort,
            stream=self.stream,
        )
        chat["tool_choice"], tools = self._choice()
        chat["tools"] = [tool.for_chat() for tool in tools]
        chat["parallel_tool_calls"] = self.parallel_tool_calls
        if self.stream:
            chat["stream_options"] = {"include_usage": True}
        if self.logprobs:
            chat.update(logprobs=True, top_logprobs=self.top_logprobs or 0)
        return {name: value for name, value in chat.items() if value is not None}

    def _messages(self) -> list[Json]:
        conversation = Conversation()
        if self.instructions is not None:
            # One message together with that of the input, as many templates take only one.
            role = getattr(self.input[0], "role", None)
            conversation.say("developer" if role == "developer" else "system", [self.instructions])
        for item in self.input:
            item.add_to(conversation)
        return conversation.messages

    def _choice(self) -> tuple[str | Json, list[_FunctionTool]]:
        """Return the chat endpoint's ``tool_choice``, and the tools among which the model chooses.

        Raises:
            ValueError: a tool is permitted that is not there.
        """
        choice, tools = self.tool_choice, self.tools
        if isinstance(choice, _Mode):
            return choice.type, tools
        if isinstance(choice, _FunctionChoice):
            return {"type": "function", "function": {"name": choice.name}}, tools
        named = {each.name for each in choice.tools}
        if missing := sorted(named - {tool.name for tool in tools}):
            raise ValueError(f"tool_choice names {shown(missing[0])}, which is not one of the tools")
        return choice.mode, [tool for tool in tools if tool.name in named]
