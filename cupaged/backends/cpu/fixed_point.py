"""Weigh logits by integers, as `cuda/sample.cu` does bit for bit: sums are exact in any order.

The weight of a logit is exp((x - largest) / temperature) with ``shift + 24`` bits after the point.
"""

from __future__ import annotations

import math

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import formats
from . import ir as low
from .formats import BFLOAT16, kind_of
from .ir import F32, F64, I16, I32, I64
from .simd import _lane_count, inner

I128 = ir.IntType(128)


def _integers(element: ir.IntType, lanes: int, value: int) -> ir.Constant:
    return ir.Constant(low.vector(element, lanes), [value] * lanes)


def _weights(
    builder: ir.IRBuilder, x: ir.Value, largest: ir.Value, factor: ir.Value, shift: ir.Value
) -> ir.Value:
    """Return the weights of float32 lanes as int64 lanes."""
    lanes = x.type.count
    t = builder.fmul(builder.fsub(x, low.splat(builder, largest, lanes)), low.splat(builder, factor, lanes))
    limit = low.constant(-63.0, x)
    t = builder.select(builder.fcmp_ordered(">", t, limit), t, limit)
    n = low.call(builder, "rint", t)
    f = builder.fsub(t, n)
    # The Taylor series of 2**f. Fused on every CPU, as on a GPU; where it cannot, it calls a function.
    series = low.constant(math.log(2) ** 7 / math.factorial(7), x)
    for power in range(6, -1, -1):
        term = low.constant(math.log(2) ** power / math.factorial(power), x)
        series = low.call(builder, "fma", series, f, term)
    mantissa = builder.fptosi(builder.fmul(series, low.constant(2.0**24, x)), low.vector(I32, lanes))
    down = builder.fptosi(builder.fneg(n), low.vector(I32, lanes))
    wide = low.vector(I64, lanes)
    whole = builder.shl(builder.zext(mantissa, wide), low.splat(builder, shift, lanes))
    return builder.lshr(whole, builder.zext(down, wide))


def _between(builder: ir.IRBuilder, x: ir.Value, first: ir.Value, end: ir.Value) -> ir.Value:
    """Return whether first <= x < end in each lane; false for NaN."""
    lanes = x.type.count
    return builder.and_(
        builder.fcmp_ordered(">=", x, low.splat(builder, first, lanes)),
        builder.fcmp_ordered("<", x, low.splat(builder, end, lanes)),
    )


def _any(builder: ir.IRBuilder, mask: ir.Value) -> ir.Value:
    bits = builder.bitcast(mask, ir.IntType(mask.type.count))
    return builder.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))


@intrinsic(prefer_literal=True)
def count_between(typingctx, dtype, address, lanes, first, end):
    """Return how many of `lanes` elements at `address` are at least `first` and below `end`."""
    count = _lane_count(lanes)
    if count is None:
        return None

    def codegen(context, builder, signature, args):
        mask = _between(builder, formats.load(builder, dtype, args[1], count), args[3], args[4])
        bits = builder.bitcast(mask, ir.IntType(count))
        return builder.zext(builder.ctpop(bits), I64)

    return types.int64(dtype, types.int64, lanes, types.float32, types.float32), codegen


@intrinsic(prefer_literal=True)
def weigh_between(typingctx, dtype, address, lanes, first, end, largest, factor, shift):
    """Return the weight of those of `lanes` elements that are at least `first` and below `end`."""
    count = _lane_count(lanes)
    if count is None:
        return None

    def codegen(context, builder, signature, args):
        x = formats.load(builder, dtype, args[1], count)
        mask = _between(builder, x, args[3], args[4])
        before = builder.block
        with builder.if_then(_any(builder, mask)):
            zeros = _integers(I64, count, 0)
            weights = builder.select(mask, _weights(builder, x, *args[5:]), zeros)
            function = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(I64, [weights.type]), f"llvm.vector.reduce.add.v{count}i64"
            )
            total = builder.call(function, [weights])
            inside = builder.block
        result = builder.phi(I64)
        result.add_incoming(I64(0), before)
        result.add_incoming(total, inside)
        return result

    signature = types.int64(
        dtype, types.int64, lanes, types.float32, types.float32, types.float32, types.float32, types.int64
    )
    return signature, codegen


@intrinsic
def weight_of(typingctx, x, largest, factor, shift):
    """Return the weight of one logit."""

    def codegen(context, builder, signature, args):
        vector = low.splat(builder, args[0], 1)
        return builder.extract_element(_weights(builder, vector, *args[1:]), I32(0))

    return types.int64(types.float32, types.float32, types.float32, types.int64), codegen


@intrinsic
def bits_of(typingctx, dtype, x):
    """Return the bits of a float32 that is an element of `dtype`, as int64."""
    kind = kind_of(dtype)

    def codegen(context, builder, signature, args):
        if kind.itemsize == 4:
            return builder.zext(builder.bitcast(args[1], I32), I64)
        if kind == BFLOAT16:
            return builder.lshr(builder.zext(builder.bitcast(args[1], I32), I64), I64(16))
        return builder.zext(builder.bitcast(builder.fptrunc(args[1], ir.HalfType()), I16), I64)

    return types.int64(dtype, types.float32), codegen


@intrinsic
def float_of(typingctx, dtype, bits):
    """Return the element of `dtype` that has these bits, as float32."""
    kind = kind_of(dtype)

    def codegen(context, builder, signature, args):
        if kind.itemsize == 4:
            return builder.bitcast(builder.trunc(args[1], I32), F32)
        if kind == BFLOAT16:
            return builder.bitcast(builder.trunc(builder.shl(args[1], I64(16)), I32), F32)
        return builder.fpext(builder.bitcast(builder.trunc(args[1], I16), ir.HalfType()), F32)

    return types.float32(dtype, types.int64), codegen


@intrinsic
def load_double(typingctx, address):
    """Load one float64."""

    def codegen(context, builder, signature, args):
        return builder.load(low.pointer(builder, args[0], F64), align=8)

    return types.float64(types.int64), codegen


@intrinsic
def multiply_high(typingctx, a, b):
    """Return the upper 64 bits of the product of two uint64."""

    def codegen(context, builder, signature, args):
        product = builder.mul(*(builder.zext(arg, I128) for arg in args))
        return builder.trunc(builder.lshr(product, I128(64)), I64)

    return types.uint64(types.uint64, types.uint64), codegen


@inner
def key_of(dtype, itemsize, x):
    """Return an integer for each element, in the order of the elements; -0 is before 0."""
    bits, width = bits_of(dtype, x), 8 * itemsize
    if bits >> (width - 1):
        return (1 << width) - 1 - bits
    return bits | (1 << (width - 1))


@inner
def value_of(dtype, itemsize, key):
    """Return the element of a key."""
    width = 8 * itemsize
    if key >> (width - 1):
        return float_of(dtype, key & ((1 << (width - 1)) - 1))
    return float_of(dtype, (1 << width) - 1 - key)
