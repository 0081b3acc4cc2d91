"""Parse calls that are written as a list of Python calls: ``[f(a=1, b="x"), g()]``."""

from __future__ import annotations

import re
from typing import Any

from .base import SPACE, ToolParser, Tools
from .json_reader import written
from .python_literals import call_arguments

_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_MAX_NAME = 256
_MAX_DEPTH = 64  # maximum number of nested brackets; Python's own parser has a limit too
_CLOSING = {"(": ")", "[": "]", "{": "}"}
# Strings of Python have no line ends, and models write them nevertheless.
_ESCAPED = {"\n": "\\n", "\r": "\\r", "\0": "\\x00"}


class Pythonic(ToolParser):
    """Parse a list of calls of known functions, at the beginning of the answer or after a start.

    A call is reported when it is complete.
    """

    starts = ("<|python_start|>", "<|python_tag|>")
    ends = ("<|python_end|>",)

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        self._state = self._opened
        self._opening = False  # whether a start precedes the list
        self._any_in_list = False

    def _in_text(self) -> bool:
        self._opening = True
        return super()._in_text()

    def _opened(self) -> bool:
        rest = self._buffer.lstrip(SPACE)
        if not rest:
            return False
        if rest[0] != "[":
            if self._opening:
                return self._give_back()
            self._state = self._in_text
            return True
        if self._opening:
            self._take_space()
        else:
            self._space = self._buffer[: len(self._buffer) - len(rest)]
            self._buffer = rest
        self._take(1)
        self._any_in_list = False
        self._state = self._in_list
        return True

    def _in_list(self) -> bool:
        """Read what stands between the calls of a list, and the name of the next one."""
        rest = self._buffer.lstrip(SPACE + "," if self._any_in_list else SPACE)
        self._take(len(self._buffer) - len(rest))
        if not rest:
            return False
        if rest[0] == "]" and self._any_in_list:
            self._buffer = rest[1:]
            self._raw = []
            self._state = self._after_list
            return True
        name = _NAME.match(rest)
        if name is None or name.end() > _MAX_NAME:
            return self._give_back()
        following = rest[name.end() :].lstrip(SPACE)
        if not following:
            return False
        if following[0] != "(" or name[0] not in self.tools:
            return self._give_back()
        self._brackets = list[str]()  # closing brackets that are to come
        self._quote = ""  # of the string that is being read
        self._escaped = False
        self._call: list[str] = []
        self._function = name[0]
        self._take(name.end())
        self._take_space()
        self._state = self._in_call
        return True

    def _in_call(self) -> bool:
        for position, character in enumerate(self._buffer):
            if not self._read(character):
                self._take(position)
                return self._give_back()
            if not self._brackets:
                self._take(position + 1)
                return self._complete()
        self._take(len(self._buffer))
        return False

    def _read(self, character: str) -> bool:
        """Read a character of the arguments; return whether it can follow those before it."""
        self._call.append(_ESCAPED.get(character, character) if self._quote else character)
        if self._quote:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == self._quote:
                self._quote = ""
        elif character in "'\"":
            self._quote = character
        elif character in _CLOSING:
            self._brackets.append(_CLOSING[character])
            return len(self._brackets) <= _MAX_DEPTH
        elif character in ")]}":
            return self._brackets.pop() == character
        return True

    def _complete(self) -> bool:
        try:
            names = _properties(self.tools[self._function])
            arguments = written(call_arguments("".join(self._call), names))
        except ValueError:
            return self._give_back()
        self._begin(self._function)
        self._arguments(arguments)
        self._any_in_list = True
        self._end_call(self._in_list)
        return True

    def _after_list(self) -> bool:
        rest = self._buffer.lstrip(SPACE)
        for end in self.ends:
            if rest.startswith(end):
                self._buffer = rest[len(end) :]
                return True
            if end.startswith(rest):
                return False
        self._state = self._in_text
        return True

    def _ended(self) -> None:
        if self._state == self._after_list:
            self._buffer = ""  # a part of an end
        elif self._state == self._in_list and self._any_in_list:
            self._raw = []  # a list that is not closed
        super()._ended()


def _properties(schema: Any) -> list[str]:
    """Return the names of a function's parameters."""
    properties = schema.get("properties")
    return list(properties) if isinstance(properties, dict) else []
