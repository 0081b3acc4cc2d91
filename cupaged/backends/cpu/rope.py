"""The numba kernel of `rope_and_cache`: a token's heads are normalised, rotated and stored by one thread."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .memory import F32, addresses, are_valid, quantise_row
from .norm import inverse_rms, load_either, sum_of_squares, weighted
from .simd import HALF, LANES, add, copy_bytes, fma, inner, load, load_scalar, mul, splat, sub
from .team import HEADER_BYTES, INVALID, Launch, Rows, next_rows, read, run_rows
from .vector_math import load_pairs, store_as, store_pairs

CHUNK_TOKENS = 4  # tokens that a thread takes at a time


class Rotation(NamedTuple):
    """Hold the arguments of a call: addresses (0 for an absent tensor), strides in bytes, and numbers.

    The fields that `memory.Tokens` has are the same there.
    """

    query: int
    key: int
    value: int
    cos: int
    sin: int
    cache: int
    slot_mapping: int
    query_weight: int
    key_weight: int
    k_scale: int
    v_scale: int
    interleaved: int
    epsilon: float
    weight_offset: float
    # The tensors' layout determines the rest.
    query_token_stride: int
    query_head_stride: int
    key_token_stride: int
    key_head_stride: int
    value_token_stride: int
    value_head_stride: int
    block_stride: int
    value_offset: int
    kv_head_stride: int
    row_bytes: int
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    num_slots: int
    block_size: int
    head_size: int
    itemsize: int  # of query, key and value
    kv_itemsize: int
    cos_stride: int
    sin_stride: int
    cos_itemsize: int
    num_pairs: int  # rotated pairs of dimensions in a head
    weight_itemsize: int
    smallest_scale: float
    largest_scale: float


VARIABLE = Rotation._fields.index(
    "query_token_stride"
)  # number of arguments that the layout does not determine


class Head(NamedTuple):
    """A head's row: where it is read and written, and its token's row of cos and sin."""

    source: int
    target: int
    target_itemsize: int
    cos: int
    sin: int
    weight: int  # address of the norm's weights, 0 without


@inner
def _rotate(a, b, cos, sin):
    return sub(mul(a, cos), mul(b, sin)), fma(b, cos, mul(a, sin))


@inner
def _load(dtype, rotation, head, d, inverse):
    """Load as many elements of a head as `inverse` has lanes, from element `d` on, and normalise them."""
    x = load(dtype, head.source + rotation.itemsize * d, inverse)
    if head.weight != 0:
        weight = head.weight + rotation.weight_itemsize * d
        return weighted(dtype, rotation.weight_itemsize, weight, rotation.weight_offset, x, inverse)
    return x


@inner
def _split_pairs(dtype, target_dtype, rotation, head, pair, inverse, factor):
    """Rotate pairs (i, i + num_pairs), as many as `inverse` has lanes, from i = `pair` on."""
    other = pair + rotation.num_pairs
    cos = load_either(dtype, rotation.cos_itemsize, head.cos + rotation.cos_itemsize * pair, inverse)
    sin = load_either(dtype, rotation.cos_itemsize, head.sin + rotation.cos_itemsize * pair, inverse)
    a = _load(dtype, rotation, head, pair, inverse)
    b = _load(dtype, rotation, head, other, inverse)
    a, b = _rotate(a, b, cos, sin)
    store_as(dtype, target_dtype, head.target + head.target_itemsize * pair, a, factor)
    store_as(dtype, target_dtype, head.target + head.target_itemsize * other, b, factor)


@inner
def _neighbours(dtype, target_dtype, rotation, head, pair, inverse, factor):
    """Rotate pairs (2i, 2i + 1), as many as `inverse` has lanes, from i = `pair` on."""
    cos = load_either(dtype, rotation.cos_itemsize, head.cos + rotation.cos_itemsize * pair, inverse)
    sin = load_either(dtype, rotation.cos_itemsize, head.sin + rotation.cos_itemsize * pair, inverse)
    a, b = load_pairs(dtype, head.source + rotation.itemsize * 2 * pair, inverse)
    if head.weight != 0:
        weight = head.weight + rotation.weight_itemsize * 2 * pair
        if rotation.weight_itemsize == 4:
            a_weight, b_weight = load_pairs(F32, weight, inverse)
        else:
            a_weight, b_weight = load_pairs(dtype, weight, inverse)
        offset = splat(np.float32(rotation.weight_offset), inverse)
        a = mul(mul(a, inverse), add(a_weight, offset))
        b = mul(mul(b, inverse), add(b_weight, offset))
    a, b = _rotate(a, b, cos, sin)
    store_pairs(dtype, target_dtype, head.target + head.target_itemsize * 2 * pair, a, b, factor)


@inner
def _rest(dtype, target_dtype, rotation, head, d, inverse, factor):
    """Store elements that are not rotated, from element `d` on."""
    x = _load(dtype, rotation, head, d, inverse)
    store_as(dtype, target_dtype, head.target + head.target_itemsize * d, x, factor)


@inner
def _row(dtype, target_dtype, rotation, head, factor):
    """Normalise and rotate a head.

    Args:
        factor: what rounded values are multiplied by to become the target's codes.
    """
    size, pairs = rotation.head_size, rotation.num_pairs
    scalar = np.float32(1.0)
    if head.weight != 0:
        squares = sum_of_squares(dtype, rotation.itemsize, head.source, size)
        scalar = inverse_rms(squares, size, rotation.epsilon)
    full, full_factor = splat(scalar, LANES), splat(factor, LANES)
    half, half_factor = splat(scalar, HALF), splat(factor, HALF)
    single, single_factor = splat(scalar, 1), splat(factor, 1)
    pair = 0
    if rotation.interleaved:
        while pair + LANES <= pairs:
            _neighbours(dtype, target_dtype, rotation, head, pair, full, full_factor)
            pair += LANES
        while pair + HALF <= pairs:
            _neighbours(dtype, target_dtype, rotation, head, pair, half, half_factor)
            pair += HALF
        while pair < pairs:
            _neighbours(dtype, target_dtype, rotation, head, pair, single, single_factor)
            pair += 1
    else:
        while pair + LANES <= pairs:
            _split_pairs(dtype, target_dtype, rotation, head, pair, full, full_factor)
            pair += LANES
        while pair + HALF <= pairs:
            _split_pairs(dtype, target_dtype, rotation, head, pair, half, half_factor)
            pair += HALF
        while pair < pairs:
            _split_pairs(dtype, target_dtype, rotation, head, pair, single, single_factor)
            pair += 1
    d = 2 * pairs
    if head.weight == 0 and head.target_itemsize == rotation.itemsize:
        if head.source != head.target:
            start = rotation.itemsize * d
            copy_bytes(head.target + start, head.source + start, rotation.itemsize * size - start)
        return
    while d + HALF <= size:
        _rest(dtype, target_dtype, rotation, head, d, half, half_factor)
        d += HALF
    while d < size:
        _rest(dtype, target_dtype, rotation, head, d, single, single_factor)
        d += 1


@inner
def _queries(dtype, rotation, token, cos, sin):
    if rotation.num_pairs == 0 and rotation.query_weight == 0:
        return
    query = rotation.query + token * rotation.query_token_stride
    for _ in range(rotation.num_heads):
        head = Head(query, query, rotation.itemsize, cos, sin, rotation.query_weight)
        _row(dtype, dtype, rotation, head, np.float32(1.0))
        query += rotation.query_head_stride


@inner
def _keys_and_values(dtype, kv_dtype, rotation, token, cos, sin):
    target, key, value = addresses(rotation, token)
    for kv_head in range(rotation.num_kv_heads if target != 0 else 0):
        factor = np.float32(1.0)
        if rotation.k_scale != 0:
            factor = np.float32(1.0) / load_scalar(F32, rotation.k_scale + 4 * kv_head)
        head = Head(key, target, rotation.kv_itemsize, cos, sin, rotation.key_weight)
        _row(dtype, kv_dtype, rotation, head, factor)
        if rotation.k_scale == 0:
            copy_bytes(target + rotation.value_offset, value, rotation.row_bytes)
        else:
            scale = rotation.v_scale + 4 * kv_head
            quantise_row(dtype, kv_dtype, rotation, value, target + rotation.value_offset, scale)
        target += rotation.kv_head_stride
        key += rotation.key_head_stride
        value += rotation.value_head_stride


@inner
def rotate_tokens(dtype, kv_dtype, rotation, first, last):
    """Process the tokens from `first` to before `last`."""
    for token in range(first, last):
        cos = rotation.cos + token * rotation.cos_stride
        sin = rotation.sin + token * rotation.sin_stride
        _queries(dtype, rotation, token, cos, sin)
        _keys_and_values(dtype, kv_dtype, rotation, token, cos, sin)


def build(dtype, kv_dtype):
    """Return the entry and the work of the kernel for queries of ``dtype`` and a cache of ``kv_dtype``."""

    def rope_and_cache(address):
        arguments = address + HEADER_BYTES
        rotation = read(Rotation, arguments)
        if not are_valid(rotation):
            return INVALID
        heads = rotation.num_heads + 2 * rotation.num_kv_heads
        num_bytes = 3 * rotation.num_tokens * heads * rotation.head_size  # copied in the same time
        return run_rows(read(Launch, address), arguments, rotation.num_tokens, CHUNK_TOKENS, num_bytes)

    def work(address):
        rows = read(Rows, address)
        rotation = read(Rotation, rows.arguments)
        while True:
            first, last = next_rows(rows)
            if first == last:
                return 0
            rotate_tokens(dtype, kv_dtype, rotation, first, last)

    return rope_and_cache, work
