"""Split the text of an answer into what the model thinks and what it says."""

from __future__ import annotations

from dataclasses import dataclass

from .tools.base import held_back
from .tools.events import Event, Reasoning, Text, merged


@dataclass(frozen=True)
class Tags:
    """Describe how a model marks its reasoning.

    Args:
        start: text before the reasoning; models whose prompt ends with it do not write it again.
        end: text after it.
        implied: the answer begins with reasoning even without ``start``, unless the prompt ends with ``end``.
    """

    start: str
    end: str
    implied: bool = False


_THINK = Tags("<think>", "</think>")

# Under vLLM's names.
REASONING: dict[str, Tags] = {
    "deepseek_r1": Tags("<think>", "</think>", implied=True),
    "deepseek_v3": _THINK,
    "glm45": _THINK,
    "granite": Tags("Here is my thought process:", "Here is my response:"),
    "kimi_k2": _THINK,
    "mistral": Tags("[THINK]", "[/THINK]"),
    "qwen3": _THINK,
    "seed_oss": Tags("<seed:think>", "</seed:think>", implied=True),
}

# A text in a chat template -> the parser of what it shows; the first that is found counts.
_GUESSES = {
    "<seed:think>": "seed_oss",
    "[THINK]": "mistral",
    "<think>": "qwen3",
    "</think>": "qwen3",
    "Here is my thought process:": "granite",
}


def guess(template: str) -> str | None:
    """Return the name of the reasoning parser for a model with this chat template; None if nothing tells."""
    return next((name for text, name in _GUESSES.items() if text in template), None)


class ReasoningParser:
    """Split the text of one answer, which comes in pieces of any length.

    Whitespace beside the tags is dropped. An answer that ends within the reasoning is reasoning.

    Args:
        prompt: the rendered conversation, at whose end the reasoning may have begun.
        continued: the prompt ends within the assistant's message.
    """

    def __init__(self, tags: Tags, prompt: str, continued: bool = False) -> None:
        self._tags = tags
        self._buffer = ""
        self._space = ""  # whitespace that is dropped if a tag follows
        _, start, tail = prompt.rpartition(tags.start)
        begun = bool(start) and tags.end not in tail and (continued or not tail.strip())
        ended = prompt.rstrip().endswith(tags.end) or continued
        self._in_reasoning = begun or (tags.implied and not ended)
        self._any_reasoning = False
        self._at_start = True  # nothing but whitespace was read
        self._after = ended and not begun

    def feed(self, text: str) -> list[Event]:
        """Return what the next piece of the text adds."""
        self._buffer += text
        return merged(self._read(final=False))

    def finish(self) -> list[Event]:
        """Return what was held back, at the end of the text."""
        return merged(self._read(final=True))

    def _read(self, final: bool) -> list[Event]:
        events: list[Event] = []
        if self._at_start and not self._read_start(final):
            return events
        if self._in_reasoning:
            end = self._tags.end
            reasoning, found, rest = self._buffer.partition(end)
            if not found:
                keep = 0 if final else held_back(self._buffer, [end])
                cut = len(self._buffer) - keep
                reasoning, rest = self._buffer[:cut], self._buffer[cut:]
            self._buffer = rest
            reasoning = self._space + (reasoning if self._any_reasoning else reasoning.lstrip())
            shown = reasoning.rstrip()
            self._space = reasoning[len(shown) :]
            if shown:
                self._any_reasoning = True
                events.append(Reasoning(shown))
            if not found:
                return events
            self._in_reasoning, self._after, self._space = False, True, ""
        if self._after:  # the reasoning
            self._buffer = self._buffer.lstrip()
            self._after = not self._buffer
        if self._buffer:
            events.append(Text(self._buffer))
        self._buffer = ""
        return events

    def _read_start(self, final: bool) -> bool:
        """Read the start tag if the text begins with it; return whether it is known if it does."""
        rest, start = self._buffer.lstrip(), self._tags.start
        if not final and start.startswith(rest):
            return False
        self._at_start = False
        if rest.startswith(start) and not self._after:
            self._in_reasoning, self._buffer = True, rest[len(start) :]
        return True
