"""Format results as text: a table per section, and the summary that is printed last."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .bars import BARS, ratios
from .problems import Case
from .report import Result, Row

CASE_FIELDS = tuple(Case.__dataclass_fields__)
SHOWN_FAILURES = 20


def case_of(row: Row) -> Case:
    return Case(**{name: row[name] for name in CASE_FIELDS if name in row})


def lines_of(name: str, result: Result) -> Iterator[str]:
    """Yield the lines of a section's table, then its notes, what it left out and what was wrong."""
    if result.rows:
        yield from FORMATS[name](result.rows)
    yield from result.notes
    if result.left_out:
        shown = "; ".join(result.left_out[:SHOWN_FAILURES])
        more = len(result.left_out) - SHOWN_FAILURES
        yield f"left out: {shown}" + (f"; and {more} more" if more > 0 else "")
    for text in result.wrong[:SHOWN_FAILURES]:
        yield f"WRONG: {text}"
    if len(result.wrong) > SHOWN_FAILURES:
        yield f"WRONG: and {len(result.wrong) - SHOWN_FAILURES} more"


def _checks(rows: list[Row]) -> Iterator[str]:
    return iter(())  # the notes have their number, and failures are listed


def _ceilings(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        if "flop_per_s" in row:
            yield f"{row['name']:<20} {row['flop_per_s'] / 1e12:>8.2f} TFLOP/s"
        else:
            yield f"{row['name']:<20} {row['bytes_per_s'] / 1e9:>8.1f} GB/s"


def _decode(rows: list[Row]) -> Iterator[str]:
    yield f"{'case':<56} {'us':>9} {'GB/s':>7} {'of copy':>8}  others, in our time"
    for row in rows:
        yield _line(row, lambda row, s: f"{row['bytes'] / s / 1e9:>7.1f} {_ratio(row, 'of_copy')}")


def _prefill(rows: list[Row]) -> Iterator[str]:
    yield f"{'case':<56} {'us':>9} {'TFLOP/s':>9}  others, in our time"
    for row in rows:
        yield _line(row, lambda row, s: f"{row['flop'] / s / 1e12:>9.3f}")


def _line(row: Row, rate: Callable[[Row, float], str]) -> str:
    head = f"{case_of(row)!s:<56}"
    if "cupaged" not in row["seconds"]:
        return f"{head} WRONG: {row.get('wrong', 'not measured')}"
    ours = row["seconds"]["cupaged"]
    return f"{head} {ours * 1e6:>9.1f} {rate(row, ours)}  {_others(row, ours)}"


def _others(row: Row, ours: float) -> str:
    others = [f"{name} {s / ours:.2f}x" for name, s in row["seconds"].items() if name != "cupaged"]
    others += [f"{name} failed: {why[:48]}" for name, why in row["failed"].items()]
    return ", ".join(others)


def _ratio(row: Row, name: str) -> str:
    value = ratios(row).get(name)
    return f"{value:>8.2f}" if value is not None else f"{'':>8}"


def _memory(rows: list[Row]) -> Iterator[str]:
    yield f"{'what':<52} {'us':>10} {'GB/s':>8} {'of':>5} the ceiling"
    for row in rows:
        size = f"{row['block_bytes'] >> 10} KB blocks" if "block_bytes" in row else ""
        size = size or (f"{row['tokens']} tokens" if "tokens" in row else row["case"])
        head = f"{row['name']:<18} {size:<33}"
        if "wrong" in row:
            yield f"{head} WRONG: {row['wrong']}"
            continue
        ceiling = "of_pinned" if "of_pinned" in row else "of_copy"
        seconds = row["seconds"]
        yield (
            f"{head} {seconds * 1e6:>10.1f} {row['bytes'] / seconds / 1e9:>8.1f} {row[ceiling]:>5.2f} "
            f"{ceiling.removeprefix('of_')}"
            + "".join(f", {way} {row['bytes'] / s / 1e9:.1f} GB/s" for way, s in row.get("ways", {}).items())
        )


def _sampling(rows: list[Row]) -> Iterator[str]:
    yield f"{'sample':<34} {'us':>9}  others, in our time"
    for row in rows:
        if "cupaged" not in row["seconds"]:
            yield f"{row['case']:<34} WRONG: {row.get('wrong', 'not measured')}"
            continue
        ours = row["seconds"]["cupaged"]
        yield f"{row['case']:<34} {ours * 1e6:>9.1f}  {_others(row, ours)}"


def _latent(rows: list[Row]) -> Iterator[str]:
    yield f"{'latent attention':<48} {'us':>9} {'GB/s':>7} {'TFLOP/s':>8}  others, in our time"
    for row in rows:
        if "cupaged" not in row["seconds"]:
            yield f"{row['case']:<48} WRONG: {row.get('wrong', 'not measured')}"
            continue
        ours = row["seconds"]["cupaged"]
        rates = f"{row['bytes'] / ours / 1e9:>7.1f} {row['flop'] / ours / 1e12:>8.2f}"
        yield f"{row['case']:<48} {ours * 1e6:>9.1f} {rates}  {_others(row, ours)}"


def _mixed(rows: list[Row]) -> Iterator[str]:
    yield f"{'decodes and chunks':<44} {'us':>10} {'decodes':>10} {'chunks':>10}  parts over the whole"
    for row in rows:
        if "of_parts" not in row:
            yield f"{row['name']:<44} WRONG: {row.get('wrong', 'not measured')}"
            continue
        times = "".join(f" {row['seconds'][name] * 1e6:>10.1f}" for name in ("mixed", "decodes", "chunks"))
        yield f"{row['name']:<44}{times}  {row['of_parts']:.2f}"


def _engine(rows: list[Row]) -> Iterator[str]:
    yield f"{'model':<7}{'graphs':<8}{'overlap':<9}step in ms, and tokens/s, by number of requests"
    for row in rows:
        steps = row.get("seconds", {})
        times = [f"{count}: {s * 1e3:.2f} ({int(count) / s:.0f})" for count, s in steps.items()]
        on = ["on" if row[name] else "off" for name in ("graphs", "overlap")]
        yield f"{row['name']:<7}{on[0]:<8}{on[1]:<9}{', '.join(times) or 'WRONG: not measured'}"


def _host(rows: list[Row]) -> Iterator[str]:
    depths = ("dispatched", "call", "backend", "launches")
    yield f"{'host us of':<20}" + "".join(f"{depth:>11}" for depth in depths)
    for row in rows:
        times = "".join(f"{row['seconds'][depth] * 1e6:>11.1f}" for depth in depths)
        yield f"{row['name']:<20}{times} ({row['launches']})"


FORMATS: dict[str, Callable[[list[Row]], Iterator[str]]] = {
    "check": _checks,
    "ceilings": _ceilings,
    "decode": _decode,
    "prefill": _prefill,
    "latent": _latent,
    "mixed": _mixed,
    "memory": _memory,
    "fused": _memory,
    "sampling": _sampling,
    "engine": _engine,
    "host": _host,
}


def summary(environment: dict, results: dict[str, Result]) -> Iterator[str]:
    """Yield the last lines: environment, state of each section, ceilings, and each bar with its value."""
    versions = " ".join(f"{k} {v}" for k, v in environment["versions"].items())
    yield f"{environment['device']}, driver {environment.get('driver', 'none')}; {versions}"
    yield f"commit {environment['commit']}{' (modified)' if environment['modified'] else ''}"
    for name, result in results.items():
        state = f"{len(result.wrong)} WRONG" if result.wrong else "right"
        left = f", {len(result.left_out)} left out" if result.left_out else ""
        yield f"  {name:<9} {result.seconds:>6.1f} s  {len(result.rows):>4} rows, {state}{left}"
    if "ceilings" in results:
        yield from _ceilings(results["ceilings"].rows)
    measured = [(bar, bar.measure(results)) for bar in BARS if "driver" in environment]  # bars are for GPUs
    if any(value is not None for _, value in measured):
        yield f"{'bar':<64} {'at least':>8} {'measured':>8}"
        for bar, value in measured:
            if value is not None:
                verdict = "met" if value >= bar.target else "MISSED"
                yield f"{bar.name:<64} {bar.target:>8.2f} {value:>8.2f} {verdict}"
