"""Manage a pool of equal blocks: reference counts, content keys, LRU eviction. It knows nothing of attention.

A block is an ID; the memory behind it belongs to the caller. It is used (it has references), cached (it has
none, and its content can still be found by its key), or empty. `num_free` counts cached and empty blocks:
allocation takes empty blocks first, then the least recently used cached block.

The caller chooses the keys: a hash of tokens for a KV cache, a name and a page number for an adapter. Here
the pages of LoRA adapters share four blocks of memory:

>>> pool = BlockPool(4)
>>> def load(adapter, num_pages):
...     blocks, read = [], []
...     for key in [(adapter, page) for page in range(num_pages)]:
...         block = pool.find(key)
...         if block is None:
...             block = pool.allocate()
...             pool.promise(block, key)
...             read.append(key)  # copy the page from disk into the block
...         else:
...             pool.share(block)
...         blocks.append(block)
...     pool.confirm()
...     return blocks, read
>>> sql, _ = load("sql", 2)
>>> load("sql", 2) == (sql, [])  # a second request shares the blocks and reads nothing
True
>>> pool.num_free
2
>>> for block in [*sql, *sql]:  # both requests end; the adapter stays cached
...     pool.release(block)
>>> pool.num_free, pool.num_cached
(4, 2)
>>> chat, read = load("chat", 3)  # evicts one of the two cached blocks: the one released first
>>> pool.find(("sql", 0)), pool.find(("sql", 1)) in sql
(None, True)
>>> host = BlockPool(8)  # a pool of host memory to swap to
>>> pages = [(chat, [("chat", page) for page in range(3)])]
>>> moved, copies = move(pages, pool, host)
>>> copies == list(zip(chat, moved[0]))
True
>>> back, copies = move([(moved[0], pages[0][1])], host, pool)
>>> copies, back == [chat]  # the device still holds the content: nothing to copy
([], True)
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Sequence

# Blocks in order, and the keys of the first len(keys) blocks.
KeyedBlocks = tuple[Sequence[int], Sequence[Hashable]]
Note = tuple[str, int, Hashable]  # what happened to a block, the block, and the key where it is about content


class BlockPool:
    """Manage the blocks 0 to ``num_blocks - 1``: their references, content keys and eviction order.

    Every operation but `take` takes constant time. Callers check `num_free` before they take blocks.

    Attributes:
        journal: list that changes of blocks are appended to, in order, while somebody watches; else None.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks
        self._empty = list(range(num_blocks - 1, -1, -1))  # a stack: the block freed last is warm in caches
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._keys: list[Hashable] = [None] * num_blocks  # block -> key; None: it cannot be found
        self._block_of: dict[Hashable, int] = {}  # the inverse
        self._promised: list[int] = []
        self.journal: list[Note] | None = None

    @property
    def num_free(self) -> int:
        """Return the number of blocks that can be taken."""
        return len(self._empty) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Return the number of blocks that hold content and have no references."""
        return len(self._cached)

    def empty_blocks(self) -> list[int]:
        """Return the blocks that have neither references nor content."""
        return list(self._empty)

    def key_of(self, block: int) -> Hashable:
        """Return the key that the block's content is found by, or None."""
        return self._keys[block]

    def find(self, key: Hashable) -> int | None:
        """Return the block that holds the content of this key, or None."""
        return self._block_of.get(key)

    def allocate(self) -> int:
        """Take a free block with one reference; evict a cached one if none is empty.

        Raises:
            KeyError: no block is free.
        """
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            key = self._keys[block]
            del self._block_of[key]
            self._keys[block] = None
            if self.journal is not None:
                self.journal.append(("evict", block, key))
        self.ref_counts[block] = 1
        if self.journal is not None:
            self.journal.append(("take", block, None))
        return block

    def take(self, blocks: Sequence[int]) -> None:
        """Take these empty blocks with one reference each, in time linear in the size of the pool."""
        taken = set(blocks)
        self._empty = [block for block in self._empty if block not in taken]
        for block in blocks:
            self.ref_counts[block] = 1
        if self.journal is not None:
            self.journal += [("take", block, None) for block in blocks]

    def share(self, block: int) -> None:
        """Add a reference to a used or cached block."""
        if self.ref_counts[block] == 0:
            del self._cached[block]
        self.ref_counts[block] += 1
        if self.journal is not None:
            self.journal.append(("share", block, None))

    def release(self, block: int) -> None:
        """Drop one reference; the last one frees the block."""
        count = self.ref_counts[block] = self.ref_counts[block] - 1
        if count == 0:
            if self._keys[block] is None:
                self._empty.append(block)
            else:
                self._cached[block] = None
        if self.journal is not None:
            self.journal.append(("release", block, None))

    def register(self, block: int, key: Hashable) -> bool:
        """Register the content of a used block under a key.

        Returns:
            False if another block has the key or the block has another key; nothing is registered then.
        """
        if key in self._block_of or self._keys[block] is not None:
            return False
        self._block_of[key] = block
        self._keys[block] = key
        if self.journal is not None:
            self.journal.append(("store", block, key))
        return True

    def promise(self, block: int, key: Hashable) -> None:
        """Register a block whose content the planned step will write (see `confirm` and `revoke`)."""
        if self.register(block, key):
            self._promised.append(block)

    def confirm(self) -> None:
        """Mark all promised content as written."""
        self._promised.clear()

    def revoke(self) -> list[int]:
        """Forget the promised content, which was not written, and return its blocks."""
        revoked = list(self._promised)
        for block in revoked:
            self.forget(block)
        self._promised.clear()
        return revoked

    def forget(self, block: int) -> None:
        """Remove the block's key, if it has one: its content changes or is no longer of use."""
        key = self._keys[block]
        if key is not None:
            self._keys[block] = None
            del self._block_of[key]
            if block in self._cached:
                del self._cached[block]
                self._empty.append(block)
            if self.journal is not None:
                self.journal.append(("remove", block, key))

    def check_integrity(self, references: Counter[int]) -> None:
        """Check the pool's state against the references that callers hold.

        Args:
            references: number of references to each block.

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
        if {key: block for block, key in enumerate(self._keys) if key is not None} != self._block_of:
            raise RuntimeError("keys and the blocks found under them differ")


def num_to_move(block_lists: Iterable[KeyedBlocks], target: BlockPool) -> int:
    """Return the number of free blocks that `move` would take from ``target``."""
    fresh: set[int] = set()
    cached: set[int] = set()
    for blocks, keys in block_lists:
        for i, block in enumerate(blocks):
            hit = target.find(keys[i]) if i < len(keys) else None
            if hit is None:
                fresh.add(block)
            elif target.ref_counts[hit] == 0:
                cached.add(hit)
    return len(fresh) + len(cached)


def move(
    block_lists: Sequence[KeyedBlocks], source: BlockPool, target: BlockPool
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Move references from one pool to another.

    References to one block become references to one block of ``target``. Content that ``target`` already
    holds is not copied.

    Args:
        block_lists: the references to move, as blocks of ``source`` with their keys.

    Returns:
        The blocks of each list in ``target``, and (source block, target block) of the copies to make before
        the source blocks are written again. The content is promised in ``target``.
    """
    # Share all hits before anything is allocated, which could evict them.
    moved = [
        [target.find(keys[i]) if i < len(keys) else None for i in range(len(blocks))]
        for blocks, keys in block_lists
    ]
    for hits in moved:
        for hit in hits:
            if hit is not None:
                target.share(hit)
    copies: dict[int, int] = {}
    for (blocks, keys), new in zip(block_lists, moved):
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
    for blocks, _ in block_lists:
        for block in reversed(blocks):  # evict the end first: it is useless without the beginning
            source.release(block)
    return moved, list(copies.items())  # type: ignore[return-value]
