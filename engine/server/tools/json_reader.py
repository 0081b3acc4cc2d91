"""Read JSON that comes in pieces, character by character."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any

_CLOSING = {"{": "}", "[": "]"}
_SCALARS = frozenset("+-.0123456789aeflnrstuE")  # of numbers, true, false and null
_OUTSIDE = _SCALARS | frozenset(" \t\r\n,:")  # of a list or an object, between brackets and strings
_SPACE = " \t\r\n"


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def parsed(text: str) -> Any:
    """Return the value of a JSON text; strings may contain line ends, which models do not always escape.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(text, strict=False, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("lists and objects are nested too deep") from None


def written(value: Any) -> str:
    """Return a value as JSON that UTF-8 can encode.

    Raises:
        ValueError: JSON has no such value.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        return text if is_sendable(text) else json.dumps(value)
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None


def is_sendable(text: str) -> bool:
    """Return whether a text has no lone surrogates, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class ValueReader:
    """Find the end of a list, an object or a string.

    Attributes:
        text: the value so far.
        complete: whether the value has ended.
        broken: whether the last character cannot follow those before it; it is not part of ``text``.
    """

    def __init__(self) -> None:
        self._characters: list[str] = []
        self._open: list[str] = []  # closing brackets that are to come
        self._in_string = self._escaped = False
        self.complete = self.broken = False

    @property
    def text(self) -> str:
        return "".join(self._characters)

    def read(self, character: str) -> str:
        """Read the next character and return it as JSON: in a string a line end is escaped."""
        shown = character
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = False
            if character < " ":
                shown = f"\\u{ord(character):04x}"
        elif character == '"':
            self._in_string = True
        elif character in _CLOSING:
            self._open.append(_CLOSING[character])
        elif self._open and character == self._open[-1]:
            self._open.pop()
        else:
            self.broken = character not in _OUTSIDE
        if self.broken:
            return ""
        self._characters.append(character)
        self.complete = not (self._open or self._in_string)
        return shown


class ObjectReader:
    """Read an object of arguments, passing it on as it comes.

    Attributes:
        complete: whether the object has ended, and is valid.
        broken: whether it is not an object, or not valid.
    """

    def __init__(self) -> None:
        self._value = ValueReader()
        self._pieces: list[str] = []
        self.complete = self.broken = False

    def feed(self, text: str) -> int:
        """Read up to the end of the object or the first wrong character, and return the number read."""
        for position, character in enumerate(text):
            self._pieces.append(self._value.read(character))
            self.broken = self._value.broken
            if self._value.complete:
                try:
                    self.complete = isinstance(parsed(self._value.text), dict)
                except ValueError:
                    self.complete = False
                self.broken = not self.complete
            if self.broken or self.complete:
                return position + (not self._value.broken)
        return len(text)

    def pieces(self) -> str:
        """Return what was read since the last call."""
        text, self._pieces = "".join(self._pieces), []
        return text


class CallReader:
    """Read a call that is an object with a name and arguments, in either order.

    Args:
        known: the only names that make the object a call; None: any.

    Attributes:
        name: the function's name, once the arguments may be passed on too.
        complete: whether the object has ended, and is a call.
        broken: whether it is not a call.
    """

    def __init__(self, known: Collection[str] | None = None) -> None:
        self._known = known
        self._raw: list[str] = []
        self._state: Callable[[str], None] = self._before
        self._key = ""
        self._value = ValueReader()
        self._scalar: list[str] = []
        self._keys: set[str] = set()
        self._name: str | None = None
        self._pieces: list[str] = []
        self._has_arguments = False
        self.complete = self.broken = False

    @property
    def name(self) -> str | None:
        return self._name if self._has_arguments else None

    def feed(self, text: str) -> int:
        """Read up to the end of the object or the first wrong character, and return the number read."""
        for position, character in enumerate(text):
            self._raw.append(character)
            self._state(character)
            if self.broken:
                return position
            if self.complete:
                return position + 1
        return len(text)

    def pieces(self) -> str:
        """Return the part of the arguments that was read since the last call."""
        text, self._pieces = "".join(self._pieces), []
        return text

    def _before(self, character: str) -> None:
        self.broken = character != "{"
        self._state = self._before_key

    def _before_key(self, character: str) -> None:
        if character == '"':
            self._value = ValueReader()
            self._value.read(character)
            self._state = self._in_key
        elif character == "}":
            self._end()
        else:
            self._must_be_space(character)

    def _in_key(self, character: str) -> None:
        self._value.read(character)
        if self._value.complete:
            key = self._parse(self._value.text)
            self._key = "arguments" if key == "parameters" else key  # two names of the same
            if self._key in self._keys:
                self.broken = True
            self._keys.add(self._key)
            self._state = self._after_key

    def _after_key(self, character: str) -> None:
        if character == ":":
            self._state = self._before_value
        else:
            self._must_be_space(character)

    def _before_value(self, character: str) -> None:
        if character in _SPACE:
            return
        self._value = ValueReader()
        self._scalar = []
        if character in '"{[':
            self._state = self._in_value
        else:
            self._state = self._in_scalar
        if self._key == "arguments" and character == "{":
            self._has_arguments = True
        self._state(character)

    def _in_value(self, character: str) -> None:
        shown = self._value.read(character)
        self.broken = self._value.broken
        if self._key == "arguments" and self._has_arguments:
            self._pieces.append(shown)
        if self._value.complete:
            self._member(self._value.text)

    def _in_scalar(self, character: str) -> None:
        if character in _SCALARS:
            self._scalar.append(character)
            return
        self._member("".join(self._scalar))
        self._state(character)

    def _member(self, text: str) -> None:
        """Take a member whose value has ended."""
        self._state = self._after_value
        if self._key == "name":
            name = self._parse(text)
            if not (isinstance(name, str) and name and is_sendable(name)) or (
                self._known is not None and name not in self._known
            ):
                self.broken = True
            else:
                self._name = name
        elif self._key == "arguments" and not self._has_arguments:
            arguments = self._parse(text)
            if isinstance(arguments, str):  # an object as JSON in a string
                arguments = self._parse(arguments)
            arguments = {} if arguments is None else arguments
            if self.broken or not isinstance(arguments, dict):
                self.broken = True
                return
            self._pieces.append(written(arguments))
            self._has_arguments = True

    def _after_value(self, character: str) -> None:
        if character == ",":
            self._state = self._before_key
        elif character == "}":
            self._end()
        else:
            self._must_be_space(character)

    def _must_be_space(self, character: str) -> None:
        if character not in _SPACE:
            self.broken = True

    def _end(self) -> None:
        self._parse("".join(self._raw))
        if self._name is None:
            self.broken = True
        if self.broken:
            return
        if not self._has_arguments:  # a function without parameters
            self._has_arguments = True
            self._pieces.append("{}")
        self.complete = True

    def _parse(self, text: str) -> Any:
        try:
            return parsed(text)
        except ValueError:
            self.broken = True
            return None
