"""What PTX instructions compute, on the 32 lanes of a warp at once.

`function(opcode)` gives the types of the operands and a function of NumPy arrays. Subnormals are kept where
the hardware makes zeros of them, and approximations are exact: the tests' tolerances cover both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Lanes = Any  # an array of 32, or one value for all of them
DTYPES: dict[str, Any] = {
    "pred": np.bool_,
    "b8": np.uint8,
    "u8": np.uint8,
    "b16": np.uint16,
    "u16": np.uint16,
    "s16": np.int16,
    "f16": np.float16,
    "b32": np.uint32,
    "u32": np.uint32,
    "s32": np.int32,
    "f32": np.float32,
    "b64": np.uint64,
    "u64": np.uint64,
    "s64": np.int64,
    "f64": np.float64,
}


def bits_of(kind: str) -> int:
    return 1 if kind == "pred" else 8 * np.dtype(DTYPES[kind]).itemsize


def function(opcode: str) -> tuple[str, list[str], Callable[..., Lanes]] | None:
    """The type of the result, those of the arguments, and what is done; None if this is no arithmetic."""
    name, *modifiers = opcode.split(".")
    kind = modifiers[-1] if modifiers else ""
    if name == "cvt":
        return _convert(modifiers)
    if name == "setp":
        return "pred", [kind, kind], _COMPARISONS[modifiers[0]]
    if name == "selp":
        return kind, [kind, kind, "pred"], lambda a, b, p: np.where(p, a, b)
    if name == "mov":
        return (kind, [kind], lambda a: a)
    if name == "cvta":
        return kind, [kind], lambda a: a
    if name == "mul" and modifiers[0] == "wide":
        wide = kind[0] + str(2 * bits_of(kind))
        return wide, [kind, kind], lambda a, b: _wide(a) * _wide(b)
    if name == "mul" and modifiers[0] == "hi":
        return kind, [kind, kind], lambda a, b: (_wide(a) * _wide(b)) >> bits_of(kind)
    if name in ("mad", "fma"):
        return kind, [kind] * 3, _fma if kind == "f32" else lambda a, b, c: a * b + c
    if name in ("shl", "shr"):
        return kind, [kind, "u32"], _shift_left if name == "shl" else _shift_right
    if name in ("div", "rem") and kind[0] in "us":
        return kind, [kind, kind], _divide if name == "div" else _remainder
    if name in ("bfi", "prmt"):
        return kind, [kind] * (4 if name == "bfi" else 3), _insert if name == "bfi" else _permute
    if name in ("add", "sub") and kind == "f16x2":
        return "b32", ["b32", "b32"], lambda a, b: _halves(_BINARY[name](_halves(a), _halves(b)))
    if name in _BINARY:
        return kind, [kind, kind], _BINARY[name]
    if name in _UNARY:
        return kind, [kind], _UNARY[name]
    return None


def _wide(a: Lanes) -> Lanes:
    return a.astype(np.int64 if a.dtype.kind == "i" else np.uint64)


def _fma(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    return (np.float64(a) * np.float64(b) + np.float64(c)).astype(np.float32)


def _shift_left(a: Lanes, by: Lanes) -> Lanes:
    bits = 8 * a.dtype.itemsize
    shifted = a << np.minimum(by, bits - 1).astype(a.dtype)
    return np.where(by < bits, shifted, a.dtype.type(0))


def _shift_right(a: Lanes, by: Lanes) -> Lanes:
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by < bits, shifted, a.dtype.type(0))


def _divide(a: Lanes, b: Lanes) -> Lanes:
    """Towards zero. Lanes that are not at work may divide by zero; others get what shows."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = np.abs(a) // np.abs(safe)
    signed = np.where((a < 0) ^ (safe < 0), -quotient, quotient)
    return np.where(b == 0, ~b.dtype.type(0), signed).astype(a.dtype)


def _remainder(a: Lanes, b: Lanes) -> Lanes:
    return a - _divide(a, b) * b


def _insert(a: Lanes, b: Lanes, position: Lanes, length: Lanes) -> Lanes:
    field = (np.uint64(1) << np.uint64(length)) - np.uint64(1)
    moved = (np.uint64(a) & field) << np.uint64(position)
    return ((np.uint64(b) & ~(field << np.uint64(position))) | moved).astype(np.uint32)


def _permute(a: Lanes, b: Lanes, selection: Lanes) -> Lanes:
    both = np.uint64(a) | np.uint64(b) << np.uint64(32)
    result = np.uint64(0)
    for i in range(4):
        chosen = (np.uint64(selection) >> np.uint64(4 * i)) & np.uint64(0xF)
        byte = (both >> (np.uint64(8) * (chosen & np.uint64(7)))) & np.uint64(0xFF)
        sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        result = result | np.where(chosen & np.uint64(8), sign, byte) << np.uint64(8 * i)
    return np.asarray(result).astype(np.uint32)


