"""Vector operations of the fused operators: activations, pairs of lanes, and rounding to a dtype.

As in `simd`, memory is addressed by integers, in bytes, and ``dtype`` arguments select code at compile time.
"""

from __future__ import annotations

import math

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from . import formats
from . import ir as low
from .ir import I16, I32

# exp(z * z) * erfc(z) is t times this polynomial of t = 1 / (1 + 0.4 * z), highest power first, for z from 0
# to 9.6: a least squares fit weighted towards the smallest maximum of the relative error, 6e-8.
ERFC_STEP = 0.4
ERFC_POLYNOMIAL = (
    0.040475429634381666,
    -0.1364964245236065,
    0.07599366586320833,
    0.09722652267902615,
    0.07326959250222284,
    0.19619747424179942,
    0.20115880082393167,
    0.22654696815846032,
    0.2256280290588325,
)
# ln(2) in two parts. The first has 9 bits, so that its product with an exponent is exact.
LN2_HIGH = 355 / 512
LN2_LOW = math.log(2) - LN2_HIGH


def _polynomial(builder: ir.IRBuilder, x: ir.Value, coefficients: tuple[float, ...]) -> ir.Value:
    """Return the polynomial's value; the coefficient of the highest power comes first."""
    value = low.constant(coefficients[0], x)
    for coefficient in coefficients[1:]:
        value = low.fma(builder, value, x, low.constant(coefficient, x))
    return value


