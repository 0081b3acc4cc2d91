"""Draw the paper's comparison from the committed results: docs/paper-latency.png.

python benchmarks/paper_plots.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "rates-simulated.json"
COLOURS = {
    "paged": "C3",
    "Orca (Oracle)": "C0",
    "Orca (Pow2)": "C9",
    "Orca (Max)": "C2",
    "FasterTransformer": "C7",
}


def latency(rows: list[dict[str, Any]], limit: float, target: Path) -> Path:
    """Draw normalized latency against request rate, as Figure 12 has it, and return the file's path."""
    loads = list(dict.fromkeys(row["case"] for row in rows if row["figure"] == "12"))
    figure, panels = pyplot.subplots(1, len(loads), figsize=(9, 3.6), squeeze=False)
    for axes, load in zip(panels[0], loads):
        for row in rows:
            if row["case"] == load:
                rates, latencies = zip(*row["points"])
                axes.plot(rates, latencies, marker=".", label=row["system"], color=COLOURS[row["system"]])
        axes.axhline(limit, color="grey", linewidth=0.8, linestyle="--")
        axes.set(
            title=f"{load} (simulated)",
            xlabel="requests per second",
            ylabel="seconds per output token",
            xscale="log",
            ylim=(0, 4 * limit),
        )
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(target, dpi=100, metadata={"Software": None})
    pyplot.close(figure)
    return target


def main() -> int:
    results = json.loads(RESULTS.read_text())["results"]
    print(latency(results["rows"], results["latency_s"], ROOT / "docs" / "paper-latency.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
