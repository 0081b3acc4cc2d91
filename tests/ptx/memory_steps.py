"""Instructions that move data: registers in parts, memory, copies that run by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import DTYPES, bits_of
from .memory import PtxError
from .operands import address_of, parts, read, same, write
from .program import Immediate, Instruction, Program, Vector
from .races import WORD, Races
from .warp import Warp

if TYPE_CHECKING:
    from .machine import Block

Action = Callable[[Warp], None]
VECTOR = {"v2": 2, "v4": 4}
PARAM_BASE = 1 << 50  # of the arguments, where no global memory is


def move_parts(instruction: Instruction) -> Action:
    """mov between a register and its halves."""
    kind = instruction.opcode.split(".")[1]
    to, source = instruction.operands
    pieces = parts(to) if isinstance(to, Vector) else parts(source)
    part_kind = f"b{bits_of(kind) // len(pieces)}"
    if isinstance(to, Vector):
        take, puts = read(source, kind), [write(part, part_kind) for part in pieces]

        def split(warp: Warp) -> None:
            halves = np.ascontiguousarray(take(warp)).view(DTYPES[part_kind]).reshape(32, len(puts))
            for i, put in enumerate(puts):
                put(warp, halves[:, i].copy())

        return split
    put, takes = write(to, kind), [read(part, part_kind) for part in pieces]

    def join(warp: Warp) -> None:
        halves = np.stack([take(warp) for take in takes], axis=1)
        put(warp, np.ascontiguousarray(halves).view(DTYPES[kind]).ravel())

    return join


def load(instruction: Instruction, modifiers: list[str], program: Program) -> Action:
    kind, (to, address) = modifiers[-1], instruction.operands
    puts = [write(part, kind, loose=True) for part in parts(to)]
    if modifiers[0] == "param":
        return _load_param(instruction, kind, program)
    addresses, width, count = address_of(address), bits_of(kind) // 8, len(puts)
    shared, constant = "shared" in modifiers, "nc" in modifiers

    def act(warp: Warp) -> None:
        mask, block = warp.mask, warp.block
        where = addresses(warp)[mask]
        if shared:
            words = block.shared.load(where, width, count)
        else:
            words = block.memory.load(where, width, count, constant)
        _count(instruction, block, shared, where, width * count)
        if (races := _races(block, shared, width * count)) is not None:
            races.read(warp.threads[mask], where, width * count)
        for put, row in zip(puts, words):
            lanes = row
            if not warp.full:
                lanes = np.zeros(32, row.dtype)
                lanes[mask] = row
            put(warp, lanes.view(DTYPES[kind]))

    return act


def _count(instruction: Instruction, block: Block, shared: bool, where: np.ndarray, size: int) -> None:
    if block.traffic is not None:
        count = block.traffic.count_shared if shared else block.traffic.count_global
        count((instruction.line, instruction.opcode), where, size)


def _races(block: Block, shared: bool, size: int) -> Races | None:
    """Where to look for races. Halves of words are written to global memory only, as outputs."""
    if shared:
        return block.races
    return block.global_races if size % WORD == 0 else None


def _load_param(instruction: Instruction, kind: str, program: Program) -> Action:
    """Whole fields of the arguments, one or several neighbours."""
    to, address = instruction.operands
    puts = [write(part, kind, loose=True) for part in parts(to)]
    addresses, width = address_of(address), bits_of(kind) // 8

    def act(warp: Warp) -> None:
        start = same(addresses(warp)[warp.mask]) - PARAM_BASE
        for i, put in enumerate(puts):
            offset = start + i * width
            if program.fields.get(offset) != width:
                raise PtxError(f"{width} bytes of the arguments at {offset} are no field")
            put(warp, np.frombuffer(warp.block.arguments, DTYPES[kind], 1, offset)[0])

    return act


def store(instruction: Instruction, modifiers: list[str], program: Program) -> Action:
    kind, (address, source) = modifiers[-1], instruction.operands
    takes = [read(part, kind, loose=True) for part in parts(source)]
    addresses, width, shared = address_of(address), bits_of(kind) // 8, "shared" in modifiers

    def act(warp: Warp) -> None:
        mask, block = warp.mask, warp.block
        where = addresses(warp)[mask]
        words = np.stack([np.ascontiguousarray(take(warp)).view(f"u{width}")[mask] for take in takes])
        _count(instruction, block, shared, where, width * len(takes))
        if (races := _races(block, shared, width * len(takes))) is not None:
            races.write(warp.threads[mask], where, width * len(takes))
        (block.shared if shared else block.memory).store(where, words, width)

    return act


def atomic(instruction: Instruction, modifiers: list[str], program: Program) -> Action:
    if modifiers != ["global", "add", "u32"]:
        raise ValueError(f"unknown instruction: {instruction.text}")
    to, address, operand = instruction.operands
    put, addresses, take = write(to, "u32"), address_of(address), read(operand, "u32")

    def add(warp: Warp) -> None:
        result, memory = np.zeros(32, np.uint32), warp.block.memory
        where, values = addresses(warp), take(warp)
        for lane in np.flatnonzero(warp.mask):
            (old,) = memory.load(where[[lane]], 4)
            result[lane] = old[0]
            memory.store(where[[lane]], (old + values[lane])[None], 4)
        put(warp, result)

    return add


class Copy:
    """One cp.async of some lanes.

    Attributes:
        lanes: that have not waited for it.
    """

    def __init__(self, warp: Warp, targets: np.ndarray, sources: np.ndarray, reads: np.ndarray) -> None:
        self.lanes = warp.mask.copy()
        self._warp, self._targets, self._sources, self._reads = warp, targets, sources, reads
        warp.block.races.write(warp.threads[self.lanes], targets[self.lanes], 16, under_way=True)
        self._early = warp.block.random.random() < 0.5
        if self._early:
            self._move(self.lanes)

    def land(self, lanes: np.ndarray) -> None:
        if not self._early:
            self._move(lanes)
        self._warp.block.races.landed(self._warp.threads[lanes], self._targets[lanes], 16)
        self.lanes = self.lanes & ~lanes

    def _move(self, lanes: np.ndarray) -> None:
        words, reads = np.zeros((4, 32), np.uint32), lanes & self._reads
        words[:, reads] = self._warp.block.memory.load(self._sources[reads], 4, 4)
        self._warp.block.shared.store(self._targets[lanes], words[:, lanes], 4)


def copy(instruction: Instruction) -> Action:
    """cp.async. It lands at once or as late as the waits allow, as is drawn."""
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == "cp.async.commit_group":
        return lambda warp: warp.copies.append(warp.mask.copy())
    if opcode == "cp.async.wait_group" and isinstance(operands[0], Immediate):
        newest = int(operands[0].value)
        return lambda warp: _wait(warp, newest)
    if opcode != "cp.async.cg.shared.global" or operands[2] != Immediate(16):
        raise ValueError(f"unknown instruction: {instruction.text}")
    to, source = address_of(operands[0]), address_of(operands[1])
    size = read(operands[3], "u32") if len(operands) > 3 else None

    def issue(warp: Warp) -> None:
        sizes = np.full(32, 16) if size is None else size(warp).copy()
        if not np.isin(sizes[warp.mask], (0, 16)).all():
            raise PtxError("only copies of 0 and 16 bytes are known")
        targets, sources = to(warp), source(warp)
        _count(instruction, warp.block, True, targets[warp.mask], 16)
        _count(instruction, warp.block, False, sources[warp.mask & (sizes == 16)], 16)
        warp.copies.append(Copy(warp, targets, sources, sizes == 16))

    return issue


def _wait(warp: Warp, newest: int) -> None:
    """Until at most so many of the newest groups of each lane are under way, and what is in no group."""
    groups = np.zeros(32, int)  # seen behind
    for entry in reversed(warp.copies):
        if not isinstance(entry, Copy):
            groups += entry
            continue
        ready = entry.lanes & warp.mask & (groups > newest)
        if ready.any():
            entry.land(ready)
    warp.copies = [entry for entry in warp.copies if not isinstance(entry, Copy) or entry.lanes.any()]
    if not any(isinstance(entry, Copy) for entry in warp.copies):
        warp.copies = []


STEPS: dict[str, Callable[[Instruction, list[str], Program], Action]] = {
    "ld": load,
    "st": store,
    "atom": atomic,
}
