"""The documentation's tables and charts, made from the committed results.

    python benchmarks/readme_table.py          rewrite them
    python benchmarks/readme_table.py --check  exit with 1 if they are not what the results say

A table stands between `<!-- NAME.json -->` and `<!-- end -->`, for a file NAME.json in `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if not __package__:  # as a script: what is imported is the checkout, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import charts
from benchmarks.contenders import rates as rates_of
from benchmarks.evaluation import tables
from benchmarks.markdown import header, line

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks/results")
DOCUMENTS = ("docs/benchmarks.md", "docs/paper.md")
REGION = re.compile(r"(<!-- ([\w-]+\.json) -->\n).*?(<!-- end -->)", re.DOTALL)
DTYPE = "bfloat16"
KERNELS, THROUGHPUT = "kernels-cpu", "throughput-cpu"
Run = dict[str, Any]


def documents(root: Path = ROOT) -> Iterator[tuple[Path, str]]:
    """Yield every file that is made from results, in whole or in part, and the text it must have."""
    for name in DOCUMENTS:
        yield root / name, filled(root, root / name)
    kernels = _run(root, KERNELS)
    rows = [{"label": _label(row), "speed_up": _speed_up(row)} for row in _compared_rows(kernels)]
    yield root / "docs" / "throughput.svg", charts.throughput(_run(root, THROUGHPUT))
    yield root / "docs" / "speed.svg", charts.speed_up(rows, charts.hardware(kernels))


def filled(root: Path, document: Path) -> str:
    """Return a document's text with every region made anew."""

    def region(match: re.Match[str]) -> str:
        link = Path(os.path.relpath(root / RESULTS / match[2], document.parent)).as_posix()
        name = match[2].removesuffix(".json")
        if (root / RESULTS / match[2]).is_file():
            table = next(table for start, table in TABLES.items() if name.startswith(start))
            lines = table(_run(root, name), f"[{match[2]}]({link})")
        else:
            lines = iter(["Not measured yet."])
        return match[1] + "\n".join(lines) + "\n" + match[3]

    return REGION.sub(region, document.read_text())


def _run(root: Path, name: str) -> Run:
    return json.loads((root / RESULTS / f"{name}.json").read_text())


# -- kernels -----------------------------------------------------------------------------------------


def kernels_table(run: Run, link: str) -> Iterator[str]:
    """Yield where the run was made, and a line for every plain shape in `DTYPE`."""
    where = run["environment"]
    rows = _attention_rows(run)
    copy = next(row["copy_bytes_per_s"] for row in rows)
    versions = where["versions"]
    parts = [charts.hardware(run)]
    if "driver" in where:
        parts += [f"driver {where['driver']}", f"NVRTC {where['nvrtc']}"]
    parts += [f"{package} {versions[package]}" for package in ("torch", "numba") if package in versions]
    yield (
        f"{', '.join(parts)}; a large copy reads and writes {copy / 1e9:,.0f} GB/s there together, "
        f"decode's GB/s are of keys and values read ({link})."
    )
    yield ""
    peer = any(_best(row, "flashinfer") for row in rows)
    titles = ["", "sequences x context", "query/KV heads x size", "paged us", "", "dense us", "speed-up"]
    yield from header(*titles, *(["FlashInfer us"] if peer else []))
    for row in rows:
        yield line(*_cells(row, peer))


def _attention_rows(run: Run) -> list[Run]:
    sections = run["results"]["sections"]
    return [row for part in ("decode", "prefill") for row in sections[part]["rows"] if _shown(row)]


def _compared_rows(run: Run) -> list[Run]:
    return [row for row in _attention_rows(run) if _best(row, "sdpa")]


def _shown(row: Run) -> bool:
    plain = row.get("block_size", 16) == 16 and not row.get("cache_dtype") and not row.get("shared_prefix")
    return plain and row["dtype"] == DTYPE and "cupaged" in row["seconds"]


def _kind(row: Run) -> str:
    return "decode" if row["query_tokens"] == 1 else f"prefill {row['query_tokens']}"


