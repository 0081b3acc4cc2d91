"""Measure registers, shared memory and spills of every kernel that a call can launch, with NVRTC and no GPU.

    python benchmarks/kernel_resources.py --jobs 4

compiles all kernels that are not in the cache (six thousand, an hour of one core; a stopped run is resumed)
and writes `results/kernel-resources.json`. A row is an architecture and a set of macros without head size;
its columns are lists by head size (null for a kernel that takes any).

    python benchmarks/kernel_resources.py --compiled

compiles nothing: the table has the kernels in the cache, and names those that are not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

if __package__:
    from . import common
else:
    import common

import torch

from cupaged.backends.cuda import compile as kernel_compiler
from cupaged.backends.cuda.occupancy import occupancy
from cupaged.backends.cuda.precompile import Row, compile_all
from cupaged.backends.cuda.reachable import reachable
from cupaged.backends.cuda.specs import ARCHS, KernelSpec

PATH = Path(__file__).parent / "results" / "kernel-resources.json"
COLUMNS = ("registers", "spilled_bytes", "shared_memory", "blocks_per_multiprocessor")
HEAD_SIZE = "head_size"
# Identifies a kernel: entry point, architecture, macros, head size.
Name = tuple[str, str, frozenset[tuple[str, str]], int | None]


def name_of(spec: KernelSpec, arch: str) -> Name:
    """Return the name that identifies a kernel in the table."""
    macros = {name.removeprefix("CUPAGED_").lower(): value for name, value in spec.defines}
    macros = {name: value.removeprefix("CUPAGED_").lower() for name, value in macros.items()}
    head_size = macros.pop(HEAD_SIZE, None)
    return spec.entry, arch, frozenset(macros.items()), None if head_size is None else int(head_size)


def table(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Return the rows of the table: one for all kernels that differ only in their head size."""
    families: dict[tuple[object, ...], dict[str, Any]] = {}
    for row in rows:
        entry, arch, macros, head_size = name_of(row.spec, row.arch)
        empty = {"kernel": entry, "arch": arch, "macros": dict(sorted(macros))}
        empty |= {column: [] for column in (HEAD_SIZE, *COLUMNS)}
        family = families.setdefault((entry, arch, macros), empty)
        usage = row.usage
        values = (
            usage.registers,
            usage.spill_stores + usage.spill_loads,
            usage.shared_memory + row.spec.dynamic_shared_memory,
            occupancy(row.spec, usage, row.arch).blocks,
        )
        for column, value in zip((HEAD_SIZE, *COLUMNS), (head_size, *values)):
            family[column].append(value)
    return list(families.values())


def head_sizes(kernels: Iterable[tuple[KernelSpec, str]]) -> list[dict[str, Any]]:
    """Return rows like those of the table, without the compiler's figures."""
    families: dict[tuple[object, ...], dict[str, Any]] = {}
    for kernel in kernels:
        entry, arch, macros, head_size = name_of(*kernel)
        empty = {"kernel": entry, "arch": arch, "macros": dict(sorted(macros)), HEAD_SIZE: []}
        families.setdefault((entry, arch, macros), empty)[HEAD_SIZE].append(head_size)
    return list(families.values())


def names(families: Iterable[dict[str, Any]]) -> list[Name]:
    """Return the names of a table's kernels."""
    return [
        (family["kernel"], family["arch"], frozenset(family["macros"].items()), head_size)
        for family in families
        for head_size in family[HEAD_SIZE]
    ]


def by_name(families: Sequence[dict[str, Any]]) -> dict[Name, tuple[int, ...]]:
    """Return a table's figures by kernel, in the order of `COLUMNS`."""
    values = (value for family in families for value in zip(*(family[column] for column in COLUMNS)))
    return dict(zip(names(families), values))


def read(path: Path = PATH) -> dict[str, Any]:
    """Return the results of the last run: version of NVRTC, table, and kernels that are not in it."""
    return json.loads(path.read_text())["results"]


def write(rows: Iterable[Row], work: Iterable[tuple[KernelSpec, str]], path: Path = PATH) -> None:
    """Write the table, one row per line, and the kernels of `work` that are not in it."""
    rows, work = list(rows), list(work)
    compiled = {(row.spec, row.arch) for row in rows}
    environment = common.environment(torch.device("cpu"))
    nvrtc = ".".join(map(str, kernel_compiler.nvrtc_version()))
    lines, not_compiled = (
        ",\n".join(f"  {json.dumps(family)}" for family in families)
        for families in (table(rows), head_sizes(kernel for kernel in work if kernel not in compiled))
    )
    coverage = json.dumps({"compiled": len(compiled), "of": len(work)})
    path.write_text(
        f'{{"environment": {json.dumps(environment)},\n "results": {{"nvrtc": "{nvrtc}",\n'
        f' "coverage": {coverage},\n'
        f' "not_compiled": [\n{not_compiled}],\n "kernels": [\n{lines}\n]}}}}\n'
    )


REMEDY = "python benchmarks/kernel_resources.py writes the table anew"


def main(arguments: list[str] | None = None) -> int:
    """Compile every kernel, write the table, and return 1 if a kernel has a complaint, such as spills."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, help="processes (default: one a core)")
    parser.add_argument("--compiled", action="store_true", help="write what is compiled already")
    options = parser.parse_args(arguments)
    work = [(spec, arch) for arch in ARCHS for spec in reachable(arch)]
    rows = []
    todo = [kernel for kernel in work if not options.compiled or kernel_compiler.kept(*kernel)]
    for row in compile_all(todo, kernel_compiler.cache_dir(), options.jobs):
        rows.append(row)
        if len(rows) % 100 == 0:
            print(f"{len(rows)} of {len(todo)}", flush=True)
        for complaint in row.complaints():
            print(f"{row.spec} sm_{row.arch} {complaint}", file=sys.stderr)
    write(rows, work)
    return int(any(row.complaints() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
