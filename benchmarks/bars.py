"""The bars that the kernels have to meet on a GPU, as ratios within one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from .report import Result, Row


def ratios(row: Row) -> dict[str, float]:
    """Return the ratios of a decode or prefill row: bandwidth over a copy's, and others' times over ours."""
    seconds = row["seconds"]
    if "cupaged" not in seconds:
        return {}
    ours = seconds["cupaged"]
    # On Hopper the kernel for earlier generations is timed as well.
    by_name = {"mma_tflop_per_s": row["flop"] / seconds.get("cupaged mma.sync", ours) / 1e12}
    if row.get("copy_bytes_per_s"):
        by_name["of_copy"] = row["bytes"] / ours / row["copy_bytes_per_s"]
    for group in ("sdpa", "flashinfer"):
        times = [s for name, s in seconds.items() if name.startswith(group)]
        if times:
            by_name[group] = min(times) / ours
    return by_name


@dataclass(frozen=True)
class Bar:
    """A bar: ``measure`` returns the worst ratio of the rows it applies to, None if there are none."""

    name: str
    target: float
    measure: Callable[[dict[str, Result]], float | None]


def _plain(row: Row) -> bool:
    return row["cache_dtype"] is None and not row["shared_prefix"] and row["query_tokens"] == 1


def _worst(
    section: str, ratio: str, *conditions: Callable[[Row], bool]
) -> Callable[[dict[str, Result]], float | None]:
    def measure(results: dict[str, Result]) -> float | None:
        rows = results[section].rows if section in results else []
        chosen = [ratios(row) for row in rows if all(condition(row) for condition in conditions)]
        return min((r[ratio] for r in chosen if ratio in r), default=None)

    return measure


_decode = partial(_worst, "decode")
_prefill = partial(_worst, "prefill")


def _group(row: Row) -> int:
    return row["num_heads"] // row["num_kv_heads"]


def _known(row: Row) -> bool:
    """Return whether a row has the shape for which rates of other kernels are published."""
    shape = (row["num_seqs"], row["query_tokens"], row["context"], _group(row), row["head_size"])
    return shape == (32, 4096, 4096, 1, 128) and row["block_size"] == 16 and row["cache_dtype"] is None


def _large(row: Row) -> bool:
    return row["num_seqs"] >= 32 and row["context"] >= 4096 and row["block_size"] == 16


def _page_sizes(section: str, results: dict[str, Result]) -> float | None:
    """Return the worst ratio, over shapes, of the rate at the slowest page size to that at the fastest."""
    by_shape: dict[tuple, list[float]] = {}
    names = ("dtype", "num_seqs", "query_tokens", "context", "num_heads", "num_kv_heads", "head_size")
    for row in results[section].rows if section in results else []:
        plain = _plain(row) or (section == "prefill" and row["cache_dtype"] is None)
        if plain and "cupaged" in row["seconds"]:
            by_shape.setdefault(tuple(row[k] for k in names), []).append(row["seconds"]["cupaged"])
    return min((min(times) / max(times) for times in by_shape.values() if len(times) > 1), default=None)


def _quantised(results: dict[str, Result]) -> float | None:
    """Return the worst ratio of the time over a bf16 cache to that over an fp8 cache, at long context."""
    times: dict[tuple, dict[str | None, float]] = {}
    for row in results["decode"].rows if "decode" in results else []:
        plain = row["query_tokens"] == 1 and not row["shared_prefix"] and row["block_size"] == 16
        if plain and row["dtype"] == "bfloat16" and row["context"] >= 8192 and "cupaged" in row["seconds"]:
            shape = tuple(row[k] for k in ("num_seqs", "context", "num_heads", "num_kv_heads", "head_size"))
            times.setdefault(shape, {})[row["cache_dtype"]] = row["seconds"]["cupaged"]
    speedups = [
        by_dtype[None] / s
        for by_dtype in times.values()
        for name, s in by_dtype.items()
        if None in by_dtype and name and name.startswith("float8")
    ]
    return min(speedups, default=None)


def _mixed(results: dict[str, Result]) -> float | None:
    rows = results["mixed"].rows if "mixed" in results else []
    return min((row["of_parts"] for row in rows if "of_parts" in row), default=None)


def _memory(
    name: str, ratio: str, condition: Callable[[Row], bool], section: str = "memory"
) -> Callable[[dict[str, Result]], float | None]:
    def measure(results: dict[str, Result]) -> float | None:
        rows = results[section].rows if section in results else []
        chosen = [row for row in rows if row["name"].startswith(name) and ratio in row and condition(row)]
        return min((row[ratio] for row in chosen), default=None)

    return measure


BARS = (
    Bar(
        "decode, GQA 4 to 8, >= 32 x >= 4k, page 16: of copy",
        0.90,
        _decode("of_copy", _plain, _large, lambda row: 4 <= _group(row) <= 8),
    ),
    Bar(
        "decode, MHA, >= 32 x >= 4k, page 16: of copy",
        0.90,
        _decode("of_copy", _plain, _large, lambda row: _group(row) == 1),
    ),
    Bar(
        "decode, 1 x 64k: of copy",
        0.80,
        _decode("of_copy", _plain, lambda row: row["num_seqs"] == 1 and row["context"] >= 65536),
    ),
    Bar("decode, page sizes 16 to 128: slowest over fastest", 0.97, partial(_page_sizes, "decode")),
    Bar("decode: dense SDPA's time over ours", 1.0, _decode("sdpa")),
    Bar("decode: FlashInfer's time over ours", 1.0, _decode("flashinfer")),
    Bar("decode, >= 8k: bf16 cache's time over fp8's", 1.6, _quantised),
    Bar("prefill on mma.sync, 32 x 4k, MHA of size 128: TFLOP/s", 320.0, _prefill("mma_tflop_per_s", _known)),
    Bar("prefill, page sizes 16 to 128: slowest over fastest", 0.90, partial(_page_sizes, "prefill")),
    Bar("prefill: dense SDPA's time over ours", 0.95, _prefill("sdpa")),
    Bar("prefill: FlashInfer's time over ours", 1.0, _prefill("flashinfer")),
    Bar("chunks and decodes in one call: their time alone over it", 0.95, _mixed),
    Bar(
        "copy_blocks, >= 64 MB: of copy",
        0.90,
        _memory("copy_blocks", "of_copy", lambda row: row["bytes"] >= 64 << 20),
    ),
    Bar(
        "reshape_and_cache, >= 64 MB: of copy",
        0.90,
        _memory("reshape_and_cache", "of_copy", lambda row: row["bytes"] >= 64 << 20),
    ),
    *(
        Bar(
            f"{name}, >= 64 MB: of copy",
            0.85,
            _memory(name, "of_copy", lambda row: row["bytes"] >= 64 << 20, "fused"),
        )
        for name in ("rms_norm", "act_and_mul", "rope_and_cache")
    ),
    Bar(
        "swap_blocks, 2 MB blocks: of a pinned copy",
        0.90,
        _memory("swap_blocks", "of_pinned", lambda row: row["block_bytes"] == 2 << 20),
    ),
    Bar(
        "swap_blocks, 32 KB blocks: of a pinned copy",
        0.50,
        _memory("swap_blocks", "of_pinned", lambda row: row["block_bytes"] == 32 << 10),
    ),
)
