"""The numba kernel of `act_and_mul`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import prange

from .simd import LANES, inner, load, mul, splat, store
from .vector_math import gelu, gelu_tanh, silu

SERIAL = 1 << 14  # maximum number of elements for one thread
# In the order of their numbers in `Gated`.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


class Gated(NamedTuple):
    """Hold the arguments of a call: addresses, strides in bytes, and numbers."""

    input: int
    input_stride: int
    out: int
    out_stride: int
    num_rows: int
    size: int  # columns of out
    itemsize: int
    activation: int


@inner
def _silu(dtype, gated, gate, out, d, like):
    up = load(dtype, gate + gated.itemsize * (gated.size + d), like)
    product = mul(silu(load(dtype, gate + gated.itemsize * d, like)), up)
    store(dtype, out + gated.itemsize * d, product)


@inner
def _gelu(dtype, gated, gate, out, d, like):
    up = load(dtype, gate + gated.itemsize * (gated.size + d), like)
    product = mul(gelu(load(dtype, gate + gated.itemsize * d, like)), up)
    store(dtype, out + gated.itemsize * d, product)


@inner
def _gelu_tanh(dtype, gated, gate, out, d, like):
    up = load(dtype, gate + gated.itemsize * (gated.size + d), like)
    product = mul(gelu_tanh(load(dtype, gate + gated.itemsize * d, like)), up)
    store(dtype, out + gated.itemsize * d, product)


@inner
def _elements(dtype, gated, gate, out, first, last, like, lanes):
    """Compute whole vectors of `lanes` lanes from element `first` on; return where they end."""
    d = first
    if gated.activation == 0:
        while d + lanes <= last:
            _silu(dtype, gated, gate, out, d, like)
            d += lanes
    elif gated.activation == 1:
        while d + lanes <= last:
            _gelu(dtype, gated, gate, out, d, like)
            d += lanes
    else:
        while d + lanes <= last:
            _gelu_tanh(dtype, gated, gate, out, d, like)
            d += lanes
    return d


@inner
def gated_rows(dtype, gated, first, last):
    """Compute the rows from `first` to before `last`."""
    for row in range(first, last):
        gate = gated.input + row * gated.input_stride
        out = gated.out + row * gated.out_stride
        rest = _elements(dtype, gated, gate, out, 0, gated.size, splat(np.float32(0.0), LANES), LANES)
        _elements(dtype, gated, gate, out, rest, gated.size, splat(np.float32(0.0), 1), 1)


def build(version: str, jit):
    @jit
    def act_and_mul(dtype, gated, num_threads):
        version  # noqa: B018  puts it into the closure, see attention.py
        if gated.num_rows * gated.size <= SERIAL:
            gated_rows(dtype, gated, 0, gated.num_rows)
        else:
            for part in prange(num_threads):
                first = part * gated.num_rows // num_threads
                gated_rows(dtype, gated, first, (part + 1) * gated.num_rows // num_threads)

    return act_and_mul
