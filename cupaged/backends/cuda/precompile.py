"""Compile every kernel ahead of time: `python -m cupaged.compile`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from .compile import ResourceUsage, cache_dir, cubin
from .occupancy import occupancy
from .specs import ARCHS, SHARED_MEMORY, STATIC_SHARED_MEMORY, KernelSpec, variants


@dataclass(frozen=True)
class Row:
    """A line of the table: one kernel on one architecture."""

    spec: KernelSpec
    arch: str
    usage: ResourceUsage
    compile_ms: float

    def complaints(self) -> list[str]:
        """Return what makes the kernel unfit to ship."""
        found = []
        if self.usage.spill_stores or self.usage.spill_loads:
            found.append(f"spills {self.usage.spill_stores + self.usage.spill_loads} bytes of registers")
        found += self.usage.warnings
        limit = min(STATIC_SHARED_MEMORY, SHARED_MEMORY[self.arch.rstrip("af")])
        if self.usage.shared_memory > limit:
            found.append(f"needs {self.usage.shared_memory} bytes of shared memory, the limit is {limit}")
        elif occupancy(self.spec, self.usage, self.arch).blocks == 0:
            found.append("needs more than a multiprocessor has: no block of it can run")
        return found


def compile_all(
    kernels: Iterable[tuple[KernelSpec, str]], directory: Path, jobs: int | None = None
) -> Iterator[Row]:
    """Compile kernels, each for an architecture, in parallel: NVRTC compiles one at a time in a process."""
    work = [(spec, arch, directory) for spec, arch in kernels]
    jobs = min(jobs or os.cpu_count() or 1, len(work))
    if jobs <= 1:
        yield from map(_compile_row, work)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_compile_row, work, chunksize=4)


def _compile_row(job: tuple[KernelSpec, str, Path]) -> Row:
    spec, arch, directory = job
    compiled = cubin(spec, arch, directory)
    if compiled.path is None:
        raise OSError(f"{directory} cannot be written: make room, or give another directory with --out")
    return Row(spec, arch, compiled.usage[spec.entry], compiled.compile_ms)


HEADER = (
    f"{'kernel':<76} {'arch':>5} {'regs':>5} {'stack':>6} {'spills':>7} {'smem':>7} "
    f"{'blocks':>6} {'occupancy':>9} {'limited by':<13} {'ms':>6}"
)


def format_row(row: Row) -> str:
    used, held = row.usage, occupancy(row.spec, row.usage, row.arch)
    shared_memory = used.shared_memory + row.spec.dynamic_shared_memory
    return (
        f"{row.spec!s:<76} {row.arch:>5} {used.registers:>5} {used.stack:>6} "
        f"{used.spill_stores + used.spill_loads:>7} {shared_memory:>7} "
        f"{held.blocks:>6} {held.share:>9.0%} {held.limit:<13} {row.compile_ms:>6.0f}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Compile the kernels, print the table, and return 1 if one is unfit to ship."""
    parser = argparse.ArgumentParser(prog="python -m cupaged.compile", description="Compile the kernels.")
    parser.add_argument("--arch", action="append", help=f"as 90a; repeatable (default: {' '.join(ARCHS)})")
    parser.add_argument("--out", type=Path, help="the CUPAGED_CACHE_DIR to fill (default: this user's)")
    parser.add_argument(
        "--all",
        action="store_true",
        help="also the rare ones, which are compiled when they are met",
    )
    parser.add_argument("--only", default="", help="only kernels whose name contains this")
    parser.add_argument("--jobs", type=int, help="processes (default: one a core)")
    options = parser.parse_args(arguments)
    for arch in options.arch or ():
        if arch.rstrip("af") not in SHARED_MEMORY:
            parser.error(f"--arch {arch} is unknown; it must be one of {', '.join(SHARED_MEMORY)}, or 90a")
    archs = options.arch or ARCHS
    listed = variants
    if options.all:
        from .reachable import reachable as listed  # loads torch, which compiling does without
    work = [(spec, arch) for arch in archs for spec in listed(arch) if options.only in str(spec)]
    if not work:
        parser.error(f"--only {options.only!r} matches no kernel")
    print(HEADER)
    failed = 0
    try:
        for row in compile_all(work, cache_dir(options.out), options.jobs):
            print(format_row(row))
            for complaint in row.complaints():
                failed = 1
                print(f"    {complaint}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return failed
