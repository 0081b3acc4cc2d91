"""The numba kernel of `sample`: a thread samples a row, by the steps of `cuda/sample.cu`.

It draws the same tokens. A threshold is found by bisection: each pass over the row counts, or weighs, the
logits of a range that shrinks to half, and where 16 logits are outside, their weights are not computed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .fixed_point import count_between, key_of, load_double, multiply_high, value_of, weigh_between, weight_of
from .simd import LANES, WIDE, inner, load, load_scalar, max_lanes, maximum, splat, store_int
from .team import HEADER_BYTES, Launch, Rows, next_rows, read, run_rows

I64 = np.dtype(np.int64)
BLOCK = 1024  # logits of which one maximum, or sum, is kept
VALUE_PASSES = 4  # of a search: they halve the range of floats, the others that of their bits
INFINITY = np.float32(np.inf)


class Sampling(NamedTuple):
    """Hold the arguments of a call: addresses, and numbers."""

    logits: int
    temperature: int
    top_k: int
    top_p: int
    min_p: int
    seeds: int
    indices: int
    positions: int
    out: int
    # The tensors' layout determines the rest.
    stride: int  # in bytes
    num_rows: int
    size: int
    itemsize: int
    fraction_bits: int


@inner
def _largest_between(dtype, itemsize, row, first, last):
    """Return the largest logit from `first` to before `last`; NaN counts as -inf."""
    wide, single = splat(-INFINITY, WIDE), splat(-INFINITY, 1)
    while first + WIDE <= last:
        wide = maximum(load(dtype, row + itemsize * first, WIDE), wide)
        first += WIDE
    while first < last:
        single = maximum(load(dtype, row + itemsize * first, 1), single)
        first += 1
    return max(max_lanes(wide), max_lanes(single))


@inner
def _find_largest(dtype, itemsize, row, size):
    """Return the largest logit, and the first token that has it: 0 if none is above -inf."""
    largest, block = -INFINITY, 0
    for first in range(0, size, BLOCK):
        here = _largest_between(dtype, itemsize, row, first, min(first + BLOCK, size))
        if here > largest:
            largest, block = here, first
    if largest > -INFINITY:
        for token in range(block, min(block + BLOCK, size)):
            if load_scalar(dtype, row + itemsize * token) == largest:
                return largest + np.float32(0.0), token  # no -0
    return largest, 0


@inner
def _count(dtype, itemsize, row, first, last, low, high):
    """Return how many of a row's logits are at least `low` and below `high`."""
    total = 0
    while first + LANES <= last:
        total += count_between(dtype, row + itemsize * first, LANES, low, high)
        first += LANES
    while first < last:
        total += count_between(dtype, row + itemsize * first, 1, low, high)
        first += 1
    return total


@inner
def _weigh(dtype, itemsize, row, first, last, low, high, largest, factor, shift):
    """Return the weight of those."""
    total = 0
    while first + LANES <= last:
        total += weigh_between(dtype, row + itemsize * first, LANES, low, high, largest, factor, shift)
        first += LANES
    while first < last:
        total += weigh_between(dtype, row + itemsize * first, 1, low, high, largest, factor, shift)
        first += 1
    return total


@inner
def _largest_below(dtype, itemsize, largest, factor, shift, minimum):
    """Return the key of the largest logit whose weight is below the minimum."""
    low, high = key_of(dtype, itemsize, -INFINITY), key_of(dtype, itemsize, largest)
    while high - low > 1:
        middle = low + (high - low) // 2
        if weight_of(value_of(dtype, itemsize, middle), largest, factor, shift) < minimum:
            low = middle
        else:
            high = middle
    return low


@inner
def _search(dtype, itemsize, row, size, by_weight, low, target, largest, factor, shift):
    """Return the largest key such that there is `target` at or above it, and what is above it.

    The key is `low` if there is not so much above that. What there is are tokens, or their weights.
    """
    high, end, above, passes = key_of(dtype, itemsize, largest) + 1, INFINITY, 0, 0
    while high - low > 1:
        middle = low + (high - low) // 2
        if passes < VALUE_PASSES:
            passes += 1
            bounds = value_of(dtype, itemsize, low), value_of(dtype, itemsize, high - 1)
            half = np.float32(0.5) * bounds[0] + np.float32(0.5) * bounds[1]
            middle = min(max(key_of(dtype, itemsize, half), low + 1), high - 1)
        pivot = value_of(dtype, itemsize, middle)
        if by_weight:
            found = above + _weigh(dtype, itemsize, row, 0, size, pivot, end, largest, factor, shift)
        else:
            found = above + _count(dtype, itemsize, row, 0, size, pivot, end)
        if found >= target:
            low = middle
        else:
            high, end, above = middle, pivot, found
    return low, above


@inner
def _mix(x):
    """Apply the mixing function of SplitMix64 to a uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@inner
def _uniform(seed, index, position):
    """Return a number in units of 2^-64 of which the first 53 bits count."""
    bits = _mix(_mix(_mix(np.uint64(seed)) + np.uint64(index)) + np.uint64(position))
    return bits & ~np.uint64(0x7FF)


@inner
def _draw(dtype, itemsize, row, size, key, ties, number, largest, factor, shift):
    """Draw a token among those above the key and the first `ties` that equal it."""
    threshold, low = value_of(dtype, itemsize, key), value_of(dtype, itemsize, key + 1)
    tie_weight = weight_of(threshold, largest, factor, shift)
    num_blocks = (size - 1) // BLOCK + 1
    above, equal = np.empty(num_blocks, np.int64), np.zeros(num_blocks, np.int64)
    all_above, all_equal = 0, 0
    for block in range(num_blocks):
        first, last = block * BLOCK, min((block + 1) * BLOCK, size)
        above[block] = _weigh(dtype, itemsize, row, first, last, low, INFINITY, largest, factor, shift)
        if ties > 0:
            equal[block] = _count(dtype, itemsize, row, first, last, threshold, low)
        all_above += above[block]
        all_equal += equal[block]
    total = all_above + min(all_equal, ties) * tie_weight
    target = np.int64(multiply_high(number, np.uint64(total)))
    all_above, all_equal, block = 0, 0, 0
    while all_above + above[block] + min(all_equal + equal[block], ties) * tie_weight <= target:
        all_above += above[block]
        all_equal += equal[block]
        block += 1
    token = block * BLOCK
    while True:
        x = load_scalar(dtype, row + itemsize * token)
        if x > threshold:
            all_above += weight_of(x, largest, factor, shift)
        elif x == threshold:
            all_equal += 1
        if all_above + min(all_equal, ties) * tie_weight > target:
            return token
        token += 1


@inner
def sample_row(dtype, sampling, n):
    """Return the token of row `n`."""
    row, size, itemsize = sampling.logits + n * sampling.stride, sampling.size, sampling.itemsize
    largest, token = _find_largest(dtype, itemsize, row, size)
    temperature = load_double(sampling.temperature + 8 * n)
    if not temperature > 0.0 or math.isinf(largest):
        return token
    divisor = min(max(np.float32(temperature), np.float32(1e-30)), np.float32(1e30))
    factor, shift = np.float32(1.44269502) / divisor, sampling.fraction_bits - 24
    minimum, min_p = 1, load_double(sampling.min_p + 8 * n)
    if min_p > 0.0:
        minimum = max(1, np.int64(math.ceil(min(min_p, 1.0) * np.float64(1 << sampling.fraction_bits))))
    key, ties = _largest_below(dtype, itemsize, largest, factor, shift, minimum), 0
    top_k = load_scalar(I64, sampling.top_k + 8 * n)
    if 0 < top_k < size:
        found, above = _search(dtype, itemsize, row, size, False, key, top_k, largest, factor, shift)
        if found != key:
            key, ties = found, top_k - above
    top_p = load_double(sampling.top_p + 8 * n)
    if top_p < 1.0:
        # The most likely tokens are kept until they have top_p of the weight.
        low = value_of(dtype, itemsize, key + 1)
        total = _weigh(dtype, itemsize, row, 0, size, low, INFINITY, largest, factor, shift)
        total += ties * weight_of(value_of(dtype, itemsize, key), largest, factor, shift)
        share = np.int64(math.ceil(max(top_p, 0.0) * np.float64(total)))
        target = min(max(share, 1), total)
        key, above = _search(dtype, itemsize, row, size, True, key, target, largest, factor, shift)
        weight = weight_of(value_of(dtype, itemsize, key), largest, factor, shift)
        ties = (target - above - 1) // weight + 1
    number = _uniform(
        load_scalar(I64, sampling.seeds + 8 * n),
        load_scalar(I64, sampling.indices + 8 * n),
        load_scalar(I64, sampling.positions + 8 * n),
    )
    return _draw(dtype, itemsize, row, size, key, ties, number, largest, factor, shift)


def build(dtype):
    """Return the entry and the work of the kernel for logits of ``dtype``."""

    def sample(address):
        arguments = address + HEADER_BYTES
        sampling = read(Sampling, arguments)
        num_bytes = sampling.num_rows * sampling.size * sampling.itemsize
        return run_rows(read(Launch, address), arguments, sampling.num_rows, 1, num_bytes)

    def work(address):
        rows = read(Rows, address)
        sampling = read(Sampling, rows.arguments)
        while True:
            first, last = next_rows(rows)
            if first == last:
                return 0
            for n in range(first, last):
                store_int(sampling.out + 8 * n, sample_row(dtype, sampling, n))

    return sample, work
