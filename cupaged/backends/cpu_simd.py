"""Explicit SIMD for numba: a vector type and the few operations the CPU kernels need.

LLVM's loop vectoriser does not keep a tile of accumulators in registers, so the kernels name their
vectors. A `Vector` of any number of lanes is an LLVM vector: 16 lanes are one AVX-512 register, two AVX2
registers or four NEON registers; LLVM splits it. Memory is addressed by integers (bytes), as the kernels
read blocks at computed places; nothing here checks bounds.

``dtype`` arguments are `numpy.dtype`s and select code at compile time. bfloat16 travels as uint16, which
numba knows and which no cache holds otherwise.
"""

from __future__ import annotations

import math

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

BFLOAT16 = np.dtype(np.uint16)
LANES = 16
HALF = LANES // 2  # head sizes are multiples of this


def _has(feature: str) -> bool:
    """Whether numba compiles for a CPU with this feature."""
    chosen = numba.config.CPU_FEATURES  # type: ignore[attr-defined]
    if chosen is not None:
        return f"+{feature}" in chosen.split(",")
    return bool(llvmlite.binding.get_host_cpu_features().get(feature))


NATIVE = 16 if _has("avx512f") else 8  # float32 lanes of a machine register
# Four rows of WIDE lanes must fit the register file as accumulators, with a few registers to spare.
WIDE = 64 if NATIVE == LANES else 16

# What only other kernels call: without the wrappers that Python and C would need, which take as long to
# compile as the function itself.
inner = numba.njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)

_F32, _I8, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)


class Vector(types.Type):
    """``lanes`` float32 values in registers."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        super().__init__(name=f"Vector({lanes} x float32)")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, ir.VectorType(_F32, fe_type.lanes))


def _vector(element: ir.Type, lanes: int) -> ir.VectorType:
    return ir.VectorType(element, lanes)


def _splat(builder: ir.IRBuilder, scalar: ir.Value, lanes: int) -> ir.Value:
    one = builder.insert_element(ir.Constant(_vector(scalar.type, lanes), ir.Undefined), scalar, _I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(_vector(_I32, lanes), [0] * lanes))


def _constant(value: float, like: ir.Value) -> ir.Constant:
    return ir.Constant(like.type, [ir.Constant(like.type.element, value)] * like.type.count)


def _call(builder: ir.IRBuilder, name: str, *args: ir.Value) -> ir.Value:
    """An LLVM intrinsic overloaded on the type of its first argument."""
    kind = args[0].type
    suffix = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(kind, [a.type for a in args]), f"llvm.{name}.{suffix}"
    )
    return builder.call(function, args)


def _fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return _call(builder, "fmuladd", a, b, c)  # fused where the CPU can, never a library call


def _pointer(builder: ir.IRBuilder, address: ir.Value, element: ir.Type) -> ir.Value:
    return builder.inttoptr(address, element.as_pointer())


def _load(builder: ir.IRBuilder, dtype: types.DType, address: ir.Value, lanes: int) -> ir.Value:
    """Load ``lanes`` elements of ``dtype`` and widen them to float32, exactly."""
    if dtype.dtype == types.float32:
        return builder.load(_pointer(builder, address, _vector(_F32, lanes)), align=4)
    if dtype.dtype == types.float16:
        half = builder.load(_pointer(builder, address, _vector(ir.HalfType(), lanes)), align=2)
        return builder.fpext(half, _vector(_F32, lanes))
    bits = builder.load(_pointer(builder, address, _vector(_I16, lanes)), align=2)
    wide = builder.zext(bits, _vector(_I32, lanes))
    shifted = builder.shl(wide, ir.Constant(_vector(_I32, lanes), [16] * lanes))
    return builder.bitcast(shifted, _vector(_F32, lanes))


def _narrow_bfloat16(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Round to nearest, ties to even; NaN stays NaN."""
    lanes = value.type.count
    bits = builder.bitcast(value, _vector(_I32, lanes))

    def lanes_of(number: int) -> ir.Constant:
        return ir.Constant(_vector(_I32, lanes), [number] * lanes)

    odd = builder.and_(builder.lshr(bits, lanes_of(16)), lanes_of(1))
    rounded = builder.lshr(builder.add(builder.add(bits, lanes_of(0x7FFF)), odd), lanes_of(16))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, lanes_of(0x7FC0), rounded), _vector(_I16, lanes))


