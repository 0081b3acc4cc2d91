"""An instruction as a function of the warp."""

from __future__ import annotations

from collections.abc import Callable

from . import arithmetic, memory_steps, warp_steps
from .operands import condition, read, write
from .program import Instruction, Program, Vector
from .warp import Warp

Step = tuple[Callable[..., None], bool]
# Without an effect here: about the order of what is in order already, or the compiler's.
IGNORED = ("fence.acq_rel", "membar", "setmaxnreg", "wgmma.fence")


def step(instruction: Instruction, program: Program) -> Step:
    """What it does, and whether it is one of `warp_steps`, which also takes the group of lanes.

    Raises:
        ValueError: it is not known.
    """
    name, *modifiers = instruction.opcode.split(".")
    operands = instruction.operands
    if instruction.opcode == "fence.proxy.async.shared::cta":
        return _guarded(instruction, lambda warp: warp.block.order.fence_proxy(warp.threads[warp.mask]))
    if instruction.opcode.startswith(IGNORED):
        return _guarded(instruction, lambda warp: None)
    if name in warp_steps.STEPS:
        return warp_steps.STEPS[name](instruction, program), True
    if name == "mov" and any(isinstance(operand, Vector) for operand in operands):
        return _guarded(instruction, memory_steps.move_parts(instruction))
    if name in memory_steps.STEPS:
        return _guarded(instruction, memory_steps.STEPS[name](instruction, modifiers, program))
    if instruction.opcode.startswith("cp.async"):
        return _guarded(instruction, memory_steps.copy(instruction))
    found = arithmetic.function(instruction.opcode)
    if found is None or len(operands) != len(found[1]) + 1:
        raise ValueError(f"unknown instruction: {instruction.text}")
    kind, kinds, function = found
    loose = name == "cvt"
    put = write(operands[0], kind, loose)
    readers = [read(operand, kind, loose) for operand, kind in zip(operands[1:], kinds)]
    if len(readers) == 1:
        (one,) = readers
        return _guarded(instruction, lambda warp: put(warp, function(one(warp))))
    if len(readers) == 2:
        first, second = readers
        return _guarded(instruction, lambda warp: put(warp, function(first(warp), second(warp))))
    return _guarded(instruction, lambda warp: put(warp, function(*[r(warp) for r in readers])))


def _guarded(instruction: Instruction, action: Callable[[Warp], None]) -> Step:
    if instruction.guard is None:
        return action, False
    chosen = condition(instruction)

    def guarded(warp: Warp) -> None:
        before = warp.mask
        mask = before & chosen(warp)
        if mask.any():
            warp.use(mask)
            action(warp)
            warp.use(before)

    return guarded, False
