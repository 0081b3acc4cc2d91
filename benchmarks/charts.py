"""The documentation's charts: horizontal bars as SVG, made from the committed results.

They are written here and not by matplotlib, whose files are ten times as large and differ from version to
version: the same results give the same bytes, which a test compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from .contenders.names import OURS
from .contenders.rates import medians

WIDTH, LABELS, VALUES = 720, 220, 60  # pixels of a chart, of the labels before its bars and the values after
ROW, BAR = 24, 16  # pixels from one bar to the next, and of a bar
COLOUR = "#1f77b4"


@dataclass(frozen=True)
class Bar:
    """One row of a chart.

    Args:
        label: stands before the bar.
        length: None for a heading.
        value: stands after the bar.
    """

    label: str
    length: float | None
    value: str


def speed_up(rows: Sequence[dict[str, Any]], where: str) -> str:
    """Return the chart of dense attention's time over paged attention's.

    Args:
        rows: ``label`` and ``speed_up`` of each.
        where: the hardware.
    """
    bars = [Bar(row["label"], row["speed_up"], f"{row['speed_up']:.1f}x") for row in rows]
    return svg(f"Paged attention's speed over dense attention's: bfloat16, {where}", bars, mark=1.0)


def throughput(run: dict[str, Any]) -> str:
    """Return the chart of each contender's tokens per second, in lengths of ours under the same load."""
    results = run["results"]
    rates = {each["name"]: medians(each) for each in results["runs"]}
    bars = []
    for case in (each["name"] for each in results["cases"]):
        of_case = {name: by_case[case] for name, by_case in rates.items() if case in by_case}
        if not of_case:
            continue
        unit = of_case.get(OURS) or max(of_case.values())
        bars.append(Bar(case, None, ""))
        bars += [Bar(name, rate / unit, f"{rate:,.0f}") for name, rate in of_case.items()]
    title = f"Tokens/s: {results['model']} in {results['dtype']}, {hardware(run)}"
    return svg(title, bars, mark=1.0)


def hardware(run: dict[str, Any]) -> str:
    """Name a run's device; of a CPU with its threads."""
    where = run["environment"]
    if "driver" in where:
        return where["device"]
    threads = where["threads"]
    return f"{threads} thread{'s' * (threads != 1)} of an {where['device']}"


def svg(title: str, bars: Sequence[Bar], mark: float) -> str:
    """Draw bars.

    Args:
        mark: length at which a line is drawn.
    """
    top = 36
    height = top + ROW * len(bars) + 8
    scale = (WIDTH - LABELS - VALUES) / max(bar.length or 0.0 for bar in bars)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img" font-family="sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        "<style>text{fill:#1f2328}line{stroke:#1f2328}"
        "@media(prefers-color-scheme:dark){text{fill:#e6edf3}line{stroke:#e6edf3}}</style>",
        f'<text x="0" y="18" font-size="14">{escape(title)}</text>',
    ]
    for i, bar in enumerate(bars):
        y, x = top + ROW * i, float(LABELS)
        if bar.length is None:
            lines.append(f'<text x="0" y="{y + 13}" font-weight="bold">{escape(bar.label)}</text>')
            continue
        lines.append(f'<text x="{LABELS - 8}" y="{y + 13}" text-anchor="end">{escape(bar.label)}</text>')
        width = bar.length * scale
        lines.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{COLOUR}"/>')
        x += width
        lines.append(f'<text x="{x + 6:.1f}" y="{y + 13}">{escape(bar.value)}</text>')
    x = LABELS + mark * scale
    lines.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 6}" y2="{height - 6}" stroke-dasharray="3 3"/>')
    return "\n".join([*lines, "</svg>", ""])
