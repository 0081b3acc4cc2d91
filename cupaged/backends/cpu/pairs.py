"""Multiply pairs of bfloat16 (AVX512-BF16): intrinsics for numba.

A pair is a lane of 32 bits. Vectors of pairs are typed as float32, but nothing computes with their lanes.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from . import formats
from . import ir as low
from .ir import I16, I32
from .simd import HALF


def _has_pairs(dtype: types.DType, kv_dtype: types.DType) -> bool:
    kinds = {formats.kind_of(dtype), formats.kind_of(kv_dtype)}
    return kinds == {formats.BFLOAT16} and low.BFLOAT16_PRODUCTS


@intrinsic
def has_pairs(typingctx, dtype, kv_dtype):
    """Return whether queries and a cache of these dtypes are multiplied in pairs, a compile-time constant."""
    pairs = ir.IntType(1)(_has_pairs(dtype, kv_dtype))
    return types.boolean(dtype, kv_dtype), lambda context, builder, signature, args: pairs


def _registers(builder: ir.IRBuilder, value: ir.Value) -> list[ir.Value]:
    """Divide a vector into machine registers."""
    masks = [range(first, first + low.NATIVE) for first in range(0, value.type.count, low.NATIVE)]
    return [
        builder.shuffle_vector(value, value, ir.Constant(low.vector(I32, low.NATIVE), list(mask)))
        for mask in masks
    ]


def _joined(builder: ir.IRBuilder, parts: list[ir.Value]) -> ir.Value:
    """Join vectors, as many as a power of two."""
    while len(parts) > 1:
        lanes = 2 * parts[0].type.count
        mask = ir.Constant(low.vector(I32, lanes), list(range(lanes)))
        parts = [builder.shuffle_vector(a, b, mask) for a, b in zip(parts[::2], parts[1::2])]
    return parts[0]


@intrinsic
def multiply_add(typingctx, dtype, kv_dtype, a, b, total):
    """Return total + a * b; where `has_pairs`, + the products of the two pairs in each lane."""

    def codegen(context, builder, signature, args):
        *factors, total = args[2:]
        if not _has_pairs(dtype, kv_dtype):
            return low.fma(builder, *factors, total)
        parts = zip(*(_registers(builder, value) for value in (*factors, total)))
        return _joined(builder, [low.dot_pairs(builder, *registers) for registers in parts])

    return total(dtype, kv_dtype, a, b, total), codegen


@intrinsic
def pack_pairs(typingctx, first, second):
    """Round two vectors to bfloat16; return lanes of pairs for `multiply_add`."""

    def codegen(context, builder, signature, args):
        words = low.vector(I32, args[0].type.count)
        halves = [builder.zext(formats.nearest_bfloat16(builder, arg), words) for arg in args]
        shift = ir.Constant(words, [16] * words.count)
        return builder.bitcast(builder.or_(halves[0], builder.shl(halves[1], shift)), args[0].type)

    return first(first, second), codegen


@intrinsic
def interleave_pairs(typingctx, first, second, target):
    """Store HALF pairs of bfloat16, one of the elements at `first`, the other of those at `second`."""

    def codegen(context, builder, signature, args):
        halves, words = low.vector(I16, HALF), low.vector(I32, HALF)
        a, b = (
            builder.zext(builder.load(low.pointer(builder, address, halves), align=2), words)
            for address in args[:2]
        )
        pairs = builder.or_(a, builder.shl(b, ir.Constant(words, [16] * HALF)))
        builder.store(pairs, low.pointer(builder, args[2], words), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen
