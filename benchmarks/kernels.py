"""Check and time the paged kernels on the GPU, or on the CPU without one.

    python benchmarks/kernels.py                   decode and prefill beside dense attention
    python benchmarks/kernels.py --report DIR      every section; JSON, text and plots in DIR
    python benchmarks/kernels.py --section memory  one section (repeatable; --list names them)

Every timed call is checked first: its error against float64 may be twice that of plain torch at the same
dtype, plus 1e-5. No time is printed for a wrong result, and none at all if section `check` fails; the exit
status is then 1. On a GPU the whole report takes less than 8 minutes: each section has a budget and lists
what it left out.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import asdict
from pathlib import Path

if not __package__:  # run as a script: import from the checkout's root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks import common, plots, tables
from benchmarks.report import Context, Result, reason, run_section
from benchmarks.sections import SECTIONS

REPORT_S = 460.0  # budget of all sections on a GPU; the plots take the rest of the 8 minutes
DEFAULT = ("decode", "prefill")


def main(arguments: list[str] | None = None) -> int:
    """Run the sections; return 1 if a result is wrong."""
    options = _options(arguments)
    if options.list:
        for section in SECTIONS:
            print(f"{section.name:<9} {section.title}")
        return 0
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    layouts = ("block", "layer") if options.layout == "both" else (options.layout,)
    context = Context(device, options.quick, layouts, seed)
    names = options.section or ([s.name for s in SECTIONS] if options.report else DEFAULT)
    end = time.perf_counter() + REPORT_S
    if context.on_gpu:
        _compile_ahead(device)
    results: dict[str, Result] = {}
    for section in SECTIONS:
        if section.name not in names:
            continue
        print(f"\n{section.name}: {section.title} (seed {seed})", flush=True)
        if section.needs_gpu and not context.on_gpu:
            results[section.name] = Result(left_out=["all of it: there is no GPU"])
        elif section.timed and any(result.wrong for name, result in results.items() if name == "check"):
            results[section.name] = Result(left_out=["all of it: no times while check is wrong"])
        else:
            results[section.name] = run_section(section, context, end)
        print("\n".join(tables.lines_of(section.name, results[section.name])), flush=True)
    _write(options, device, seed, results)
    return int(any(result.wrong for result in results.values()))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--report", type=Path, metavar="DIR", help="all sections; results and plots in DIR")
    parser.add_argument(
        "--section", action="append", choices=[s.name for s in SECTIONS], help="only this one"
    )
    parser.add_argument("--list", action="store_true", help="name the sections")
    parser.add_argument("--layout", choices=("block", "layer", "both"), default="both", help="memory section")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a few small shapes")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--seed", type=int, help="of what is drawn (default: a fresh one)")
    parser.add_argument("--commit", help="what is measured, where the checkout is a copy without git")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the JSON alone")
    options = parser.parse_args(arguments)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch finds no GPU; leave it out to run on the CPU")
    return options


def _compile_ahead(device: torch.device) -> None:
    """Compile every kernel in parallel, which takes seconds instead of minutes."""
    from cupaged.backends.cuda import compile as kernel_compiler
    from cupaged.backends.cuda import specs as kernel_specs
    from cupaged.backends.cuda.precompile import compile_all

    start = time.perf_counter()
    arch = kernel_compiler.arch_for_capability(
        *torch.cuda.get_device_capability(device), kernel_compiler.nvrtc_archs()
    )
    work = [(spec, arch) for spec in kernel_specs.variants(arch)]
    try:
        count = len(list(compile_all(work, kernel_compiler.cache_dir())))
    except RuntimeError as error:  # sections that need the kernel will report it
        print(f"not every kernel compiles: {reason(error)}", flush=True)
    else:
        print(f"{count} kernels for sm_{arch} in {time.perf_counter() - start:.1f} s", flush=True)


def _write(options: argparse.Namespace, device: torch.device, seed: int, results: dict[str, Result]) -> None:
    environment = common.environment(device)
    if options.commit and environment["commit"] == "unknown":
        environment["commit"] = options.commit
    if folder := options.report or options.out:
        sections = {name: asdict(result) for name, result in results.items()}
        path = common.write(
            folder, common.result_name("kernels", device), environment, {"sections": sections}
        )
        print(f"\nwritten: {path.name}")
    if options.report:
        drawn = plots.draw(options.report, environment, results)
        print("plots: " + (", ".join(p.name for p in drawn) if drawn else "none, matplotlib is missing"))
    print("\n" + "\n".join(tables.summary(environment, results)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
