"""Plan the work items of the CPU attention; the functions that both of its forms use."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .simd import (
    HALF,
    LANES,
    fma,
    inner,
    load,
    load_head,
    load_scalar,
    mul,
    splat,
    store_float,
    store_head,
    store_int,
    store_ramp,
)
from .tiles import code_unit, prefetch

KEYS = 64  # keys of a tile
ROWS = 64  # maximum number of query rows in a tile
FEW_ROWS = 8  # maximum number of rows in the decode form
LINE_BYTES = 64  # of a cache line
SPLIT_KEYS = 512  # maximum number of keys in a KV split

F32, I32, I64 = np.dtype(np.float32), np.dtype(np.int32), np.dtype(np.int64)
LOG2E = math.log2(math.e)
INFINITY = np.float32(np.inf)


class Batch(NamedTuple):
    """Hold the arguments of a call: addresses, 0 for an absent tensor, and strides in bytes."""

    query: int
    out: int
    lse: int
    cache: int
    block_tables: int
    seq_lens: int
    query_start_loc: int
    alibi_slopes: int
    sinks: int
    k_scale: int
    v_scale: int
    causal: int
    window: int
    q_scale: float  # factor of the dot products; with a soft cap they are s / cap
    cap: float  # soft cap of the logits in base 2; 0 for none
    # What the layout of the tensors determines.
    query_token_stride: int
    query_head_stride: int
    out_token_stride: int
    out_head_stride: int
    block_stride: int
    value_offset: int
    kv_head_stride: int
    row_bytes: int
    value_row_bytes: int
    table_stride: int
    num_seqs: int
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    value_size: int  # of values, which may be the first elements of the keys
    itemsize: int  # of query and out
    block_size: int
    num_blocks: int
    table_width: int


class Item(NamedTuple):
    """A work item: rows `row` to `row + rows` of sequence `seq` over the keys `low` to `high`."""

    seq: int
    token: int  # index in the batch of the sequence's first query token
    position: int  # position in the sequence of that token
    row: int
    rows: int
    low: int
    high: int
    partial: int  # index of the KV split's partial; -1 without splits


ITEM_BYTES = 8 * len(Item._fields)


@inner
def query_range(batch, s):
    """Return the indexes of the first query token of sequence `s` and of the one after its last."""
    if batch.query_start_loc == 0:
        return np.int64(s), np.int64(s + 1)
    first = np.int64(load_scalar(I32, batch.query_start_loc + 4 * s))
    return first, np.int64(load_scalar(I32, batch.query_start_loc + 4 * s + 4))


@inner
def are_valid(batch):
    """Return whether lengths fit the block tables, whose used entries are in the cache.

    What `checks.attention_ids` checks, at a small part of the time of its tensor operations.
    """
    end = np.int64(0)
    for s in range(batch.num_seqs):
        length = np.int64(load_scalar(I32, batch.seq_lens + 4 * s))
        first, last = query_range(batch, s)
        if first != end or last < first or last > batch.num_tokens:
            return False
        end = last
        if length < 0 or length > batch.table_width * batch.block_size:
            return False
        if length > 0 and last - first > length:
            return False
        low = np.int64(0)
        if batch.window:
            low = max(np.int64(0), length - (last - first) - batch.window + 1) // batch.block_size
        table = batch.block_tables + s * batch.table_stride
        for column in range(low, (length + batch.block_size - 1) // batch.block_size):
            block = load_scalar(I32, table + 4 * column)
            if block < 0 or block >= batch.num_blocks:
                return False
    return True


@inner
def plan(batch, items, capacity):
    """Return the number of work items and of partials, and store the first `capacity` work items.

    Args:
        items: address of the array to store work items in.
    """
    group = batch.num_heads // batch.num_kv_heads
    count = 0
    partials = 0
    for s in range(batch.num_seqs):
        length = np.int64(load_scalar(I32, batch.seq_lens + 4 * s))
        first, last = query_range(batch, s)
        if length == 0:
            continue
        position = length - (last - first)
        total = (last - first) * group
        for row in range(0, total, ROWS):
            rows = min(ROWS, total - row)
            high = length
            if batch.causal:
                high = min(length, position + (row + rows - 1) // group + 1)
            low = 0
            if batch.window:
                low = max(0, position + row // group - batch.window + 1)
            step = max(high - low, 1)
            split = (total <= ROWS or last - first == 1) and step > SPLIT_KEYS
            if split:
                step = SPLIT_KEYS
            for start in range(low, high, step):
                if count < capacity:
                    partial = partials if split else -1
                    item = Item(s, first, position, row, rows, start, min(start + step, high), partial)
                    for field in range(len(item)):
                        store_int(items + count * ITEM_BYTES + 8 * field, item[field])
                count += 1
                if split:
                    partials += 1
    return count, partials


@inner
def aligned(size):
    """Allocate `size` bytes. Return the array that owns them and their address, a multiple of 64."""
    memory = np.empty(size + 64, np.uint8)
    return memory, (np.int64(memory.ctypes.data) + 63) // 64 * 64  # int64 + uint64 would be float64


@inner
def row_limits(batch, item, head, lower, upper, position, slope):
    """Store each row's visible keys j (lower < j <= upper), its position, and its ALiBi slope in base 2.

    Args:
        lower, upper, position, slope: addresses of a float32 for each row.
    """
    group = batch.num_heads // batch.num_kv_heads
    for r in range(item.rows):
        token = (item.row + r) // group
        row_position = np.float32(item.position + token)
        last = np.float32(item.high - 1)
        store_float(position + 4 * r, row_position)
        store_float(lower + 4 * r, row_position - batch.window if batch.window else -INFINITY)
        store_float(upper + 4 * r, min(row_position, last) if batch.causal else last)
        row_slope = np.float32(0.0)
        if batch.alibi_slopes != 0:
            h = head * group + (item.row + r) % group
            row_slope = np.float32(load_scalar(F32, batch.alibi_slopes + 4 * h) * LOG2E)
        store_float(slope + 4 * r, row_slope)


@inner
def row_address(batch, item, r, head, base, token_stride, head_stride):
    """Return the address of row `r` of a work item in a tensor [T, H, D] at `base`."""
    group = batch.num_heads // batch.num_kv_heads
    token = item.token + (item.row + r) // group
    return base + token * token_stride + (head * group + (item.row + r) % group) * head_stride


@inner
def key_addresses(batch, item, head, start, count, padded, keys):
    """Store the addresses of the `count` keys from position `start` on, padded with the last to `padded`.

    Args:
        keys: address of an int64 array of `padded` + HALF elements.
    """
    table = batch.block_tables + item.seq * batch.table_stride
    block = start // batch.block_size
    offset = start - block * batch.block_size
    k = 0
    while k < count:
        number = np.int64(load_scalar(I32, table + 4 * block))
        address = batch.cache + number * batch.block_stride + head * batch.kv_head_stride
        address += offset * batch.row_bytes
        rows = min(batch.block_size - offset, count - k)
        for i in range(0, rows, HALF):  # addresses past `rows` are overwritten below
            store_ramp(keys + 8 * (k + i), address + i * batch.row_bytes, batch.row_bytes)
        k += rows
        offset = 0
        block += 1
    last = load_scalar(I64, keys + 8 * (count - 1))
    for rest in range(count, padded, HALF):
        store_ramp(keys + 8 * rest, last, 0)


@inner
def prefetch_keys(batch, item, head):
    """Prefetch the first tile of keys of a work item."""
    table = batch.block_tables + item.seq * batch.table_stride
    position, end = item.low, min(item.low + KEYS, item.high)
    while position < end:
        block = position // batch.block_size
        offset = position - block * batch.block_size
        number = np.int64(load_scalar(I32, table + 4 * block))
        address = batch.cache + number * batch.block_stride + head * batch.kv_head_stride
        rows = min(batch.block_size - offset, end - position)
        for at in range(offset * batch.row_bytes, (offset + rows) * batch.row_bytes, LINE_BYTES):
            prefetch(address + at)
        position += rows


@inner
def unit_of(kv_dtype, scales, head):
    """Return the factor between the floats read for a KV head's keys or values and their values."""
    if scales == 0:
        return np.float32(1.0)
    return load_scalar(F32, scales + 4 * head) * code_unit(kv_dtype)


