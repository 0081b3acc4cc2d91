"""The CPU attention where rows are few (decode): vectors lie along D.

A logit is a dot product; K and V stream from the cache through registers once for up to four rows.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .cpu_simd import (
    HALF,
    LANES,
    WIDE,
    add,
    dot_tile,
    exp2,
    fma,
    iota,
    load,
    load_head,
    max_lanes,
    maximum,
    mul,
    splat,
    store,
    sub,
    sum_lanes,
    tanh,
    where_between,
)
from .cpu_work import (
    F32,
    FEW_ROWS,
    INFINITY,
    KEYS,
    aligned,
    finish_row,
    key_addresses,
    row_addresses,
    row_limits,
)


@njit
def _accumulate_four(dtype, weights, values, count, offset, out, out_stride, alpha, like):
    """out[r, :] = alpha[r] * out[r, :] + sum over k of weights[r, k] * values[k], four rows r."""
    c0 = mul(load(F32, out, like), splat(alpha[0], like))
    c1 = mul(load(F32, out + out_stride, like), splat(alpha[1], like))
    c2 = mul(load(F32, out + 2 * out_stride, like), splat(alpha[2], like))
    c3 = mul(load(F32, out + 3 * out_stride, like), splat(alpha[3], like))
    for k in range(count):
        value = load(dtype, values[k] + offset, like)
        c0 = fma(splat(weights[0, k], like), value, c0)
        c1 = fma(splat(weights[1, k], like), value, c1)
        c2 = fma(splat(weights[2, k], like), value, c2)
        c3 = fma(splat(weights[3, k], like), value, c3)
    store(F32, out, c0)
    store(F32, out + out_stride, c1)
    store(F32, out + 2 * out_stride, c2)
    store(F32, out + 3 * out_stride, c3)


@njit
def _accumulate_one(dtype, weights, values, count, offset, out, alpha, like):
    c = mul(load(F32, out, like), splat(alpha, like))
    for k in range(count):
        c = fma(splat(weights[k], like), load(dtype, values[k] + offset, like), c)
    store(F32, out, c)


@njit
def _accumulate_values(dtype, batch, rows, weights, values, count, out, out_stride, alpha):
    size = batch.head_size
    itemsize = batch.row_bytes // size
    wide = splat(np.float32(0.0), WIDE)
    narrow = splat(np.float32(0.0), LANES)
    half = splat(np.float32(0.0), HALF)
    r = 0
    while r < rows:
        four = rows - r > 1
        d = 0
        while d < size:
            at = out + r * out_stride + 4 * d
            if four:
                weight, scale = weights[r : r + 4], alpha[r : r + 4]
                if size - d >= WIDE:
                    _accumulate_four(dtype, weight, values, count, d * itemsize, at, out_stride, scale, wide)
                elif size - d >= LANES:
                    _accumulate_four(
                        dtype, weight, values, count, d * itemsize, at, out_stride, scale, narrow
                    )
                else:
                    _accumulate_four(dtype, weight, values, count, d * itemsize, at, out_stride, scale, half)
            elif size - d >= WIDE:
                _accumulate_one(dtype, weights[r], values, count, d * itemsize, at, alpha[r], wide)
            elif size - d >= LANES:
                _accumulate_one(dtype, weights[r], values, count, d * itemsize, at, alpha[r], narrow)
            else:
                _accumulate_one(dtype, weights[r], values, count, d * itemsize, at, alpha[r], half)
            d += WIDE if size - d >= WIDE else (LANES if size - d >= LANES else HALF)
        r += 4 if four else 1


@njit
def few_rows(dtype, batch, item, head, q_scale, cap, partials, partial_lse):
    size = batch.head_size
    padded = (size + LANES - 1) // LANES * LANES
    itemsize = batch.row_bytes // size
    stride = 4 * padded
    memory, query = aligned(2 * FEW_ROWS * stride + 4 * FEW_ROWS * (KEYS + LANES))
    out = query + FEW_ROWS * stride
    logits = out + FEW_ROWS * stride
    logits_stride = 4 * KEYS
    weights = np.empty((FEW_ROWS, KEYS), np.float32)
    keys = np.empty(KEYS, np.int64)
    values = np.empty(KEYS, np.int64)
    lower = np.zeros(FEW_ROWS, np.float32)
    upper = np.zeros(FEW_ROWS, np.float32)
    position = np.zeros(FEW_ROWS, np.float32)
    slope = np.zeros(FEW_ROWS, np.float32)
    top = np.full(FEW_ROWS, -INFINITY)
    total = np.zeros(FEW_ROWS, np.float32)
    alpha = np.zeros(FEW_ROWS, np.float32)
    zero = splat(np.float32(0.0), LANES)
    minus_infinity = splat(-INFINITY, LANES)
    scale = splat(q_scale, LANES)
    weights[:] = 0.0
    for r in range(FEW_ROWS):
        source = np.int64(0)
        if r < item.rows:
            source = row_addresses(
                batch, item, r, head, batch.query, batch.query_token_stride, batch.query_head_stride
            )
        for d in range(0, size, LANES):
            store(F32, out + r * stride + 4 * d, zero)
            part = zero
            if r < item.rows:
                part = mul(load_head(dtype, source + itemsize * d, size - d), scale)
            store(F32, query + r * stride + 4 * d, part)
    row_limits(batch, item, head, lower, upper, position, slope)
    weight_address = weights.ctypes.data

    for start in range(item.low, item.high, KEYS):
        count = min(KEYS, item.high - start)
        key_addresses(batch, item, head, start, count, (count + 15) // 16 * 16, keys, values)
        r = 0
        while r < item.rows:
            q = query + r * stride
            left = item.rows - r
            for k in range(0, count, 16 if left == 1 else (8 if left == 2 else 4)):
                address = keys.ctypes.data + 8 * k
                target = logits + r * logits_stride + 4 * k
                if left == 1:
                    dot_tile(dtype, 1, q, stride, address, size, target, logits_stride)
                elif left == 2:
                    dot_tile(dtype, 2, q, stride, address, size, target, logits_stride)
                else:
                    dot_tile(dtype, 4, q, stride, address, size, target, logits_stride)
            r += 1 if left == 1 else (2 if left == 2 else 4)

        for r in range(item.rows):
            largest = splat(top[r], LANES)
            low = splat(lower[r], LANES)
            high = splat(upper[r], LANES)
            for k in range(0, count, LANES):
                at = logits + r * logits_stride + 4 * k
                s = load(F32, at, LANES)
                j = iota(np.float32(start + k))
                if cap != 0.0:
                    s = mul(tanh(s), splat(cap, LANES))
                if batch.alibi_slopes != 0:
                    s = fma(splat(slope[r], LANES), sub(j, splat(position[r], LANES)), s)
                s = where_between(j, low, high, s, minus_infinity)
                largest = maximum(s, largest)
                store(F32, at, s)
            new_top = max_lanes(largest)
            safe = new_top if new_top > -INFINITY else np.float32(0.0)
            shift = splat(safe, LANES)
            part = zero
            for k in range(0, count, LANES):
                p = exp2(sub(load(F32, logits + r * logits_stride + 4 * k, LANES), shift))
                part = add(part, p)
                store(F32, weight_address + r * 4 * KEYS + 4 * k, p)
            alpha[r] = np.float32(2.0 ** float(top[r] - safe))
            total[r] = total[r] * alpha[r] + sum_lanes(part)
            top[r] = new_top
        _accumulate_values(dtype, batch, item.rows, weights, values, count, out, stride, alpha)

    for r in range(item.rows):
        finish_row(dtype, batch, item, r, head, out + r * stride, top[r], total[r], partials, partial_lse)
    return memory.size  # keeps the scratch alive until here
