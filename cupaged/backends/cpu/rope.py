"""The numba kernel of `rope_and_cache`: a token's heads are normalised, rotated and stored by one thread."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import prange

from .memory import F32, _addresses, _quantise_row
from .norm import inverse_rms, sum_of_squares, weighted
from .simd import HALF, LANES, add, copy_bytes, fma, inner, load, load_scalar, mul, splat, sub
from .vector_math import load_pairs, store_as, store_pairs

SERIAL = 1 << 15  # maximum number of elements for one thread


class Rotation(NamedTuple):
    """Hold the arguments of a call: addresses (0 for an absent tensor), strides in bytes, and numbers.

    The fields that `memory.Tokens` has are the same there.
    """

    query: int
    query_token_stride: int
    query_head_stride: int
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
    num_heads: int
    num_kv_heads: int
    block_size: int
    head_size: int
    itemsize: int  # of query, key and value
    kv_itemsize: int
    k_scale: int
    v_scale: int
    cos: int
    cos_stride: int
    sin: int
    sin_stride: int
    cos_itemsize: int
    num_pairs: int  # rotated pairs of dimensions in a head
    interleaved: int
    query_weight: int
    key_weight: int
    weight_itemsize: int
    epsilon: float
    weight_offset: float


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
def _load(dtype, weight_dtype, rotation, head, d, inverse):
    """Load as many elements of a head as `inverse` has lanes, from element `d` on, and normalise them."""
    x = load(dtype, head.source + rotation.itemsize * d, inverse)
    if head.weight != 0:
        weight = head.weight + rotation.weight_itemsize * d
        return weighted(weight_dtype, weight, rotation.weight_offset, x, inverse)
    return x


@inner
def _split_pairs(dtypes, rotation, head, pair, inverse, factor):
    """Rotate pairs (i, i + num_pairs), as many as `inverse` has lanes, from i = `pair` on."""
    dtype, target_dtype, cos_dtype, weight_dtype = dtypes
    other = pair + rotation.num_pairs
    cos = load(cos_dtype, head.cos + rotation.cos_itemsize * pair, inverse)
    sin = load(cos_dtype, head.sin + rotation.cos_itemsize * pair, inverse)
    a = _load(dtype, weight_dtype, rotation, head, pair, inverse)
    b = _load(dtype, weight_dtype, rotation, head, other, inverse)
    a, b = _rotate(a, b, cos, sin)
    store_as(dtype, target_dtype, head.target + head.target_itemsize * pair, a, factor)
    store_as(dtype, target_dtype, head.target + head.target_itemsize * other, b, factor)


@inner
def _neighbours(dtypes, rotation, head, pair, inverse, factor):
    """Rotate pairs (2i, 2i + 1), as many as `inverse` has lanes, from i = `pair` on."""
    dtype, target_dtype, cos_dtype, weight_dtype = dtypes
    cos = load(cos_dtype, head.cos + rotation.cos_itemsize * pair, inverse)
    sin = load(cos_dtype, head.sin + rotation.cos_itemsize * pair, inverse)
    a, b = load_pairs(dtype, head.source + rotation.itemsize * 2 * pair, inverse)
    if head.weight != 0:
        weight = head.weight + rotation.weight_itemsize * 2 * pair
        a_weight, b_weight = load_pairs(weight_dtype, weight, inverse)
        offset = splat(np.float32(rotation.weight_offset), inverse)
        a = mul(mul(a, inverse), add(a_weight, offset))
        b = mul(mul(b, inverse), add(b_weight, offset))
    a, b = _rotate(a, b, cos, sin)
    store_pairs(dtype, target_dtype, head.target + head.target_itemsize * 2 * pair, a, b, factor)


@inner
def _rest(dtypes, rotation, head, d, inverse, factor):
    """Store elements that are not rotated, from element `d` on."""
    dtype, target_dtype, _, weight_dtype = dtypes
    x = _load(dtype, weight_dtype, rotation, head, d, inverse)
    store_as(dtype, target_dtype, head.target + head.target_itemsize * d, x, factor)


@inner
def _row(dtypes, rotation, head, factor):
    """Normalise and rotate a head.

    Args:
        dtypes: those of source, target, cos and weight.
        factor: what rounded values are multiplied by to become the target's codes.
    """
    size, pairs = rotation.head_size, rotation.num_pairs
    scalar = np.float32(1.0)
    if head.weight != 0:
        squares = sum_of_squares(dtypes[0], rotation.itemsize, head.source, size)
        scalar = inverse_rms(squares, size, rotation.epsilon)
    full, full_factor = splat(scalar, LANES), splat(factor, LANES)
    half, half_factor = splat(scalar, HALF), splat(factor, HALF)
    single, single_factor = splat(scalar, 1), splat(factor, 1)
    pair = 0
    if rotation.interleaved:
        while pair + LANES <= pairs:
            _neighbours(dtypes, rotation, head, pair, full, full_factor)
            pair += LANES
        while pair + HALF <= pairs:
            _neighbours(dtypes, rotation, head, pair, half, half_factor)
            pair += HALF
        while pair < pairs:
            _neighbours(dtypes, rotation, head, pair, single, single_factor)
            pair += 1
    else:
        while pair + LANES <= pairs:
            _split_pairs(dtypes, rotation, head, pair, full, full_factor)
            pair += LANES
        while pair + HALF <= pairs:
            _split_pairs(dtypes, rotation, head, pair, half, half_factor)
            pair += HALF
        while pair < pairs:
            _split_pairs(dtypes, rotation, head, pair, single, single_factor)
            pair += 1
    d = 2 * pairs
    if head.weight == 0 and head.source == head.target:
        return
    while d + HALF <= size:
        _rest(dtypes, rotation, head, d, half, half_factor)
        d += HALF
    while d < size:
        _rest(dtypes, rotation, head, d, single, single_factor)
        d += 1


@inner
def _queries(dtype, cos_dtype, weight_dtype, rotation, token, cos, sin):
    if rotation.num_pairs == 0 and rotation.query_weight == 0:
        return
    query = rotation.query + token * rotation.query_token_stride
    for _ in range(rotation.num_heads):
        head = Head(query, query, rotation.itemsize, cos, sin, rotation.query_weight)
        _row((dtype, dtype, cos_dtype, weight_dtype), rotation, head, np.float32(1.0))
        query += rotation.query_head_stride


@inner
def _keys_and_values(dtype, kv_dtype, cos_dtype, weight_dtype, rotation, token, cos, sin):
    target, key, value = _addresses(rotation, token)
    for kv_head in range(rotation.num_kv_heads if target != 0 else 0):
        factor = np.float32(1.0)
        if rotation.k_scale != 0:
            factor = np.float32(1.0) / load_scalar(F32, rotation.k_scale + 4 * kv_head)
        if rotation.k_scale == 0 and rotation.num_pairs == 0 and rotation.key_weight == 0:
            copy_bytes(target, key, rotation.row_bytes)
        else:
            head = Head(key, target, rotation.kv_itemsize, cos, sin, rotation.key_weight)
            _row((dtype, kv_dtype, cos_dtype, weight_dtype), rotation, head, factor)
        if rotation.k_scale == 0:
            copy_bytes(target + rotation.value_offset, value, rotation.row_bytes)
        else:
            scale = rotation.v_scale + 4 * kv_head
            _quantise_row(dtype, kv_dtype, rotation, value, target + rotation.value_offset, scale)
        target += rotation.kv_head_stride
        key += rotation.key_head_stride
        value += rotation.value_head_stride


@inner
def rotate_tokens(dtype, kv_dtype, cos_dtype, weight_dtype, rotation, first, last):
    """Process the tokens from `first` to before `last`."""
    for token in range(first, last):
        cos = rotation.cos + token * rotation.cos_stride
        sin = rotation.sin + token * rotation.sin_stride
        _queries(dtype, cos_dtype, weight_dtype, rotation, token, cos, sin)
        _keys_and_values(dtype, kv_dtype, cos_dtype, weight_dtype, rotation, token, cos, sin)


def build(version: str, jit):
    @jit
    def rope_and_cache(dtype, kv_dtype, cos_dtype, weight_dtype, rotation, num_threads):
        version  # noqa: B018  puts it into the closure, see attention.py
        heads = rotation.num_heads + 2 * rotation.num_kv_heads
        if rotation.num_tokens * heads * rotation.head_size <= SERIAL:
            rotate_tokens(dtype, kv_dtype, cos_dtype, weight_dtype, rotation, 0, rotation.num_tokens)
        else:
            for part in prange(num_threads):
                first = part * rotation.num_tokens // num_threads
                last = (part + 1) * rotation.num_tokens // num_threads
                rotate_tokens(dtype, kv_dtype, cos_dtype, weight_dtype, rotation, first, last)

    return rope_and_cache
