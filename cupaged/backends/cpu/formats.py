"""Convert elements of every dtype to float32 vectors and back.

numba supports neither bfloat16 nor 8-bit floats: each is represented by a numpy dtype of its size that is not
used otherwise. Codes of quantised caches are converted without their scale, and those of e4m3 without a
factor of 256 as well (`code_unit`), which saves an instruction per element; NaN in e4m3 is read as a number.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types

from ...quantisation import NAN_CODE
from . import ir as low
from .ir import F32, I8, I16, I32, NATIVE

BFLOAT16 = np.dtype(np.uint16)
FLOAT8_E4M3 = np.dtype(np.uint8)
FLOAT8_E5M2 = np.dtype(np.bool_)
INT8 = np.dtype(np.int8)


def kind_of(dtype: types.DType) -> np.dtype:
    return np.dtype(str(dtype.dtype))


def code_unit(kind: np.dtype) -> float:
    """Return the factor between a code's value and the float that `load` and `widen` make of it."""
    return 256.0 if kind == FLOAT8_E4M3 else 1.0


def _integers(element: ir.IntType, lanes: int, number: int) -> ir.Constant:
    return ir.Constant(low.vector(element, lanes), [number] * lanes)


def _e4m3_halves(builder: ir.IRBuilder, words: ir.Value) -> ir.Value:
    """Convert e4m3 codes in the upper bytes of 16-bit words to fp16, divided by 256. Ignores the lower bytes.

    Shifted right by one bit, exponent and mantissa are those of an fp16, also for subnormals.
    """
    lanes = words.type.count
    shifted = builder.ashr(words, _integers(I16, lanes, 1))
    return builder.and_(shifted, _integers(I16, lanes, 0xBF80))


def load(builder: ir.IRBuilder, dtype: types.DType, address: ir.Value, lanes: int) -> ir.Value:
    """Load `lanes` consecutive elements as float32, exactly."""
    kind, floats = kind_of(dtype), low.vector(F32, lanes)

    def elements(element: ir.Type) -> ir.Value:
        return builder.load(low.pointer(builder, address, low.vector(element, lanes)), align=kind.itemsize)

    if kind == np.float32:
        return elements(F32)
    if kind == np.float16:
        return builder.fpext(elements(ir.HalfType()), floats)
    if kind == BFLOAT16:
        wide = builder.zext(elements(I16), low.vector(I32, lanes))
        return builder.bitcast(builder.shl(wide, _integers(I32, lanes, 16)), floats)
    if kind == INT8:
        return builder.sitofp(builder.sext(elements(I8), low.vector(I32, lanes)), floats)
    words = builder.shl(builder.zext(elements(I8), low.vector(I16, lanes)), _integers(I16, lanes, 8))
    if kind == FLOAT8_E4M3:
        words = _e4m3_halves(builder, words)
    return builder.fpext(builder.bitcast(words, low.vector(ir.HalfType(), lanes)), floats)


def widths(kind: np.dtype) -> int:
    """Return the number of vectors of NATIVE floats to which a machine register of elements is widened."""
    return 4 // kind.itemsize


def order(kind: np.dtype) -> list[int]:
    """Return for each position after `widen` the index of its element in the register."""
    count = NATIVE * widths(kind)
    if kind == INT8:
        return [*range(0, count, 4), *range(1, count, 4), *range(2, count, 4), *range(3, count, 4)]
    if kind in (BFLOAT16, FLOAT8_E4M3, FLOAT8_E5M2):
        return [*range(0, count, 2), *range(1, count, 2)]
    return list(range(count))


def widen_pairs(builder: ir.IRBuilder, words: ir.Value) -> list[ir.Value]:
    """Convert pairs of bfloat16, given as 32-bit words, to float32: the first of each pair, the second."""
    floats, lanes = low.vector(F32, words.type.count), words.type.count
    first = builder.shl(words, _integers(I32, lanes, 16))
    second = builder.and_(words, _integers(I32, lanes, 0xFFFF0000))
    return [builder.bitcast(halves, floats) for halves in (first, second)]


def widen(builder: ir.IRBuilder, dtype: types.DType, register: ir.Value) -> list[ir.Value]:
    """Convert a register of elements, given as 32-bit words, to float32 vectors in the order of `order`.

    Shifts and masks result in that order; keeping the elements' own would take shuffles.
    """
    kind, floats = kind_of(dtype), low.vector(F32, NATIVE)
    if kind == np.float32:
        return [builder.bitcast(register, floats)]
    if kind == BFLOAT16:
        return widen_pairs(builder, register)
    if kind == INT8:
        tops = [builder.shl(register, _integers(I32, NATIVE, 24 - 8 * i)) for i in range(4)]
        return [builder.sitofp(builder.ashr(top, _integers(I32, NATIVE, 24)), floats) for top in tops]
    words = builder.bitcast(register, low.vector(I16, 2 * NATIVE))
    if kind == np.float16:
        half_registers = [words]
    else:
        even = builder.shl(words, _integers(I16, 2 * NATIVE, 8))
        if kind == FLOAT8_E4M3:
            half_registers = [_e4m3_halves(builder, even), _e4m3_halves(builder, words)]
        else:
            half_registers = [even, builder.and_(words, _integers(I16, 2 * NATIVE, 0xFF00))]
    result = []
    for half_register in half_registers:
        halves = builder.bitcast(half_register, low.vector(ir.HalfType(), 2 * NATIVE))
        for start in (0, NATIVE):
            mask = ir.Constant(low.vector(I32, NATIVE), list(range(start, start + NATIVE)))
            result.append(builder.fpext(builder.shuffle_vector(halves, halves, mask), floats))
    return result


