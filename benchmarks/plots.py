"""Draw PNG plots of a report, if matplotlib is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .report import Result, Row

COLOURS = {"cupaged": "C3", "flashinfer": "C0", "flashinfer tc": "C9", "flex": "C2"}


def draw(folder: Path, environment: dict[str, Any], results: dict[str, Result]) -> list[Path]:
    """Write the plots for which there are results, and return their files; none without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    files = []
    for name, plot in PLOTS.items():
        figure, axes = pyplot.subplots(figsize=(9, 5))
        if plot(axes, results):
            axes.set_title(f"{axes.get_title()}\n{environment['device']}, {environment['date']}", fontsize=10)
            axes.legend(fontsize=7)
            axes.grid(axis="y", alpha=0.3)
            figure.tight_layout()
            figure.savefig(folder / f"{name}.png", dpi=110)
            files.append(folder / f"{name}.png")
        pyplot.close(figure)
    return files


def _rows(results: dict[str, Result], section: str) -> list[Row]:
    return results[section].rows if section in results else []


def _decode(axes, results: dict[str, Result]) -> bool:
    """Plot the bandwidth of every shape as a group of bars."""
    rows = [row for row in _rows(results, "decode") if _plain(row)]
    rows = [row for row in rows if "cupaged" in row["seconds"]][:12]
    axes.set_title("Decode: keys and values read")
    axes.set_ylabel("GB/s")
    if rows:
        axes.axhline(rows[0]["copy_bytes_per_s"] / 1e9, color="grey", linestyle="--", label="copy")
    return _bars(axes, rows, lambda row, s: row["bytes"] / s / 1e9, _shape)


def _prefill(axes, results: dict[str, Result]) -> bool:
    rows = [row for row in _rows(results, "prefill") if "cupaged" in row["seconds"]][:12]
    axes.set_title("Prefill")
    axes.set_ylabel("TFLOP/s")
    return _bars(
        axes, rows, lambda row, s: row["flop"] / s / 1e12, lambda r: f"{r['query_tokens']} q\n{_shape(r)}"
    )


def _blocks(axes, results: dict[str, Result]) -> bool:
    """Plot the rates of copy_blocks and swap_blocks by block size."""
    series: dict[str, list[tuple[int, float]]] = {}
    for row in _rows(results, "memory"):
        if "block_bytes" in row and "seconds" in row:
            rate = row.get("of_pinned", row.get("of_copy", 0.0))
            series.setdefault(row["name"], []).append((row["block_bytes"], rate))
            for way, seconds in row.get("ways", {}).items():
                point = (row["block_bytes"], rate * row["seconds"] / seconds)
                series.setdefault(f"{row['name']}, {way}", []).append(point)
    for name, points in series.items():
        axes.plot(*zip(*sorted(points)), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bytes of a block")
    axes.set_ylabel("of a plain copy of as many bytes")
    axes.set_title("Copying and swapping blocks")
    return bool(series)


def _bars(axes, rows: list[Row], rate: Callable[[Row, float], float], label: Callable[[Row], str]) -> bool:
    names = list(dict.fromkeys(name for row in rows for name in row["seconds"]))
    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        points = [
            (x, rate(row, row["seconds"][name])) for x, row in enumerate(rows) if name in row["seconds"]
        ]
        xs, ys = zip(*points)
        axes.bar(
            [x + (i - len(names) / 2) * width for x in xs], ys, width, label=name, color=COLOURS.get(name)
        )
    axes.set_xticks(range(len(rows)), [label(row) for row in rows], fontsize=6)
    return bool(rows)


def _plain(row: Row) -> bool:
    return not row["cache_dtype"] and not row["shared_prefix"] and row["query_tokens"] == 1


def _shape(row: Row) -> str:
    heads = f"{row['num_heads']}/{row['num_kv_heads']}x{row['head_size']}"
    return f"{row['num_seqs']} x {row['context']}\n{heads}\n{row['dtype']}, page {row['block_size']}"


PLOTS: dict[str, Callable[[Any, dict[str, Result]], bool]] = {
    "decode": _decode,
    "prefill": _prefill,
    "blocks": _blocks,
}
