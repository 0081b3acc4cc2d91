"""Explicit SIMD for numba: a vector type and the operations that the CPU kernels need.

LLVM's loop vectoriser does not keep a tile of accumulators in registers, so the kernels use explicit vectors.
Memory is addressed by integers, in bytes, because the kernels read blocks at computed addresses. Bounds are
not checked.

``dtype`` arguments are `numpy.dtype`s that select code at compile time; `formats` has those that represent
dtypes that numba does not support.
"""

from __future__ import annotations

import math

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from . import formats
from . import ir as low
from .ir import F32, I8, I32, I64

LANES = 16
HALF = LANES // 2  # head sizes are multiples of this


# Four vectors of WIDE lanes must fit the register file as accumulators, with a few registers to spare.
WIDE = 64 if low.NATIVE == LANES else 16

# For functions that only kernels call: omits the wrappers for Python and C, which take as long to compile as
# the function itself.
inner = numba.njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


class Vector(types.Type):
    """The type of ``lanes`` float32 values in registers."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        super().__init__(name=f"Vector({lanes} x float32)")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, ir.VectorType(F32, fe_type.lanes))


def _lane_count(lanes: types.Type) -> int | None:
    """Return the number of lanes that a constant, or a vector of as many lanes, stands for."""
    if isinstance(lanes, Vector):
        return lanes.lanes
    return lanes.literal_value if isinstance(lanes, types.IntegerLiteral) else None


@intrinsic(prefer_literal=True)
def load(typingctx, dtype, address, lanes):
    """Load `lanes` consecutive elements at `address` as float32."""
    count = _lane_count(lanes)
    if count is None:
        return None

    def codegen(context, builder, signature, args):
        return formats.load(builder, dtype, args[1], count)

    return Vector(count)(dtype, types.int64, lanes), codegen


@intrinsic
def load_head(typingctx, dtype, address, count):
    """Load the first `count` elements (8, or at least LANES) at `address` into LANES lanes, padded with 0."""

    def codegen(context, builder, signature, args):
        whole = builder.icmp_signed(">=", args[2], I64(LANES))
        with builder.if_else(whole) as (then, otherwise):
            with then:
                full = formats.load(builder, dtype, args[1], LANES)
                full_block = builder.block
            with otherwise:
                half = formats.load(builder, dtype, args[1], LANES // 2)
                zero = ir.Constant(half.type, [F32(0.0)] * (LANES // 2))
                mask = ir.Constant(low.vector(I32, LANES), list(range(LANES)))
                padded = builder.shuffle_vector(half, zero, mask)
                half_block = builder.block
        result = builder.phi(full.type)
        result.add_incoming(full, full_block)
        result.add_incoming(padded, half_block)
        return result

    return Vector(LANES)(dtype, types.int64, types.int64), codegen


@intrinsic
def store(typingctx, dtype, address, value):
    """Store `value` at `address` as elements of `dtype`, rounded to nearest, ties to even."""

    def codegen(context, builder, signature, args):
        formats.store(builder, dtype, args[1], args[2])
        return context.get_dummy_value()

    return types.void(dtype, types.int64, value), codegen


@intrinsic
def store_head(typingctx, dtype, address, value, count):
    """Store the first `count` lanes (8, or all if at least LANES) of `value`."""

    def codegen(context, builder, signature, args):
        whole = builder.icmp_signed(">=", args[3], I64(LANES))
        with builder.if_else(whole) as (then, otherwise):
            with then:
                formats.store(builder, dtype, args[1], args[2])
            with otherwise:
                mask = ir.Constant(low.vector(I32, LANES // 2), list(range(LANES // 2)))
                formats.store(builder, dtype, args[1], builder.shuffle_vector(args[2], args[2], mask))
        return context.get_dummy_value()

    return types.void(dtype, types.int64, value, types.int64), codegen


@intrinsic
def load_scalar(typingctx, dtype, address):
    """Load one element at `address`: an int32 or int64 as it is, any other dtype as float32."""
    kind = dtype.dtype
    result = kind if kind in (types.int32, types.int64) else types.float32

    def codegen(context, builder, signature, args):
        if result == kind != types.float32:
            return builder.load(low.pointer(builder, args[1], context.get_value_type(kind)))
        return builder.extract_element(formats.load(builder, dtype, args[1], 1), I32(0))

    return result(dtype, types.int64), codegen


@intrinsic
def store_float(typingctx, address, value):
    """Store one float32."""

    def codegen(context, builder, signature, args):
        builder.store(args[1], low.pointer(builder, args[0], F32), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), codegen


@intrinsic
def store_int(typingctx, address, value):
    """Store one int64."""

    def codegen(context, builder, signature, args):
        builder.store(args[1], low.pointer(builder, args[0], I64), align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def store_ramp(typingctx, address, start, step):
    """Store HALF int64: start, start + step, ..."""

    def codegen(context, builder, signature, args):
        address, start, step = args
        ramp = ir.Constant(low.vector(I64, HALF), list(range(HALF)))
        values = builder.add(
            low.splat(builder, start, HALF), builder.mul(low.splat(builder, step, HALF), ramp)
        )
        builder.store(values, low.pointer(builder, address, values.type), align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic(prefer_literal=True)
def splat(typingctx, value, lanes):
    """Return a vector with `value` in every lane."""
    count = _lane_count(lanes)
    if count is None:
        return None

    def codegen(context, builder, signature, args):
        return low.splat(builder, args[0], count)

    return Vector(count)(types.float32, lanes), codegen


@intrinsic
def add(typingctx, a, b):
    return a(a, b), lambda context, builder, signature, args: builder.fadd(*args)


@intrinsic
def sub(typingctx, a, b):
    return a(a, b), lambda context, builder, signature, args: builder.fsub(*args)


@intrinsic
def mul(typingctx, a, b):
    return a(a, b), lambda context, builder, signature, args: builder.fmul(*args)


@intrinsic
def fma(typingctx, a, b, c):
    """Return a * b + c, fused if the CPU can."""
    return a(a, b, c), lambda context, builder, signature, args: low.fma(builder, *args)


@intrinsic
def maximum(typingctx, a, b):
    """Return the larger value of each lane; `b` where either is NaN."""

    def codegen(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return a(a, b), codegen


@intrinsic
def where_between(typingctx, x, low, high, then, otherwise):
    """Select each lane from `then` where low < x <= high, else from `otherwise`."""

    def codegen(context, builder, signature, args):
        inside = builder.and_(
            builder.fcmp_ordered(">", args[0], args[1]), builder.fcmp_ordered("<=", args[0], args[2])
        )
        return builder.select(inside, args[3], args[4])

    return x(x, x, x, x, x), codegen


@intrinsic
def iota(typingctx, start):
    """Return LANES lanes: start, start + 1, ..."""

    def codegen(context, builder, signature, args):
        ramp = ir.Constant(low.vector(F32, LANES), [F32(float(i)) for i in range(LANES)])
        return builder.fadd(low.splat(builder, args[0], LANES), ramp)

    return Vector(LANES)(types.float32), codegen


@intrinsic
def sum_lanes(typingctx, a):
    def codegen(context, builder, signature, args):
        kind = args[0].type
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(F32, [F32, kind]), f"llvm.vector.reduce.fadd.v{kind.count}f32"
        )
        return builder.call(function, [F32(-0.0), args[0]], fastmath=("reassoc",))

    return types.float32(a), codegen


@intrinsic
def max_lanes(typingctx, vector):
    """Return the largest lane. NaN lanes may be ignored."""

    def codegen(context, builder, signature, args):
        # llvm.vector.reduce.fmax compares the lanes one after the other, because of NaN.
        (value,) = args
        while (half := value.type.count // 2) > 0:
            masks = [ir.Constant(low.vector(I32, half), list(range(i, i + half))) for i in (0, half)]
            a, b = (builder.shuffle_vector(value, value, mask) for mask in masks)
            value = builder.select(builder.fcmp_ordered(">", a, b), a, b)
        return builder.extract_element(value, I32(0))

    return types.float32(vector), codegen


def _exp2_parts(builder: ir.IRBuilder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return 2**n and 2**f - 1 with x = n + f, |f| <= 1/2; 2**n is 0 below x = -126.5.

    The Taylor series of 2**f - 1 to degree 7 has a relative error below 3e-8 on that interval, less than
    half a unit in the last place; the factor f keeps it exact near zero.
    """
    lanes = x.type.count
    lowest = low.constant(-127.0, x)
    x = builder.select(builder.fcmp_ordered("<", x, lowest), lowest, x)  # NaN stays NaN
    n = low.call(builder, "rint", x)
    f = builder.fsub(x, n)
    series = low.constant(math.log(2) ** 7 / math.factorial(7), x)
    for power in range(6, 0, -1):
        series = low.fma(builder, series, f, low.constant(math.log(2) ** power / math.factorial(power), x))
    integer = builder.fptosi(n, low.vector(I32, lanes))
    biased = builder.add(integer, ir.Constant(low.vector(I32, lanes), [127] * lanes))
    scale = builder.shl(biased, ir.Constant(low.vector(I32, lanes), [23] * lanes))
    return builder.bitcast(scale, x.type), builder.fmul(series, f)


