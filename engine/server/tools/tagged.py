"""Parse calls whose arguments stand between tags, each in the text of its value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .base import ToolParser, Tools, held_back
from .json_reader import is_sendable, parsed, written
from .python_literals import literal

_MAX_NAME = 256  # maximum number of characters of a function's or a parameter's name


class TaggedParser(ToolParser):
    """Parse calls with arguments between tags.

    Strings are passed on as they come. Other values are read by the types that the function's schema has for
    them.
    """

    name_ends: tuple[str, ...] = ()  # texts after the function's name, of which the first one is dropped
    key_start = ""
    key_end = ""
    value_start = ""  # text between ``key_end`` and the value, with space before it
    value_end = ""
    line_ends = False  # whether a line end stands on either side of a value
    call_end = ""

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        self._function = ""
        self._key = ""
        self._keys: set[str] = set()
        self._value: list[str] = []  # text of a value that is not passed on as it comes

    def _opened(self) -> bool:
        found = [(position, end) for end in self.name_ends if (position := self._buffer.find(end)) >= 0]
        if not found:
            return self._wait_for(max(map(len, self.name_ends)))
        position, end = min(found)
        name = self._buffer[:position].strip()
        if position > _MAX_NAME or not name or set(name) & set('\n<>{}"') or not is_sendable(name):
            return self._give_back()
        self._take(position + len(end) * (end == self.name_ends[0]))
        self._function, self._keys = name, set()
        self._state = self._before_key
        return True

    def _before_key(self) -> bool:
        if not self._take_space():
            return False
        tags = (self.key_start, self.call_end)
        tag = next((tag for tag in tags if self._buffer.startswith(tag)), None)
        if tag is None:
            return False if any(tag.startswith(self._buffer) for tag in tags) else self._give_back()
        if tag == self.key_start:
            end = self._buffer.find(self.key_end, len(tag))
            if end < 0:
                return self._wait_for(len(self.key_end))
            self._key = self._buffer[len(tag) : end].strip()
            if end > _MAX_NAME or not self._key or self._key in self._keys or not is_sendable(self._key):
                return self._give_back()
            self._take(end + len(self.key_end))
            self._state = self._before_value
            return True
        self._take(len(tag))
        self._begin_once()
        self._arguments("}" if self._keys else "{}")
        self._end_call(self._after_call)
        return True

    def _before_value(self) -> bool:
        if self.value_start:
            if not self._take_space():
                return False
            if not self._buffer.startswith(self.value_start):
                return False if self.value_start.startswith(self._buffer) else self._give_back()
            self._take(len(self.value_start))
        elif self.line_ends and self._buffer[0] == "\n":
            self._take(1)
        self._begin_once()
        self._arguments(f"{', ' if self._keys else '{'}{written(self._key)}: ")
        self._keys.add(self._key)
        self._value = []
        self._state = self._in_text_value if self._is_text() else self._in_value
        if self._state == self._in_text_value:
            self._arguments('"')
        return True

    def _wait_for(self, length: int) -> bool:
        """Need more text, unless a name before an end of this length would be too long."""
        return False if len(self._buffer) <= _MAX_NAME + length else self._give_back()

    def _begin_once(self) -> None:
        if not self._begun:
            self._begin(self._function)

    def _schema(self) -> Any:
        properties = self.tools.get(self._function, {}).get("properties")
        return properties.get(self._key, {}) if isinstance(properties, Mapping) else {}

    def _is_text(self) -> bool:
        """Return whether the value is a string whatever its text."""
        schema = self._schema()
        return not schema or (isinstance(schema, Mapping) and schema.get("type") == "string")

    def _value_piece(self) -> tuple[str, bool]:
        """Take the next piece of the value; return it, and whether the value has ended."""
        end = self._buffer.find(self.value_end)
        # The line end before the tag is no part of the value.
        ends = (self.value_end, "\n" + self.value_end) if self.line_ends else (self.value_end,)
        if end < 0:
            piece = self._take(len(self._buffer) - held_back(self._buffer, ends))
            return piece, False
        piece = self._take(end + len(self.value_end))[:end]
        return piece.removesuffix("\n") if self.line_ends else piece, True

    def _in_text_value(self) -> bool:
        piece, ended = self._value_piece()
        self._arguments(_string_part(piece) + '"' * ended)
        if ended:
            self._state = self._before_key
        return ended

    def _in_value(self) -> bool:
        piece, ended = self._value_piece()
        self._value.append(piece)
        if ended:
            self._arguments(_typed("".join(self._value), self._schema()))
            self._state = self._before_key
        return ended

    def _after_call(self) -> bool:
        rest = self._buffer.lstrip()
        for end in self.ends:
            if rest.startswith(end):
                self._buffer = rest[len(end) :]
                return True
        if not rest or any(end.startswith(rest) for end in self.ends):
            return False
        self._state = self._in_text
        return True

    def _ended(self) -> None:
        if self._state == self._after_call:
            self._buffer = ""
        super()._ended()


class Qwen3Coder(TaggedParser):
    starts = ("<tool_call>", "<function=")
    name_ends = (">",)
    key_start, key_end = "<parameter=", ">"
    value_end = "</parameter>"
    line_ends = True
    call_end = "</function>"
    ends = ("</tool_call>",)
    others = ("</function>", "<parameter=", "</parameter>")

    def _opened(self) -> bool:
        if self._raw[-1] == "<function=":
            return super()._opened()
        # The tag around the call.
        if not self._take_space():
            return False
        if not self._buffer.startswith("<function="):
            return False if "<function=".startswith(self._buffer) else self._give_back()
        self._take(len("<function="))
        return True


class Glm45(TaggedParser):
    starts = ("<tool_call>",)
    name_ends = ("\n", "<arg_key>", "</tool_call>")
    key_start, key_end = "<arg_key>", "</arg_key>"
    value_start, value_end = "<arg_value>", "</arg_value>"
    call_end = "</tool_call>"
    others = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "</tool_call>")


def _string_part(text: str) -> str:
    """Return a part of a string as it stands in JSON."""
    return (written(text) if is_sendable(text) else json.dumps(text))[1:-1]


_TYPES: dict[str, tuple[type, ...]] = {
    "null": (type(None),),
    "boolean": (bool,),
    "integer": (int, float),
    "number": (int, float),
    "object": (dict,),
    "array": (list,),
}


def _typed(text: str, schema: Any) -> str:
    """Return the value that a text stands for as JSON: the first that the schema permits, or a string."""
    types = _types(schema)
    for read in (parsed, literal):  # some models write Python's in place of JSON
        try:
            value = read(text.strip())
            shown = written(value)
        except ValueError:
            continue
        if not types or any(
            isinstance(value, _TYPES[kind]) and (kind == "boolean") == isinstance(value, bool)
            for kind in types
            if kind in _TYPES
        ):
            return shown
    return written(text)


def _types(schema: Any) -> set[str]:
    """Return the types that a schema permits; none if it does not say."""
    if not isinstance(schema, Mapping):
        return set()
    kind = schema.get("type")
    kinds = kind if isinstance(kind, list) else [kind]
    types = {kind for kind in kinds if isinstance(kind, str)}
    for name in ("anyOf", "oneOf"):
        options = schema.get(name)
        for option in options if isinstance(options, list) else ():
            types |= _types(option)
    return types
