"""Define the requests of Anthropic's Messages API and translate them for the chat endpoint."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from .conversation import Conversation, one_of, texts_of
from .fields import Integer, Strict, refuse_unsupported

Json = dict[str, Any]

NAMES = {  # of the chat endpoint's fields
    "stop": "stop_sequences",
    "response_format": "output_config.format",
}

# Fields that would change the answer, with values that have no effect.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "container": (),
    "context_management": ({},),
    "mcp_servers": ([],),
}


class _TextBlock(Strict):
    text: str


class _ThinkingBlock(Strict):
    thinking: str


class _RedactedThinkingBlock(Strict):
    """Hold reasoning that only Anthropic can read; it is left out."""


class _ToolUseBlock(Strict):
    id: str
    name: str
    input: dict[str, Any]


class _ToolResultBlock(Strict):
    tool_use_id: str
    content: Annotated[list[str], texts_of("text")] = Field(default_factory=list)


_BLOCKS: dict[str, type[Strict]] = {
    "text": _TextBlock,
    "thinking": _ThinkingBlock,
    "redacted_thinking": _RedactedThinkingBlock,
    "tool_use": _ToolUseBlock,
    "tool_result": _ToolResultBlock,
}
_BLOCKS_OF_ROLES = {
    "system": (_TextBlock,),
    "user": (_TextBlock, _ToolResultBlock),
    "assistant": (_TextBlock, _ThinkingBlock, _RedactedThinkingBlock, _ToolUseBlock),
}
_Block = Annotated[Any, one_of(_BLOCKS, "content blocks")]


class _Message(Strict):
    role: Literal["user", "assistant", "system"]
    content: list[_Block] = Field(fail_fast=True)

    @model_validator(mode="before")
    @classmethod
    def _text_as_block(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(text := data.get("content"), str):
            return {**data, "content": [{"type": "text", "text": text}]}
        return data

    @model_validator(mode="after")
    def _blocks_of_the_role(self) -> _Message:
        for block in self.content:
            if not isinstance(block, _BLOCKS_OF_ROLES[self.role]):
                kind = next(name for name, model in _BLOCKS.items() if type(block) is model)
                raise ValueError(f"content blocks of type {kind!r} are not for the role {self.role!r}")
        return self

    def add_to(self, conversation: Conversation) -> None:
        for block in self.content:
            match block:
                case _TextBlock():
                    conversation.say(self.role, [block.text])
                case _ThinkingBlock():
                    conversation.think(block.thinking)
                case _ToolUseBlock():
                    conversation.call(block.id, block.name, block.input)
                case _ToolResultBlock():
                    conversation.result(block.tool_use_id, block.content)


class _Function(Strict):
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None

    def for_chat(self) -> Json:
        function = {"name": self.name, "description": self.description, "parameters": self.input_schema}
        members = {**function, "strict": self.strict}
        return {"type": "function", "function": {k: v for k, v in members.items() if v is not None}}


_Tool = Annotated[Any, one_of({"custom": _Function}, "tools", default="custom")]


class _ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False

    @model_validator(mode="after")
    def _names_a_tool(self) -> _ToolChoice:
        if self.type == "tool" and self.name is None:
            raise ValueError("name is missing: of the tool that the model has to use")
        return self

    def for_chat(self) -> str | Json:
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return {"auto": "auto", "any": "required", "none": "none"}[self.type]


class _Thinking(Strict):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]


class _JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class _OutputConfig(Strict):
    format: _JsonSchemaFormat | None = None


class CountTokensRequest(Strict):
    """Hold what both endpoints read; unknown fields are ignored, as by the chat endpoint."""

    model: str
    messages: list[_Message] = Field(min_length=1, fail_fast=True)
    system: Annotated[list[str], texts_of("text")] = Field(default_factory=list)
    tools: list[_Tool] = Field(default_factory=list, fail_fast=True)
    tool_choice: _ToolChoice = Field(default_factory=lambda: _ToolChoice(type="auto"))
    thinking: _Thinking | None = None
    output_config: _OutputConfig = Field(default_factory=_OutputConfig)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if isinstance(data, dict):
            refuse_unsupported(data, _UNSUPPORTED, {})
        return data

    @model_validator(mode="after")
    def _results_of_all_calls(self) -> CountTokensRequest:
        if any(isinstance(block, _ToolUseBlock) for block in self.messages[-1].content):
            raise ValueError("messages must end with the tool_result blocks of all tool_use blocks")
        return self

    def for_chat(self) -> Json:
        """Return the request of the chat endpoint, not validated yet."""
        conversation = Conversation()
        if self.system:
            conversation.say("system", self.system)
        for message in self.messages:
            message.add_to(conversation)
        chat: Json = {"model": self.model, "messages": conversation.messages}
        if self.messages[-1].role == "assistant":  # the answer goes on from there
            chat.update(continue_final_message=True, add_generation_prompt=False)
        chat["tools"] = [tool.for_chat() for tool in self.tools]
        chat["tool_choice"] = self.tool_choice.for_chat()
        chat["parallel_tool_calls"] = not self.tool_choice.disable_parallel_tool_use
        if self.thinking is not None:  # under the names that templates have for it
            thinks = self.thinking.type != "disabled"
            chat["chat_template_kwargs"] = {"enable_thinking": thinks, "thinking": thinks}
        if (output := self.output_config.format) is not None:
            schema = {"name": "output", "schema": output.schema_, "strict": True}
            chat["response_format"] = {"type": "json_schema", "json_schema": schema}
        return chat


class MessagesRequest(CountTokensRequest):
    """Hold a request for a message."""

    model_config = ConfigDict(extra="allow")

    max_tokens: Integer = Field(ge=1)
    stop_sequences: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list, fail_fast=True)
    temperature: float | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    stream: bool = False

    def for_chat(self) -> Json:
        chat = super().for_chat()
        chat.update(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=self.stop_sequences,
            stream=self.stream,
        )
        if self.stream:  # the first event has the number of tokens of the prompt
            chat["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        return {name: value for name, value in chat.items() if value is not None}
