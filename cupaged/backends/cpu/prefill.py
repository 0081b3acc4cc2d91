"""The CPU attention for many rows (prefill): vectors run along the rows.

Q is transposed once, logits and output are transposed too, keys and values are broadcast scalars, and the
softmax needs no sums across lanes.

Where the CPU multiplies pairs of bfloat16 (AVX512-BF16), queries and values of a bfloat16 cache are arranged
in pairs, of dimensions and of keys, and the weights of the values are rounded to bfloat16, as on a GPU.
"""

from __future__ import annotations

import numpy as np

from .pairs import has_pairs, interleave_pairs, multiply_add, pack_pairs
from .simd import (
    HALF,
    LANES,
    WIDE,
    add,
    exp2,
    fma,
    inner,
    load,
    load_scalar,
    maximum,
    mul,
    splat,
    store,
    store_float,
    sub,
    tanh,
    where_between,
)
from .work import (
    F32,
    INFINITY,
    KEYS,
    ROWS,
    aligned,
    finish_row,
    key_addresses,
    row_address,
    row_limits,
    unit_of,
)


@inner
def _logits_tile(dtype, kv_dtype, query, keys, count, steps, logits, column, like):
    """Compute logits[k, rows] = sum over d of keys[k, d] * query[d, rows], in vectors like `like`.

    Args:
        steps: number of d: of elements, or of pairs of them.
    """
    for k in range(0, count, 4):
        k0, k1, k2, k3 = keys[k], keys[k + 1], keys[k + 2], keys[k + 3]
        q = query + 4 * column
        c0 = splat(np.float32(0.0), like)
        c1, c2, c3 = c0, c0, c0
        for d in range(steps):
            vector = load(F32, q, like)
            c0 = multiply_add(dtype, kv_dtype, splat(load_scalar(F32, k0 + 4 * d), like), vector, c0)
            c1 = multiply_add(dtype, kv_dtype, splat(load_scalar(F32, k1 + 4 * d), like), vector, c1)
            c2 = multiply_add(dtype, kv_dtype, splat(load_scalar(F32, k2 + 4 * d), like), vector, c2)
            c3 = multiply_add(dtype, kv_dtype, splat(load_scalar(F32, k3 + 4 * d), like), vector, c3)
            q += 4 * ROWS
        at = logits + 4 * (k * ROWS + column)
        store(F32, at, c0)
        store(F32, at + 4 * ROWS, c1)
        store(F32, at + 8 * ROWS, c2)
        store(F32, at + 12 * ROWS, c3)


@inner
def _values_tile(dtype, kv_dtype, weights, values, count, size, out, column, alpha, like):
    """Compute out[d, rows] = alpha[rows] * out[d, rows] + sum over k of values[k, d] * weights[k, rows].

    Args:
        count: number of k: of keys, or of pairs of them.
    """
    scale = load(F32, alpha + 4 * column, like)
    for d in range(0, size, 4):
        at = out + 4 * (d * ROWS + column)
        c0 = mul(load(F32, at, like), scale)
        c1 = mul(load(F32, at + 4 * ROWS, like), scale)
        c2 = mul(load(F32, at + 8 * ROWS, like), scale)
        c3 = mul(load(F32, at + 12 * ROWS, like), scale)
        w = weights + 4 * column
        for k in range(count):
            vector = load(F32, w, like)
            v = values[k] + 4 * d
            c0 = multiply_add(dtype, kv_dtype, splat(load_scalar(F32, v), like), vector, c0)
            c1 = multiply_add(dtype, kv_dtype, splat(load_scalar(F32, v + 4), like), vector, c1)
            c2 = multiply_add(dtype, kv_dtype, splat(load_scalar(F32, v + 8), like), vector, c2)
            c3 = multiply_add(dtype, kv_dtype, splat(load_scalar(F32, v + 12), like), vector, c3)
            w += 4 * ROWS
        store(F32, at, c0)
        store(F32, at + 4 * ROWS, c1)
        store(F32, at + 8 * ROWS, c2)
        store(F32, at + 12 * ROWS, c3)


