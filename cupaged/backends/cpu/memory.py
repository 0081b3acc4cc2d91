"""The numba kernels that write and copy cache contents and merge attention states."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .simd import HALF, LANES, copy_bytes, fma, inner, load, load_scalar, mul, splat, store, store_float
from .team import HEADER_BYTES, INVALID, Launch, Rows, next_rows, read, run_rows

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
CHUNK = 1 << 18  # bytes of a block that one thread copies at a time
CHUNK_TOKENS = 8  # tokens, or rows, that a thread takes at a time


class Tokens(NamedTuple):
    """Hold the arguments of a call of reshape_and_cache: addresses, and strides in bytes."""

    key: int
    value: int
    cache: int
    slot_mapping: int
    k_scale: int
    v_scale: int
    # What the layout of the tensors determines.
    key_token_stride: int
    key_head_stride: int
    value_token_stride: int
    value_head_stride: int
    block_stride: int
    value_offset: int
    kv_head_stride: int
    row_bytes: int
    key_bytes: int  # of a row of key, and of value
    value_bytes: int
    num_tokens: int
    num_kv_heads: int
    num_slots: int
    block_size: int
    head_size: int
    itemsize: int  # of key and value
    smallest_scale: float
    largest_scale: float


class Blocks(NamedTuple):
    """Hold the arguments of a copy of blocks: addresses, and sizes in bytes."""

    target: int
    target_stride: int
    source: int
    source_stride: int
    block_bytes: int
    pairs: int  # int64 [count, 2] of IDs (source, target)
    count: int


class States(NamedTuple):
    """Hold the arguments of a call of merge_attention_states: addresses and sizes."""

    outs: int
    lses: int
    num_states: int
    rows: int
    head_size: int
    itemsize: int  # of outs and out
    out: int
    lse: int


@inner
def quantise_row(dtype, kv_dtype, tokens, source, target, scale):
    reciprocal = splat(np.float32(1.0) / load_scalar(F32, scale), LANES)
    for d in range(0, tokens.head_size, LANES):
        row = load(dtype, source + tokens.itemsize * d, LANES)
        store(kv_dtype, target + d, mul(row, reciprocal))


@inner
def _quantise_token(dtype, kv_dtype, tokens, token):
    target, key, value = addresses(tokens, token)
    for head in range(tokens.num_kv_heads if target != 0 else 0):
        quantise_row(dtype, kv_dtype, tokens, key, target, tokens.k_scale + 4 * head)
        quantise_row(dtype, kv_dtype, tokens, value, target + tokens.value_offset, tokens.v_scale + 4 * head)
        target += tokens.kv_head_stride
        key += tokens.key_head_stride
        value += tokens.value_head_stride


@inner
def addresses(tokens, token):
    """Return the addresses of a token's first row in the cache (0: skip it), in `key` and in `value`."""
    slot = load_scalar(I64, tokens.slot_mapping + 8 * token)
    key = tokens.key + token * tokens.key_token_stride
    value = tokens.value + token * tokens.value_token_stride
    if slot < 0:
        return np.int64(0), key, value
    block = slot // tokens.block_size
    target = tokens.cache + block * tokens.block_stride
    return target + (slot - block * tokens.block_size) * tokens.row_bytes, key, value


@inner
def _write_token(tokens, token):
    target, key, value = addresses(tokens, token)
    for _ in range(tokens.num_kv_heads if target != 0 else 0):
        copy_bytes(target, key, tokens.key_bytes)
        copy_bytes(target + tokens.value_offset, value, tokens.value_bytes)
        target += tokens.kv_head_stride
        key += tokens.key_head_stride
        value += tokens.value_head_stride


@inner
def are_valid(tokens):
    """Return whether slots and scales are in their ranges, as `checks.slots` and `scale_values` check."""
    for token in range(tokens.num_tokens):
        slot = load_scalar(I64, tokens.slot_mapping + 8 * token)
        if slot < -1 or slot >= tokens.num_slots:
            return False
    for head in range(tokens.num_kv_heads if tokens.k_scale != 0 else 0):
        for scales in (tokens.k_scale, tokens.v_scale):
            scale = load_scalar(F32, scales + 4 * head)
            if not tokens.smallest_scale <= scale <= tokens.largest_scale:
                return False
    return True


