"""The numba kernel of `paged_attention` on the CPU.

Work is cut into items: a tile of query rows (a row is one query token under one query head; all rows of a
KV head share its keys and values) and a range of keys. Threads take items from a shared counter. A
sequence whose rows fit one tile is cut along the keys as well, by its own length alone, so that its result
does not depend on the batch it is in; the parts are merged afterwards.

Each item runs FlashAttention's online softmax in base 2 over tiles of KEYS keys, in one of two forms:
- few rows (decode): a key is a vector along D. Logits are dot products, and K and V stream from the cache
  through registers once for up to four rows at a time.
- many rows (prefill): a vector holds one number of many rows. Q is transposed once, logits and output stay
  transposed, keys and values enter one scalar at a time, and the softmax needs no sums across lanes.
Keys and values of 16 or 8 bits are widened in registers (decode) or a tile at a time (prefill). The scales of
8-bit ones enter with the scale of the logits and at the end of a row.
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
    """Rows that see nothing: zeros and -inf."""
    for token in range(first, last):
        for h in range(batch.num_heads):
            at = batch.out + token * batch.out_token_stride + h * batch.out_head_stride
            for d in range(0, batch.head_size, HALF):
                store(dtype, at + batch.itemsize * d, splat(np.float32(0.0), HALF))
            if batch.lse != 0:
                store_float(batch.lse + 4 * (token * batch.num_heads + h), -INFINITY)


@inner
def _clear_empty(dtype, batch):
    owned = batch.num_seqs
    for s in range(batch.num_seqs):
        first, last = s, s + 1
        if batch.query_start_loc != 0:
            first = np.int64(load_scalar(I32, batch.query_start_loc + 4 * s))
            last = np.int64(load_scalar(I32, batch.query_start_loc + 4 * s + 4))
            owned = last
        if load_scalar(I32, batch.seq_lens + 4 * s) == 0:
            _clear(dtype, batch, first, last)
    _clear(dtype, batch, owned, batch.num_tokens)


@inner
def _work(dtype, kv_dtype, batch, items, counter, q_scale, cap, partials, partial_lse):
    """One thread: take items until none is left. The last items come first: they are the longest."""
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
    """The compiled entry point.

    Args:
        version: changes with the sources of this package. numba's disk cache sees changes of this file
            only, but hashes what a closure holds.
        jit: the decorator that compiles it.
    """

    @jit
    def attention(dtype, kv_dtype, batch, q_scale, cap, num_threads):
        version  # noqa: B018  holds it in the closure
        count, num_partials = plan(batch, np.empty((0, 8), np.int64))
        items = np.empty((count, 8), np.int64)
        plan(batch, items)
        _clear_empty(dtype, batch)
        slots = num_partials * batch.num_kv_heads * ROWS
        memory = np.empty(slots * batch.head_size, np.float32)
        partial_lse = np.empty(slots, np.float32)
        partials = np.int64(memory.ctypes.data)
        counter = np.zeros(1, np.int64)
        address = np.int64(counter.ctypes.data)
        for _ in prange(num_threads):
            _work(dtype, kv_dtype, batch, items, address, q_scale, cap, partials, partial_lse)
        if num_partials > 0:
            for task in prange(count * batch.num_kv_heads):
                index = task // batch.num_kv_heads
                item = _item(items, index)
                first = index == 0 or items[index - 1, 0] != item.seq
                if item.partial >= 0 and first:
                    parts = 1
                    while index + parts < count and items[index + parts, 0] == item.seq:
                        parts += 1
                    for r in range(item.rows):
                        merge_row(
                            dtype, batch, item, r, task % batch.num_kv_heads, parts, partials, partial_lse
                        )
        return memory.size + counter.size

    return attention
