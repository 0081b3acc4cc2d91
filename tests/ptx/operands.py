"""Operands of instructions, as functions of the warp."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from .arithmetic import DTYPES, bits_of
from .memory import PtxError
from .program import Address, Immediate, Instruction, Operand, Register, Special, Symbol, Vector
from .warp import ALL, Warp

Reader = Callable[[Warp], Any]  # 32 lanes
Writer = Callable[[Warp, Any], None]  # to the lanes at work


def read(operand: Operand, kind: str, loose: bool = False) -> Reader:
    """Loose: a register may be wider, as in cvt and st; then its low bits count."""
    dtype = DTYPES[kind]
    if loose and isinstance(operand, Register) and operand.width > bits_of(kind):
        wide, own = read(operand, f"u{operand.width}"), f"u{bits_of(kind) // 8}"
        return lambda warp: wide(warp).astype(own).view(dtype)
    if isinstance(operand, Register):
        _check_width(operand, kind)
        index = operand.index
        return lambda warp: warp.files[kind][index]
    if isinstance(operand, Immediate):
        constant = np.broadcast_to(_constant(operand.value, kind), 32)
        return lambda warp: constant
    if isinstance(operand, Special):
        name = operand.name
        return lambda warp: warp.special[name] if name in warp.special else warp.block.special[name]
    if isinstance(operand, Symbol):
        symbol = operand.name
        return lambda warp: np.full(32, warp.block.symbols[symbol], dtype)
    raise ValueError(f"cannot read {operand}")


def _constant(value: int | float, kind: str) -> np.ndarray:
    if kind == "pred":
        return np.array(value != 0)
    if isinstance(value, float):
        integer, number = ("<Q", "<d") if bits_of(kind) == 64 else ("<I", "<f")
        (bits,) = struct.unpack(integer, struct.pack(number, value))
        return np.array(bits, f"u{bits_of(kind) // 8}").view(DTYPES[kind])
    width = bits_of(kind)
    return np.array(value & (1 << width) - 1, f"u{width // 8}").view(DTYPES[kind])


def write(operand: Operand, kind: str, loose: bool = False) -> Writer:
    """Loose: a register may be wider, as in cvt and ld; then the value is extended."""
    if loose and isinstance(operand, Register) and operand.width > bits_of(kind):
        return write(operand, f"{'s' if kind[0] == 's' else 'u'}{operand.width}")
    if operand is None:
        return lambda warp, value: None
    if not isinstance(operand, Register):
        raise ValueError(f"cannot write {operand}")
    _check_width(operand, kind)
    index = operand.index

    def put(warp: Warp, value: Any) -> None:
        if warp.full:
            warp.files[kind][index] = value
        else:
            np.copyto(warp.files[kind][index], value, where=warp.mask, casting="unsafe")

    return put


def _check_width(register: Register, kind: str) -> None:
    if register.width != bits_of(kind):
        raise ValueError(f"a register of {register.width} bits for {kind}")


def parts(operand: Operand) -> tuple[Operand, ...]:
    """What is in braces; the operand itself where it has none."""
    return operand.parts if isinstance(operand, Vector) else (operand,)


def address_of(operand: Operand) -> Reader:
    if not isinstance(operand, Address):
        raise ValueError(f"not an address: {operand}")
    offset = operand.offset
    if operand.base is None:
        return lambda warp: np.full(32, offset, np.int64)
    narrow = isinstance(operand.base, Register) and operand.base.width == 32
    base = read(operand.base, "u32" if narrow else "s64")
    return lambda warp: base(warp).astype(np.int64) + offset


def condition(instruction: Instruction) -> Reader:
    """Which lanes the guard lets through."""
    if instruction.guard is None:
        return lambda warp: ALL
    index, negated = instruction.guard.index, instruction.negated
    return lambda warp: ~warp.files["pred"][index] if negated else warp.files["pred"][index]


def same(lanes: np.ndarray) -> int:
    """What is one for all lanes."""
    if (lanes != lanes[0]).any():
        raise PtxError("lanes differ in what is one for all of them")
    return int(lanes[0])
