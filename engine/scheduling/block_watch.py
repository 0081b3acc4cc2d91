"""Report the state of all blocks and requests, and then what changes. No torch.

What is reported are plain dictionaries, as `/kv_cache/events` sends them; docs/server.md describes them.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from ..memory import block_pool
from ..memory.block_manager import BlockManager
from ..memory.block_pool import BlockPool
from ..memory.block_tables import NO_BLOCK
from .request import SequenceGroup
from .scheduler import Scheduler

Json = dict[str, Any]
_MEDIA = {"gpu": "GPU", "cpu": "CPU"}  # vLLM's names
_CONTENT = {"store": "BlockStored", "evict": "BlockRemoved", "remove": "BlockRemoved"}


class BlockWatch:
    """Watch a block manager and the requests that hold its blocks.

    To be used between two steps, by the thread that runs them. As long as it is not closed, the block manager
    keeps a journal, which `changes` empties. There can be one at a time.

    Attributes:
        number: number of the last report of changes; the next one has the next number.
    """

    def __init__(self, blocks: BlockManager, scheduler: Scheduler) -> None:
        self._blocks = blocks
        self._scheduler = scheduler
        self._pools = {"gpu": blocks.gpu, "cpu": blocks.cpu}
        self.number = 0
        blocks.record(True)
        self._requests = self._read_requests()  # as of the last report
        self._totals = self._read_totals()

    def close(self) -> None:
        """End the journal."""
        self._blocks.record(False)

    def snapshot(self) -> Json:
        """Return the state as of the last report of changes. Call `changes` before, unless just created."""
        held = {name: [_state(pool, b) for b in _held(pool)] for name, pool in self._pools.items()}
        events: list[Json] = [{"type": "AllBlocksCleared"}]
        for name, states in held.items():
            if hashes := [content for _, _, content in states if content]:
                events.append(self._event("BlockStored", hashes, name))
        return {
            "type": "snapshot",
            "number": self.number,
            "time": time.time(),
            "block_size": self._blocks.block_size,
            "num_gpu_blocks": self._blocks.gpu.num_blocks,
            "num_cpu_blocks": self._blocks.cpu.num_blocks,
            **held,
            "requests": [_written(name, new, {}) for name, new in self._requests.items()],
            **self._totals,
            "events": events,
        }

    def changes(self) -> Json | None:
        """Return what has changed since the last report, or None."""
        old, new, totals = self._requests, self._read_requests(), self._read_totals()
        journals = {name: pool.journal or [] for name, pool in self._pools.items()}
        if old == new and totals == self._totals and not any(journals.values()):
            return None
        happened: list[Json] = [
            {"type": what, "sequences": seq_ids, "blocks": blocks}
            for what, seq_ids, blocks in self._blocks.journal or []
        ]
        report: Json = {"type": "changes", "number": self.number + 1, "time": time.time()}
        events: list[Json] = []
        for name, journal in journals.items():
            touched = sorted({block for _, block, _ in journal})
            report[name] = [_state(self._pools[name], block) for block in touched]
            events += self._events(name, journal)
            happened += [
                {"type": "eviction", "medium": _MEDIA[name], "block": block, "hash": _hash(key)}
                for what, block, key in journal
                if what == "evict"
            ]
        report["requests"] = [
            _written(name, state, old.get(name, (None, {}))[1])
            for name, state in new.items()
            if state != old.get(name)
        ]
        report["ended"] = [name for name in old if name not in new]
        report |= totals
        report |= {"happened": happened, "events": events}
        self._requests, self._totals = new, totals
        self.number += 1
        self._blocks.record(True)
        return report

    def _events(self, name: str, journal: Iterable[block_pool.Note]) -> Iterator[Json]:
        content = ((_CONTENT[what], _hash(key)) for what, _, key in journal if what in _CONTENT)
        for kind, notes in groupby(content, key=lambda note: note[0]):
            yield self._event(kind, [key for _, key in notes], name)

    def _event(self, kind: str, hashes: Sequence[str | None], name: str) -> Json:
        size = {"block_size": self._blocks.block_size} if kind == "BlockStored" else {}
        return {"type": kind, "block_hashes": hashes, **size, "medium": _MEDIA[name]}

    def _read_totals(self) -> dict[str, int]:
        scheduler = self._scheduler
        return {
            "num_preemptions": scheduler.num_preemptions,
            "prefix_cache_queries": scheduler.num_prefix_queries,
            "prefix_cache_hits": scheduler.num_prefix_hits,
        }

    def _read_requests(self) -> dict[str, _Request]:
        scheduler = self._scheduler
        groups = [*scheduler.running, *scheduler.preempted, *scheduler.waiting]
        named = {group.request_id: group for group in groups if not group.is_prefix}
        named |= {f"prefix {name}": group for name, group in scheduler.pinned.groups.items()}
        return {name: (group.status.value, self._read_sequences(group)) for name, group in named.items()}

    def _read_sequences(self, group: SequenceGroup) -> _Sequences:
        found: _Sequences = {}
        for seq in group.live:
            medium, table = self._blocks.place(seq.seq_id)
            found[seq.seq_id] = (len(seq.token_ids), seq.num_computed, medium, list(table))
        return found


# By sequence ID: number of tokens, number of those computed, the pool, and the block table.
_Sequences = dict[int, tuple[int, int, str, list[int]]]
_Request = tuple[str, _Sequences]  # the status before


def _written(name: str, state: _Request, old: _Sequences) -> Json:
    """Return a request with the parts of its block tables that have changed."""
    status, sequences = state
    written = []
    for seq_id, (tokens, computed, medium, table) in sequences.items():
        _, _, old_medium, old_table = old.get(seq_id, (0, 0, medium, []))
        start = _num_equal(old_table, table) if medium == old_medium else 0
        blocks = [None if block == NO_BLOCK else block for block in table[start:]]
        written.append(
            {
                "sequence": seq_id,
                "tokens": tokens,
                "computed": computed,
                "medium": _MEDIA[medium],
                "start": start,
                "blocks": blocks,
            }
        )
    return {"id": name, "status": status, "sequences": written}


def _num_equal(old: list[int], new: list[int]) -> int:
    """Return the length of the common beginning."""
    if old == new[: len(old)]:  # usually a table has grown at most
        return len(old)
    return next((i for i, (a, b) in enumerate(zip(old, new)) if a != b), min(len(old), len(new)))


def _held(pool: BlockPool) -> Iterator[int]:
    """Yield the blocks that have references or content."""
    for block, references in enumerate(pool.ref_counts):
        if references or pool.key_of(block) is not None:
            yield block


def _state(pool: BlockPool, block: int) -> tuple[int, int, str | None]:
    """Return a block, its number of references, and the hash that its content is found by."""
    return block, pool.ref_counts[block], _hash(pool.key_of(block))


def _hash(key: Hashable) -> str | None:
    """Return the first 64 bits of a key."""
    return key[:8].hex() if isinstance(key, bytes) else None