def _store(builder: ir.IRBuilder, dtype: types.DType, address: ir.Value, value: ir.Value) -> None:
    lanes = value.type.count
    if dtype.dtype == types.float32:
        builder.store(value, _pointer(builder, address, value.type), align=4)
    elif dtype.dtype == types.float16:
        half = builder.fptrunc(value, _vector(ir.HalfType(), lanes))
        builder.store(half, _pointer(builder, address, half.type), align=2)
    else:
        bits = _narrow_bfloat16(builder, value)
        builder.store(bits, _pointer(builder, address, bits.type), align=2)


def _lane_count(lanes: types.Type) -> int | None:
    """Lanes are given as a constant or by a vector of that many."""
    if isinstance(lanes, Vector):
        return lanes.lanes
    return lanes.literal_value if isinstance(lanes, types.IntegerLiteral) else None


@intrinsic(prefer_literal=True)
def load(typingctx, dtype, address, lanes):
    """`lanes` consecutive elements at `address`, as float32."""
    count = _lane_count(lanes)
    if count is None:
        return None

    def codegen(context, builder, signature, args):
        return _load(builder, dtype, args[1], count)

    return Vector(count)(dtype, types.int64, lanes), codegen


@intrinsic
def load_head(typingctx, dtype, address, count):
    """The first `count` (8 or 16) elements at `address` in LANES lanes, zero behind them."""

    def codegen(context, builder, signature, args):
        whole = builder.icmp_signed(">=", args[2], _I64(LANES))
        with builder.if_else(whole) as (then, otherwise):
            with then:
                full = _load(builder, dtype, args[1], LANES)
                full_block = builder.block
            with otherwise:
                half = _load(builder, dtype, args[1], LANES // 2)
                zero = ir.Constant(half.type, [_F32(0.0)] * (LANES // 2))
                mask = ir.Constant(_vector(_I32, LANES), list(range(LANES)))
                padded = builder.shuffle_vector(half, zero, mask)
                half_block = builder.block
        result = builder.phi(full.type)
        result.add_incoming(full, full_block)
        result.add_incoming(padded, half_block)
        return result

    return Vector(LANES)(dtype, types.int64, types.int64), codegen


@intrinsic
def store(typingctx, dtype, address, value):
    """Write `value` at `address` as elements of `dtype`, rounding to nearest even."""

    def codegen(context, builder, signature, args):
        _store(builder, dtype, args[1], args[2])
        return context.get_dummy_value()

    return types.void(dtype, types.int64, value), codegen


@intrinsic
def store_head(typingctx, dtype, address, value, count):
    """Write the first `count` (8 or 16) lanes of `value`."""

    def codegen(context, builder, signature, args):
        whole = builder.icmp_signed(">=", args[3], _I64(LANES))
        with builder.if_else(whole) as (then, otherwise):
            with then:
                _store(builder, dtype, args[1], args[2])
            with otherwise:
                mask = ir.Constant(_vector(_I32, LANES // 2), list(range(LANES // 2)))
                _store(builder, dtype, args[1], builder.shuffle_vector(args[2], args[2], mask))
        return context.get_dummy_value()

    return types.void(dtype, types.int64, value, types.int64), codegen


@intrinsic
def load_scalar(typingctx, dtype, address):
    """One element at `address`; float32 for the 16-bit types."""
    kind = dtype.dtype
    result = types.float32 if kind in (types.float16, types.uint16) else kind

    def codegen(context, builder, signature, args):
        if isinstance(kind, types.Integer) and kind != types.uint16:
            return builder.load(_pointer(builder, args[1], context.get_value_type(kind)))
        return builder.extract_element(_load(builder, dtype, args[1], 1), _I32(0))

    return result(dtype, types.int64), codegen


@intrinsic
def store_float(typingctx, address, value):
    """Write one float32."""

    def codegen(context, builder, signature, args):
        builder.store(args[1], _pointer(builder, args[0], _F32), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), codegen


@intrinsic
def store_ramp(typingctx, address, start, step):
    """Write the int64 start, start + step, ..., HALF of them."""

    def codegen(context, builder, signature, args):
        address, start, step = args
        ramp = ir.Constant(_vector(_I64, HALF), list(range(HALF)))
        values = builder.add(_splat(builder, start, HALF), builder.mul(_splat(builder, step, HALF), ramp))
        builder.store(values, _pointer(builder, address, values.type), align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic(prefer_literal=True)
def splat(typingctx, value, lanes):
    """`value` in every lane."""
    count = _lane_count(lanes)
    if count is None:
        return None

    def codegen(context, builder, signature, args):
        return _splat(builder, args[0], count)

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
    """a * b + c."""
    return a(a, b, c), lambda context, builder, signature, args: _fma(builder, *args)


@intrinsic
def maximum(typingctx, a, b):
    """The larger of each lane; `b` where either is NaN."""

    def codegen(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return a(a, b), codegen


@intrinsic
def where_between(typingctx, x, low, high, then, otherwise):
    """Each lane of `then` where low < x <= high, else of `otherwise`."""

    def codegen(context, builder, signature, args):
        inside = builder.and_(
            builder.fcmp_ordered(">", args[0], args[1]), builder.fcmp_ordered("<=", args[0], args[2])
        )
        return builder.select(inside, args[3], args[4])

    return x(x, x, x, x, x), codegen


@intrinsic
def iota(typingctx, start):
    """start, start + 1, ... in LANES lanes."""

    def codegen(context, builder, signature, args):
        ramp = ir.Constant(_vector(_F32, LANES), [_F32(float(i)) for i in range(LANES)])
        return builder.fadd(_splat(builder, args[0], LANES), ramp)

    return Vector(LANES)(types.float32), codegen


@intrinsic
def sum_lanes(typingctx, a):
    def codegen(context, builder, signature, args):
        kind = args[0].type
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_F32, [_F32, kind]), f"llvm.vector.reduce.fadd.v{kind.count}f32"
        )
        return builder.call(function, [_F32(-0.0), args[0]], fastmath=("reassoc",))

    return types.float32(a), codegen


@intrinsic
def max_lanes(typingctx, a):
    """The largest lane. NaN lanes may be passed over."""

    def codegen(context, builder, signature, args):
        # llvm.vector.reduce.fmax would go through the lanes one after the other, minding NaN.
        (value,) = args
        while (half := value.type.count // 2) > 0:
            masks = [ir.Constant(_vector(_I32, half), list(range(i, i + half))) for i in (0, half)]
            low, high = (builder.shuffle_vector(value, value, mask) for mask in masks)
            value = builder.select(builder.fcmp_ordered(">", low, high), low, high)
        return builder.extract_element(value, _I32(0))

    return types.float32(a), codegen


def _exp2_parts(builder: ir.IRBuilder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """2**n and 2**f - 1 with x = n + f, |f| <= 1/2; 2**n is 0 below x = -126.5.

    The Taylor series of 2**f - 1 to degree 7 has a relative error below 3e-8 on that interval, less than
    half a unit in the last place; the factor f keeps it exact near zero.
    """
    lanes = x.type.count
    lowest = _constant(-127.0, x)
    x = builder.select(builder.fcmp_ordered("<", x, lowest), lowest, x)  # NaN stays NaN
    n = _call(builder, "rint", x)
    f = builder.fsub(x, n)
    series = _constant(math.log(2) ** 7 / math.factorial(7), x)
    for power in range(6, 0, -1):
        series = _fma(builder, series, f, _constant(math.log(2) ** power / math.factorial(power), x))
    integer = builder.fptosi(n, _vector(_I32, lanes))
    biased = builder.add(integer, ir.Constant(_vector(_I32, lanes), [127] * lanes))
    scale = builder.shl(biased, ir.Constant(_vector(_I32, lanes), [23] * lanes))
    return builder.bitcast(scale, x.type), builder.fmul(series, f)


@intrinsic
def exp2(typingctx, x):
    """2**x, within 2 units in the last place; 0 below -126.5 and for -inf. Needs x < 127.5."""

    def codegen(context, builder, signature, args):
        scale, rest = _exp2_parts(builder, args[0])
        return _fma(builder, scale, rest, scale)

    return x(x), codegen


@intrinsic
def tanh(typingctx, x):
    """tanh(x) = e / (e + 2) with e = exp(2x) - 1, exact to a few units in the last place near 0 too."""

    def codegen(context, builder, signature, args):
        (value,) = args
        for bound, order in ((10.0, ">"), (-10.0, "<")):  # tanh(10) rounds to 1
            limit = _constant(bound, value)
            value = builder.select(builder.fcmp_ordered(order, value, limit), limit, value)
        power = builder.fmul(value, _constant(2.0 / math.log(2.0), value))
        scale, rest = _exp2_parts(builder, power)
        e = _fma(builder, scale, rest, builder.fsub(scale, _constant(1.0, value)))
        return builder.fdiv(e, builder.fadd(e, _constant(2.0, value)))

    return x(x), codegen


@intrinsic
def fetch_add(typingctx, address):
    """Add one to the int64 at `address`, atomically; gives the value before."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", _pointer(builder, args[0], _I64), _I64(1), "monotonic")

    return types.int64(types.int64), codegen


@intrinsic
def copy_bytes(typingctx, target, source, count):
    """memcpy."""

    def codegen(context, builder, signature, args):
        cgutils.raw_memcpy(
            builder, _pointer(builder, args[0], _I8), _pointer(builder, args[1], _I8), args[2], 1
        )
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen
