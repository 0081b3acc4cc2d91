"""Blocks of equal size: who refers to them, what they hold, which is given up first. No torch, no attention.

A block is an id; the memory behind it is the caller's. It is used (somebody refers to it), cached (nobody
does, and it still holds content under a key, so that it can be found again), or empty. `num_free` counts the
last two: both can be taken, empty ones first, then the cached one that has been unused for longest.

Keys are the caller's: a hash of tokens for a KV cache, a name and a page number for an adapter. Here the
pages of LoRA adapters share a memory of four blocks:

>>> pool = BlockPool(4)
>>> def load(adapter, num_pages):
...     blocks, read = [], []
...     for key in [(adapter, page) for page in range(num_pages)]:
...         block = pool.find(key)
...         if block is None:
...             block = pool.allocate()
...             pool.promise(block, key)
...             read.append(key)  # from the disk, into the block
...         else:
...             pool.share(block)
...         blocks.append(block)
...     pool.confirm()
...     return blocks, read
>>> sql, _ = load("sql", 2)
>>> load("sql", 2) == (sql, [])  # a second request reads nothing and takes nothing
True
>>> pool.num_free
2
>>> for block in [*sql, *sql]:  # both requests end; the adapter stays
...     pool.release(block)
>>> pool.num_free, pool.num_cached
(4, 2)
>>> chat, read = load("chat", 3)  # needs one of its two blocks: the one released first
>>> pool.find(("sql", 0)), pool.find(("sql", 1)) in sql
(None, True)
>>> host = BlockPool(8)  # the same on the other side of a link
>>> pages = [(chat, [("chat", page) for page in range(3)])]
>>> moved, copies = move(pages, pool, host)
>>> copies == list(zip(chat, moved[0]))
True
>>> back, copies = move([(moved[0], pages[0][1])], host, pool)
>>> copies, back == [chat]  # nothing was written over meanwhile: nothing to copy
([], True)
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Sequence

Run = tuple[Sequence[int], Sequence[Hashable]]  # blocks in order, and the keys of the first of them


class BlockPool:
    """Ids from 0 to ``num_blocks - 1`` with reference counts, keys and an order of eviction.

    Every operation but `take` takes constant time. Queries change nothing; the mutations expect that they
    were asked.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks
        self._empty = list(range(num_blocks - 1, -1, -1))  # a stack: the block freed last is warm in caches
        self._cached: OrderedDict[int, None] = OrderedDict()  # a linked list, the longest unused first
        self._keys: list[Hashable] = [None] * num_blocks  # of what each holds; None: of nothing that is found
        self._found: dict[Hashable, int] = {}  # the inverse
        self._promised: list[int] = []

    @property
    def num_free(self) -> int:
        """Blocks that can be taken."""
        return len(self._empty) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody refers to and that hold content."""
        return len(self._cached)

    def empty_blocks(self) -> list[int]:
        """Blocks that hold nothing anybody may read."""
        return list(self._empty)

    def find(self, key: Hashable) -> int | None:
        """The block that holds this content."""
        return self._found.get(key)

    def allocate(self) -> int:
        """Take a free block with one reference; if no empty one is left, a cached one loses its content."""
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._found[self._keys[block]]
            self._keys[block] = None
        self.ref_counts[block] = 1
        return block

    def take(self, blocks: Sequence[int]) -> None:
        """Take these blocks, which are empty, with one reference each; in time that grows with the pool."""
        taken = set(blocks)
        self._empty = [block for block in self._empty if block not in taken]
        for block in blocks:
            self.ref_counts[block] = 1

    def share(self, block: int) -> None:
        """One more reference to a used or cached block."""
        if self.ref_counts[block] == 0:
            del self._cached[block]
        self.ref_counts[block] += 1

    def release(self, block: int) -> None:
        """Drop one reference; the last one frees the block."""
        count = self.ref_counts[block] = self.ref_counts[block] - 1
        if count == 0:
            if self._keys[block] is None:
                self._empty.append(block)
            else:
                self._cached[block] = None

    def register(self, block: int, key: Hashable) -> bool:
        """Let a used block be found under a key.

        Returns:
            Whether it is now: not if another block holds the same, or the block has another key.
        """
        if key in self._found or self._keys[block] is not None:
            return False
        self._found[key] = block
        self._keys[block] = key
        return True

    def promise(self, block: int, key: Hashable) -> None:
        """Register a block whose content will be there once what is being planned has run (`confirm`)."""
        if self.register(block, key):
            self._promised.append(block)

    def confirm(self) -> None:
        """What was promised is there."""
        self._promised.clear()

    def revoke(self) -> list[int]:
        """Forget what was promised, as it is not there, and return the blocks."""
        revoked = list(self._promised)
        for block in revoked:
            self.forget(block)
        self._promised.clear()
        return revoked

    def forget(self, block: int) -> None:
        """The block's content changes, or is of no use any more. One without a key is no error."""
        key = self._keys[block]
        if key is not None:
            self._keys[block] = None
            del self._found[key]
            if block in self._cached:
                del self._cached[block]
                self._empty.append(block)

    def check_integrity(self, references: Counter[int]) -> None:
        """Compare with the references that exist outside: empty + used + cached must be all there are.

        Raises:
            RuntimeError: a block is lost, in two places, counted wrongly, or found under a wrong key.
        """
        empty = set(self._empty)
        if len(empty) != len(self._empty):
            raise RuntimeError("a block is in the list of empty ones twice")
        for block, count in enumerate(self.ref_counts):
            if count != references[block]:
                raise RuntimeError(f"block {block} counts {count} references, {references[block]} exist")
            if (count > 0) + (block in empty) + (block in self._cached) != 1:
                raise RuntimeError(f"block {block} is not just one of used, cached and empty")
            if self._keys[block] is None and block in self._cached:
                raise RuntimeError(f"block {block} is cached and has no key")
            if self._keys[block] is not None and block in empty:
                raise RuntimeError(f"block {block} is empty and has a key")
        used = sum(count > 0 for count in self.ref_counts)
        if len(empty) + used + len(self._cached) != self.num_blocks:
            raise RuntimeError("empty, used and cached blocks are not all blocks")
        if {key: block for block, key in enumerate(self._keys) if key is not None} != self._found:
            raise RuntimeError("keys and the blocks found under them differ")


