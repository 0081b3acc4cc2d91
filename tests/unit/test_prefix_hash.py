"""Keys of blocks: equal exactly where a block, all before it and the salt are."""

from __future__ import annotations

import random

from cupaged.engine.memory.prefix_hash import extend_keys, root_key


def keys(tokens: list[int], block_size: int = 4, salt: str | None = None) -> list[bytes]:
    found: list[bytes] = []
    extend_keys(found, root_key(salt), tokens, len(tokens), block_size)
    return found


def test_a_key_depends_on_its_block_all_before_it_and_the_salt(seed):
    rng = random.Random(seed)
    tokens = [rng.randrange(2**31) for _ in range(14)]
    first = keys(tokens)
    assert len(first) == 3
    assert keys(tokens) == first == keys(tokens[:12])
    for position in range(12):
        changed = list(tokens)
        changed[position] ^= 1
        same = position // 4
        assert keys(changed)[:same] == first[:same]
        assert not set(keys(changed)[same:]) & set(first)
    salts = [None, "", "a", "b", "ab", "None", "no salt"]
    assert len({key for salt in salts for key in keys(tokens, salt=salt)}) == 3 * len(salts)
    assert len(set(keys([7] * 16))) == 4, "the same tokens after others"
    assert not set(keys(tokens, block_size=2)) & set(first)


def test_keys_grow_with_the_sequence(seed):
    rng = random.Random(seed)
    tokens = [rng.randrange(1000) for _ in range(30)]
    grown: list[bytes] = []
    for length in (0, 3, 4, 5, 11, 12, 30, 30):
        extend_keys(grown, root_key("s"), tokens, length, 4)
        assert grown == keys(tokens, salt="s")[: length // 4]
