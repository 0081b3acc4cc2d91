"""Turn the body of a request into the hashes of its prompt's beginnings, without a tokenizer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from hashlib import blake2b
from itertools import islice
from typing import Any

CHUNK_SIZE = 64  # maximum number of bytes of a chunk: about a block of tokens
MAX_CHUNKS = 4096  # that are looked at: prompts that differ later are as good as equal

# Fields of all the APIs in the order in which templates render them.
_FIELDS = ("tools", "system", "instructions", "prompt", "input", "messages")


def prompt_hashes(body: bytes) -> list[bytes]:
    """Return the chained hashes of the chunks of a request's prompt, the last of which ends with the prompt.

    A message ends a chunk as well. So the prompt of a conversation's first turn, however short, is a
    beginning of that of the second, most of which can be the first answer.

    A body that is not what an API expects is no error here: a replica refuses it. If it has no prompt, there
    are no hashes.
    """
    hashes = list[bytes]()
    with contextlib.suppress(ValueError, RecursionError):
        fields = json.loads(body)
        if isinstance(fields, dict):
            parent = b"".join(_texts(fields.get("cache_salt")))  # no beginning of a prompt by itself
            for chunk in islice(_chunks(fields), MAX_CHUNKS):
                parent = blake2b(parent + chunk, digest_size=16).digest()
                hashes.append(parent)
    return hashes


def _chunks(fields: dict[str, Any]) -> Iterator[bytes]:
    for name in _FIELDS:
        value = fields.get(name)
        if value is None:
            continue
        if name == "input" and isinstance(value, str):  # short for one message
            value = [{"role": "user", "content": value}]
        of_messages = isinstance(value, list) and all(isinstance(each, dict) for each in value)
        for part in value if of_messages else [value]:
            content = bytearray(name.encode() + b"\0")
            for text in _texts(part):
                content += text
                if len(content) >= CHUNK_SIZE * MAX_CHUNKS:
                    break
            for start in range(0, len(content), CHUNK_SIZE):
                yield bytes(content[start : start + CHUNK_SIZE])


def _texts(value: Any) -> Iterator[bytes]:
    """Return the strings and numbers in a value, in order, so that no bracket ends a beginning early."""
    if isinstance(value, str):
        yield value.encode("utf-8", "surrogatepass") + b"\0"
    elif isinstance(value, dict):
        # The role of a message comes before its content, wherever a client writes it.
        for name in sorted(value, key=lambda name: name != "role"):
            yield from _texts(value[name])
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
    elif value is not None:
        yield f"{value}".encode() + b"\0"