@intrinsic
def exp2(typingctx, x):
    """Return 2**x within 2 units in the last place; 0 below -126.5 and for -inf. Needs x < 127.5."""

    def codegen(context, builder, signature, args):
        scale, rest = _exp2_parts(builder, args[0])
        return low.fma(builder, scale, rest, scale)

    return x(x), codegen


@intrinsic
def tanh(typingctx, x):
    """Return tanh(x) = e / (e + 2), e = exp(2x) - 1, within a few units in the last place, also near 0."""

    def codegen(context, builder, signature, args):
        (value,) = args
        for bound, order in ((10.0, ">"), (-10.0, "<")):  # tanh(10) rounds to 1
            limit = low.constant(bound, value)
            value = builder.select(builder.fcmp_ordered(order, value, limit), limit, value)
        power = builder.fmul(value, low.constant(2.0 / math.log(2.0), value))
        scale, rest = _exp2_parts(builder, power)
        e = low.fma(builder, scale, rest, builder.fsub(scale, low.constant(1.0, value)))
        return builder.fdiv(e, builder.fadd(e, low.constant(2.0, value)))

    return x(x), codegen


@intrinsic
def fetch_add(typingctx, address):
    """Add one to the int64 at `address` atomically; return the value before."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", low.pointer(builder, args[0], I64), I64(1), "monotonic")

    return types.int64(types.int64), codegen


@intrinsic
def copy_bytes(typingctx, target, source, count):
    """Copy `count` bytes (memcpy)."""

    def codegen(context, builder, signature, args):
        cgutils.raw_memcpy(
            builder, low.pointer(builder, args[0], I8), low.pointer(builder, args[1], I8), args[2], 1
        )
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen
