"""Compare policies of the engine on a trace: hit rate, latency and throughput. A simulation.

    python benchmarks/policies.py TRACE [--format F] [--requests 1000] [--rate R] [--burstiness B]
                                  [--blocks 2000] [--times FILE] [--kinds K ...] [--own FILE:CLASS ...]
                                  [--out DIR]

TRACE is a file (`traces.py` lists the formats) or the name of a drawn trace (`trace_generators.py`). The
scheduler and the block manager are those that serve; no model runs. The time of a step comes from a file of
step times, which `step_times.py` measures, or else from the cost model of the paper's OPT-13B on an A100.
Of each kind (eviction, scheduling, admission, preemption) every policy is tried beside the engine's defaults
of the others; --own adds a class of yours, whose base class says of which kind it is. tokens/s are those of
prompts and outputs where all requests wait from the beginning. "clairvoyant" is Belady's eviction policy,
which needs the trace's future: it evicts what is used again last. "priority" is there if the trace has
priorities.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __package__:
    from . import common
else:
    import common

import torch

from benchmarks import cost_model, trace_generators, traces
from benchmarks.clairvoyant import Clairvoyant, uses_of
from benchmarks.cost_model import Costs
from benchmarks.simulation import Record, Request, SimulatedEngine
from benchmarks.trace_generators import GENERATORS
from benchmarks.traces import Arrivals
from cupaged.engine.memory.eviction import EVICTION_POLICIES, EvictionPolicy
from cupaged.engine.scheduling.admission import ADMISSION_POLICIES, AdmissionPolicy
from cupaged.engine.scheduling.order import SCHEDULING_POLICIES, SchedulingPolicy
from cupaged.engine.scheduling.preemption import PREEMPTION_MODES, PreemptionPolicy

NOTE = "A simulation: no model ran, and the times are those of a cost model."
CLAIRVOYANT = "clairvoyant"
BLOCK_SIZE = 16
Policy = str | Callable[[], Any]


@dataclass(frozen=True)
class Kind:
    """A kind of policy: the engine's setting, its names, the default first, and the base class."""

    setting: str
    names: Sequence[str]
    base: type


KINDS = {
    "eviction": Kind("eviction_policy", (*EVICTION_POLICIES, CLAIRVOYANT), EvictionPolicy),
    "scheduling": Kind("scheduling_policy", tuple(SCHEDULING_POLICIES), SchedulingPolicy),
    "admission": Kind("admission_policy", tuple(ADMISSION_POLICIES), AdmissionPolicy),
    "preemption": Kind("preemption_mode", tuple(PREEMPTION_MODES), PreemptionPolicy),
}


@dataclass(frozen=True)
class Machine:
    """Blocks of 16 tokens, as many in the swap space, and the times of steps."""

    costs: Costs
    num_blocks: int
    max_num_seqs: int = 256

    def engine(self, preemption_mode: Policy = "recompute", **settings: Any) -> SimulatedEngine:
        """Return a simulated engine with these policies."""
        return SimulatedEngine(
            self.num_blocks,
            preemption_mode,
            block_size=BLOCK_SIZE,
            max_num_seqs=self.max_num_seqs,
            budget=2048,
            costs=self.costs,
            **settings,
        )


def policies_of(kind: str, requests: Sequence[Request]) -> list[str]:
    """Return the policies of a kind that the trace can tell apart, the default first."""
    prioritised = any(request.priority for request in requests)
    return [name for name in KINDS[kind].names if name != "priority" or prioritised]


def replay(kind: str, policy: Policy, requests: Sequence[Request], machine: Machine) -> dict[str, Any]:
    """Replay requests, in the order of arrival and without sessions, and return a row of the table."""

    def run(requests: Sequence[Request]) -> dict[str, float]:
        if policy == CLAIRVOYANT:
            simulated = _clairvoyant(requests, machine)
        else:
            simulated = machine.engine(**{KINDS[kind].setting: policy})
        return summary(simulated, simulated.replay(requests))

    # Requests that come at a rate end at that rate: a policy's throughput is that of a queue.
    queued = run([replace(request, time=0.0) for request in requests])
    name = policy if isinstance(policy, str) else getattr(policy, "__name__", repr(policy))
    return {"kind": kind, "policy": name, **run(requests), "queued_tokens_per_s": queued["tokens_per_s"]}


def _clairvoyant(requests: Sequence[Request], machine: Machine) -> SimulatedEngine:
    """Return an engine whose eviction policy knows the requests that will come."""
    engines: list[SimulatedEngine] = []  # the policy asks its engine where it is, and is made before it

    def now() -> int:
        scheduler = engines[0].scheduler
        if scheduler.waiting:
            return scheduler.waiting[0].arrival
        return scheduler.running[-1].arrival + 1 if scheduler.running else 0

    uses = uses_of(requests, BLOCK_SIZE)
    engines.append(machine.engine(eviction_policy=lambda: Clairvoyant(uses, now)))
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


def fixed_times(requests: Iterable[Request], machine: Machine) -> list[Request]:
    """Return requests with the times at which they arrive under the defaults, and without sessions.

    A later turn arrives when the one before it has ended; the policies are compared on the same times.
    """
    requests = list(requests)
    if not any(request.follows for request in requests):
        return sorted(requests, key=lambda r: r.time)
    served = machine.engine().replay(requests).served
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


def own_policy(text: str) -> tuple[str, Policy]:
    """Return the kind of a policy and its class, which stands in a file: ``FILE:CLASS``.

    Raises:
        ValueError: there is no such file or class, or it is no policy.
    """
    file, _, name = text.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file) if Path(file).is_file() else None
    if spec is None or spec.loader is None:
        raise ValueError(f"--own {text}: no Python file is called {file!r}; write FILE:CLASS")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = getattr(module, name, None)
    for kind, each in KINDS.items():
        if isinstance(made, type) and issubclass(made, each.base):
            return kind, made
    bases = ", ".join(each.base.__name__ for each in KINDS.values())
    raise ValueError(f"--own {text}: {file} has no class {name} derived from one of {bases}")


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
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS), metavar="KIND")
    parser.add_argument("--own", nargs="+", default=[], metavar="FILE:CLASS", help="policies of your own")
    parser.add_argument("--times", type=Path, help="JSON of step_times.py (default: OPT-13B on an A100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="directory for the JSON")
    options = parser.parse_args(arguments)
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


HEADER = (
    f"{'kind':<11} {'policy':<16} {'hits':>6} {'first token, s':>15} "
    f"{'p99':>8} {'s/token':>8} {'tokens/s':>9} {'preempted':>9}"
)


def line(row: dict[str, Any]) -> str:
    """Return a row as text."""
    return (
        f"{row['kind']:<11} {row['policy']:<16} {100 * row['hit_rate']:>5.1f}% {row['ttft_median_s']:>15.3f} "
        f"{row['ttft_p99_s']:>8.2f} {row['normalized_latency_s']:>8.4f} {row['queued_tokens_per_s']:>9.0f} "
        f"{row['preemptions']:>9}"
    )


def main(arguments: list[str] | None = None) -> int:
    options = _parsed(arguments)
    try:
        own = [own_policy(text) for text in options.own]
        drawn = load(options)
        costs = cost_model.read(options.times).costs if options.times else cost_model.opt_13b_on_a100()
    except (ValueError, OSError) as error:
        print(f"policies.py: {error}", file=sys.stderr)
        return 2
    machine = Machine(costs, options.blocks, options.max_num_seqs)
    requests = fitting(drawn, options.blocks)
    print(NOTE)
    print(f"{len(requests)} requests of {options.trace}, {options.blocks} blocks", end="")
    print(f"; {len(drawn) - len(requests)} do not fit" if len(requests) < len(drawn) else "")
    if not requests:
        return 2
    requests = fixed_times(requests, machine)
    print(HEADER, flush=True)
    rows: list[dict[str, Any]] = []
    for kind in options.kinds:
        names: list[Policy] = [*policies_of(kind, requests), *(made for its, made in own if its == kind)]
        for policy in names:
            if rows and policy == KINDS[kind].names[0]:  # all kinds' defaults are the same engine
                rows.append({**rows[0], "kind": kind, "policy": policy})
            else:
                rows.append(replay(kind, policy, requests, machine))
            print(line(rows[-1]), flush=True)
    if options.out:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "out"}
        results = {"note": NOTE, **settings, "fitting": len(requests), "rows": rows}
        name = f"policies-{Path(options.trace).stem}"
        print(common.write(options.out, name, common.environment(torch.device("cpu")), results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