@inner
def finish_row(dtype, batch, item, r, head, accumulated, unit, top, total, partials, partial_lse):
    """Write a row of the output, or of a partial if the work item has one.

    Args:
        accumulated: address of the float32 sums of weighted values, to be multiplied by `unit`.
        top: maximum logit, in base 2.
        total: denominator of the softmax.
    """
    group = batch.num_heads // batch.num_kv_heads
    h = head * group + (item.row + r) % group
    size = batch.value_size
    if item.partial >= 0:
        index = (item.partial * batch.num_kv_heads + head) * ROWS + r
        inverse = np.float32(0.0)
        store_float(partial_lse + 4 * index, -INFINITY)
        if total != 0.0:
            inverse = unit / total
            store_float(partial_lse + 4 * index, top + np.float32(math.log2(total)))
        target = partials + index * size * 4
        for d in range(0, size, LANES):
            scaled = mul(load(F32, accumulated + 4 * d, LANES), splat(inverse, LANES))
            store_head(F32, target + 4 * d, scaled, size - d)
        return
    empty = top == -INFINITY
    inverse = np.float32(0.0)
    denominator = float(total)
    largest = float(top)
    if not empty:
        if batch.sinks != 0:
            sink = float(load_scalar(F32, batch.sinks + 4 * h)) * LOG2E
            larger = max(largest, sink)
            denominator = denominator * 2.0 ** (largest - larger) + 2.0 ** (sink - larger)
            inverse = np.float32(2.0 ** (largest - larger) * unit / denominator)
            largest = larger
        else:
            inverse = np.float32(unit / denominator)
    target = row_address(batch, item, r, head, batch.out, batch.out_token_stride, batch.out_head_stride)
    for d in range(0, size, LANES):
        scaled = mul(load(F32, accumulated + 4 * d, LANES), splat(inverse, LANES))
        store_head(dtype, target + batch.itemsize * d, scaled, size - d)
    if batch.lse != 0:
        token = item.token + (item.row + r) // group
        value = -INFINITY
        if not empty:
            value = np.float32((largest + math.log2(denominator)) / LOG2E)
        store_float(batch.lse + 4 * (token * batch.num_heads + h), value)


