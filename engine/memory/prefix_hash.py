"""Keys of full blocks: a block is found again by its tokens and all before them. No torch."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import sha256  # nobody finds two prompts with one hash, not even on purpose


def root_key(cache_salt: str | None) -> bytes:
    """What the first block of a prompt follows: prompts with different salts share nothing."""
    return _hash(b"no salt" if cache_salt is None else b"salt " + cache_salt.encode("utf-8", "surrogatepass"))


def extend_keys(
    keys: list[bytes], root: bytes, token_ids: Sequence[int], num_tokens: int, block_size: int
) -> None:
    """Append the keys of further full blocks.

    Args:
        keys: of the first blocks; changed.
        root: `root_key`.
        token_ids: of the sequence from its start.
        num_tokens: keys are added for the full blocks among this many.
    """
    parent = keys[-1] if keys else root
    layout = f"{block_size}q"
    for start in range(len(keys) * block_size, num_tokens - block_size + 1, block_size):
        # All of one length, so that no other split into parent and tokens gives the same bytes.
        parent = _hash(parent + struct.pack(layout, *token_ids[start : start + block_size]))
        keys.append(parent)


def _hash(data: bytes) -> bytes:
    return sha256(data).digest()
