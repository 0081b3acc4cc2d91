"""Read answers that are calls because the request demands it, as structured output makes sure."""

from __future__ import annotations

from .base import SPACE, ToolParser
from .events import Event
from .json_calls import BareParser


class ForcedCalls(BareParser):
    """Read the list of calls that an answer consists of under ``tool_choice="required"``."""

    first = "["


class ForcedCall(ToolParser):
    """Read the arguments of one function, which an answer consists of if that function must be called."""

    def __init__(self, name: str) -> None:
        super().__init__({})
        self._name = name
        self._state = self._opened  # the answer begins with the arguments

    def feed(self, text: str) -> list[Event]:
        """Return the next piece of the arguments."""
        if not self._begun:
            text = text.lstrip(SPACE)
        return super().feed(text)

    def _opened(self) -> bool:
        if not self._begun:
            self._begin(self._name)
        self._arguments(self._buffer)
        self._buffer = ""
        return False

    def _ended(self) -> None:
        """Keep arguments that the end has cut: the client asked for this call, and learns why it ended."""
        self._begun = False