@inner
def merge_row(dtype, batch, item, r, head, num_splits, partials, partial_lse):
    """Merge a row's partials, which begin with `item`'s; overwrites their lse with weights."""
    group = batch.num_heads // batch.num_kv_heads
    stride = batch.num_kv_heads * ROWS
    index = (item.partial * batch.num_kv_heads + head) * ROWS + r
    h = head * group + (item.row + r) % group
    size = batch.value_size
    largest = -INFINITY
    for p in range(num_splits):
        largest = max(largest, load_scalar(F32, partial_lse + 4 * (index + p * stride)))
    empty = largest == -INFINITY
    if empty:
        largest = np.float32(0.0)
    elif batch.sinks != 0:
        largest = max(largest, np.float32(load_scalar(F32, batch.sinks + 4 * h) * LOG2E))
    denominator = 0.0
    for p in range(num_splits):
        denominator += 2.0 ** float(load_scalar(F32, partial_lse + 4 * (index + p * stride)) - largest)
    if not empty and batch.sinks != 0:
        denominator += 2.0 ** (float(load_scalar(F32, batch.sinks + 4 * h)) * LOG2E - float(largest))
    inverse = 0.0 if empty else 1.0 / denominator
    for p in range(num_splits):
        at = partial_lse + 4 * (index + p * stride)
        store_float(at, np.float32(2.0 ** float(load_scalar(F32, at) - largest) * inverse))
    target = row_address(batch, item, r, head, batch.out, batch.out_token_stride, batch.out_head_stride)
    for d in range(0, size, LANES):
        total = splat(np.float32(0.0), LANES)
        for p in range(num_splits):
            at = index + p * stride
            weight = splat(load_scalar(F32, partial_lse + 4 * at), LANES)
            total = fma(load_head(F32, partials + 4 * (at * size + d), size - d), weight, total)
        store_head(dtype, target + batch.itemsize * d, total, size - d)
    if batch.lse != 0:
        token = item.token + (item.row + r) // group
        value = -INFINITY
        if not empty:
            value = np.float32((float(largest) + math.log2(denominator)) / LOG2E)
        store_float(batch.lse + 4 * (token * batch.num_heads + h), value)
