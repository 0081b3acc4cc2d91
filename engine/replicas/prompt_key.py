"""Turn the body of a request into the hashes of its prompt's beginnings, without a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

CHUNK_SIZE = 64  # bytes: about a block of tokens
MAX_CHUNKS = 4096  # that are looked at: prompts that differ later are as good as equal

# Fields of all the APIs in the order in which templates render them.
_FIELDS = ("cache_salt", "tools", "system", "instructions", "prompt", "input", "messages")


def prompt_hashes(body: bytes) -> list[bytes]:
    """Return the chained hashes of the chunks of a request's prompt; none if the body has no prompt.

    A body that is not what an API expects is no error here: a replica refuses it.
    """
    try:
        content = _prompt(json.loads(body))
    except (ValueError, RecursionError):
        return []
    hashes, parent = list[bytes](), b""
    for start in range(0, len(content) - CHUNK_SIZE + 1, CHUNK_SIZE):
        parent = blake2b(parent + content[start : start + CHUNK_SIZE], digest_size=16).digest()
        hashes.append(parent)
    return hashes


def _prompt(fields: Any) -> bytes:
    content = bytearray()
    for name in _FIELDS if isinstance(fields, dict) else ():
        if fields.get(name) is not None:
            content += name.encode() + b"\0"
            for text in _texts(fields[name]):
                content += text
                if len(content) > CHUNK_SIZE * MAX_CHUNKS:
                    return bytes(content[: CHUNK_SIZE * MAX_CHUNKS])
    return bytes(content)


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
