"""Compare eviction policies of the prefix cache on a trace: hit rate, latency and throughput. A simulation.

    python benchmarks/eviction.py TRACE [--format F] [--requests 1000] [--rate R] [--burstiness B]
                                  [--blocks 2000] [--times FILE] [--out DIR]

TRACE is a file (`traces.py` lists the formats) or the name of a drawn trace (`trace_generators.py`). The
scheduler and the block manager are those that serve; no model runs. The time of a step comes from a file of
step times, which `step_times.py` measures, or else from the cost model of the paper's OPT-13B on an A100.
tokens/s are those of prompts and outputs where all requests wait from the beginning.
"clairvoyant" is Belady's policy, which needs the trace's future: it evicts what is used again last.
"""

from __future__ import annotations

import argparse
import heapq
import statistics
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

if __package__:
    from . import common
else:
    import common

import torch

from benchmarks import cost_model, trace_generators, traces
from benchmarks.cost_model import Costs
from benchmarks.simulation import Record, Request, SimulatedEngine
from benchmarks.trace_generators import GENERATORS
from benchmarks.traces import Arrivals
from cupaged.engine.memory.eviction import EVICTION_POLICIES, MakePolicy, Ranked
from cupaged.engine.memory.prefix_hash import extend_keys, root_key

NOTE = "A simulation: no model ran, and the times are those of a cost model."
CLAIRVOYANT = "clairvoyant"
BLOCK_SIZE = 16
Uses = dict[Hashable, deque[int]]  # of a content: numbers of the requests that begin with it


class Clairvoyant(Ranked):
    """Evict the block whose content is used again last, or never (Belady's policy).

    Requests are taken to use blocks in the order of their arrival. They use them only together with all
    blocks before, and preempted ones look for them again: neither is foreseen, so it is not quite a bound.

    Args:
        uses: when contents are used, in ascending order; changed.
        now: returns the number of the first request that was not admitted.
    """

    def __init__(self, uses: Uses, now: Callable[[], int]) -> None:
        super().__init__()
        self._uses_of = uses
        self._now = now
        self._soonest: list[tuple[float, int, int, Hashable]] = []  # next use, order, block, key

    def add(self, block: int, key: Hashable, num_lost: int) -> None:
        super().add(block, key, num_lost)
        self._expect(block, key)

    def evict(self) -> int:
        now = self._now()
        while (
            self._soonest and self._soonest[0][0] < now
        ):  # a use that came to nothing: there is another next
            _, order, block, key = heapq.heappop(self._soonest)
            entry = self._entries.get(block)
            if entry is not None and entry[1] == order:
                entry = self._entries[block] = self.rank(key, 0, 0), order, block
                heapq.heappush(self._heap, entry)
                self._expect(block, key)
        return super().evict()

    def _expect(self, block: int, key: Hashable) -> None:
        rank, order, _ = self._entries[block]
        if rank > -inf:
            heapq.heappush(self._soonest, (-rank, order, block, key))

    def rank(self, key: Hashable, num_uses: int, num_lost: int) -> float:
        """Return the negated number of the next request that uses the content."""
        uses = self._uses_of.get(key)
        now = self._now()
        while uses and uses[0] < now:
            uses.popleft()
        return -uses[0] if uses else -inf


def uses_of(requests: Sequence[Request], block_size: int) -> Uses:
    """Return which requests could use which contents."""
    uses: Uses = defaultdict(deque)
    for number, request in enumerate(requests):
        keys: list[bytes] = []
        prompt = list(request.prompt)
        extend_keys(keys, root_key(None), prompt, len(prompt), block_size)
        for key in keys:
            uses[key].append(number)
    return dict(uses)


def engine(policy: str | MakePolicy, costs: Costs, num_blocks: int, max_num_seqs: int) -> SimulatedEngine:
    """Return a simulated engine with an eviction policy."""
    return SimulatedEngine(
        num_blocks,
        num_cpu_blocks=0,
        block_size=BLOCK_SIZE,
        max_num_seqs=max_num_seqs,
        budget=2048,
        costs=costs,
        eviction_policy=policy,
    )


def replay(policy: str, requests: Sequence[Request], make: Callable[..., SimulatedEngine]) -> dict[str, Any]:
    """Replay requests, in the order of arrival and without sessions, and return a row of the table."""

    def run(requests: Sequence[Request]) -> dict[str, float]:
        simulated = _clairvoyant(requests, make) if policy == CLAIRVOYANT else make(policy)
        return summary(simulated, simulated.replay(requests))

    # Requests that come at a rate end at that rate: a policy's throughput is that of a queue.
    queued = run([replace(request, time=0.0) for request in requests])
    return {"policy": policy, **run(requests), "queued_tokens_per_s": queued["tokens_per_s"]}


def _clairvoyant(requests: Sequence[Request], make: Callable[..., SimulatedEngine]) -> SimulatedEngine:
    """Return an engine whose eviction policy knows the requests that will come."""
    engines: list[SimulatedEngine] = []  # the policy asks its engine where it is, and is made before it

    def now() -> int:
        scheduler = engines[0].scheduler
        if scheduler.waiting:
            return scheduler.waiting[0].arrival
        return scheduler.running[-1].arrival + 1 if scheduler.running else 0

    uses = uses_of(requests, BLOCK_SIZE)
    engines.append(make(lambda: Clairvoyant(uses, now)))
    return engines[0]


