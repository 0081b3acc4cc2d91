"""Read the text of an answer piece by piece, whatever the format of its tool calls."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .events import Arguments, BrokenCall, CallStart, Event, Text, merged

SPACE = " \t\r\n"

# By the name of a function: the JSON schema of its parameters.
Tools = Mapping[str, Mapping[str, Any]]


def held_back(text: str, markers: Iterable[str]) -> int:
    """Return the length of the longest end of a text with which a marker may begin."""
    longest = max((len(marker) - 1 for marker in markers), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in markers):
            return length
    return 0


class ToolParser(ABC):
    """Find tool calls in the text of an answer, which comes in pieces of any length.

    A parser is in one state at a time. A state is a method that reads from the beginning of ``_buffer`` and
    returns False if it needs more text to go on. It decides by the text alone, not by where the pieces end,
    so that any pieces of a text give the same calls.

    Whitespace beside calls is dropped. A call that is broken is text of the answer, exactly as written.

    Args:
        tools: the functions that the model may call.
    """

    starts: tuple[str, ...] = ()  # texts that begin calls
    ends: tuple[str, ...] = ()  # texts that may follow a call, which are dropped
    others: tuple[str, ...] = ()  # other texts of the format that may be special tokens

    def __init__(self, tools: Tools) -> None:
        self.tools = tools
        self._buffer = ""  # text that was not read yet
        self._raw: list[str] = []  # text of the current call so far
        self._begun = False  # whether the current call was reported
        self._any_call = False  # whether a call is complete
        self._space = ""  # whitespace of the answer that is dropped if nothing but calls follows
        self._events: list[Event] = []
        self._final = False  # whether the text has ended
        self._state: Callable[[], bool] = self._in_text

    def feed(self, text: str) -> list[Event]:
        """Return what is found up to the end of the next piece of the text."""
        self._buffer += text
        return self._run()

    def finish(self) -> list[Event]:
        """Return what is found at the end of the text."""
        self._final = True
        self._run(keep=True)
        self._ended()
        if self._space and not self._any_call:
            self._events.append(Text(self._space))
        return self._run()

    @staticmethod
    def call_id() -> str:
        """Return a new ID for a call."""
        return f"call_{secrets.token_hex(12)}"

    def _run(self, keep: bool = False) -> list[Event]:
        while self._buffer and self._state():
            pass
        if keep:
            return []
        events, self._events = merged(self._events), []
        return events

    def _ended(self) -> None:
        """Give back the text of a call that the end of the text has cut."""
        self._take(len(self._buffer))
        self._give_back()

    def _in_text(self) -> bool:
        """Read text of the answer up to the next call."""
        found = [(self._buffer.find(start), start) for start in self.starts if start in self._buffer]
        if found:
            position, start = min(found)
            self._text(self._buffer[:position])
            self._buffer = self._buffer[position:]
            self._take(len(start))
            self._state = self._opened
            return True
        keep = 0 if self._final else held_back(self._buffer, self.starts)
        end = len(self._buffer) - keep
        self._text(self._buffer[:end])
        self._buffer = self._buffer[end:]
        return False

    @abstractmethod
    def _opened(self) -> bool:
        """Read what follows the start of a call."""

    def _take(self, length: int) -> str:
        """Move characters from the buffer to the text of the current call."""
        taken, self._buffer = self._buffer[:length], self._buffer[length:]
        self._raw.append(taken)
        return taken

    def _take_space(self) -> bool:
        """Take whitespace; return whether something follows."""
        rest = self._buffer.lstrip(SPACE)
        self._take(len(self._buffer) - len(rest))
        return bool(rest)

    def _text(self, text: str) -> None:
        """Report text of the answer, except for whitespace at its end, which may be followed by a call."""
        text = self._space + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            self._events.append(Text(shown))

    def _begin(self, name: str, call_id: str | None = None) -> None:
        self._begun = True
        self._events.append(CallStart(name, call_id))

    def _arguments(self, text: str) -> None:
        if text:
            self._events.append(Arguments(text))

    def _end_call(self, then: Callable[[], bool]) -> None:
        self._any_call, self._begun = True, False
        self._raw = []
        self._state = then

    def _give_back(self) -> bool:
        """Turn the current call into text of the answer, as it is broken."""
        raw, self._raw = "".join(self._raw), []
        if self._begun:
            text = self._space + raw
            shown = text.rstrip()
            self._events.append(BrokenCall(shown))
            self._space = text[len(shown) :]
        elif raw:
            self._text(raw)
        self._begun = False
        self._state = self._in_text
        return True
