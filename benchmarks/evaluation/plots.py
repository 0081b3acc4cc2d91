"""Draw the figures from the results of `benchmarks/paper.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from .memory import KINDS

COLOURS = {
    "paged": "C3",
    "Orca (Oracle)": "C0",
    "Orca (Pow2)": "C9",
    "Orca (Max)": "C2",
    "FasterTransformer": "C7",
}
SLOT_COLOURS = ("C0", "C1", "C3", "C7")  # of `KINDS`
PAPER = {"marker": "D", "color": "black", "linestyle": "", "markersize": 5, "label": "paper"}
Results = dict[str, Any]


def draw(results: Results, target: Path) -> Path:
    """Draw the plot of a part of the evaluation, and return its file."""
    panels = PANELS[target.stem]
    figure, axes = pyplot.subplots(
        -(-len(panels) // 2), 2, figsize=(10, 3.6 * -(-len(panels) // 2)), squeeze=False
    )
    for panel, place in zip(panels, axes.flat):
        panel(place, results)
        place.grid(alpha=0.3)
        place.set_axisbelow(True)
        if place.get_legend_handles_labels()[0]:
            place.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(target, dpi=90, metadata={"Software": None})
    pyplot.close(figure)
    return target


# -- memory ------------------------------------------------------------------------------------------


def _use(axes: Any, results: Results) -> None:
    rows = [
        row
        for row in results["policies"]
        if row["load"] == "ShareGPT" and row["system"] != "FasterTransformer"
    ]
    bottoms = [0.0] * len(rows)
    for (kind, label), colour in zip(KINDS.items(), SLOT_COLOURS):
        heights = [100 * row[kind] for row in rows]
        axes.bar(range(len(rows)), heights, 0.6, bottoms, color=colour, label=label)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights)]
    axes.plot(range(len(rows)), [100 * row["published"] for row in rows], **PAPER)
    axes.set_xticks(range(len(rows)), [row["system"] for row in rows], fontsize=8)
    axes.set(title="Figure 2: slots of the KV cache, ShareGPT", ylabel="%", ylim=(0, 140))


def _running(axes: Any, results: Results) -> None:
    rows = [row for row in results["policies"] if row["published_running"]]
    axes.bar(
        range(len(rows)),
        [row["running"] for row in rows],
        0.6,
        color=[COLOURS[row["system"]] for row in rows],
    )
    axes.plot(range(len(rows)), [row["published_running"] for row in rows], **PAPER)
    labels = [f"{row['system']}\n{row['load']}" for row in rows]
    axes.set_xticks(range(len(rows)), labels, fontsize=6, rotation=30)
    axes.set(title="Figure 13: requests that run at once", yscale="log")


def _sharing(decoding: str, width: str, title: str) -> Callable[[Any, Results], None]:
    def panel(axes: Any, results: Results) -> None:
        rows = results[decoding]
        colours = ["C0" if row["load"] == "ShareGPT" else "C1" for row in rows]
        axes.bar(range(len(rows)), [100 * row["saved"] for row in rows], 0.6, color=colours)
        known = [(i, 100 * row["published"]) for i, row in enumerate(rows) if row["published"] is not None]
        axes.plot(*zip(*known), **PAPER)
        axes.set_xticks(range(len(rows)), [f"{row['load']}\n{row[width]}" for row in rows], fontsize=7)
        axes.set(title=f"Figure 15: memory saved by {title}", ylabel="%")

    return panel


# -- rates -------------------------------------------------------------------------------------------


def _latency(load: str) -> Callable[[Any, Results], None]:
    def panel(axes: Any, results: Results) -> None:
        limit = results["latency_s"]
        for row in results["rows"]:
            if row["case"] == load:
                points = zip(*row["points"])
                axes.plot(*points, marker=".", label=row["system"], color=COLOURS[row["system"]])
        axes.axhline(limit, color="grey", linewidth=0.8, linestyle="--")
        axes.set(
            title=f"Figure 12: {load}",
            xlabel="requests per second",
            ylabel="seconds per output token",
            xscale="log",
            ylim=(0, 4 * limit),
        )

    return panel


def _ratios(figures: tuple[str, ...], title: str) -> Callable[[Any, Results], None]:
    def panel(axes: Any, results: Results) -> None:
        rows = [row for row in results["rows"] if row["figure"] in figures and row["system"] != "paged"]
        axes.barh(
            range(len(rows)), [row["ratio"] for row in rows], color=[COLOURS[row["system"]] for row in rows]
        )
        known = [(value, i) for i, row in enumerate(rows) for value in row["published"]]
        if known:
            axes.plot(*zip(*known), **PAPER)
        labels = [f"{row['case']}: {row['system']}" for row in rows]
        axes.set_yticks(range(len(rows)), labels, fontsize=6)
        axes.invert_yaxis()
        axes.set(title=title, xlabel="requests/s of paged memory over the system's")

    return panel


# -- blocks ------------------------------------------------------------------------------------------


def _lines(
    title: str, ylabel: str, value: str, by: str, factor: float = 1.0
) -> Callable[[Any, Results], None]:
    def panel(axes: Any, results: Results) -> None:
        for name in dict.fromkeys(row[by] for row in results["rows"]):
            points = [(row["block_size"], factor * row[value]) for row in results["rows"] if row[by] == name]
            axes.plot(*zip(*points), marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("symlog" if value == "preemptions" else "log")
        axes.set(title=title, xlabel="tokens of a block", ylabel=ylabel)

    return panel


# -- policies ----------------------------------------------------------------------------------------


def _policies(title: str, value: str) -> Callable[[Any, Results], None]:
    """Return a panel of each policy's value over that of the defaults, a marker for each trace."""

    def panel(axes: Any, results: Results) -> None:
        names: list[str] = []
        for marker, trace in zip("o^sDv", results["traces"]):
            rows = [row for row in results["rows"] if row["trace"] == trace]
            names = [f"{row['kind']}: {row['policy']}" for row in rows[1:]]
            values = [row[value] / rows[0][value] for row in rows[1:]]
            axes.plot(values, range(len(values)), marker=marker, linestyle="", markersize=4, label=trace)
        axes.axvline(1, color="grey", linewidth=0.8)
        axes.set_yticks(range(len(names)), names, fontsize=6)
        axes.invert_yaxis()
        axes.set(title=title, xlabel="over that of the defaults", xscale="log")

    return panel


PANELS: dict[str, list[Callable[[Any, Results], None]]] = {  # by the name of the results
    "paper-memory": [
        _use,
        _running,
        _sharing("parallel_sampling", "n", "parallel sampling"),
        _sharing("beam_search", "beam_width", "beam search"),
    ],
    "paper-rates": [
        _latency("ShareGPT"),
        _latency("Alpaca"),
        _ratios(("12",), "Figure 12: rates at equal latency"),
        _ratios(("14", "16", "17"), "Figures 14, 16, 17: rates at equal latency"),
    ],
    "paper-block-size": [
        _lines("Figure 18: by block size", "seconds per output token", "latency_s", "load"),
        _lines("Preemptions", "number", "preemptions", "load"),
    ],
    "paper-preemption": [
        _lines(
            "Figure 19a: time to preempt and resume a sequence", "milliseconds", "overhead_s", "mode", 1e3
        ),
        _lines("Figure 19b: by block size", "seconds per output token", "latency_s", "mode"),
    ],
    "paper-policies": [
        _policies("Seconds per output token", "normalized_latency_s"),
        _policies("99th percentile of the time to the first token", "ttft_p99_s"),
    ],
}
