"""Instructions that decide where lanes go on: branches, and what several lanes do together.

Each is a function of the warp and the group of lanes that is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from . import matrices
from .memory import PtxError
from .operands import Reader, address_of, condition, parts, read, same, write
from .program import Both, Immediate, Instruction, Program, Symbol, Vector
from .warp import ALL, Group, Warp

Control = Callable[[Warp, Group], None]


def _branch(instruction: Instruction, program: Program) -> Control:
    (label,) = instruction.operands
    if not isinstance(label, Symbol):
        raise ValueError(f"unknown instruction: {instruction.text}")
    target, taken = program.labels[label.name], condition(instruction)
    return lambda warp, group: warp.branch(group, taken(warp), target)


def _return(instruction: Instruction, program: Program) -> Control:
    chosen = condition(instruction)

    def leave(warp: Warp, group: Group) -> None:
        group.mask = group.mask & ~chosen(warp)
        group.pc += 1

    return leave


def _together(
    instruction: Instruction, action: Callable[[Warp], None], wanted: Reader | None = None
) -> Control:
    """What takes all lanes, or those of a mask."""
    if instruction.guard is not None:
        raise ValueError(f"guarded: {instruction.text}")

    def act(warp: Warp, group: Group) -> None:
        mask = ALL
        if wanted is not None:
            bits = same(np.asarray(wanted(warp))[warp.mask])
            mask = (np.uint32(bits) >> np.arange(32, dtype=np.uint32) & np.uint32(1)).astype(bool)
            if (warp.mask & ~mask).any():
                raise PtxError("a lane is not in the mask that it names")
        if warp.all_here(group, mask):
            action(warp)
            group.pc += 1

    return act


def _shuffle(instruction: Instruction, program: Program) -> Control:
    mode = instruction.opcode.split(".")[2]
    to, source, lane, clamp, members = instruction.operands
    put = write(to.value if isinstance(to, Both) else to, "b32")
    put_predicate = write(to.predicate if isinstance(to, Both) else None, "pred")
    take, lanes, clamps = read(source, "b32"), read(lane, "u32"), read(clamp, "u32")

    def shuffle(warp: Warp) -> None:
        own, by, bounds = np.arange(32), lanes(warp).astype(int) & 31, clamps(warp).astype(int)
        segment = bounds >> 8 & 31
        first, last = own & segment, (own & segment) | (bounds & 31 & ~segment)
        chosen = {"up": own - by, "down": own + by, "bfly": own ^ by, "idx": first | (by & ~segment)}[mode]
        valid = chosen >= last if mode == "up" else chosen <= last
        chosen = np.where(valid, chosen, own)
        if not warp.mask[chosen[warp.mask]].all():
            raise PtxError("a shuffle from a lane that does not take part")
        put(warp, take(warp)[chosen])
        put_predicate(warp, valid)

    return _together(instruction, shuffle, read(members, "u32"))


def _vote(instruction: Instruction, program: Program) -> Control:
    mode = instruction.opcode.split(".")[2]
    to, source, members = instruction.operands
    put, take = write(to, "b32" if mode == "ballot" else "pred"), read(source, "pred")

    def vote(warp: Warp) -> None:
        votes = take(warp) & warp.mask
        if mode == "ballot":
            put(warp, np.uint32(sum(1 << int(i) for i in np.flatnonzero(votes))))
        else:
            put(warp, votes.any() if mode == "any" else (votes == warp.mask).all())

    return _together(instruction, vote, read(members, "u32"))


def _barrier(instruction: Instruction, program: Program) -> Control:
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == "bar.warp.sync":
        return _together(
            instruction, lambda warp: warp.block.order.meet(warp.threads[warp.mask]), read(operands[0], "u32")
        )
    if opcode not in ("bar.sync", "bar.arrive"):
        raise ValueError(f"unknown instruction: {instruction.text}")
    number, waits = read(operands[0], "u32"), opcode == "bar.sync"
    threads = read(operands[1], "u32") if len(operands) > 1 else None

    def arrive(warp: Warp) -> None:
        wanted = warp.block.threads if threads is None else same(threads(warp))
        warp.block.arrive(warp, same(number(warp)), wanted, waits)

    return _together(instruction, arrive)


def _phase_barrier(instruction: Instruction, program: Program) -> Control:
    operation, operands = instruction.opcode.split(".")[1], instruction.operands
    if instruction.opcode.endswith("try_wait.parity.shared::cta.b64"):
        return _try_wait(instruction)
    if operation not in ("init", "arrive") or (operation == "arrive" and operands[0] is not None):
        raise ValueError(f"unknown instruction: {instruction.text}")
    address, chosen = address_of(operands[operation == "arrive"]), condition(instruction)
    count = read(operands[1], "u32") if operation == "init" else None

    def act(warp: Warp, group: Group) -> None:
        where = address(warp)
        mask = warp.mask & chosen(warp)
        for barrier, lanes in _by_value(where, mask):
            if count is not None:
                warp.block.start_phases(barrier, same(count(warp)[lanes]), warp.threads[lanes])
            else:
                warp.block.arrive_at(barrier, warp.threads[lanes])
        group.pc += 1

    return act


def _by_value(values: np.ndarray, mask: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for value in np.unique(values[mask]):
        yield int(value), mask & (values == value)


def _try_wait(instruction: Instruction) -> Control:
    if instruction.guard is not None:
        raise ValueError(f"guarded: {instruction.text}")
    to, barrier, phase = instruction.operands
    put, address, parity = write(to, "pred"), address_of(barrier), read(phase, "u32")

    def try_wait(warp: Warp, group: Group) -> None:
        over, where, parities = np.zeros(32, bool), address(warp), parity(warp)
        for barrier, lanes in _by_value(where, warp.mask):
            over[lanes] = warp.block.is_over(barrier, same(parities[lanes]), warp.threads[lanes])
        put(warp, over)
        warp.blocked = not over[warp.mask].any()  # let others run before it asks again
        group.pc += 1

    return try_wait


def _load_matrix(instruction: Instruction, program: Program) -> Control:
    modifiers = instruction.opcode.split(".")
    count, transposed = int(next(m for m in modifiers if m in ("x1", "x2", "x4"))[1]), "trans" in modifiers
    puts = [write(part, "b32") for part in parts(instruction.operands[0])]
    addresses = address_of(instruction.operands[1])

    def load(warp: Warp) -> None:
        rows = addresses(warp)[: 8 * count]
        if warp.block.traffic is not None:
            warp.block.traffic.count_shared((instruction.line, instruction.opcode), rows, 16)
        warp.block.races.read_by_all(warp.threads, rows, 16)  # each gets some of every matrix
        registers = matrices.load_matrices(warp.block.shared, rows, count, transposed)
        for put, register in zip(puts, registers):
            put(warp, register)

    return _together(instruction, load)


def _multiply(instruction: Instruction, program: Program) -> Control:
    if not instruction.opcode.startswith("mma.sync.aligned.m16n8k16.row.col.f32."):
        raise ValueError(f"unknown instruction: {instruction.text}")
    kind = instruction.opcode.split(".")[-2]
    to, *sources = (parts(operand) for operand in instruction.operands)
    puts = [write(part, "f32") for part in to]
    a, b, c = ([read(part, k) for part in s] for s, k in zip(sources, ("b32", "b32", "f32")))

    def multiply(warp: Warp) -> None:
        inputs = [np.stack([take(warp) for take in takes]) for takes in (a, b, c)]
        for put, result in zip(puts, matrices.product(*inputs, kind)):
            put(warp, result)

    return _together(instruction, multiply)


def _warpgroup(instruction: Instruction, program: Program) -> Control:
    opcode, operands = instruction.opcode, instruction.operands
    if opcode.startswith("wgmma.commit_group"):
        return _together(instruction, lambda warp: warp.products.append(None))
    if opcode.startswith("wgmma.wait_group") and isinstance(operands[0], Immediate):
        newest = int(operands[0].value)
        return _together(instruction, lambda warp: _wait(warp, newest))
    *_, shape, to_kind, kind, other = opcode.split(".")
    columns = int(shape.partition("n")[2].partition("k")[0])
    to, a, b, accumulates, *constants = operands
    accumulators, in_registers = parts(to), isinstance(a, Vector)
    factors = [constant.value for constant in constants if isinstance(constant, Immediate)]
    if (
        not opcode.startswith("wgmma.mma_async.sync.aligned.m64")
        or (shape[-3:], to_kind, kind) != ("k16", "f32", other)
        or factors[:2] != [1, 1]
        or len(factors) != (3 if in_registers else 4)
        or len(accumulators) != columns // 2
    ):
        raise ValueError(f"unknown instruction: {instruction.text}")
    puts, takes = [write(part, "f32") for part in accumulators], [read(part, "f32") for part in accumulators]
    left = [read(part, "b32" if in_registers else "u64") for part in parts(a)]
    right, adds = read(b, "u64"), read(accumulates, "pred")
    transposed = (0 if in_registers else int(factors[2]), int(factors[-1]))

    def issue(warp: Warp) -> None:
        first = np.stack([take(warp) for take in left]) if in_registers else same(left[0](warp))
        descriptors = first, same(right(warp))
        inputs = matrices.warpgroup_inputs(warp.index % 4, columns, *descriptors, transposed)
        add = bool(same(adds(warp)))
        races, threads, shared = warp.block.races, warp.threads, warp.block.shared
        for addresses in inputs:
            races.begin_product(threads, addresses)

        def finish() -> None:
            result = matrices.warpgroup_product(shared, first, inputs, kind)
            for put, take, values in zip(puts, takes, result):
                put(warp, take(warp) + values if add else values)
            for addresses in inputs:
                races.end_product(threads, addresses)

        warp.products.append(finish)

    return _together(instruction, issue)


def _wait(warp: Warp, newest: int) -> None:
    """Until at most so many of the newest groups of products are under way."""
    ends = [i for i, product in enumerate(warp.products) if product is None]
    if len(ends) <= newest:
        return
    last = ends[len(ends) - newest - 1]
    for product in warp.products[:last]:
        if product is not None:
            product()
    del warp.products[: last + 1]


STEPS: dict[str, Callable[[Instruction, Program], Control]] = {
    "bra": _branch,
    "ret": _return,
    "shfl": _shuffle,
    "vote": _vote,
    "bar": _barrier,
    "mbarrier": _phase_barrier,
    "ldmatrix": _load_matrix,
    "mma": _multiply,
    "wgmma": _warpgroup,
}