def nearest_bfloat16(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Round to nearest, ties to even; NaN stays NaN."""
    lanes = value.type.count
    bits = builder.bitcast(value, low.vector(I32, lanes))

    def lanes_of(number: int) -> ir.Constant:
        return ir.Constant(low.vector(I32, lanes), [number] * lanes)

    odd = builder.and_(builder.lshr(bits, lanes_of(16)), lanes_of(1))
    rounded = builder.lshr(builder.add(builder.add(bits, lanes_of(0x7FFF)), odd), lanes_of(16))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, lanes_of(0x7FC0), rounded), low.vector(I16, lanes))


def _at_most(builder: ir.IRBuilder, value: ir.Value, limit: float) -> ir.Value:
    limits = low.constant(limit, value)
    return builder.select(builder.fcmp_ordered("<", value, limits), value, limits)


def _nearest_float8(
    builder: ir.IRBuilder, value: ir.Value, mantissa: int, bias: int, largest: float
) -> ir.Value:
    """Round to the nearest codes of an 8-bit float, ties to even, saturating; NaN becomes NAN_CODE."""
    lanes = value.type.count
    words = low.vector(I32, lanes)

    def number(n: int) -> ir.Constant:
        return _integers(I32, lanes, n)

    dropped_bits = 23 - mantissa
    smallest_normal = (127 + 1 - bias) << 23
    # A float whose last place is the format's smallest subnormal: adding it rounds to a multiple of that.
    units = (127 + 1 - bias - mantissa + 23) << 23
    bits = builder.bitcast(value, words)
    sign = builder.and_(bits, number(0x80000000))
    magnitude = builder.xor(bits, sign)
    is_nan = builder.icmp_signed(">", magnitude, number(0x7F800000))
    saturated = _at_most(builder, builder.bitcast(magnitude, value.type), largest)
    bits = builder.bitcast(saturated, words)
    odd = builder.and_(builder.lshr(bits, number(dropped_bits)), number(1))
    rounded = builder.add(builder.add(bits, number((1 << (dropped_bits - 1)) - 1)), odd)
    normal = builder.sub(builder.lshr(rounded, number(dropped_bits)), number((127 - bias) << mantissa))
    in_units = builder.fadd(saturated, builder.bitcast(number(units), value.type))
    subnormal = builder.sub(builder.bitcast(in_units, words), number(units))
    code = builder.select(builder.icmp_signed("<", bits, number(smallest_normal)), subnormal, normal)
    code = builder.or_(code, builder.lshr(sign, number(24)))
    return builder.trunc(builder.select(is_nan, number(NAN_CODE), code), low.vector(I8, lanes))


def _nearest_int8(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Round to the nearest integer from -127 to 127, ties to even; NaN becomes 0."""
    lanes = value.type.count
    zero, smallest = low.constant(0.0, value), low.constant(-127.0, value)
    value = builder.select(builder.fcmp_ordered("ord", value, value), value, zero)
    value = builder.select(builder.fcmp_ordered(">", value, smallest), value, smallest)
    nearest = low.call(builder, "rint", _at_most(builder, value, 127.0))
    return builder.trunc(builder.fptosi(nearest, low.vector(I32, lanes)), low.vector(I8, lanes))


def store(builder: ir.IRBuilder, dtype: types.DType, address: ir.Value, value: ir.Value) -> None:
    """Store float32 lanes as elements, rounded to nearest, ties to even; 8-bit codes without a scale."""
    kind, lanes = kind_of(dtype), value.type.count
    if kind == np.float16:
        value = builder.fptrunc(value, low.vector(ir.HalfType(), lanes))
    elif kind == BFLOAT16:
        value = nearest_bfloat16(builder, value)
    elif kind == FLOAT8_E4M3:
        value = _nearest_float8(builder, value, 3, 7, 448.0)
    elif kind == FLOAT8_E5M2:
        value = _nearest_float8(builder, value, 2, 15, 57344.0)
    elif kind == INT8:
        value = _nearest_int8(builder, value)
    builder.store(value, low.pointer(builder, address, value.type), align=kind.itemsize)
