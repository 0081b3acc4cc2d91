"""The numba kernel of `rms_norm`: each row is normalised by one thread, in two or three passes over it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .simd import LANES, WIDE, add, fma, inner, load, mul, splat, store, sum_lanes
from .team import HEADER_BYTES, Launch, Rows, next_rows, read, run_rows
from .vector_math import store_and_round

F32 = np.dtype(np.float32)
CHUNK_ROWS = 8  # rows that a thread takes at a time


class Norm(NamedTuple):
    """Hold the arguments of a call: addresses (0 for an absent tensor), strides in bytes, and numbers."""

    input: int
    residual: int
    out: int
    weight: int
    input_weight: int
    epsilon: float
    weight_offset: float
    # The tensors' layout determines the rest.
    input_stride: int
    residual_stride: int
    out_stride: int
    num_rows: int
    size: int
    itemsize: int  # of input, residual and out
    weight_itemsize: int


@inner
def inverse_rms(squares, size, epsilon):
    """Return 1 / sqrt(mean + epsilon) for a sum of squares of `size` elements."""
    return np.float32(1.0 / math.sqrt(np.float64(squares) / size + epsilon))


@inner
def load_either(dtype, itemsize, address, like):
    """Load as many elements as `like` has lanes: float32 if they have 4 bytes, otherwise `dtype`."""
    if itemsize == 4:
        return load(F32, address, like)
    return load(dtype, address, like)


@inner
def weighted(dtype, itemsize, weight, weight_offset, x, inverse):
    """Return x * inverse * (weight_offset + weight), for the weights at an address."""
    weights = load_either(dtype, itemsize, weight, inverse)
    return mul(mul(x, inverse), add(weights, splat(np.float32(weight_offset), inverse)))


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
def _add(dtype, norm, input, residual, d, inverse, squares):
    """Add elements of the input to the residual; return `squares` plus the squares of what is stored."""
    x = load(dtype, input + norm.itemsize * d, inverse)
    if norm.input_weight != 0:
        weight = norm.input_weight + norm.weight_itemsize * d
        x = weighted(dtype, norm.weight_itemsize, weight, norm.weight_offset, x, inverse)
    address = residual + norm.itemsize * d
    x = store_and_round(dtype, address, add(x, load(dtype, address, inverse)))
    return fma(x, x, squares)


@inner
def _add_row(dtype, norm, input, residual):
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
        wide = _add(dtype, norm, input, residual, d, splat(scalar, WIDE), wide)
        d += WIDE
    while d + LANES <= norm.size:
        narrow = _add(dtype, norm, input, residual, d, splat(scalar, LANES), narrow)
        d += LANES
    while d < norm.size:
        single = _add(dtype, norm, input, residual, d, splat(scalar, 1), single)
        d += 1
    return sum_lanes(wide) + sum_lanes(narrow) + sum_lanes(single)


@inner
def _write(dtype, norm, x, out, d, inverse):
    value = load(dtype, x + norm.itemsize * d, inverse)
    weight = norm.weight + norm.weight_itemsize * d
    value = weighted(dtype, norm.weight_itemsize, weight, norm.weight_offset, value, inverse)
    store(dtype, out + norm.itemsize * d, value)


@inner
def norm_rows(dtype, norm, first, last):
    """Normalise the rows from `first` to before `last`."""
    for row in range(first, last):
        x = norm.input + row * norm.input_stride
        out = norm.out + row * norm.out_stride
        if norm.residual != 0:
            residual = norm.residual + row * norm.residual_stride
            squares = _add_row(dtype, norm, x, residual)
            x = residual
        else:
            squares = sum_of_squares(dtype, norm.itemsize, x, norm.size)
        scalar = inverse_rms(squares, norm.size, norm.epsilon)
        d = 0
        while d + WIDE <= norm.size:
            _write(dtype, norm, x, out, d, splat(scalar, WIDE))
            d += WIDE
        while d + LANES <= norm.size:
            _write(dtype, norm, x, out, d, splat(scalar, LANES))
            d += LANES
        while d < norm.size:
            _write(dtype, norm, x, out, d, splat(scalar, 1))
            d += 1


def build(dtype):
    """Return the entry and the work of the kernel for an input of ``dtype``."""

    def rms_norm(address):
        arguments = address + HEADER_BYTES
        norm = read(Norm, arguments)
        num_bytes = 4 * norm.num_rows * norm.size  # bytes that are copied in the same time
        return run_rows(read(Launch, address), arguments, norm.num_rows, CHUNK_ROWS, num_bytes)

    def work(address):
        rows = read(Rows, address)
        norm = read(Norm, rows.arguments)
        while True:
            first, last = next_rows(rows)
            if first == last:
                return 0
            norm_rows(dtype, norm, first, last)

    return rms_norm, work