def _halves(a: Lanes) -> Lanes:
    """32 registers as 64 halves, and back."""
    return np.ascontiguousarray(a).view(np.float16 if a.dtype == np.uint32 else np.uint32)


def _reverse(a: Lanes) -> Lanes:
    return np.array([int(f"{x:032b}"[::-1], 2) for x in np.atleast_1d(a).tolist()], np.uint32)


def _leading_zeros(a: Lanes) -> Lanes:
    return np.array([32 - x.bit_length() for x in np.atleast_1d(a).tolist()], np.uint32)


def _ones(a: Lanes) -> Lanes:
    return np.array([x.bit_count() for x in np.atleast_1d(a).tolist()], np.uint32)


def _shift_to_top(a: Lanes) -> Lanes:
    """bfind.shiftamt: how far the highest one is from the top; -1 if there is none."""
    return np.where(a == 0, np.uint32(0xFFFFFFFF), _leading_zeros(a))


_COMPARISONS: dict[str, Callable[..., Lanes]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a < b) | (a > b) if a.dtype.kind == "f" else a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": lambda a, b: a != b,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}
_BINARY: dict[str, Callable[..., Lanes]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "min": lambda a, b: np.fmin(a, b),
    "max": lambda a, b: np.fmax(a, b),
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "copysign": lambda a, b: np.copysign(b, a),  # the sign of a
}
_UNARY: dict[str, Callable[..., Lanes]] = {
    "neg": lambda a: -a,
    "abs": lambda a: np.abs(a),
    "not": lambda a: ~a,
    "ex2": lambda a: np.exp2(a),
    "lg2": lambda a: np.log2(a),
    "rcp": lambda a: np.float32(1) / a,
    "sqrt": lambda a: np.sqrt(a),
    "rsqrt": lambda a: np.float32(1) / np.sqrt(a),
    "tanh": lambda a: np.tanh(a),
    "brev": _reverse,
    "clz": _leading_zeros,
    "popc": _ones,
    "bfind": _shift_to_top,
}


def _convert(modifiers: list[str]) -> tuple[str, list[str], Callable[..., Lanes]]:
    to, source = modifiers[-2:]
    if source in ("e4m3x2", "e5m2x2"):
        dtype = _PACKED[source][0]

        def unpack(codes: Lanes) -> Lanes:
            as_bytes = np.broadcast_to(codes, 32).astype(np.uint16).view(np.uint8)
            halves = torch.from_numpy(as_bytes.copy()).view(dtype).half().numpy()
            return halves.view(np.uint32)

        return "b32", ["b16"], unpack
    if to in _PACKED:  # the first operand goes to the upper half
        torch_dtype, bits = _PACKED[to]

        def pack(upper: Lanes, lower: Lanes) -> Lanes:
            return _codes(lower, torch_dtype, bits) | _codes(upper, torch_dtype, bits) << bits

        return ("b16" if bits == 8 else "b32"), [source, source], pack
    if "bf16" in (to, source):
        if to == "bf16":
            return "b16", [source], lambda a: _codes(a, torch.bfloat16, 16).astype(np.uint16)
        return to, ["b16"], lambda a: (a.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if DTYPES[source]().dtype.kind == "f" and DTYPES[to]().dtype.kind in "iu":
        rounded = _TO_WHOLE[modifiers[0]]
        limits = np.iinfo(DTYPES[to])

        def to_integer(a: Lanes) -> Lanes:
            whole = np.nan_to_num(rounded(np.float64(a)), nan=0.0)
            return np.clip(whole, limits.min, limits.max).astype(DTYPES[to])

        return to, [source], to_integer
    whole = _TO_WHOLE.get(modifiers[0], lambda a: a)
    return to, [source], lambda a: whole(a).astype(DTYPES[to])


_TO_WHOLE: dict[str, Callable[[Lanes], Lanes]] = {
    "rni": np.rint,
    "rzi": np.trunc,
    "rmi": np.floor,
    "rpi": np.ceil,
}
_PACKED = {
    "bf16x2": (torch.bfloat16, 16),
    "f16x2": (torch.float16, 16),
    "e4m3x2": (torch.float8_e4m3fn, 8),
    "e5m2x2": (torch.float8_e5m2, 8),
}


def _codes(a: Lanes, dtype: torch.dtype, bits: int) -> Lanes:
    """The nearest of a 16- or 8-bit format, in a wider integer. Those of 8 bits saturate; NaN is 0x7f."""
    values = torch.from_numpy(np.broadcast_to(a, 32).astype(np.float32))
    if bits == 8:
        values = values.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
        codes = values.to(dtype).view(torch.uint8).masked_fill(values.isnan(), 0x7F)
        return codes.numpy().astype(np.uint16)
    return values.to(dtype).view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
