"""Build the LLVM instructions of which the CPU kernels' intrinsics are composed.

An LLVM vector may have any number of lanes: LLVM maps 16 float32 lanes to one AVX-512 register, two AVX2
registers or four NEON registers. Memory is addressed by integers, in bytes.
"""

from __future__ import annotations

import llvmlite.binding
import numba
from llvmlite import ir
from numba.core import cgutils

F32, F64 = ir.FloatType(), ir.DoubleType()
I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)


def _has(feature: str) -> bool:
    """Return whether numba compiles for a CPU with this feature."""
    configured = numba.config.CPU_FEATURES  # type: ignore[attr-defined]
    if configured is not None:
        return f"+{feature}" in configured.split(",")
    return bool(llvmlite.binding.get_host_cpu_features().get(feature))


BFLOAT16_PRODUCTS = _has("avx512bf16")
HAS_FMA = _has("fma")
NATIVE = 16 if _has("avx512f") else 8  # float32 lanes of a machine register


def vector(element: ir.Type, lanes: int) -> ir.VectorType:
    return ir.VectorType(element, lanes)


def splat(builder: ir.IRBuilder, scalar: ir.Value, lanes: int) -> ir.Value:
    """Return a vector with ``scalar`` in every lane."""
    first = builder.insert_element(ir.Constant(vector(scalar.type, lanes), ir.Undefined), scalar, I32(0))
    return builder.shuffle_vector(first, first, ir.Constant(vector(I32, lanes), [0] * lanes))


def constant(value: float, like: ir.Value) -> ir.Constant:
    return ir.Constant(like.type, [ir.Constant(like.type.element, value)] * like.type.count)


def call(builder: ir.IRBuilder, name: str, *args: ir.Value) -> ir.Value:
    """Call the LLVM intrinsic ``name``, which is overloaded on the type of its first argument."""
    kind = args[0].type
    suffix = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(kind, [a.type for a in args]), f"llvm.{name}.{suffix}"
    )
    return builder.call(function, args)


def fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return call(builder, "fmuladd", a, b, c)  # fused only if the CPU can: "fma" may call a library function


def pointer(builder: ir.IRBuilder, address: ir.Value, element: ir.Type) -> ir.Value:
    return builder.inttoptr(address, element.as_pointer())


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not know."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def dot_pairs(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, total: ir.Value) -> ir.Value:
    """Add the products of two pairs of bfloat16, given as 32-bit words, to each lane of a machine register.

    Needs `BFLOAT16_PRODUCTS`.
    """
    lanes = total.type.count
    pairs = ir.VectorType(_BFloat(), 2 * lanes)
    name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * lanes}"
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(total.type, [total.type, pairs, pairs]), name
    )
    return builder.call(function, [total, builder.bitcast(a, pairs), builder.bitcast(b, pairs)])
