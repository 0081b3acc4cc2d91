"""Define and check limits of requests, so that no client disturbs the others. FastAPI is not imported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..sampling_params import SamplingParams


class BusyError(Exception):
    """Report that the server has too many requests, so that the client should try again later."""


@dataclass(frozen=True)
class Limits:
    """Hold the limits of requests and connections; what exceeds one is refused before it is processed.

    Args:
        max_body_size: maximum size of a request's body in bytes; TGI's default.
        max_bodies_size: maximum size in bytes of all bodies together that are not processed yet; beyond it
            the oldest incomplete request gets 429.
        max_json_depth: maximum nesting depth of lists and objects in a body.
        max_json_lists: maximum number of lists and objects in a body; parsing them blocks the server.
        max_choices: maximum number of choices of a request: its prompts times n, or best_of if that is
            larger.
        max_messages: maximum number of messages of a chat; OpenAI's.
        max_stop_strings: maximum number of stop strings of a request; each is searched for at every token.
        max_bad_words: maximum number of bad_words of a request.
        max_string_length: maximum number of characters of a stop string, and of a bad word.
        max_token_ids: maximum number of entries of logit_bias, and of allowed_token_ids and stop_token_ids.
        max_grammar_size: maximum number of characters of a JSON schema, regular expression or grammar, or of
            all choices, that an answer has to follow.
        max_waiting_requests: maximum number of prompts, of all clients, that wait for their first token; with
            more, requests get 429.
        max_connections: maximum number of connections. If all are open, a new one replaces one without a
            request; while seven eighths of them have requests, further requests get 429.
        header_timeout: seconds within which the head of a request must arrive; nginx's default.
        body_timeout: seconds within which the body of a request must arrive.
        send_timeout: seconds within which a client must read what is buffered for it; nginx's default.
        keep_alive_timeout: seconds that a connection without a request stays open; vLLM's default.

    Raises:
        ValueError: a limit is not positive.
    """

    max_body_size: int = 2_000_000
    max_bodies_size: int = 256_000_000
    max_json_depth: int = 64
    max_json_lists: int = 50_000
    max_choices: int = 1024
    max_messages: int = 2048
    max_stop_strings: int = 64
    max_bad_words: int = 128
    max_string_length: int = 256
    max_token_ids: int = 1024
    max_grammar_size: int = 100_000
    max_waiting_requests: int = 2048
    max_connections: int = 4096
    header_timeout: float = 60.0
    body_timeout: float = 60.0
    send_timeout: float = 60.0
    keep_alive_timeout: float = 5.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ValueError(f"{field.name} must be positive, got {value}")

    def check_json(self, body: bytes) -> None:
        """Check the number of lists and objects in a body before it is parsed.

        Raises:
            ValueError: there are too many.
        """
        if _openings(body) > self.max_json_lists and _openings(_STRING.sub(b"", body)) > self.max_json_lists:
            raise ValueError(
                f"the body has more than {self.max_json_lists} lists and objects (max_json_lists): send less"
            )

    def check_body(self, body: Any) -> None:
        """Check the sizes in a parsed body before it is validated: millions of entries would take minutes.

        Raises:
            ValueError: the body is nested too deep, or a list or string in it is too long.
        """
        if _is_deeper(body, self.max_json_depth):
            raise ValueError(
                f"the body has lists and objects in each other more than {self.max_json_depth} deep "
                "(max_json_depth): make it flatter"
            )
        if not isinstance(body, Mapping):
            return
        for name, setting in _ENTRIES.items():
            _check_number(name, body.get(name), getattr(self, setting), setting)
        prompt = body.get("prompt")
        if (
            isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
        ):  # a list of prompts, not of tokens
            _check_number("prompt", prompt, self.max_choices, "max_choices")
        for name in ("stop", "stop_sequences", "bad_words"):
            value = body.get(name)
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and len(text) > self.max_string_length:
                    raise ValueError(
                        f"{name} has a string of {len(text)} characters, and the server takes at most "
                        f"{self.max_string_length} (max_string_length): shorten it"
                    )

    def check_choices(self, num_prompts: int, num_sequences: int) -> None:
        """Check the number of choices of a request.

        Args:
            num_sequences: number of sequences of each prompt.

        Raises:
            ValueError: there are too many.
        """
        if num_prompts * num_sequences > self.max_choices:
            raise ValueError(
                f"n, or best_of, is {num_sequences} for each of {num_prompts} prompts, and the server takes "
                f"at most {self.max_choices} together (max_choices): send them in several requests"
            )

    def check_grammar(self, params: SamplingParams) -> None:
        """Check the size of what the outputs of a request have to be.

        Raises:
            ValueError: it is too large.
        """
        structure = params.structured_outputs
        if structure is not None and structure.size > self.max_grammar_size:
            raise ValueError(
                f"structured_outputs: {structure.kind} has {structure.size} characters, and the server takes "
                f"at most {self.max_grammar_size} (max_grammar_size): shorten it"
            )


# A string without an end extends to the end of the body, so the search stays linear.
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)

_ENTRIES = {
    "messages": "max_messages",
    "input": "max_messages",  # of the Responses API
    "stop": "max_stop_strings",
    "stop_sequences": "max_stop_strings",  # Anthropic's
    "bad_words": "max_bad_words",
    "stop_token_ids": "max_token_ids",
    "allowed_token_ids": "max_token_ids",
    "logit_bias": "max_token_ids",
}


def _openings(json: bytes) -> int:
    return json.count(b"[") + json.count(b"{")


def _check_number(name: str, value: Any, limit: int, setting: str) -> None:
    if isinstance(value, (list, dict)) and len(value) > limit:
        raise ValueError(
            f"{name} has {len(value)} entries, and the server takes at most {limit} ({setting}): send fewer"
        )


def _is_deeper(body: Any, limit: int) -> bool:
    """Return whether lists and objects are nested more than ``limit`` deep.

    It goes level by level, as JSON may be nested deeper than Python's stack.
    """
    level = [body] if isinstance(body, (dict, list)) else []
    for _ in range(limit):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
    return bool(level)