def _exp(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Return exp(x) for x <= 0 within 2 units in the last place; 0 below -87.7, NaN of NaN."""
    lowest = low.constant(-127 * math.log(2), x)
    x = builder.select(builder.fcmp_ordered("<", x, lowest), lowest, x)
    n = low.call(builder, "rint", builder.fmul(x, low.constant(1 / math.log(2), x)))
    rest = low.fma(builder, n, low.constant(-LN2_HIGH, x), x)
    rest = low.fma(builder, n, low.constant(-LN2_LOW, x), rest)
    series = _polynomial(builder, rest, tuple(1 / math.factorial(power) for power in range(7, -1, -1)))
    words = low.vector(I32, x.type.count)
    biased = builder.add(builder.fptosi(n, words), ir.Constant(words, [127] * x.type.count))
    scale = builder.shl(biased, ir.Constant(words, [23] * x.type.count))
    return builder.fmul(builder.bitcast(scale, x.type), series)


def _is_positive(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return builder.fcmp_ordered(">=", x, low.constant(0.0, x))


def _times_sigmoid(builder: ir.IRBuilder, x: ir.Value, u: ir.Value) -> ir.Value:
    """Return x / (1 + exp(-u)) for a u of x's sign, with exp(-abs(u)), which cannot overflow."""
    power = _exp(builder, builder.fneg(low.call(builder, "fabs", u)))
    numerator = builder.select(_is_positive(builder, x), x, builder.fmul(x, power))
    return builder.fdiv(numerator, builder.fadd(power, low.constant(1.0, x)))


@intrinsic
def silu(typingctx, x):
    """Return x / (1 + exp(-x)) within a few units in the last place."""
    return x(x), lambda context, builder, signature, args: _times_sigmoid(builder, args[0], args[0])


@intrinsic
def gelu_tanh(typingctx, x):
    """Return x * (1 + tanh(u)) / 2 with u = sqrt(2 / pi) * (x + 0.044715 * x**3)."""

    def codegen(context, builder, signature, args):
        (value,) = args
        double = 2 * math.sqrt(2 / math.pi)
        factor = low.fma(
            builder,
            builder.fmul(value, value),
            low.constant(0.044715 * double, value),
            low.constant(double, value),
        )
        return _times_sigmoid(builder, value, builder.fmul(value, factor))

    return x(x), codegen


@intrinsic
def gelu(typingctx, x):
    """Return x * (1 + erf(x / sqrt(2))) / 2. Relative to the result it is as accurate for large -x."""

    def codegen(context, builder, signature, args):
        (value,) = args
        one = low.constant(1.0, value)
        distance = low.call(builder, "fabs", value)
        t = builder.fdiv(one, low.fma(builder, distance, low.constant(ERFC_STEP / math.sqrt(2), value), one))
        power = _exp(builder, builder.fmul(builder.fmul(value, value), low.constant(-0.5, value)))
        tail = builder.fmul(builder.fmul(t, _polynomial(builder, t, ERFC_POLYNOMIAL)), power)
        tail = builder.fmul(tail, low.constant(0.5, value))
        share = builder.select(_is_positive(builder, value), builder.fsub(one, tail), tail)
        return builder.fmul(value, share)

    return x(x), codegen


def _rounded(builder: ir.IRBuilder, dtype: types.DType, value: ir.Value) -> ir.Value:
    """Round float32 lanes to a model's dtype, ties to even."""
    kind = formats.kind_of(dtype)
    if kind == formats.BFLOAT16:
        wide = builder.zext(formats.nearest_bfloat16(builder, value), low.vector(I32, value.type.count))
        shift = ir.Constant(low.vector(I32, value.type.count), [16] * value.type.count)
        return builder.bitcast(builder.shl(wide, shift), value.type)
    if kind == "float16":
        half = builder.fptrunc(value, low.vector(ir.HalfType(), value.type.count))
        return builder.fpext(half, value.type)
    return value


@intrinsic
def store_and_round(typingctx, dtype, address, value):
    """Store `value` as elements of `dtype`; return what was stored."""

    def codegen(context, builder, signature, args):
        value = _rounded(builder, dtype, args[2])
        if formats.kind_of(dtype) == formats.BFLOAT16:
            lanes = value.type.count
            words = builder.bitcast(value, low.vector(I32, lanes))
            shift = ir.Constant(low.vector(I32, lanes), [16] * lanes)
            halves = builder.trunc(builder.lshr(words, shift), low.vector(I16, lanes))
            builder.store(halves, low.pointer(builder, args[1], halves.type), align=2)
        else:
            formats.store(builder, dtype, args[1], value)
        return value

    return value(dtype, types.int64, value), codegen


def _store_as(builder, dtype, target_dtype, address, value, factor) -> None:
    if formats.kind_of(dtype) != formats.kind_of(target_dtype):
        value = builder.fmul(_rounded(builder, dtype, value), factor)
    formats.store(builder, target_dtype, address, value)


@intrinsic
def store_as(typingctx, dtype, target_dtype, address, value, factor):
    """Store `value`, rounded to `dtype`; as codes of another `target_dtype` multiplied by `factor` first."""

    def codegen(context, builder, signature, args):
        _store_as(builder, dtype, target_dtype, *args[2:])
        return context.get_dummy_value()

    return types.void(dtype, target_dtype, types.int64, value, value), codegen


def _every_second(builder: ir.IRBuilder, value: ir.Value, first: int) -> ir.Value:
    lanes = value.type.count // 2
    mask = ir.Constant(low.vector(I32, lanes), list(range(first, 2 * lanes, 2)))
    return builder.shuffle_vector(value, value, mask)


@intrinsic
def load_pairs(typingctx, dtype, address, like):
    """Load twice as many elements as `like` has lanes; return those of even and those of odd index."""

    def codegen(context, builder, signature, args):
        both = formats.load(builder, dtype, args[1], 2 * like.lanes)
        halves = [_every_second(builder, both, first) for first in (0, 1)]
        return context.make_tuple(builder, signature.return_type, halves)

    return types.UniTuple(like, 2)(dtype, types.int64, like), codegen


@intrinsic
def store_pairs(typingctx, dtype, target_dtype, address, even, odd, factor):
    """Store lanes of `even` and `odd` by turns, as `store_as` does."""

    def codegen(context, builder, signature, args):
        lanes = even.lanes
        order = [i // 2 + lanes * (i % 2) for i in range(2 * lanes)]
        mask = ir.Constant(low.vector(I32, 2 * lanes), order)
        value = builder.shuffle_vector(args[3], args[4], mask)
        twice = ir.Constant(low.vector(I32, 2 * lanes), [0] * (2 * lanes))
        factors = builder.shuffle_vector(args[5], args[5], twice)
        _store_as(builder, dtype, target_dtype, args[2], value, factors)
        return context.get_dummy_value()

    return types.void(dtype, target_dtype, types.int64, even, even, even), codegen
