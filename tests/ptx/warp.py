"""A warp: the registers of its lanes, and where in the program they are.

Lanes that branched apart go on as groups, in any order, and join where they meet. An instruction for several
lanes (shuffles, products, barriers) waits for all of them; where they can never meet there, that is an error.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .arithmetic import DTYPES, bits_of
from .memory import POISON, PtxError

if TYPE_CHECKING:
    from .machine import Block

ALL = np.ones(32, bool)


@dataclass
class Group:
    """Lanes at one place."""

    pc: int
    mask: np.ndarray
    waits: bool = False  # for the others


class Warp:
    """32 threads of a block.

    Attributes:
        mask: the lanes at work on the current instruction.
        full: whether these are all.
        blocked: whether only another warp can bring it on.
    """

    def __init__(self, block: Block, index: int, rng: random.Random) -> None:
        self.block, self.index = block, index
        self._random = rng
        counts = block.program.registers
        files = {
            bits: np.full((counts.get(bits, 0) + 1, 32), POISON, f"u{bits // 8}") for bits in (16, 32, 64)
        }
        self.files = {
            kind: np.zeros((counts.get(1, 0) + 1, 32), bool)
            if kind == "pred"
            else files[bits_of(kind)].view(dtype)
            for kind, dtype in DTYPES.items()
            if bits_of(kind) != 8  # registers hold no less than 16
        }
        for file in files.values():
            file.view(np.uint8)[:] = POISON
        self.special = {"%laneid": np.arange(32, dtype=np.uint32)}
        self.special["%tid.x"] = np.arange(32, dtype=np.uint32) + np.uint32(32 * index)
        self.special["%tid.y"] = self.special["%tid.z"] = np.zeros(32, np.uint32)
        self.groups = [Group(0, ALL.copy())]
        self.mask, self.full = ALL, True
        self.blocked = False
        self.at: int | None = None  # the instruction that failed
        self.threads = np.arange(32) + 32 * index
        # What runs by itself, in the order of issue: copies, and the lanes that closed a group; products, and
        # None where a group ends.
        self.copies: list[Any] = []
        self.products: list[Callable[[], None] | None] = []

    def use(self, mask: np.ndarray) -> None:
        self.mask, self.full = mask, bool(mask.all())

    def run(self, steps: int) -> int:
        """Go on until blocked, or for about so many instructions. Gives how many."""
        done = 0
        while self.groups and not self.blocked and done < steps:
            group = self._choose()
            others = {other.pc for other in self.groups if other is not group}
            done += self._run_group(group, others)
            self._join()
        return done

    def _choose(self) -> Group:
        ready = [group for group in self.groups if not group.waits]
        if not ready:
            places = "; ".join(
                f"{int(g.mask.sum())} at {self.block.program.instructions[g.pc].text!r}" for g in self.groups
            )
            raise PtxError(f"lanes of a warp wait for each other: {places}")
        # Mostly those that are behind, so that they meet again soon.
        if len(ready) > 1 and self._random.random() < 0.2:
            return self._random.choice(ready)
        return min(ready, key=lambda group: group.pc)

    def _run_group(self, group: Group, others: set[int]) -> int:
        code, steps = self.block.code, 0
        self.use(group.mask)
        pc = group.pc
        try:
            while True:
                step, control = code[pc]
                steps += 1
                if control:
                    group.pc = pc
                    step(self, group)
                    return steps
                step(self)
                pc += 1
                if pc in others:
                    group.pc = pc
                    return steps
        except Exception:
            self.at = pc
            raise

    def _join(self) -> None:
        places: dict[int, Group] = {}
        for group in self.groups:
            if not group.mask.any():
                continue
            if group.pc in places:
                other = places[group.pc]
                other.mask = other.mask | group.mask
                other.waits = False
            else:
                places[group.pc] = group
        self.groups = list(places.values())

    def branch(self, group: Group, taken: np.ndarray, target: int) -> None:
        """The lanes of the group that are taken go to the target, the others on."""
        taken = taken & group.mask
        if taken.all() or (taken == group.mask).all():
            group.pc = target
        elif not taken.any():
            group.pc += 1
        else:
            self.groups.append(Group(target, taken))
            group.mask = group.mask & ~taken
            group.pc += 1

    def all_here(self, group: Group, wanted: np.ndarray) -> bool:
        """Whether the group has all the wanted lanes; if not it waits."""
        group.waits = bool((wanted & ~group.mask).any())
        return not group.waits
