"""Compute the theoretical occupancy: how many blocks of a kernel a multiprocessor can hold at once."""

from __future__ import annotations

from dataclasses import dataclass

from .compile import ResourceUsage
from .specs import SHARED_MEMORY, KernelSpec

WARP = 32
REGISTERS = 64 * 1024  # of a multiprocessor, on every architecture from Volta on
PARTITIONS = 4  # that its registers and its warps are divided over
REGISTER_UNIT = 256  # that a warp's registers are allocated in

# Warps and blocks that a multiprocessor can hold.
MOST = {
    "70": (64, 32),
    "75": (32, 16),
    "80": (64, 32),
    "86": (48, 16),
    "87": (48, 16),
    "89": (48, 24),
    "90": (64, 32),
    "100": (64, 32),
    "103": (64, 32),
    "110": (48, 24),
    "120": (48, 24),
    "121": (48, 24),
}


@dataclass(frozen=True)
class Occupancy:
    """The blocks and warps that one multiprocessor can hold."""

    blocks: int
    share: float  # resident warps over the most there can be
    limit: str  # what allows for no more: "warps", "blocks", "registers" or "shared memory"


def occupancy(spec: KernelSpec, usage: ResourceUsage, arch: str) -> Occupancy:
    """Return the occupancy of a kernel as it is launched."""
    return of(arch, spec.threads, usage.registers, usage.shared_memory + spec.dynamic_shared_memory)


def of(arch: str, threads: int, registers: int, shared_memory: int) -> Occupancy:
    """Return the occupancy of blocks with these threads, registers a thread and bytes of shared memory."""
    number = arch.rstrip("af")
    most_warps, most_blocks = MOST[number]
    # From Ampere on the driver keeps 1 KiB of every block's shared memory.
    reserved, unit = (1024, 128) if int(number) >= 80 else (0, 256)
    warps = -(-threads // WARP)
    limits = {"warps": most_warps // warps, "blocks": most_blocks}
    if registers:
        # Registers are a partition's, and a block's warps are dealt out to the partitions in turn.
        of_warp = _round_up(registers * WARP, REGISTER_UNIT)
        limits["registers"] = PARTITIONS * (REGISTERS // PARTITIONS // of_warp) // warps
    if taken := _round_up(shared_memory + reserved, unit):
        limits["shared memory"] = (SHARED_MEMORY[number] + reserved) // taken
    limit = min(limits, key=limits.__getitem__)
    return Occupancy(limits[limit], limits[limit] * warps / most_warps, limit)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