def _heads(row: Run) -> str:
    return f"{row['num_heads']}/{row['num_kv_heads']} x {row['head_size']}"


def _label(row: Run) -> str:
    return f"{_kind(row)}, {row['num_seqs']} x {row['context']}, {_heads(row)}"


def _speed_up(row: Run) -> float:
    """Divide dense attention's time by ours."""
    return (_best(row, "sdpa") or 0.0) / row["seconds"]["cupaged"]


def _cells(row: Run, peer: bool) -> Iterator[str]:
    ours, dense = row["seconds"]["cupaged"], _best(row, "sdpa")
    yield _kind(row)
    yield f"{row['num_seqs']} x {row['context']}"
    yield _heads(row)
    yield f"{ours * 1e6:,.0f}"
    decode = row["query_tokens"] == 1
    yield f"{row['bytes'] / ours / 1e9:,.1f} GB/s" if decode else f"{row['flop'] / ours / 1e9:,.0f} GFLOP/s"
    yield f"{dense * 1e6:,.0f}" if dense else ""
    yield f"{_speed_up(row):.1f}x" if dense else ""
    if peer:
        other = _best(row, "flashinfer")
        yield f"{other * 1e6:,.0f}" if other else ""


def _best(row: Run, group: str) -> float | None:
    return min((s for name, s in row["seconds"].items() if name.startswith(group)), default=None)


# -- the engine --------------------------------------------------------------------------------------


def throughput_table(run: Run, link: str) -> Iterator[str]:
    """Yield a line for each contender: its tokens per second, and the ratio of ours to it."""
    results, runs = run["results"], run["results"]["runs"]
    cases = [case["name"] for case in results["cases"]]
    tokens = next(case["new_tokens"] for case in results["cases"] if case["kind"] == "requests")
    yield (
        f"Tokens/s with {results['model']} in {results['dtype']}, {tokens} new tokens a request, on "
        f"{charts.hardware(run)}; in brackets cupaged's rate over it, for `-http` cupaged-http's, for "
        f"cupaged-http its rate over cupaged's ({link})."
    )
    yield ""
    yield from header("", *cases)
    for each in runs:
        rates = rates_of.medians(each)
        cells = []
        for case in cases:
            ratio = rates_of.ratio(runs, each, case)
            times = "" if ratio is None else f" ({ratio:.2f}x)"
            cells.append(f"{rates[case]:,.0f}{times}" if case in rates else "")
        yield line(each["name"], *cells)


def scheduler_table(run: Run, link: str) -> Iterator[str]:
    results = run["results"]
    size = results["block_size"]
    yield (
        f"{results['seqs']} running sequences, blocks of {size} tokens, one thread of an "
        f"{run['environment']['device']} ({link})."
    )
    yield ""
    yield from header(
        "load", "sequences", "blocks", "prefix cache", "us a sequence", "us to gather its block table"
    )
    for row in results["rows"]:
        yield line(
            row["load"],
            row["sequences"],
            f"{row['num_blocks']:,}",
            "on" if row["caching"] else "off",
            f"{row['us_per_seq']:.1f}",
            f"{row['gather_us_per_seq']:.1f}",
        )


TABLES: dict[str, Callable[[Run, str], Iterator[str]]] = {  # by the beginning of the file's name
    "kernels": kernels_table,
    "throughput": throughput_table,
    "scheduler": scheduler_table,
    "paper-memory": tables.memory_tables,
    "paper-rates": tables.rates_table,
    "paper-block-size": tables.block_size_table,
    "paper-preemption": tables.preemption_table,
    "allocators": tables.allocators_table,
    "paper-policies": tables.policies_tables,
    "capacity": tables.capacity_table,
}


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    changed = 0
    for path, text in documents(root):
        if path.is_file() and path.read_text() == text:
            continue
        if options.check:
            print(f"{path.name} is not what {RESULTS} says: python benchmarks/readme_table.py")
            changed = 1
        else:
            path.write_text(text)
    return changed


if __name__ == "__main__":
    sys.exit(main())
