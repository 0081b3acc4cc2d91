"""Define what a parser finds in the text of an answer, in the order of the text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Reasoning:
    """Hold text that the model wrote before its answer, to think."""

    text: str


@dataclass(frozen=True)
class Text:
    """Hold text of the answer."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """Begin a tool call.

    Args:
        id: ID that the model gave the call; None: the server chooses one.
    """

    name: str
    id: str | None = None


@dataclass(frozen=True)
class Arguments:
    """Hold the next piece of the last call's arguments, an object as JSON."""

    text: str


@dataclass(frozen=True)
class BrokenCall:
    """Report that the last call is none, with its text, which belongs to the answer."""

    text: str


Event = Reasoning | Text | CallStart | Arguments | BrokenCall


def merged(events: Iterable[Event]) -> list[Event]:
    """Return the events with consecutive pieces of the same text joined."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, (Reasoning, Text, Arguments)) and type(last) is type(event):
            result[-1] = type(event)(last.text + event.text)
        else:
            result.append(event)
    return result
