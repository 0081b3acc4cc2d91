"""The numba kernels that write and copy cache contents and merge attention states."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import prange

from .simd import HALF, LANES, copy_bytes, fma, inner, load, load_scalar, mul, splat, store, store_float

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
CHUNK = 1 << 18  # bytes of a block that one thread copies at a time


class Tokens(NamedTuple):
    """Hold the arguments of a call of reshape_and_cache as int64: addresses, and strides in bytes."""

    key: int
    key_token_stride: int
    key_head_stride: int
    value: int
    value_token_stride: int
    value_head_stride: int
    cache: int
    block_stride: int
    value_offset: int
    kv_head_stride: int
    row_bytes: int
    slot_mapping: int
    num_tokens: int
    num_kv_heads: int
    block_size: int
    head_size: int
    itemsize: int  # of key and value
    k_scale: int
    v_scale: int


@inner
def _quantise_row(dtype, kv_dtype, tokens, source, target, scale):
    reciprocal = splat(np.float32(1.0) / load_scalar(F32, scale), LANES)
    for d in range(0, tokens.head_size, LANES):
        row = load(dtype, source + tokens.itemsize * d, LANES)
        store(kv_dtype, target + d, mul(row, reciprocal))


@inner
def _quantise_token(dtype, kv_dtype, tokens, token):
    target, key, value = _addresses(tokens, token)
    for head in range(tokens.num_kv_heads if target != 0 else 0):
        _quantise_row(dtype, kv_dtype, tokens, key, target, tokens.k_scale + 4 * head)
        _quantise_row(dtype, kv_dtype, tokens, value, target + tokens.value_offset, tokens.v_scale + 4 * head)
        target += tokens.kv_head_stride
        key += tokens.key_head_stride
        value += tokens.value_head_stride


@inner
def _addresses(tokens, token):
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
    target, key, value = _addresses(tokens, token)
    for _ in range(tokens.num_kv_heads if target != 0 else 0):
        copy_bytes(target, key, tokens.row_bytes)
        copy_bytes(target + tokens.value_offset, value, tokens.row_bytes)
        target += tokens.kv_head_stride
        key += tokens.key_head_stride
        value += tokens.value_head_stride


def build_reshape_and_cache(version: str, jit):
    @jit
    def reshape_and_cache(tokens, num_threads):
        version  # noqa: B018  puts it into the closure, see attention.py
        if tokens.num_tokens * tokens.num_kv_heads * tokens.row_bytes < CHUNK:
            for token in range(tokens.num_tokens):
                _write_token(tokens, token)
        else:
            for token in prange(tokens.num_tokens):
                _write_token(tokens, token)

    return reshape_and_cache


def build_quantise(version: str, jit):
    @jit
    def quantise(dtype, kv_dtype, tokens, num_threads):
        version  # noqa: B018
        if tokens.num_tokens * tokens.num_kv_heads * tokens.row_bytes < CHUNK // 8:
            for token in range(tokens.num_tokens):
                _quantise_token(dtype, kv_dtype, tokens, token)
        else:
            for token in prange(tokens.num_tokens):
                _quantise_token(dtype, kv_dtype, tokens, token)

    return quantise


def build_move_blocks(version: str, jit):
    @jit
    def move_blocks(target, target_stride, source, source_stride, block_bytes, pairs, count, num_threads):
        """Copy `count` blocks; address `pairs` has their int64 pairs of IDs (source, target)."""
        version  # noqa: B018
        chunks = (block_bytes + CHUNK - 1) // CHUNK
        for task in prange(count * chunks):
            pair = task // chunks
            start = (task - pair * chunks) * CHUNK
            copy_bytes(
                target + load_scalar(I64, pairs + 16 * pair + 8) * target_stride + start,
                source + load_scalar(I64, pairs + 16 * pair) * source_stride + start,
                min(CHUNK, block_bytes - start),
            )

    return move_blocks


@inner
def _merge(dtype, itemsize, outs, lses, num_states, rows, size, row, out, lse):
    """Merge the states of one row of all `rows` rows of `size` elements."""
    largest = np.float32(-np.inf)
    for n in range(num_states):
        largest = max(largest, load_scalar(F32, lses + 4 * (n * rows + row)))
    total = np.float32(-np.inf)
    if largest > -np.inf:
        denominator = 0.0
        for n in range(num_states):
            denominator += np.exp(np.float64(load_scalar(F32, lses + 4 * (n * rows + row)) - largest))
        total = np.float32(largest + np.log(denominator))
    store_float(lse + 4 * row, total)
    for d in range(0, size, HALF):
        accumulated = splat(np.float32(0.0), HALF)
        for n in range(num_states):
            state_lse = load_scalar(F32, lses + 4 * (n * rows + row))
            if state_lse > -np.inf:  # the output of an empty state may be NaN
                weight = np.float32(np.exp(np.float64(state_lse) - np.float64(total)))
                address = outs + itemsize * ((n * rows + row) * size + d)
                accumulated = fma(load(dtype, address, HALF), splat(weight, HALF), accumulated)
        store(dtype, out + itemsize * (row * size + d), accumulated)


def build_merge(version: str, jit):
    @jit
    def merge_attention_states(dtype, itemsize, outs, lses, num_states, rows, size, out, lse, num_threads):
        version  # noqa: B018
        for row in prange(rows):
            _merge(dtype, itemsize, outs, lses, num_states, rows, size, row, out, lse)

    return merge_attention_states
