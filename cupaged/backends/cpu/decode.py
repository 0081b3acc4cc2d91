"""The CPU attention for few rows (decode): vectors run along D.

A logit is a dot product; K and V are streamed from the cache through registers once for up to four rows.
While the logits of a tile of keys are computed, its values are prefetched; while the values are summed, the
next tile's keys. The CPU's own prefetcher cannot predict the addresses of scattered blocks.
"""

from __future__ import annotations

import numpy as np

from .simd import (
    HALF,
    LANES,
    add,
    exp2,
    fma,
    inner,
    iota,
    load,
    load_head,
    load_scalar,
    max_lanes,
    maximum,
    mul,
    splat,
    store,
    store_float,
    sub,
    sum_lanes,
    tanh,
    where_between,
)
from .tiles import (
    MAX_ROWS,
    QUAD,
    padded_size,
    reorder_output,
    reorder_query,
    scores_rows,
    sum_quads,
    values_rows,
)
from .work import (
    F32,
    FEW_ROWS,
    INFINITY,
    KEYS,
    finish_row,
    key_addresses,
    row_address,
    row_limits,
    unit_of,
)

SUMS_STRIDE = 4 * KEYS * QUAD
WEIGHTS_STRIDE = 4 * KEYS
STATE_BYTES = 7 * 4 * LANES
ADDRESSES_BYTES = 8 * (KEYS + HALF)  # of the keys of a tile


@inner
def _scores(kv_dtype, batch, rows, query, stride, keys, count, sums):
    """Compute QUAD sums per key for all rows, in passes over the keys of about equally many rows.

    A pass is of at most MAX_ROWS rows; their number must be a constant at compile time.
    """
    passes = (rows + MAX_ROWS - 1) // MAX_ROWS
    r = 0
    for passes_left in range(passes, 0, -1):
        pass_rows = (rows - r + passes_left - 1) // passes_left
        q, target = query + r * stride, sums + r * SUMS_STRIDE
        if pass_rows == 4:
            scores_rows(
                kv_dtype, 4, q, stride, keys, count, batch.row_bytes, batch.value_offset, target, SUMS_STRIDE
            )
        elif pass_rows == 3:
            scores_rows(
                kv_dtype, 3, q, stride, keys, count, batch.row_bytes, batch.value_offset, target, SUMS_STRIDE
            )
        elif pass_rows == 2:
            scores_rows(
                kv_dtype, 2, q, stride, keys, count, batch.row_bytes, batch.value_offset, target, SUMS_STRIDE
            )
        else:
            scores_rows(
                kv_dtype, 1, q, stride, keys, count, batch.row_bytes, batch.value_offset, target, SUMS_STRIDE
            )
        r += pass_rows


@inner
def _values(kv_dtype, batch, rows, weights, keys, count, ahead, out, stride, alpha):
    """Rescale the output of all rows and add the weighted values, in passes like those of `_scores`."""
    passes = (rows + MAX_ROWS - 1) // MAX_ROWS
    r = 0
    offset, row_bytes = batch.value_offset, batch.value_row_bytes
    for passes_left in range(passes, 0, -1):
        pass_rows = (rows - r + passes_left - 1) // passes_left
        w, target, a = weights + r * WEIGHTS_STRIDE, out + r * stride, alpha + 4 * r
        if pass_rows == 4:
            values_rows(
                kv_dtype, 4, w, WEIGHTS_STRIDE, keys, offset, count, row_bytes, ahead, target, stride, a
            )
        elif pass_rows == 3:
            values_rows(
                kv_dtype, 3, w, WEIGHTS_STRIDE, keys, offset, count, row_bytes, ahead, target, stride, a
            )
        elif pass_rows == 2:
            values_rows(
                kv_dtype, 2, w, WEIGHTS_STRIDE, keys, offset, count, row_bytes, ahead, target, stride, a
            )
        else:
            values_rows(
                kv_dtype, 1, w, WEIGHTS_STRIDE, keys, offset, count, row_bytes, ahead, target, stride, a
            )
        r += pass_rows