@inner
def _pair_values(values, count, size, target):
    """Copy the rows at the addresses `values` to `target` as pairs of keys; set the first addresses to these.

    Of an odd number of keys the last is a pair with itself, of which `_pair_weights` weighs one with 0.
    """
    for k in range(0, count, 2):
        first, second = values[k], values[min(k + 1, count - 1)]
        at = target + 4 * (k // 2 * size)
        for d in range(0, size, HALF):
            interleave_pairs(first + 2 * d, second + 2 * d, at + 4 * d)
        values[k // 2] = at


@inner
def _pair_weights(weights, count, columns):
    """Replace weights [count, rows] by those of pairs of keys, rounded to bfloat16."""
    for column in range(0, columns, LANES):
        for k in range(0, count, 2):
            at = weights + 4 * (k * ROWS + column)
            second = splat(np.float32(0.0), LANES)
            if k + 1 < count:
                second = load(F32, at + 4 * ROWS, LANES)
            pairs = pack_pairs(load(F32, at, LANES), second)
            store(F32, weights + 4 * (k // 2 * ROWS + column), pairs)


@inner
def _widen(dtype, itemsize, size, addresses, count, padded, target):
    """Copy rows as float32 to `target` and set `addresses` to the copies. float32 rows are not copied."""
    if itemsize == 4:
        return
    for k in range(count):
        source = addresses[k]
        at = target + 4 * k * size
        for d in range(0, size, HALF):
            store(F32, at + 4 * d, load(dtype, source + itemsize * d, HALF))
        addresses[k] = at
    for k in range(count, padded):
        addresses[k] = addresses[count - 1]


@inner
def _softmax_tile(batch, scale, start, count, masked, columns, logits, state):
    """Turn logits [k, rows], times `scale`, into weights; update maximum, denominator and rescaling."""
    lower, upper, position, slope, top, total, alpha = state
    zero = splat(np.float32(0.0), LANES)
    minus_infinity = splat(-INFINITY, LANES)
    infinity = splat(INFINITY, LANES)
    for column in range(0, columns, LANES):
        low = load(F32, lower + 4 * column, LANES)
        high = load(F32, upper + 4 * column, LANES)
        where = load(F32, position + 4 * column, LANES)
        slopes = load(F32, slope + 4 * column, LANES)
        old_top = load(F32, top + 4 * column, LANES)
        largest = old_top
        for k in range(count):
            at = logits + 4 * (k * ROWS + column)
            s = mul(load(F32, at, LANES), splat(scale, LANES))
            j = splat(np.float32(start + k), LANES)
            if batch.cap != 0.0:
                s = mul(tanh(s), splat(np.float32(batch.cap), LANES))
            if batch.alibi_slopes != 0:
                s = fma(slopes, sub(j, where), s)
            if masked:
                s = where_between(j, low, high, s, minus_infinity)
            store(F32, at, s)
            largest = maximum(s, largest)
        # The maximum of a row that has seen no key is -inf: shift its logits by 0 instead.
        shift = where_between(largest, minus_infinity, infinity, largest, zero)
        tile_total = zero
        for k in range(count):
            at = logits + 4 * (k * ROWS + column)
            p = exp2(sub(load(F32, at, LANES), shift))
            tile_total = add(tile_total, p)
            store(F32, at, p)
        factor = exp2(sub(old_top, shift))
        store(F32, alpha + 4 * column, factor)
        store(F32, total + 4 * column, fma(load(F32, total + 4 * column, LANES), factor, tile_total))
        store(F32, top + 4 * column, largest)


@inner
def many_rows(dtype, kv_dtype, batch, item, head, partials, partial_lse):
    """Run a work item of up to ROWS rows for one KV head."""
    size, value_size = batch.head_size, batch.value_size
    itemsize = batch.row_bytes // size
    scale = np.float32(batch.q_scale) * unit_of(kv_dtype, batch.k_scale, head)
    unit = unit_of(kv_dtype, batch.v_scale, head)
    # Pairs are multiplied as they are, exactly, and their sums are scaled.
    paired = has_pairs(dtype, kv_dtype)
    steps = size // 2 if paired else size
    logit_scale = scale if paired else np.float32(1.0)
    memory, query = aligned(4 * ((ROWS + KEYS) * (size + value_size) + ROWS * KEYS + value_size))
    out = query + 4 * ROWS * size
    logits = out + 4 * ROWS * value_size
    wide_keys = logits + 4 * ROWS * KEYS
    wide_values = wide_keys + 4 * KEYS * size
    row_buffer = wide_values + 4 * KEYS * value_size
    keys = np.empty(KEYS + HALF, np.int64)
    values = np.empty(KEYS, np.int64)
    rows = np.zeros((7, ROWS), np.float32)  # lower, upper, position, slope, top, total, alpha
    rows[1] = -INFINITY
    rows[4] = -INFINITY
    row_state = np.int64(rows.ctypes.data)
    state = (
        row_state,
        row_state + 4 * ROWS,
        row_state + 8 * ROWS,
        row_state + 12 * ROWS,
        row_state + 16 * ROWS,
        row_state + 20 * ROWS,
        row_state + 24 * ROWS,
    )
    row_limits(batch, item, head, state[0], state[1], state[2], state[3])
    narrow = item.rows <= LANES
    columns = LANES if narrow else (item.rows + WIDE - 1) // WIDE * WIDE
    zero = splat(np.float32(0.0), LANES)
    for column in range(0, columns, LANES):
        for d in range(size):
            store(F32, query + 4 * (d * ROWS + column), zero)
        for d in range(value_size):
            store(F32, out + 4 * (d * ROWS + column), zero)
    for r in range(item.rows):
        source = row_address(
            batch, item, r, head, batch.query, batch.query_token_stride, batch.query_head_stride
        )
        if paired:
            for d in range(size // 2):
                store_float(query + 4 * (d * ROWS + r), load_scalar(F32, source + 4 * d))
        else:
            for d in range(size):
                value = load_scalar(dtype, source + batch.itemsize * d)
                store_float(query + 4 * (d * ROWS + r), np.float32(value * scale))

    # Every row of the tile sees the keys from `full_low` to `full_high`.
    full_low = item.low
    if batch.window:
        full_low = np.int64(rows[0, item.rows - 1]) + 1
    full_high = np.int64(rows[1, 0]) + 1
    lanes = splat(np.float32(0.0), LANES)
    wide = splat(np.float32(0.0), WIDE)
    for start in range(item.low, item.high, KEYS):
        count = min(KEYS, item.high - start)
        padded = (count + 3) // 4 * 4
        key_addresses(batch, item, head, start, count, padded, np.int64(keys.ctypes.data))
        for k in range(padded):
            values[k] = keys[k] + batch.value_offset
        masked = start < full_low or start + count > full_high
        if paired:
            _pair_values(values, count, value_size, wide_values)
        else:
            _widen(kv_dtype, itemsize, size, keys, count, padded, wide_keys)
            if batch.value_offset == 0:  # the values are in the keys
                for k in range(padded):
                    values[k] = keys[k]
            else:
                _widen(kv_dtype, itemsize, value_size, values, count, padded, wide_values)
        if narrow:
            _logits_tile(dtype, kv_dtype, query, keys, padded, steps, logits, 0, lanes)
        else:
            for column in range(0, columns, WIDE):
                _logits_tile(dtype, kv_dtype, query, keys, padded, steps, logits, column, wide)
        _softmax_tile(batch, logit_scale, start, count, masked, columns, logits, state)
        terms = count
        if paired:
            _pair_weights(logits, count, columns)
            terms = (count + 1) // 2
        if narrow:
            _values_tile(dtype, kv_dtype, logits, values, terms, value_size, out, 0, state[6], lanes)
        else:
            for column in range(0, columns, WIDE):
                _values_tile(dtype, kv_dtype, logits, values, terms, value_size, out, column, state[6], wide)

    for r in range(item.rows):
        for d in range(value_size):
            store_float(row_buffer + 4 * d, load_scalar(F32, out + 4 * (d * ROWS + r)))
        finish_row(
            dtype, batch, item, r, head, row_buffer, unit, rows[4, r], rows[5, r], partials, partial_lse
        )
    return memory.size  # keeps the scratch memory alive until here