def num_to_move(runs: Iterable[Run], target: BlockPool) -> int:
    """Free blocks that `move` would take from ``target``."""
    fresh: set[int] = set()
    cached: set[int] = set()
    for blocks, keys in runs:
        for i, block in enumerate(blocks):
            hit = target.find(keys[i]) if i < len(keys) else None
            if hit is None:
                fresh.add(block)
            elif target.ref_counts[hit] == 0:
                cached.add(hit)
    return len(fresh) + len(cached)


def move(
    runs: Sequence[Run], source: BlockPool, target: BlockPool
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Move references from one pool to another. What shares a block goes on sharing one, and what the target
    holds already is not copied.

    Args:
        runs: every reference to move, as blocks of ``source`` with the keys of the first of them.

    Returns:
        The blocks of each run in ``target``, and (source block, target block) of the copies to make before
        the source's are written again. Their content is promised in ``target``.
    """
    # All hits are taken before anything is allocated, which could evict them.
    moved = [
        [target.find(keys[i]) if i < len(keys) else None for i in range(len(blocks))] for blocks, keys in runs
    ]
    for hits in moved:
        for hit in hits:
            if hit is not None:
                target.share(hit)
    copies: dict[int, int] = {}
    for (blocks, keys), new in zip(runs, moved):
        for i, block in enumerate(blocks):
            if new[i] is not None:
                continue
            if block in copies:
                target.share(copies[block])
            else:
                copies[block] = target.allocate()
            new[i] = copies[block]
            if i < len(keys):
                target.promise(copies[block], keys[i])
    for blocks, _ in runs:
        for block in reversed(blocks):  # the end of a run is of no use without its beginning
            source.release(block)
    return moved, list(copies.items())  # type: ignore[return-value]
