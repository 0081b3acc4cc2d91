"""The README's tables of kernels, made from the committed results.

    python benchmarks/readme_table.py          rewrite them
    python benchmarks/readme_table.py --check  exit with 1 if they are not what the results say

A table stands between `<!-- NAME.json -->` and `<!-- end -->`, for a file NAME.json in `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
REGION = re.compile(r"(<!-- ([\w-]+)\.json -->\n).*?(<!-- end -->)", re.DOTALL)
DTYPE = "bfloat16"


def filled(text: str, results: Path = RESULTS) -> str:
    """``text`` with every region made anew."""

    def region(match: re.Match[str]) -> str:
        run = json.loads((results / f"{match[2]}.json").read_text())
        return match[1] + "\n".join(table(match[2], run)) + "\n" + match[3]

    return REGION.sub(region, text)


def table(name: str, run: dict[str, Any]) -> Iterator[str]:
    """Where the run was made, and a line for every plain shape in `DTYPE`."""
    where, sections = run["environment"], run["results"]["sections"]
    rows = [row for part in ("decode", "prefill") for row in sections[part]["rows"] if _shown(row)]
    copy = next(row["copy_bytes_per_s"] for row in rows)
    versions = where["versions"]
    parts = [where["device"]]
    if "driver" in where:
        parts += [f"driver {where['driver']}", f"NVRTC {where['nvrtc']}"]
    else:
        parts.append(f"{where['threads']} threads")
    parts += [f"{package} {versions[package]}" for package in ("torch", "numba") if package in versions]
    yield (
        f"{', '.join(parts)}; a large copy reads and writes {copy / 1e9:,.0f} GB/s there together, "
        "decode's GB/s are of keys and values read "
        f"([benchmarks/results/{name}.json](benchmarks/results/{name}.json))."
    )
    yield ""
    peer = any(_best(row, "flashinfer") for row in rows)
    titles = ["", "sequences x context", "query/KV heads x size", "paged us", "", "dense us", "speed-up"]
    titles += ["FlashInfer us"] if peer else []
    yield "|" + "|".join(f" {title} " if title else " " for title in titles) + "|"
    yield "|" + "---|" * len(titles)
    for row in rows:
        yield "| " + " | ".join(_cells(row, peer)) + " |"


def _shown(row: dict[str, Any]) -> bool:
    plain = row.get("block_size", 16) == 16 and not row.get("cache_dtype") and not row.get("shared_prefix")
    return plain and row["dtype"] == DTYPE and "cupaged" in row["seconds"]


def _cells(row: dict[str, Any], peer: bool) -> Iterator[str]:
    ours, dense = row["seconds"]["cupaged"], _best(row, "sdpa")
    decode = row["query_tokens"] == 1
    yield "decode" if decode else f"prefill {row['query_tokens']}"
    yield f"{row['num_seqs']} x {row['context']}"
    yield f"{row['num_heads']}/{row['num_kv_heads']} x {row['head_size']}"
    yield f"{ours * 1e6:,.0f}"
    yield f"{row['bytes'] / ours / 1e9:,.1f} GB/s" if decode else f"{row['flop'] / ours / 1e9:,.0f} GFLOP/s"
    yield f"{dense * 1e6:,.0f}" if dense else ""
    yield f"{dense / ours:.1f}x" if dense else ""
    if peer:
        other = _best(row, "flashinfer")
        yield f"{other * 1e6:,.0f}" if other else ""


def _best(row: dict[str, Any], group: str) -> float | None:
    return min((s for name, s in row["seconds"].items() if name.startswith(group)), default=None)


def main(arguments: list[str] | None = None, readme: Path = ROOT / "README.md") -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    text = readme.read_text()
    new = filled(text)
    if options.check:
        if new != text:
            print("README.md is not what benchmarks/results says: python benchmarks/readme_table.py")
        return int(new != text)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
