"""Compute the content keys of full blocks from their tokens and all tokens before them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import sha256  # collision-resistant: a crafted prompt must not hit another one's blocks


def root_key(cache_salt: str | None) -> bytes:
    """Return the parent key of a prompt's first block: prompts with different salts share no blocks."""
    return _hash(b"no salt" if cache_salt is None else b"salt " + cache_salt.encode("utf-8", "surrogatepass"))


def extend_keys(
    keys: list[bytes], root: bytes, token_ids: Sequence[int], num_tokens: int, block_size: int
) -> None:
    """Append the keys of further full blocks to ``keys``.

    Args:
        keys: keys of the first blocks; changed in place.
        root: result of `root_key`.
        token_ids: the sequence's tokens from its start.
        num_tokens: number of tokens whose full blocks get keys.
        block_size: number of tokens of a block.
    """
    parent = keys[-1] if keys else root
    layout = f"{block_size}q"
    for start in range(len(keys) * block_size, num_tokens - block_size + 1, block_size):
        # The parent key has a fixed length, so different (parent, tokens) pairs give different bytes.
        parent = _hash(parent + struct.pack(layout, *token_ids[start : start + block_size]))
        keys.append(parent)


def _hash(data: bytes) -> bytes:
    return sha256(data).digest()
