"""The numba kernel of `paged_attention` on the CPU.

A work item is a tile of query rows with a range of keys. A row is a query token under a query head; all rows
of a KV head share its keys and values. Threads take work items from a shared counter. A sequence of one
query token, or whose rows fit one tile, is split along the keys as well. The KV splits depend on its length
only, so that its result does not depend on the batch; their partials are merged afterwards.

In latent attention (`mla.py`) the values are the first elements of the keys: they lie at an offset of 0.

Each work item runs FlashAttention's online softmax in base 2 over tiles of KEYS keys, in one of two forms:
- few rows (decode): vectors run along D. Logits are dot products; K and V are streamed from the cache through
  registers once for up to four rows.
- many rows (prefill): vectors run along the rows. Q is transposed once, logits and output are transposed too,
  keys and values are broadcast scalars, and the softmax needs no sums across lanes.
Keys and values of 16 or 8 bits are widened in registers (decode) or a tile at a time (prefill). The scales of
quantised caches are applied with the scale of the logits and at the end of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .decode import few_rows, scratch_bytes
from .prefill import many_rows
from .simd import HALF, fetch_add, inner, load_scalar, splat, store, store_float
from .team import HEADER_BYTES, INVALID, Launch, read, run_parallel
from .work import (
    FEW_ROWS,
    I32,
    INFINITY,
    ITEM_BYTES,
    ROWS,
    Batch,
    Item,
    aligned,
    are_valid,
    merge_row,
    plan,
    prefetch_keys,
    query_range,
)


class Shared(NamedTuple):
    """Hold what the threads of a call share: counts and addresses."""

    batch: int
    counter: int  # int64, the next task
    items: int  # [count] of Item
    count: int
    partials: int  # float32 [partials, Hkv, ROWS, D], D of values
    partial_lse: int  # float32 [partials, Hkv, ROWS], in base 2
    is_merge: int
    threads: int


@inner
def _item(items, index):
    return read(Item, items + ITEM_BYTES * index)


@inner
def _has_same_rows(item, other):
    return item.seq == other.seq and item.row == other.row


@inner
def _clear(dtype, batch, first, last):
    """Write zeros and an lse of -inf for query tokens `first` to `last`, which see no key."""
    for token in range(first, last):
        for h in range(batch.num_heads):
            at = batch.out + token * batch.out_token_stride + h * batch.out_head_stride
            for d in range(0, batch.value_size, HALF):
                store(dtype, at + batch.itemsize * d, splat(np.float32(0.0), HALF))
            if batch.lse != 0:
                store_float(batch.lse + 4 * (token * batch.num_heads + h), -INFINITY)


@inner
def _clear_empty(dtype, batch):
    """Clear the rows of empty sequences and the padding."""
    last = np.int64(0)
    for s in range(batch.num_seqs):
        first, last = query_range(batch, s)
        if load_scalar(I32, batch.seq_lens + 4 * s) == 0:
            _clear(dtype, batch, first, last)
    _clear(dtype, batch, last, batch.num_tokens)


@inner
def _work(dtype, kv_dtype, batch, shared):
    """Process work items until none is left, in one thread. Starts with the last, which are the longest."""
    memory, scratch = aligned(scratch_bytes(kv_dtype, batch))
    tasks = shared.count * batch.num_kv_heads
    while True:
        task = tasks - 1 - fetch_add(shared.counter)
        if task < 0:
            return memory.size  # keeps the scratch memory alive until here
        item = _item(shared.items, task // batch.num_kv_heads)
        head = task % batch.num_kv_heads
        if task >= shared.threads:  # what this thread will probably take next
            following = task - shared.threads
            next_item = _item(shared.items, following // batch.num_kv_heads)
            prefetch_keys(batch, next_item, following % batch.num_kv_heads)
        if item.rows <= FEW_ROWS:
            few_rows(dtype, kv_dtype, batch, item, head, shared.partials, shared.partial_lse, scratch)
        else:
            many_rows(dtype, kv_dtype, batch, item, head, shared.partials, shared.partial_lse)


@inner
def _merge(dtype, batch, shared):
    """Merge the partials of split sequences until none is left, in one thread."""
    while True:
        task = fetch_add(shared.counter)
        if task >= shared.count * batch.num_kv_heads:
            return
        index, head = task // batch.num_kv_heads, task % batch.num_kv_heads
        item = _item(shared.items, index)
        if item.partial < 0 or (index > 0 and _has_same_rows(_item(shared.items, index - 1), item)):
            continue  # not the first split of these rows
        num_splits = 1
        while index + num_splits < shared.count and _has_same_rows(
            _item(shared.items, index + num_splits), item
        ):
            num_splits += 1
        for r in range(item.rows):
            merge_row(dtype, batch, item, r, head, num_splits, shared.partials, shared.partial_lse)


def build(dtype, kv_dtype):
    """Return the kernel's entry and work for queries of `dtype` and a cache of `kv_dtype`."""

    def attention(address):
        launch, batch = read(Launch, address), read(Batch, address + HEADER_BYTES)
        if not are_valid(batch):
            return INVALID
        count, num_partials = plan(batch, 0, 0)
        items = np.empty((count, ITEM_BYTES // 8), np.int64)
        plan(batch, np.int64(items.ctypes.data), count)
        _clear_empty(dtype, batch)
        rows = num_partials * batch.num_kv_heads * ROWS
        partials = np.empty(rows * batch.value_size, np.float32)
        partial_lse = np.empty(rows, np.float32)
        shared = np.zeros(9, np.int64)  # a Shared, and the counter
        shared[0] = address + HEADER_BYTES
        shared[1] = shared.ctypes.data + 8 * 8
        shared[2] = items.ctypes.data
        shared[3] = count
        shared[4] = partials.ctypes.data
        shared[5] = partial_lse.ctypes.data
        shared[7] = launch.threads
        run_parallel(launch, np.int64(shared.ctypes.data))
        if num_partials > 0:
            shared[6], shared[8] = 1, 0
            run_parallel(launch, np.int64(shared.ctypes.data))
        kept = items.size + partials.size + partial_lse.size + shared.size  # until here
        return min(kept, 0)

    def work(address):
        shared = read(Shared, address)
        batch = read(Batch, shared.batch)
        if shared.is_merge:
            _merge(dtype, batch, shared)
        else:
            _work(dtype, kv_dtype, batch, shared)
        return 0

    return attention, work
