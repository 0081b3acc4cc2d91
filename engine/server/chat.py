"""Turn chat requests into prompts, and settle how their answers are read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from .. import chat_template
from ..sampling_params import SamplingParams
from ..structured_outputs import StructuredOutputsParams
from . import reasoning
from .answers import AnswerReader
from .chat_settings import AUTO, NONE, ChatSettings
from .protocol import ChatCompletionRequest
from .reasoning import REASONING, ReasoningParser, Tags
from .tool_requests import calls_schema, parameters
from .tools import registry
from .tools.base import ToolParser
from .tools.forced import ForcedCall, ForcedCalls
from .tools.registry import PARSERS


@dataclass(frozen=True)
class _Formats:
    """Hold the formats of a model's answers by its chat template; None where nothing is to be read."""

    template: str | None
    tool_parser: type[ToolParser] | None
    tags: Tags | None


class Chat:
    """Render chat requests and choose the readers of their answers.

    Args:
        tokenizer: a tokenizer for rendering.
        max_characters: maximum number of characters of a rendered conversation.
    """

    def __init__(
        self, settings: ChatSettings, tokenizer: PreTrainedTokenizerBase, max_characters: int
    ) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._max_characters = max_characters

    def render(self, body: ChatCompletionRequest) -> str:
        """Return the conversation of a request as text.

        Raises:
            ValueError: the request asks for what this model or this server does not offer, or the template
                refuses it.
        """
        if body.chat_template is not None and not self._settings.trust_request_chat_template:
            raise ValueError(
                "chat_template is not accepted in requests, as it is a program that runs on the server: "
                "leave it out, or start the server with --trust-request-chat-template"
            )
        if body.offered_tools() and body.tool_choice in (None, "auto"):
            self._check_tools(self._formats(body))
        return chat_template.render(
            self._tokenizer,
            [message.for_template() for message in body.messages],
            max_characters=self._max_characters,
            tools=[tool.for_template() for tool in body.offered_tools()] or None,
            chat_template=body.chat_template,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            chat_template_kwargs=body.chat_template_kwargs,
        )

    def reading(
        self, body: ChatCompletionRequest, params: SamplingParams, prompt: str
    ) -> tuple[SamplingParams, Callable[[], AnswerReader] | None]:
        """Return the sampling settings of a request, and a function that creates a reader of an answer.

        That is None for answers that are plain text.

        Args:
            prompt: the rendered conversation.
        """
        formats, tools = self._formats(body), body.offered_tools()
        tool_parser = formats.tool_parser or ToolParser
        schemas = {tool.function.name: parameters(tool) for tool in tools}
        named = body.named_tool()
        tags: Tags | None = None
        create_tools: Callable[[], ToolParser] | None = None
        if named is not None:
            create_tools = functools.partial(ForcedCall, named.function.name)
            params = _constrained(params, parameters(named))
        elif body.tool_choice == "required":
            create_tools = functools.partial(ForcedCalls, schemas)
            params = _constrained(params, calls_schema(tools, body.parallel_tool_calls is not False))
        else:
            markers: set[str] = set()  # texts to be read
            if tools:
                create_tools = functools.partial(tool_parser, schemas)
                markers.update(tool_parser.starts, tool_parser.ends, tool_parser.others)
            if formats.tags is not None and params.structured_outputs is None:
                tags = formats.tags
                markers.update((tags.start, tags.end))
            if not markers:
                return params, None
            if params.skip_special_tokens and not self._special_tokens.isdisjoint(markers):
                params = replace(params, skip_special_tokens=False)

        def create() -> AnswerReader:
            return AnswerReader(
                ReasoningParser(tags, prompt, body.continue_final_message) if tags else None,
                create_tools() if create_tools else None,
                call_id=tool_parser.call_id,
                one_call=body.parallel_tool_calls is False,
                named=named is not None,
                include_reasoning=body.include_reasoning,
            )

        return params, create

    def _formats(self, body: ChatCompletionRequest) -> _Formats:
        template = chat_template.template_of(
            self._tokenizer, body.chat_template, [tool.for_template() for tool in body.offered_tools()]
        )
        settings = self._settings
        return _formats(template, settings.tool_call_parser, settings.reasoning_parser)

    def _check_tools(self, formats: _Formats) -> None:
        if formats.template is not None and formats.tool_parser is None:
            why = (
                "the server was started with --tool-call-parser none"
                if self._settings.tool_call_parser == NONE
                else "the model's chat template does not tell how it writes calls"
            )
            raise ValueError(
                f"tools: whether the model calls them cannot be read, as {why}: start the server with "
                f"--tool-call-parser, one of {', '.join(PARSERS)}, or set tool_choice to "
                '"required" or to a function'
            )

    @functools.cached_property
    def _special_tokens(self) -> frozenset[str]:
        tokens = self._tokenizer.added_tokens_decoder.values()
        return frozenset(token.content for token in tokens if token.special)


@functools.lru_cache(maxsize=16)
def _formats(template: str | None, tool_parser: str, reasoning_parser: str) -> _Formats:
    """Return the formats of answers by the names of their parsers, or as the template tells."""
    if tool_parser == AUTO:
        if template is not None and not chat_template.knows_tools(template):
            tool_parser = "hermes"  # as `chat_template.render` describes the tools
        else:
            tool_parser = registry.guess(template or "") or NONE
    if reasoning_parser == AUTO:
        reasoning_parser = reasoning.guess(template or "") or NONE
    return _Formats(template, PARSERS.get(tool_parser), REASONING.get(reasoning_parser))


def _constrained(params: SamplingParams, schema: dict) -> SamplingParams:
    # With any whitespace some models write nothing else.
    structure = StructuredOutputsParams(json=schema, whitespace_pattern=" ?")
    return replace(params, structured_outputs=structure)
