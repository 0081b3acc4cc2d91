"""The numba kernel of `paged_attention` on the CPU.

A work item is a tile of query rows with a range of keys. A row is a query token under a query head; all rows
of a KV head share its keys and values. Threads take work items from a shared counter. A sequence whose rows
fit one tile is split along the keys as well. The KV splits depend on its length only, so that its result does
not depend on the batch; their partials are merged afterwards.

Each work item runs FlashAttention's online softmax in base 2 over tiles of KEYS keys, in one of two forms:
- few rows (decode): vectors run along D. Logits are dot products; K and V are streamed from the cache through
  registers once for up to four rows.
- many rows (prefill): vectors run along the rows. Q is transposed once, logits and output are transposed too,
  keys and values are broadcast scalars, and the softmax needs no sums across lanes.
Keys and values of 16 or 8 bits are widened in registers (decode) or a tile at a time (prefill). The scales of
quantised caches are applied with the scale of the logits and at the end of a row.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from .decode import few_rows
from .prefill import many_rows
from .simd import HALF, fetch_add, inner, load_scalar, splat, store, store_float
from .work import FEW_ROWS, I32, INFINITY, ROWS, Item, merge_row, plan


@inner
def _item(items, index):
    row = items[index]
    return Item(row[0], row[1], row[2], row[3], row[4], row[5], row[6], row[7])


@inner
def _clear(dtype, batch, first, last):
    """Write zeros and an lse of -inf for query tokens `first` to `last`, which see no key."""
    for token in range(first, last):
        for h in range(batch.num_heads):
            at = batch.out + token * batch.out_token_stride + h * batch.out_head_stride
            for d in range(0, batch.head_size, HALF):
                store(dtype, at + batch.itemsize * d, splat(np.float32(0.0), HALF))
            if batch.lse != 0:
                store_float(batch.lse + 4 * (token * batch.num_heads + h), -INFINITY)


@inner
def _clear_empty(dtype, batch):
    """Clear the rows of empty sequences and the padding."""
    end = batch.num_seqs
    for s in range(batch.num_seqs):
        first, last = s, s + 1
        if batch.query_start_loc != 0:
            first = np.int64(load_scalar(I32, batch.query_start_loc + 4 * s))
            last = np.int64(load_scalar(I32, batch.query_start_loc + 4 * s + 4))
            end = last
        if load_scalar(I32, batch.seq_lens + 4 * s) == 0:
            _clear(dtype, batch, first, last)
    _clear(dtype, batch, end, batch.num_tokens)


@inner
def _work(dtype, kv_dtype, batch, items, counter, q_scale, cap, partials, partial_lse):
    """Process work items until none is left, in one thread. Starts with the last, which are the longest."""
    tasks = len(items) * batch.num_kv_heads
    while True:
        task = tasks - 1 - fetch_add(counter)
        if task < 0:
            return
        item = _item(items, task // batch.num_kv_heads)
        head = task % batch.num_kv_heads
        if item.rows <= FEW_ROWS:
            few_rows(dtype, kv_dtype, batch, item, head, q_scale, cap, partials, partial_lse)
        else:
            many_rows(dtype, kv_dtype, batch, item, head, q_scale, cap, partials, partial_lse)


def build(version: str, jit):
    """Return the compiled entry point.

    Args:
        version: digest of the sources of this package. numba's disk cache notices changes of this file only,
            but its key includes the values in a closure.
        jit: decorator that compiles the entry point.
    """

    @jit
    def attention(dtype, kv_dtype, batch, q_scale, cap, num_threads):
        version  # noqa: B018  puts it into the closure
        count, num_partials = plan(batch, np.empty((0, 8), np.int64))
        items = np.empty((count, 8), np.int64)
        plan(batch, items)
        _clear_empty(dtype, batch)
        partial_rows = num_partials * batch.num_kv_heads * ROWS
        memory = np.empty(partial_rows * batch.head_size, np.float32)
        partial_lse = np.empty(partial_rows, np.float32)
        partials = np.int64(memory.ctypes.data)
        counter = np.zeros(1, np.int64)
        address = np.int64(counter.ctypes.data)
        for _ in prange(num_threads):
            _work(dtype, kv_dtype, batch, items, address, q_scale, cap, partials, partial_lse)
        if num_partials > 0:
            for task in prange(count * batch.num_kv_heads):
                index = task // batch.num_kv_heads
                item = _item(items, index)
                is_first_split = index == 0 or items[index - 1, 0] != item.seq
                if item.partial >= 0 and is_first_split:
                    num_splits = 1
                    while index + num_splits < count and items[index + num_splits, 0] == item.seq:
                        num_splits += 1
                    head = task % batch.num_kv_heads
                    for r in range(item.rows):
                        merge_row(dtype, batch, item, r, head, num_splits, partials, partial_lse)
        return memory.size + counter.size  # keeps the arrays alive until here

    return attention