def build_reshape_and_cache(dtype, kv_dtype):
    """Return the kernel's entry and work; without a ``kv_dtype`` key and value are stored as they are."""
    is_quantised = kv_dtype is not None

    def reshape_and_cache(address):
        arguments = address + HEADER_BYTES
        tokens = read(Tokens, arguments)
        if not are_valid(tokens):
            return INVALID
        num_bytes = tokens.num_tokens * tokens.num_kv_heads * tokens.row_bytes
        if is_quantised:
            num_bytes *= 8  # arithmetic
        return run_rows(read(Launch, address), arguments, tokens.num_tokens, CHUNK_TOKENS, num_bytes)

    def work(address):
        rows = read(Rows, address)
        tokens = read(Tokens, rows.arguments)
        while True:
            first, last = next_rows(rows)
            if first == last:
                return 0
            for token in range(first, last):
                if is_quantised:
                    _quantise_token(dtype, kv_dtype, tokens, token)
                else:
                    _write_token(tokens, token)

    return reshape_and_cache, work


def build_move_blocks():
    def move_blocks(address):
        arguments = address + HEADER_BYTES
        blocks = read(Blocks, arguments)
        chunks = (blocks.block_bytes + CHUNK - 1) // CHUNK
        num_bytes = blocks.count * blocks.block_bytes
        return run_rows(read(Launch, address), arguments, blocks.count * chunks, 1, num_bytes)

    def work(address):
        rows = read(Rows, address)
        blocks = read(Blocks, rows.arguments)
        chunks = (blocks.block_bytes + CHUNK - 1) // CHUNK
        while True:
            task, end = next_rows(rows)
            if task == end:
                return 0
            pair = task // chunks
            start = (task - pair * chunks) * CHUNK
            copy_bytes(
                blocks.target + load_scalar(I64, blocks.pairs + 16 * pair + 8) * blocks.target_stride + start,
                blocks.source + load_scalar(I64, blocks.pairs + 16 * pair) * blocks.source_stride + start,
                min(CHUNK, blocks.block_bytes - start),
            )

    return move_blocks, work


@inner
def _merge(dtype, states, row):
    """Merge the states of one row."""
    lses, stride = states.lses + 4 * row, 4 * states.rows
    largest = np.float32(-np.inf)
    for n in range(states.num_states):
        largest = max(largest, load_scalar(F32, lses + n * stride))
    total = np.float32(-np.inf)
    if largest > -np.inf:
        denominator = 0.0
        for n in range(states.num_states):
            denominator += np.exp(np.float64(load_scalar(F32, lses + n * stride) - largest))
        total = np.float32(largest + np.log(denominator))
    store_float(states.lse + 4 * row, total)
    for d in range(0, states.head_size, HALF):
        accumulated = splat(np.float32(0.0), HALF)
        for n in range(states.num_states):
            state_lse = load_scalar(F32, lses + n * stride)
            if state_lse > -np.inf:  # the output of an empty state may be NaN
                weight = np.float32(np.exp(np.float64(state_lse) - np.float64(total)))
                at = (n * states.rows + row) * states.head_size + d
                elements = load(dtype, states.outs + states.itemsize * at, HALF)
                accumulated = fma(elements, splat(weight, HALF), accumulated)
        store(dtype, states.out + states.itemsize * (row * states.head_size + d), accumulated)


def build_merge(dtype):
    def merge_attention_states(address):
        arguments = address + HEADER_BYTES
        states = read(States, arguments)
        num_bytes = states.num_states * states.rows * states.head_size * states.itemsize
        return run_rows(read(Launch, address), arguments, states.rows, CHUNK_TOKENS, num_bytes)

    def work(address):
        rows = read(Rows, address)
        states = read(States, rows.arguments)
        while True:
            first, last = next_rows(rows)
            if first == last:
                return 0
            for row in range(first, last):
                _merge(dtype, states, row)

    return merge_attention_states, work
