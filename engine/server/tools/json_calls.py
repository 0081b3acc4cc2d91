"""Parse calls that are JSON: objects with a name and arguments, or arguments after a header with a name."""

from __future__ import annotations

import re
import secrets
import string

from .base import SPACE, ToolParser, Tools
from .json_reader import CallReader, ObjectReader, is_sendable

_MAX_HEADER = 512  # maximum number of characters of a header


class JsonParser(ToolParser):
    """Parse one or more calls after a start, with an end that may be missing.

    The calls are objects, alone, in a list or after each other, or, if there is a ``header``, arguments that
    follow it.
    """

    separators = ""  # characters that may stand between two objects
    header: re.Pattern[str] | None = None  # the text between the start and the arguments

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        self._in_list = False
        self._known: Tools | None = None  # the only functions that an object may call
        self._call = CallReader()
        self._object = ObjectReader()

    def _opened(self) -> bool:
        if not self._take_space():
            return False
        for start in self.starts:  # a list of calls has a start of its own
            if self._buffer.startswith(start):
                self._take(len(start))
                return True
        if not self._final and any(start.startswith(self._buffer) for start in self.starts):
            return False
        self._known = None
        self._in_list = self._buffer[0] == "["
        if self._in_list:
            self._take(1)
            return self._expect_object()
        if self._buffer[0] == "{":
            return self._expect_object()
        if self.header is None:
            return self._give_back()
        self._state = self._in_header
        return True

    def _expect_object(self) -> bool:
        self._call = CallReader(self._known)
        self._state = self._before_object
        return True

    def _before_object(self) -> bool:
        if not self._take_space():
            return False
        self._state = self._in_object
        return True

    def _in_object(self) -> bool:
        call = self._call
        self._take(call.feed(self._buffer))
        if call.name is not None and not call.broken:
            if not self._begun:
                self._begin(call.name)
            self._arguments(call.pieces())
        if call.broken:
            return self._give_back()
        if call.complete:
            self._end_call(self._after_object)
        return call.complete

    def _in_header(self) -> bool:
        assert self.header is not None
        end = self._buffer.find("{")
        if end < 0 and len(self._buffer) <= _MAX_HEADER:
            return False
        header = self.header.fullmatch(self._buffer[:end]) if 0 <= end <= _MAX_HEADER else None
        if header is None or not is_sendable(header["name"]):
            return self._give_back()
        self._take(end)
        self._begin(header["name"], header.groupdict().get("id"))
        self._object = ObjectReader()
        self._state = self._in_arguments
        return True

    def _in_arguments(self) -> bool:
        self._take(self._object.feed(self._buffer))
        self._arguments(self._object.pieces())
        if self._object.broken:
            return self._give_back()
        if self._object.complete:
            self._end_call(self._after_call)
        return self._object.complete

    def _after_object(self) -> bool:
        rest = self._buffer.lstrip(SPACE)
        if not rest:
            return False
        if self._in_list and rest[0] == ",":
            self._buffer = rest[1:]
            return self._expect_object()
        if self._in_list and rest[0] == "]":
            self._buffer, self._in_list = rest[1:], False
            self._state = self._after_call
            return True
        following = rest[1:].lstrip(SPACE) if rest[0] in self.separators else rest
        if not following:
            return False
        if following[0] == "{" and not self._in_list:
            self._buffer = following
            return self._expect_object()
        self._state = self._after_call
        return True

    def _after_call(self) -> bool:
        """Drop the ends of calls."""
        rest = self._buffer.lstrip(SPACE)
        for end in self.ends:
            if rest.startswith(end):
                self._buffer = rest[len(end) :]
                return True
        if not rest or any(end.startswith(rest) for end in self.ends):
            return False
        self._state = self._in_text
        return True

    def _ended(self) -> None:
        if self._state in (self._after_object, self._after_call):
            self._buffer = ""
        super()._ended()


class BareParser(JsonParser):
    """Parse calls that may begin the answer without a start; then only objects with known names are calls."""

    first = "{"  # characters that may begin a call

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        self._state = self._at_first

    def _at_first(self) -> bool:
        rest = self._buffer.lstrip(SPACE)
        if not rest:
            return False
        if rest[0] in self.first:
            self._space = self._buffer[: len(self._buffer) - len(rest)]
            self._buffer = rest
            self._known = self.tools
            self._in_list = rest[0] == "["
            if self._in_list:
                self._take(1)
            return self._expect_object()
        self._state = self._in_text
        return True

    def _ended(self) -> None:
        if self._state == self._at_first:
            self._state = self._in_text
        super()._ended()


class Hermes(JsonParser):
    starts = ("<tool_call>",)
    ends = ("</tool_call>",)


class Llama3Json(BareParser):
    starts = ("<|python_tag|>",)
    separators = ";,"
    first = "{["


class Mistral(JsonParser):
    starts = ("[TOOL_CALLS]",)
    header = re.compile(r"\s*(?P<name>[\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\]\s*)?")
    others = ("[ARGS]", "[CALL_ID]")

    @staticmethod
    def call_id() -> str:
        """Return an ID as Mistral's templates demand: nine letters and digits."""
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class Granite(JsonParser):
    starts = ("<|tool_call|>", "<tool_call>")
    ends = ("<|/tool_call|>", "</tool_call>")


class Phi4MiniJson(JsonParser):
    starts = ("functools", "<|tool_call|>")
    ends = ("<|/tool_call|>",)


class Jamba(JsonParser):
    starts = ("<tool_calls>",)
    ends = ("</tool_calls>",)


class InternLM(JsonParser):
    starts = ("<|action_start|><|plugin|>", "<|action_start|> <|plugin|>")
    others = ("<|action_start|>", "<|plugin|>")
    ends = ("<|action_end|>",)


class DeepSeekV3(JsonParser):
    starts = ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>")
    ends = ("```", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>")
    others = ("<｜tool▁sep｜>",)
    header = re.compile(r"\s*function<｜tool▁sep｜>\s*(?P<name>\S+)\s*(?:```json\s*)?")


class DeepSeekV31(JsonParser):
    starts = DeepSeekV3.starts
    ends = DeepSeekV3.ends[1:]
    others = DeepSeekV3.others
    header = re.compile(r"\s*(?P<name>[^\s<]+)\s*<｜tool▁sep｜>\s*")


class KimiK2(JsonParser):
    starts = ("<|tool_calls_section_begin|>", "<|tool_call_begin|>")
    ends = ("<|tool_call_end|>", "<|tool_calls_section_end|>")
    others = ("<|tool_call_argument_begin|>",)
    header = re.compile(
        r"\s*(?P<id>(?:functions\.)?(?P<name>[\w.-]+):\d+)\s*<\|tool_call_argument_begin\|>\s*"
    )
