"""Write streamed answers as server-sent events, in the format of chunks or translated to another API's."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Protocol

from .protocol import error_body

Json = dict[str, Any]
encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
# Line ends for clients that split events by `str.splitlines`; JSON escapes the other ones itself.
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}


class Events(Protocol):
    """Translate the chunks of one stream to the events of another API, each with its type under "type"."""

    def next(self, chunk: Json) -> Iterable[Json]:
        """Return the events of the next chunk."""

    def end(self) -> Iterable[Json]:
        """Return the events that end a stream without an error."""

    def failed(self, message: str) -> Iterable[Json]:
        """Return the events that end a stream by an error of the engine."""


class Translation(Protocol):
    """Translate the answer of the chat endpoint to that of another API.

    Attributes:
        id_prefix: beginning of the IDs of answers.
    """

    id_prefix: str

    def whole(self, answer: Json) -> Json:
        """Return an answer that is not streamed."""

    def events(self, head: Json) -> Events:
        """Return the translation of a stream whose chunks all have the members of ``head``."""


class ChunkWriter:
    """Write the events of a stream of chunks.

    Args:
        head: members that all chunks share; encoded once.
    """

    def __init__(self, head: Json) -> None:
        self._head = encode(head)[:-1]  # without the closing brace

    def chunk(self, chunk: Json) -> str:
        """Return the event of a chunk, which lacks the members of the head."""
        return _event(f"{self._head},{encode(chunk)[1:]}")

    def failed(self, message: str) -> str:
        """Return the event of an error; the status is sent already."""
        return _event(encode(error_body(message, "server_error"))) + self.end()

    def end(self) -> str:
        return "data: [DONE]\n\n"


class TranslatedWriter:
    """Write the events of a stream in another API's format."""

    def __init__(self, events: Events) -> None:
        self._events = events

    def chunk(self, chunk: Json) -> str:
        return _named(self._events.next(chunk))

    def failed(self, message: str) -> str:
        return _named(self._events.failed(message))

    def end(self) -> str:
        return _named(self._events.end())


def _named(events: Iterable[Json]) -> str:
    return "".join(f"event: {event['type']}\n{_event(encode(event))}" for event in events)


def _event(data: str) -> str:
    return f"data: {data if data.isascii() else data.translate(_LINE_ENDS)}\n\n"