def summary(simulated: SimulatedEngine, record: Record) -> dict[str, float]:
    """Return hit rate, latencies and throughput of a replay."""
    scheduler = simulated.scheduler
    first = sorted(served.time_to_first_token for served in record.served)
    return {
        "hit_rate": scheduler.num_prefix_hits / max(1, scheduler.num_prefix_queries),
        "computed_tokens": record.num_computed,
        "ttft_median_s": statistics.median(first),
        "ttft_p99_s": first[min(len(first) - 1, int(0.99 * len(first)))],
        "normalized_latency_s": statistics.fmean(s.normalized_latency for s in record.served),
        "tokens_per_s": record.num_tokens / record.seconds,
        "preemptions": scheduler.num_preemptions,
    }


def fixed_times(requests: Iterable[Request], make: Callable[..., SimulatedEngine]) -> list[Request]:
    """Return requests with the times at which they arrive under LRU, and without sessions.

    A later turn arrives when the one before it has ended; the policies are compared on the same times.
    """
    requests = list(requests)
    if not any(request.follows for request in requests):
        return sorted(requests, key=lambda r: r.time)
    served = make("lru").replay(requests).served
    return sorted((replace(s.request, time=s.arrived, follows=None) for s in served), key=lambda r: r.time)


def fitting(requests: Sequence[Request], num_blocks: int) -> list[Request]:
    """Return the requests that fit into the blocks, without those that follow one that does not."""
    kept: list[Request] = []
    gone: set[Request] = set()
    for request in requests:
        blocks = -(-(len(request.prompt) + request.num_tokens) // BLOCK_SIZE)
        if request.follows in gone or blocks > num_blocks:
            gone.add(request)
        else:
            kept.append(request)
    return kept


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("trace", help=f"a file, or one of {', '.join(GENERATORS)}")
    parser.add_argument("--format", choices=tuple(traces.READERS), help="default: by the file's beginning")
    parser.add_argument("--requests", type=int, default=1000, help="number of requests (default: 1000)")
    parser.add_argument(
        "--rate", type=float, help="requests (or sessions) per second (default: the file's, or 2)"
    )
    parser.add_argument("--burstiness", type=float, default=1.0, help="of arrivals (default: 1, Poisson)")
    parser.add_argument("--blocks", type=int, default=2000, help="blocks of 16 tokens (default: 2000)")
    parser.add_argument("--max-num-seqs", type=int, default=256, help="default: 256")
    parser.add_argument("--policies", nargs="+", default=[*EVICTION_POLICIES, CLAIRVOYANT])
    parser.add_argument("--times", type=Path, help="JSON of step_times.py (default: OPT-13B on an A100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="directory for the JSON")
    options = parser.parse_args(arguments)
    known = (*EVICTION_POLICIES, CLAIRVOYANT)
    if unknown := [policy for policy in options.policies if policy not in known]:
        parser.error(f"--policies: {', '.join(unknown)} is none of {', '.join(known)}")
    if min(options.requests, options.blocks, options.max_num_seqs) < 1:
        parser.error("--requests, --blocks and --max-num-seqs must be at least 1")
    return options


def load(options: argparse.Namespace) -> list[Request]:
    """Return the requests that are asked for.

    Raises:
        ValueError: they cannot be read or drawn.
    """
    if options.trace in GENERATORS:
        arrivals = Arrivals(options.rate or 2.0, options.burstiness)
        return trace_generators.generate(options.trace, options.requests, arrivals, options.seed)
    requests = traces.read(Path(options.trace), options.format, options.requests)
    if not any(request.time for request in requests):
        return traces.spread(requests, Arrivals(options.rate or 2.0, options.burstiness), options.seed)
    return requests if options.rate is None else traces.scaled(requests, options.rate)


def main(arguments: list[str] | None = None) -> int:
    options = _parsed(arguments)
    try:
        drawn = load(options)
        costs = cost_model.read(options.times).costs if options.times else cost_model.opt_13b_on_a100()
    except (ValueError, OSError) as error:
        print(f"eviction.py: {error}", file=sys.stderr)
        return 2
    make = partial(engine, costs=costs, num_blocks=options.blocks, max_num_seqs=options.max_num_seqs)
    requests = fitting(drawn, options.blocks)
    print(NOTE)
    print(f"{len(requests)} requests of {options.trace}, {options.blocks} blocks", end="")
    print(f"; {len(drawn) - len(requests)} do not fit" if len(requests) < len(drawn) else "")
    if not requests:
        return 2
    requests = fixed_times(requests, make)
    print(f"{'policy':<12} {'hits':>6} {'first token, s':>15} {'p99':>8} {'s/token':>8} {'tokens/s':>9}")
    rows = []
    for policy in options.policies:
        rows.append(row := replay(policy, requests, make))
        print(
            f"{policy:<12} {100 * row['hit_rate']:>5.1f}% {row['ttft_median_s']:>15.3f} "
            f"{row['ttft_p99_s']:>8.2f} {row['normalized_latency_s']:>8.4f} "
            f"{row['queued_tokens_per_s']:>9.0f}"
        )
    if options.out:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "out"}
        results = {"note": NOTE, **settings, "fitting": len(requests), "rows": rows}
        name = f"eviction-{Path(options.trace).stem}"
        common.write(options.out, name, common.environment(torch.device("cpu")), results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
