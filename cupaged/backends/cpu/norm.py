"""The numba kernel of `rms_norm`: each row is normalised by one thread, in two or three passes over it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import prange

from .simd import LANES, WIDE, add, fma, inner, load, mul, splat, store, sum_lanes
from .vector_math import rounded

SERIAL = 1 << 15  # maximum number of elements for one thread


class Norm(NamedTuple):
    """Hold the arguments of a call: addresses (0 for an absent tensor), strides in bytes, and numbers."""

    input: int
    input_stride: int
    residual: int
    residual_stride: int
    out: int
    out_stride: int
    weight: int
    input_weight: int
    num_rows: int
    size: int
    itemsize: int  # of input, residual and out
    weight_itemsize: int
    epsilon: float
    weight_offset: float


@inner
def inverse_rms(squares, size, epsilon):
    """Return 1 / sqrt(mean + epsilon) for a sum of squares of `size` elements."""
    return np.float32(1.0 / math.sqrt(np.float64(squares) / size + epsilon))


@inner
def weighted(weight_dtype, weight, weight_offset, x, inverse):
    """Return x * inverse * (weight_offset + weight), for the weights at an address."""
    factor = add(load(weight_dtype, weight, inverse), splat(np.float32(weight_offset), inverse))
    return mul(mul(x, inverse), factor)


@inner
def sum_of_squares(dtype, itemsize, address, size):
    wide, narrow, single = splat(np.float32(0.0), WIDE), splat(np.float32(0.0), LANES), np.float32(0.0)
    d = 0
    while d + WIDE <= size:
        x = load(dtype, address + itemsize * d, WIDE)
        wide = fma(x, x, wide)
        d += WIDE
    while d + LANES <= size:
        x = load(dtype, address + itemsize * d, LANES)
        narrow = fma(x, x, narrow)
        d += LANES
    while d < size:
        x = load(dtype, address + itemsize * d, 1)
        single += sum_lanes(mul(x, x))
        d += 1
    return sum_lanes(wide) + sum_lanes(narrow) + single


@inner
def _add(dtype, weight_dtype, norm, input, residual, d, inverse, squares):
    """Add elements of the input to the residual; return `squares` plus the squares of what is stored."""
    x = load(dtype, input + norm.itemsize * d, inverse)
    if norm.input_weight != 0:
        weight = norm.input_weight + norm.weight_itemsize * d
        x = weighted(weight_dtype, weight, norm.weight_offset, x, inverse)
    x = rounded(dtype, add(x, load(dtype, residual + norm.itemsize * d, inverse)))
    store(dtype, residual + norm.itemsize * d, x)
    return fma(x, x, squares)


@inner
def _add_row(dtype, weight_dtype, norm, input, residual):
    """Add a row of the input to the residual; return the sum of the squares of what is stored."""
    scalar = np.float32(1.0)
    if norm.input_weight != 0:
        scalar = inverse_rms(sum_of_squares(dtype, norm.itemsize, input, norm.size), norm.size, norm.epsilon)
    wide, narrow, single = (
        splat(np.float32(0.0), WIDE),
        splat(np.float32(0.0), LANES),
        splat(np.float32(0.0), 1),
    )
    d = 0
    while d + WIDE <= norm.size:
        wide = _add(dtype, weight_dtype, norm, input, residual, d, splat(scalar, WIDE), wide)
        d += WIDE
    while d + LANES <= norm.size:
        narrow = _add(dtype, weight_dtype, norm, input, residual, d, splat(scalar, LANES), narrow)
        d += LANES
    while d < norm.size:
        single = _add(dtype, weight_dtype, norm, input, residual, d, splat(scalar, 1), single)
        d += 1
    return sum_lanes(wide) + sum_lanes(narrow) + sum_lanes(single)


@inner
def _write(dtype, weight_dtype, norm, x, out, d, inverse):
    value = load(dtype, x + norm.itemsize * d, inverse)
    weight = norm.weight + norm.weight_itemsize * d
    value = weighted(weight_dtype, weight, norm.weight_offset, value, inverse)
    store(dtype, out + norm.itemsize * d, value)


@inner
def norm_rows(dtype, weight_dtype, norm, first, last):
    """Normalise the rows from `first` to before `last`."""
    for row in range(first, last):
        x = norm.input + row * norm.input_stride
        out = norm.out + row * norm.out_stride
        if norm.residual != 0:
            residual = norm.residual + row * norm.residual_stride
            squares = _add_row(dtype, weight_dtype, norm, x, residual)
            x = residual
        else:
            squares = sum_of_squares(dtype, norm.itemsize, x, norm.size)
        scalar = inverse_rms(squares, norm.size, norm.epsilon)
        d = 0
        while d + WIDE <= norm.size:
            _write(dtype, weight_dtype, norm, x, out, d, splat(scalar, WIDE))
            d += WIDE
        while d + LANES <= norm.size:
            _write(dtype, weight_dtype, norm, x, out, d, splat(scalar, LANES))
            d += LANES
        while d < norm.size:
            _write(dtype, weight_dtype, norm, x, out, d, splat(scalar, 1))
            d += 1


def build(version: str, jit):
    @jit
    def rms_norm(dtype, weight_dtype, norm, num_threads):
        version  # noqa: B018  puts it into the closure, see attention.py
        if norm.num_rows * norm.size <= SERIAL:
            norm_rows(dtype, weight_dtype, norm, 0, norm.num_rows)
        else:
            for part in prange(num_threads):
                first = part * norm.num_rows // num_threads
                norm_rows(dtype, weight_dtype, norm, first, (part + 1) * norm.num_rows // num_threads)

    return rms_norm