@inner
def _softmax(batch, rows, scale, start, count, masked, sums, weights, state):
    """Turn sums into weights; update running maximum, denominator (LANES sums a row), rescaling factor."""
    lower, upper, position, slope, top, total, alpha, shift = state
    minus_infinity = splat(-INFINITY, LANES)
    for r in range(rows):
        largest = splat(load_scalar(F32, top + 4 * r), LANES)
        low = splat(load_scalar(F32, lower + 4 * r), LANES)
        high = splat(load_scalar(F32, upper + 4 * r), LANES)
        where = splat(load_scalar(F32, position + 4 * r), LANES)
        slopes = splat(load_scalar(F32, slope + 4 * r), LANES)
        for k in range(0, count, LANES):
            s = mul(sum_quads(sums + r * SUMS_STRIDE + 4 * QUAD * k), splat(scale, LANES))
            j = iota(np.float32(start + k))
            if batch.cap != 0.0:
                s = mul(tanh(s), splat(np.float32(batch.cap), LANES))
            if batch.alibi_slopes != 0:
                s = fma(slopes, sub(j, where), s)
            if masked:
                s = where_between(j, low, high, s, minus_infinity)
            largest = maximum(s, largest)
            store(F32, weights + r * WEIGHTS_STRIDE + 4 * k, s)
        store_float(shift + 4 * r, max_lanes(largest))
    # The maximum of a row that has seen no key is -inf: shift its logits by 0 instead.
    largest = load(F32, shift, LANES)
    zero = splat(np.float32(0.0), LANES)
    safe = where_between(largest, minus_infinity, splat(INFINITY, LANES), largest, zero)
    store(F32, shift, safe)
    store(F32, alpha, exp2(sub(load(F32, top, LANES), safe)))
    store(F32, top, largest)
    for r in range(rows):
        row_shift = splat(load_scalar(F32, shift + 4 * r), LANES)
        row_total = load(F32, total + 4 * LANES * r, LANES)
        row_total = mul(row_total, splat(load_scalar(F32, alpha + 4 * r), LANES))
        for k in range(0, count, LANES):
            at = weights + r * WEIGHTS_STRIDE + 4 * k
            p = exp2(sub(load(F32, at, LANES), row_shift))
            row_total = add(row_total, p)
            store(F32, at, p)
        store(F32, total + 4 * LANES * r, row_total)


@inner
def scratch_bytes(kv_dtype, batch):
    """Return the size of the scratch memory that `few_rows` needs; a thread allocates it once."""
    row_bytes = 2 * 4 * padded_size(kv_dtype, batch.head_size) + SUMS_STRIDE + WEIGHTS_STRIDE + 4 * LANES
    return FEW_ROWS * row_bytes + STATE_BYTES + 2 * ADDRESSES_BYTES


@inner
def few_rows(dtype, kv_dtype, batch, item, head, partials, partial_lse, scratch):
    """Run a work item of at most FEW_ROWS rows for one KV head.

    Args:
        scratch: address of `scratch_bytes` bytes of memory.
    """
    size = batch.head_size
    padded = padded_size(kv_dtype, size)
    scale = np.float32(batch.q_scale) * unit_of(kv_dtype, batch.k_scale, head)
    stride = 4 * padded
    query = scratch
    out = query + FEW_ROWS * stride
    sums = out + FEW_ROWS * stride
    weights = sums + FEW_ROWS * SUMS_STRIDE
    total = weights + FEW_ROWS * WEIGHTS_STRIDE
    lower = total + FEW_ROWS * 4 * LANES
    upper, position, slope = lower + 4 * LANES, lower + 8 * LANES, lower + 12 * LANES
    top, alpha, shift = lower + 16 * LANES, lower + 20 * LANES, lower + 24 * LANES
    state = (lower, upper, position, slope, top, total, alpha, shift)
    current = lower + STATE_BYTES
    ahead = current + ADDRESSES_BYTES
    zero = splat(np.float32(0.0), LANES)
    for r in range(item.rows):
        source = row_address(
            batch, item, r, head, batch.query, batch.query_token_stride, batch.query_head_stride
        )
        for d in range(0, padded, LANES):
            store(F32, out + r * stride + 4 * d, zero)
            elements = zero
            if d < size:
                elements = load_head(dtype, source + batch.itemsize * d, size - d)
            store(F32, query + r * stride + 4 * d, elements)
        reorder_query(kv_dtype, query + r * stride, padded)
        store(F32, total + 4 * LANES * r, zero)
    store(F32, top, splat(-INFINITY, LANES))
    store(F32, shift, zero)
    row_limits(batch, item, head, lower, upper, position, slope)
    # Every row sees the keys from `full_low` to `full_high`.
    full_low = item.low
    if batch.window:
        full_low = np.int64(load_scalar(F32, lower + 4 * (item.rows - 1))) + 1
    full_high = np.int64(load_scalar(F32, upper)) + 1

    count = min(KEYS, item.high - item.low)
    key_addresses(batch, item, head, item.low, count, KEYS, current)
    for start in range(item.low, item.high, KEYS):
        count = min(KEYS, item.high - start)
        following = min(KEYS, item.high - start - count)
        if following > 0:
            key_addresses(batch, item, head, start + count, following, KEYS, ahead)
        _scores(kv_dtype, batch, item.rows, query, stride, current, count, sums)
        masked = start < full_low or start + count > full_high or count % LANES != 0
        _softmax(batch, item.rows, scale, start, count, masked, sums, weights, state)
        _values(kv_dtype, batch, item.rows, weights, current, count, ahead, out, stride, alpha)
        current, ahead = ahead, current

    for r in range(item.rows):
        unit = unit_of(kv_dtype, batch.v_scale, head)
        reorder_output(kv_dtype, out + r * stride, padded)
        largest = load_scalar(F32, top + 4 * r)
        denominator = sum_lanes(load(F32, total + 4 * LANES * r, LANES))
        finish_row(
            dtype, batch, item, r, head, out + r * stride, unit, largest, denominator, partials, partial_lse
        )
