"""The sections decode and prefill: check every shape, then time it and the peers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

from cupaged import checks

from ..peers import Peer, peers
from ..problems import Batch, Case, name_of
from ..report import Context, Row, reason

# Maximum time to prepare a peer in one run of the report, in seconds; one that takes longer is left out.
SETUP_S = 75.0
MAX_KV_BYTES = 12 << 30  # maximum size of a case's cache; there is a dense copy of the same size

LLAMA_8B, LLAMA_70B, MHA = (32, 8, 128), (64, 8, 128), (32, 32, 128)


def decode_cases(context: Context) -> list[Case]:
    """Return the cases in order of importance, because the last ones may not fit the budget."""
    if context.quick:
        return [
            Case("float32", 2, 1, 96, 4, 2, 64),
            Case("bfloat16", 2, 1, 96, 4, 2, 64),
            Case("float32", 2, 3, 90, 4, 2, 64, shared_prefix=32),
        ]
    if not context.on_gpu:
        long = Case("bfloat16", 8, 1, 8192, *LLAMA_8B)
        return [
            *_cpu_cases([(32, 1, 160), (32, 1, 512), (8, 1, 2048), (1, 1, 8192)]),
            *(replace(long, cache_dtype=name) for name in (None, *map(name_of, checks.QUANTISED))),
        ]
    base = Case("bfloat16", 32, 1, 4096, *LLAMA_8B)
    cases = [
        Case("bfloat16", seqs, 1, length, *heads)
        for heads in (LLAMA_8B, LLAMA_70B, MHA)
        for seqs, length in ((32, 4096), (64, 8192), (1, 65536))
    ]
    cases += [replace(base, block_size=size) for size in (32, 64, 128)]
    for dtype in checks.QUANTISED:
        cases += [
            replace(base, num_seqs=seqs, context=length, cache_dtype=name_of(dtype))
            for seqs, length in ((64, 8192), (1, 65536))
        ]
    cases += [replace(base, query_tokens=tokens) for tokens in (2, 4, 8)]
    cases += [
        Case("bfloat16", 64, 1, 8192, *heads, shared_prefix=7168) for heads in (LLAMA_8B, LLAMA_70B, MHA)
    ]
    cases += [replace(base, head_size=size) for size in (64, 256)]
    cases.append(replace(base, dtype="float16"))
    shapes = [(1, 512), (1, 4096), (8, 512), (8, 16384), (32, 512), (32, 16384)]
    shapes += [(128, 512), (128, 4096), (256, 512), (256, 4096), (8, 65536), (128, 16384)]
    grid = [
        Case("bfloat16", seqs, 1, length, *heads)
        for seqs, length in shapes
        for heads in (LLAMA_8B, LLAMA_70B, MHA)
    ]
    return cases + [case for case in grid if case.kv_bytes <= MAX_KV_BYTES]


def prefill_cases(context: Context) -> list[Case]:
    if context.quick:
        return [Case("float32", 1, 48, 48, 4, 2, 64)]
    if not context.on_gpu:
        return _cpu_cases([(1, 512, 512), (1, 2048, 2048), (1, 512, 4608)])
    base = Case("bfloat16", 8, 2048, 2048, *LLAMA_8B)
    cases = [
        Case("bfloat16", seqs, query, length, *heads)
        for heads in (MHA, LLAMA_8B, LLAMA_70B)
        for seqs, query, length in ((32, 4096, 4096), (1, 8192, 8192), (4, 512, 8192))
    ]
    cases += [replace(base, block_size=size) for size in (16, 32, 64, 128, 256)]
    cases += [replace(base, head_size=size) for size in (64, 256)]
    cases += [replace(base, cache_dtype=name_of(dtype)) for dtype in checks.QUANTISED]
    cases += [
        replace(base, num_seqs=1, query_tokens=chunk, context=prefix + chunk)
        for prefix in (32768, 4096, 0)
        for chunk in (64, 512, 2048, 8192)
    ]
    cases += [replace(base, num_seqs=1, query_tokens=n, context=n) for n in (128, 1024, 32768, 65536)]
    return list(dict.fromkeys(cases))


def _cpu_cases(shapes: Sequence[tuple[int, int, int]]) -> list[Case]:
    """Return cases with the heads of the demo model and of Llama 3 8B."""
    return [
        Case(dtype, seqs, query, length, *heads)
        for dtype in ("float32", "bfloat16")
        for heads in ((9, 3, 64), LLAMA_8B)
        for seqs, query, length in shapes
    ]


def decode(context: Context) -> None:
    _measure(context, decode_cases(context))


def prefill(context: Context) -> None:
    _measure(context, prefill_cases(context))


def _measure(context: Context, cases: list[Case]) -> None:
    context.result.notes.append(f"copy: {context.copy_bandwidth / 1e9:,.1f} GB/s")
    contenders = Contenders(peers(), context)
    for case in context.within_budget(cases):
        context.progress(f"  {case}")
        context.result.rows.append(measure(context, case, contenders))


class Contenders:
    """The peers of a run, without those that took too long to prepare."""

    def __init__(self, known: Sequence[Peer], context: Context) -> None:
        self._known = known
        self._context = context
        self._setup_s = dict.fromkeys((peer.name for peer in known), 0.0)

    def of(self, case: Case) -> Iterator[Peer]:
        for peer in self._known:
            if peer.applies(case, self._context.device):
                if self._setup_s[peer.name] <= SETUP_S:
                    yield peer
                else:
                    self._context.result.left_out.append(f"{peer.name} on {case}: slow to get ready")

    def took(self, peer: Peer, seconds: float) -> None:
        self._setup_s[peer.name] += seconds


def measure(context: Context, case: Case, contenders: Contenders) -> Row:
    """Return the row of a case. It has no times if our own result is wrong, and no time of a wrong peer."""
    row: Row = {**asdict(case), "bytes": case.kv_bytes, "flop": case.flop, "seconds": {}, "spread": {}}
    row |= {"method": {}, "failed": {}, "copy_bytes_per_s": context.copy_bandwidth}
    try:
        batch = Batch(case, context.device, context.rotation_bytes, context.seed)
        wrong = batch.complaint(batch.paged)
        if wrong is None:
            _time(context, row, "cupaged", batch.runs())
    except Exception as error:
        wrong = reason(error)
    if wrong:
        row["wrong"] = wrong
        context.result.wrong.append(f"{case}: {wrong}")
        return row
    for peer in contenders.of(case):
        start = time.perf_counter()
        try:
            runs = peer.prepare(batch)
            # The tolerance of peers is larger, because they may keep probabilities in 16 bits.
            wrong = batch.complaint(lambda s, runs=runs: runs[s](), slack=4.0, floor=1e-3)
            contenders.took(peer, time.perf_counter() - start)
            if wrong:
                row["failed"][peer.name] = wrong
            else:
                _time(context, row, peer.name, runs)
        except Exception as error:
            contenders.took(peer, time.perf_counter() - start)
            row["failed"][peer.name] = reason(error)
    return row


def _time(context: Context, row: Row, name: str, runs: list) -> None:
    timing = context.timer(runs, context.sample_s)
    row["seconds"][name] = timing.median_s
    row["spread"][name] = round(timing.spread, 4)
    row["method"][name] = timing.method
