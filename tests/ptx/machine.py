"""A launch of a PTX program: its blocks one after another, their warps in turns of drawn length and order."""

from __future__ import annotations

import random

import numpy as np

from .memory import POISON, PtxError, Space, TensorSpace
from .memory_steps import PARAM_BASE, Copy
from .program import Instruction, Program
from .races import Order, Races
from .steps import Step, step
from .traffic import Traffic
from .warp import Warp

SHARED_BASE = 1024  # what is below belongs to the system, as on Hopper
LONGEST_TURN = 400  # instructions
MOST_GLOBAL = 256 << 10  # bytes in which races are looked for


class Machine:
    """Runs one program.

    Args:
        program: of `program.parse`.
        limit: instructions of a warp after which a launch is taken to hang.
    """

    def __init__(self, program: Program, limit: int = 30_000_000) -> None:
        self.program = program
        self.code = [_step(instruction, program) for instruction in program.instructions]
        self.limit = limit

    def launch(
        self,
        grid: tuple[int, int],
        threads: int,
        dynamic_shared: int,
        arguments: bytes,
        memory: TensorSpace,
        rng: random.Random,
        traffic: Traffic | None = None,
    ) -> None:
        """Run all blocks to their end.

        Raises:
            PtxError: naming the block, the warp and the instruction.
        """
        blocks = [(x, y) for x in range(grid[0]) for y in range(grid[1])]
        rng.shuffle(blocks)
        with np.errstate(all="ignore"):
            for block in blocks:
                Block(self, grid, block, threads, dynamic_shared, arguments, memory, rng, traffic).run()


class Block:
    """Threads that share memory and barriers."""

    def __init__(
        self,
        machine: Machine,
        grid: tuple[int, int],
        index: tuple[int, int],
        threads: int,
        dynamic_shared: int,
        arguments: bytes,
        memory: TensorSpace,
        rng: random.Random,
        traffic: Traffic | None,
    ) -> None:
        self.traffic = traffic
        self.program, self.code, self._limit = machine.program, machine.code, machine.limit
        self.arguments, self.memory, self.random, self.threads = arguments, memory, rng, threads
        self._index = index
        sizes = {"%ntid": (threads, 1), "%ctaid": index, "%nctaid": grid}
        self.special = {
            f"{name}.{axis}": np.full(32, value, np.uint32)
            for name, values in sizes.items()
            for axis, value in zip("xyz", (*values, 1 if name != "%ctaid" else 0))
        }
        self.symbols, size = _place(self.program, dynamic_shared)
        self.symbols[self.program.param] = PARAM_BASE
        self.shared = Space("shared", SHARED_BASE, np.full(size, POISON, np.uint8))
        self.order = Order(threads)
        self.races = Races("shared", self.order, SHARED_BASE, size)
        # Of global memory where there is little, as for what plans: there threads of a block share some.
        size = memory.content.size
        self.global_races = Races("global", self.order, memory.base, size) if size <= MOST_GLOBAL else None
        self._events = 0  # that others may have waited for
        self._barriers: dict[int, tuple[int, list[Warp]]] = {}  # threads that arrived, warps that wait
        self._phases: dict[int, list[int]] = {}  # expected, pending, phase
        self.warps = [Warp(self, i, rng) for i in range(threads // 32)]

    def run(self) -> None:
        steps = [0] * len(self.warps)
        while alive := [warp for warp in self.warps if warp.groups]:
            waiting = [warp for _, waiting in self._barriers.values() for warp in waiting]
            ready = [warp for warp in alive if warp not in waiting]
            self.random.shuffle(ready)
            before = self._events
            for warp in ready:
                warp.blocked = False
                try:
                    steps[warp.index] += warp.run(self.random.randrange(1, LONGEST_TURN))
                except (PtxError, ValueError, IndexError, KeyError, TypeError) as error:
                    raise PtxError(f"{self._place_of(warp)}: {error}") from error
                if steps[warp.index] > self._limit:
                    raise PtxError(f"{self._place_of(warp)}: more than {self._limit} instructions")
            if all(warp.blocked for warp in ready) and self._events == before:
                raise PtxError(f"all warps wait: {'; '.join(map(self._place_of, alive))}")
        for warp in self.warps:
            if warp.products or any(isinstance(entry, Copy) for entry in warp.copies):
                raise PtxError(f"warp {warp.index} ended with products or copies under way")

    def _place_of(self, warp: Warp) -> str:
        pc = min((group.pc for group in warp.groups), default=-1) if warp.at is None else warp.at
        at = self.program.instructions[pc]
        return f"block {self._index}, warp {warp.index}, {at.line}, at {at.text!r:.120}"

    def arrive(self, warp: Warp, number: int, threads: int, waits: bool) -> None:
        """A warp at a barrier of so many threads."""
        count, waiting = self._barriers.get(number, (0, []))
        count += 32
        if count > threads:
            raise PtxError(f"{count} threads at barrier {number} of {threads}")
        self._events += 1
        self.order.arrive(("bar", number), warp.threads)
        if waits:
            warp.blocked = True
            waiting = [*waiting, warp]
        self._barriers[number] = count, waiting
        if count == threads:
            self.order.complete(("bar", number))
            for other in waiting:
                other.blocked = False
                self.order.learn(("bar", number), other.threads)
            del self._barriers[number]

    def start_phases(self, address: int, count: int, threads: np.ndarray) -> None:
        self.shared.load(np.array([address]), 8)  # checks it
        self.races.write(threads, np.full(len(threads), address), 8)
        self._phases[address] = [count, count, 0]

    def arrive_at(self, address: int, threads: np.ndarray) -> None:
        state = self._phase(address, threads)
        self._events += 1
        for thread in threads:
            self.order.arrive(("mbarrier", address), thread[None])
            state[1] -= 1
            if state[1] == 0:
                state[1], state[2] = state[0], state[2] + 1
                self.order.complete(("mbarrier", address))

    def is_over(self, address: int, parity: int, threads: np.ndarray) -> bool:
        over = self._phase(address, threads)[2] % 2 != parity
        if over:
            self.order.learn(("mbarrier", address), threads)
        return over

    def _phase(self, address: int, threads: np.ndarray) -> list[int]:
        if address not in self._phases:
            raise PtxError(f"no barrier at {address}")
        self.races.read_by_all(threads, np.array([address]), 8)
        return self._phases[address]


def _step(instruction: Instruction, program: Program) -> Step:
    try:
        return step(instruction, program)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{instruction.text}: {error}") from error


def _place(program: Program, dynamic_shared: int) -> tuple[dict[str, int], int]:
    """Addresses of the variables in shared memory, and its size. No more aligned than they ask for."""
    end, addresses = SHARED_BASE, {}
    for name, variable in sorted(program.shared.items(), key=lambda item: item[1].size is None):
        end = -(-end // variable.alignment) * variable.alignment
        if variable.size is None and end % (2 * variable.alignment) == 0:
            end += variable.alignment
        addresses[name] = end
        end += dynamic_shared if variable.size is None else variable.size
    return addresses, -(-(end - SHARED_BASE) // 8) * 8
