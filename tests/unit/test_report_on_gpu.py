"""The parts of the report that only a GPU runs, as far as a CPU with stand-ins can run them."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

import cupaged
from benchmarks import bars, common, kernels, peers, tables
from benchmarks.report import Context, Result
from benchmarks.sections import attention, ceilings, check, fused, memory
from benchmarks.timing import Timing
from cupaged.backends.cuda import launcher

CPU = torch.device("cpu")
MEMORY = 78 << 30  # of the smaller Hopper


class OnGpu(Context):
    """Chooses the shapes and sections of a GPU; its tensors are on the CPU."""

    @property
    def on_gpu(self) -> bool:
        return True

    def release(self) -> None:
        pass


@pytest.fixture
def context(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    found = OnGpu(CPU, quick=True)
    found.__dict__["copy_bandwidth"] = 1e9
    found.__dict__["timer"] = lambda runs, budget_s, graph=True: Timing([r() for r in runs] and 1e-3, 0, "x")
    return found


@pytest.fixture
def full(context):
    context.quick = False
    return context


def test_every_bar_of_decode_has_a_shape_that_it_is_about(full):
    seconds = {"cupaged": 1.0, "sdpa flash": 2.0, "flashinfer": 3.0}
    rows = [
        {**asdict(case), "bytes": 1, "flop": 1, "copy_bytes_per_s": 1.0, "seconds": seconds, "failed": {}}
        for case in attention.decode_cases(full)
    ]
    results = {"decode": Result(rows=rows)}
    named = [bar for bar in bars.BARS if bar.name.startswith("decode")]
    assert len(named) == 7
    assert [bar.name for bar in named if bar.measure(results) is None] == []
    assert len(list(tables.FORMATS["decode"](rows))) == len(rows) + 1


def test_every_bar_of_the_fused_operators_has_a_shape_that_it_is_about(full):
    rows = [fused.row_of(case) | {"seconds": 1.0, "of_copy": 0.9} for case in fused.cases(full)]
    results = {"fused": Result(rows=rows)}
    names = {row["name"] for row in rows}
    named = [bar for bar in bars.BARS if bar.name.partition(",")[0] in names]
    assert [bar.measure(results) for bar in named] == [0.9] * 3
    assert len(list(tables.FORMATS["fused"](rows))) == len(rows) + 1
    assert len({(row["name"], row["case"]) for row in rows}) == len(rows)


def test_every_shape_fits_a_gpus_memory_with_its_dense_copy(full):
    cases = attention.decode_cases(full) + attention.prefill_cases(full)
    assert len(set(cases)) == len(cases)
    for case in cases:
        dense = case.kv_bytes * (2 if case.cache_dtype else 1)
        assert case.kv_bytes + 2 * dense < 0.6 * MEMORY, case


def test_which_peers_a_shape_meets_on_a_gpu(full, monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: True)
    gpu = torch.device("cuda")
    met = {
        str(case): {peer.name for peer in peers.peers() if peer.applies(case, gpu)}
        for case in attention.decode_cases(full)
    }
    flashinfer = {"flashinfer", "flashinfer tc"}
    sdpa = {"sdpa flash", "sdpa efficient", "sdpa cudnn", "sdpa math"}
    first, speculation = attention.decode_cases(full)[0], "decode of 4   bfloat16   32 x 4096   32/8x128"
    assert met[str(first)] == sdpa | flashinfer | {"flex"}
    assert met[speculation] == sdpa | {"flashinfer tc"}
    shared = "decode        bfloat16   64 x 8192   32/8x128 prefix 7168"
    assert met[shared] == sdpa | flashinfer | {"cupaged unshared", "flashinfer cascade"}
    assert met["decode        bfloat16    1 x 65536  32/8x128"] >= {"cupaged by load"}
    assert sum("flex" in names for names in met.values()) <= 8  # it compiles for seconds each time


def test_swaps_are_checked_and_compared_with_a_pinned_copy_and_with_each_other(context, monkeypatch):
    """Over the emulation: both ways move the blocks, and are in the table."""
    emulator = pytest.importorskip("tests.cuda_host.emulator")
    monkeypatch.setattr(launcher, "CupyLauncher", lambda: emulator.HostLauncher(3))
    pinned = ceilings.pinned_bandwidth(context, 1 << 20)
    assert set(pinned) == {"out", "in"}
    rows = []
    for out in (True, False):
        found = memory._swap(context, block_bytes=8192, out=out, total=1 << 16, pinned=pinned)
        assert found["of_pinned"] == pytest.approx(2**-4)  # the stand-in's clock says 1 ms for everything
        assert set(found["ways"]) == {"engine", "kernel"}
        rows.append(found)
    text = "\n".join(tables.FORMATS["memory"](rows))
    assert text.count("engine 0.1 GB/s, kernel 0.1 GB/s") == 2


@pytest.mark.parametrize("way", ["chosen", "engine", "kernel"])
def test_a_swap_of_the_wrong_block_gets_no_time(context, monkeypatch, way):
    def wrong(src, dst, mapping):
        right(src, dst, mapping.roll(1, 0)[1:])

    right = cupaged.swap_blocks
    ways = {"engine": right, "kernel": right}
    if way == "chosen":
        monkeypatch.setattr(cupaged, "swap_blocks", wrong)
    else:
        ways[way] = wrong
    monkeypatch.setattr(memory, "swap_ways", lambda: ways)
    found = memory._swap(context, block_bytes=8192, out=True, total=1 << 20, pinned={"out": 1.0})
    assert found["wrong"] == f"blocks differ from their sources ({way})"
    assert "seconds" not in found


@pytest.fixture
def graphs(monkeypatch):
    """CUDA graphs of one call: a replay does the call again into the same output."""
    calls = SimpleNamespace(recorded=None, replay=True)
    real = check._call

    def call(problem):
        found = real(problem)
        calls.recorded = (problem, *found)
        return found

    class CUDAGraph:
        def replay(self):
            if calls.replay:
                problem, out, lse = calls.recorded
                for target, value in zip((out, lse), real(problem)):
                    target.copy_(value)

    @contextmanager
    def graph(captured):
        yield

    monkeypatch.setattr(check, "_call", call)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    # On a GPU the problem and what is captured are different tensors.
    monkeypatch.setattr(check.cases.Problem, "to", _copied)
    return calls


def _copied(problem, device):
    def move(x):
        return x.clone() if isinstance(x, torch.Tensor) else x

    tensors = ("query", "kv_cache", "block_tables", "seq_lens", "query_start_loc")
    options = {k: move(v) for k, v in problem.options.items()}
    return check.cases.Problem(*(move(getattr(problem, name)) for name in tensors), options)


@pytest.mark.parametrize("mode", check.MODES)
def test_a_graph_is_replayed_with_other_lengths(graphs, mode):
    check.graph(CPU, 11, mode)
    graphs.replay = False
    with pytest.raises(AssertionError, match="not written"):
        check.graph(CPU, 11, mode)


def test_a_graph_that_froze_its_lengths_is_noticed(graphs, monkeypatch):
    right = check.cases.Problem.to

    def frozen(problem, device):
        p = right(problem, device)
        lengths = p.seq_lens
        monkeypatch.setattr(
            check,
            "_call",
            lambda q, call=check._call: call(
                check.cases.Problem(
                    q.query, q.kv_cache, q.block_tables, lengths.clone(), q.query_start_loc, q.options
                )
            ),
        )
        return p

    monkeypatch.setattr(check.cases.Problem, "to", frozen)
    with pytest.raises(AssertionError, match="maximum error"):
        check.graph(CPU, 11, "decode")


def test_a_gpu_that_is_not_there_is_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        kernels.main(["--device", "cuda"])
    assert "no GPU" in capsys.readouterr().err


def test_the_environment_of_a_gpu(monkeypatch):
    properties = SimpleNamespace(multi_processor_count=132, total_memory=MEMORY, L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(common.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout="580.1\n"))
    found = common.environment(torch.device("cuda"))
    assert (found["device"], found["driver"], found["l2_bytes"]) == ("NVIDIA H200", "580.1", 50 << 20)
    assert found["nvrtc"].startswith(("12.", "13."))
    assert common.result_name("kernels", torch.device("cuda")) == "kernels-nvidia-h200"
