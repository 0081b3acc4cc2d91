"""The numba kernel of `act_and_mul`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .simd import LANES, inner, load, mul, splat, store
from .team import HEADER_BYTES, Launch, Rows, next_rows, read, run_rows
from .vector_math import gelu, gelu_tanh, silu

CHUNK_ROWS = 4  # rows that a thread takes at a time
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


class Gated(NamedTuple):
    """Hold the arguments of a call: addresses, strides in bytes, and numbers."""

    input: int
    out: int
    # The tensors' layout and the activation determine the rest.
    input_stride: int
    out_stride: int
    num_rows: int
    size: int  # columns of out
    itemsize: int
    activation: int  # index in ACTIVATIONS


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


def build(dtype):
    """Return the entry and the work of the kernel for an input of ``dtype``."""

    def act_and_mul(address):
        arguments = address + HEADER_BYTES
        gated = read(Gated, arguments)
        num_bytes = 6 * gated.num_rows * gated.size  # bytes that are copied in the same time
        return run_rows(read(Launch, address), arguments, gated.num_rows, CHUNK_ROWS, num_bytes)

    def work(address):
        rows = read(Rows, address)
        gated = read(Gated, rows.arguments)
        while True:
            first, last = next_rows(rows)
            if first == last:
                return 0
            gated_rows(dtype, gated, first, last)

    return act_and_mul, work
