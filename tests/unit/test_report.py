"""`benchmarks/kernels.py`: it runs for real on a CPU, and no wrong result gets a time."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cupaged
from benchmarks import bars, kernels, peers, plots, tables
from benchmarks.problems import Case, name_of
from benchmarks.report import Context, Result, Section, run_section
from benchmarks.sections import (
    SECTIONS,
    attention,
    check,
    engine,
    fused,
    host,
    latent,
    memory,
    mixed,
    sampling,
)
from cupaged import backends, checks
from cupaged.backends import reference

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def context():
    return Context(CPU, quick=True)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The command as a user types it: its output, and the folder it left."""
    folder = tmp_path_factory.mktemp("report")
    command = [sys.executable, "benchmarks/kernels.py", "--report", str(folder), "--quick", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, folder


@pytest.mark.matrix  # a process of its own
def test_a_bare_machine_has_what_it_imports():
    """torch, CuPy and NumPy; matplotlib where it is there."""
    program = "import sys, benchmarks.kernels; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "torch" in loaded
    assert not loaded & {"pytest", "numba", "transformers", "matplotlib", "PIL", "fastapi", "hypothesis"}


@pytest.mark.matrix
def test_the_report_has_every_section(report):
    out, folder = report
    written = json.loads((folder / "kernels-cpu.json").read_text())
    sections = written["results"]["sections"]
    assert list(sections) == [section.name for section in SECTIONS]
    assert all(section["rows"] for name, section in sections.items() if name != "host")
    assert sections["host"]["left_out"] == ["all of it: there is no GPU"]
    assert not [section["wrong"] for section in sections.values() if section["wrong"]]
    for name in ("decode", "prefill"):
        for row in sections[name]["rows"]:
            assert row["seconds"]["cupaged"] > 0
            assert row["seconds"]["sdpa"] > 0
    assert all(row["of_parts"] > 0 for row in sections["mixed"]["rows"])
    assert out.rstrip().splitlines()[-1].startswith("matmul")  # the summary is last
    assert written["environment"]["versions"]["torch"]


@pytest.mark.matrix
def test_what_is_written_names_no_machine(report):
    _, folder = report
    text = (folder / "kernels-cpu.json").read_text()
    assert str(folder) not in text
    assert str(ROOT) not in text
    assert str(Path.home()) + "/" not in text


@pytest.mark.matrix
def test_the_report_draws_what_it_measured(report):
    out, folder = report
    for path in (folder / f"{name}.png" for name in plots.PLOTS):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.name in out


def test_without_matplotlib_there_are_no_plots_and_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    assert (
        kernels.main(["--section", "ceilings", "--report", str(tmp_path), "--quick", "--device", "cpu"]) == 0
    )
    assert "matplotlib is missing" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.png"))


def test_a_copy_without_git_is_told_its_commit(monkeypatch, tmp_path, capsys):
    arguments = ["--section", "ceilings", "--out", str(tmp_path), "--quick", "--device", "cpu"]
    for git, expected in (("", "abc123"), ("0123", "0123")):
        monkeypatch.setattr(kernels.common, "_git", lambda *args, git=git: git)
        assert kernels.main([*arguments, "--commit", "abc123"]) == 0
        written = json.loads((tmp_path / "kernels-cpu.json").read_text())
        assert written["environment"]["commit"] == expected
        assert f"commit {expected}" in capsys.readouterr().out


def test_plain_use_times_decode_and_prefill_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert kernels.main(["--quick", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "decode:" in out
    assert "prefill:" in out
    assert "check:" not in out
    assert not list(tmp_path.iterdir())


def test_the_sections_are_listed(capsys):
    assert kernels.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(tables.FORMATS)


@pytest.fixture
def off_by_a_little(monkeypatch):
    """The first output element is wrong."""
    right = cupaged.paged_attention

    def wrong(query, *args, out, **options):
        found = right(query, *args, out=out, **options)
        if out.numel():
            out[0, 0, 0] += 0.5
        return found

    monkeypatch.setattr(cupaged, "paged_attention", wrong)


@pytest.mark.usefixtures("off_by_a_little")
def test_a_wrong_kernel_gets_no_time(capsys, tmp_path):
    assert kernels.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "WRONG: maximum error" in out
    assert "sdpa" not in out.partition("copy:")[0]
    sections = json.loads((tmp_path / "kernels-cpu.json").read_text())["results"]["sections"]
    rows = sections["decode"]["rows"] + sections["prefill"]["rows"]
    assert rows
    assert not [row for row in rows if row["seconds"]]


@pytest.mark.matrix
@pytest.mark.usefixtures("off_by_a_little")
def test_a_wrong_check_says_what_and_stops_the_clocks(capsys):
    arguments = ["--quick", "--device", "cpu", "--section", "check", "--section", "decode"]
    assert kernels.main(arguments) == 1
    out = capsys.readouterr().out
    assert "WRONG: decode torch.float32 D=64 (seed " in out
    assert "no times while check is wrong" in out
    assert "of copy" not in out


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("reshape_and_cache", lambda args: args[2].view(torch.uint8).flatten()[:1].bitwise_xor_(1)),
        ("copy_blocks", lambda args: args[0].view(torch.uint8).flatten()[:1].bitwise_xor_(1)),
        ("swap_blocks", lambda args: args[1].view(torch.uint8).flatten()[:1].bitwise_xor_(1)),
    ],
)
def test_the_checks_notice_one_wrong_bit(monkeypatch, context, name, damage):
    right = getattr(cupaged, name)

    def wrong(*args):
        right(*args)
        damage(args)

    monkeypatch.setattr(cupaged, name, wrong)
    found = [run for text, run in check.checks_of(context) if text.startswith(name)]
    assert found
    monkeypatch.setattr(backends, "for_device", lambda device: reference)  # it has every dtype
    for run in found:
        with pytest.raises(AssertionError, match="1 bytes differ"):
            run(CPU, 5)


def test_quantised_caches_are_checked_and_measured(monkeypatch, context):
    """By the reference: the CPU backend need not have them."""
    monkeypatch.setattr(backends, "for_device", lambda device: reference)
    for text, run in check.checks_of(context):
        if "float8" in text or "int8" in text:
            run(CPU, 5)
    for dtype in checks.QUANTISED:
        case = Case("bfloat16", 2, 1, 40, 4, 2, 64, cache_dtype=name_of(dtype))
        assert case.kv_bytes == 2 * 2 * 40 * 2 * 64
        row = attention.measure(context, case, attention.Contenders(peers.peers(), context))
        assert row["seconds"]["cupaged"] > 0, row
    right = reference.paged_attention

    def wrong_scale(*args):
        *others, params, layout = args
        right(*others, params._replace(v_scale=1.1 * params.v_scale), layout)

    monkeypatch.setattr(reference, "paged_attention", wrong_scale)
    row = attention.measure(context, case, attention.Contenders(peers.peers(), context))
    assert "maximum error" in row["wrong"]
    with pytest.raises(AssertionError, match="maximum error"):
        check.attention(CPU, 5, "decode", dtype=torch.bfloat16, cache_dtype=checks.QUANTISED[0])


def test_latent_attention_is_checked_and_measured(monkeypatch, context):
    monkeypatch.setattr(backends, "for_device", lambda device: reference)
    latent.run(context)
    assert context.result.wrong == []
    times = [set(row["seconds"]) for row in context.result.rows]
    assert times == [{"cupaged", "sdpa"}, {"cupaged"}]  # decode and prefill
    right = cupaged.mla_attention
    monkeypatch.setattr(cupaged, "mla_attention", lambda *args, **options: right(*args, **options).add_(0.1))
    context.result = Result()
    latent.run(context)
    assert [row["seconds"] for row in context.result.rows] == [{}, {}]
    assert len(context.result.wrong) == 2
    lines = list(tables.lines_of("latent", context.result))
    assert sum("WRONG" in line for line in lines) == 4  # in the table, and after it


def test_a_result_that_depends_on_the_batch_is_noticed(monkeypatch, context):
    right = cupaged.paged_attention

    def wrong(query, *args, out=None, **options):
        found = right(query, *args, out=out, **options)
        return found if out is not None else found * (1 + 2**-20)

    monkeypatch.setattr(cupaged, "paged_attention", wrong)
    with pytest.raises(AssertionError, match="other bits"):
        check.invariance(CPU, 1, "decode")


def test_a_peer_that_raises_fails_in_its_own_row(context):
    def broken(batch):
        raise RuntimeError("no kernel image\nfor this device")

    def wrong(batch):
        return [lambda: torch.zeros_like(batch.out[0])] * batch.num_sets

    def anywhere(case, device):
        return True

    known = (
        peers.Peer("broken", broken, anywhere),
        peers.Peer("wrong", wrong, anywhere),
        *(p for p in peers.peers() if p.name == "sdpa"),
    )
    row = attention.measure(
        context, Case("float32", 2, 1, 40, 2, 1, 32), attention.Contenders(known, context)
    )
    assert row["failed"]["broken"] == "RuntimeError: no kernel image"
    assert row["failed"]["wrong"].startswith("maximum error")
    assert set(row["seconds"]) == {"cupaged", "sdpa"}
    assert context.result.wrong == []
    assert "broken failed: RuntimeError" in "".join(tables.lines_of("decode", Result(rows=[row])))


def test_a_peer_that_is_slow_to_get_ready_is_left_out(context):
    peer = peers.Peer("slow", peers.sdpa, lambda case, device: True)
    contenders = attention.Contenders([peer], context)
    case = Case("float32", 2, 1, 40, 2, 1, 32)
    contenders.took(peer, attention.SETUP_S + 1)
    assert "slow" not in attention.measure(context, case, contenders)["seconds"]
    assert "slow" in context.result.left_out[0]


def test_time_that_is_over_leaves_out_the_rest_by_name(context):
    def run(context):
        for case in context.within_budget(["a", "b", "c"]):
            context.result.rows.append({"name": case})
            context.deadline = 0.0

    result = run_section(Section("x", "", 10.0, run), context, end=float("inf"))
    assert [row["name"] for row in result.rows] == ["a"]
    assert result.left_out == ["b", "c"]


def test_a_section_that_stops_is_wrong_and_the_report_goes_on(context):
    def run(context):
        raise RuntimeError("out of paper")

    result = run_section(Section("x", "", 10.0, run), context, end=float("inf"))
    assert result.wrong == ["x stopped: RuntimeError: out of paper"]


def test_both_layouts_are_measured_or_one(context):
    for layouts in (("block",), ("layer",), ("block", "layer")):
        context.layouts = layouts
        context.result = Result()
        memory.run(context)
        names = [row["name"] for row in context.result.rows if row["name"].endswith("major")]
        assert names == [f"{layout}-major" for layout in layouts]


def test_host_time_of_a_call_and_of_its_launches(context, monkeypatch):
    """Over the emulation: the same backend, with a launcher that runs on the CPU."""
    emulator = pytest.importorskip("tests.cuda_host.emulator")
    backend = emulator.backend(3)
    launched = []

    class Launcher:
        def __getattr__(self, name):
            return getattr(backend._launcher, name)

        def prepare(self, call, device):
            return lambda tensors: launched.append(call.spec.entry)

    monkeypatch.setattr(host, "launcher", Launcher)
    host.run(context)
    rows = {row["name"]: row for row in context.result.rows}
    assert list(rows) == ["decode", "decode, split", "prefill", "reshape_and_cache"]
    assert rows["decode, split"]["launches"] == 2
    assert rows["decode"]["launches"] == 1
    for row in rows.values():
        assert set(row["seconds"]) == {"dispatched", "call", "backend", "launches"}
    assert {"merge_splits", "reshape_and_cache"} <= set(launched)
    for name in ("paged_decode", "paged_prefill"):
        assert any(entry.startswith(name) for entry in launched)


def row(**changes) -> dict:
    base = {"dtype": "bfloat16", "num_seqs": 32, "query_tokens": 1, "context": 4096, "num_heads": 32}
    base |= {"num_kv_heads": 8, "head_size": 128, "block_size": 16, "cache_dtype": None, "shared_prefix": 0}
    base |= {"bytes": 900, "flop": 1, "copy_bytes_per_s": 1000.0, "seconds": {"cupaged": 1.0}, "failed": {}}
    return base | changes


def test_the_bars_take_the_worst_row_they_are_about():
    rows = [
        row(seconds={"cupaged": 1.0, "sdpa flash": 3.0, "sdpa math": 9.0, "flashinfer": 0.5}),
        row(num_seqs=64, bytes=950),
        row(num_heads=8, bytes=800),  # MHA
        row(num_seqs=1, context=65536, bytes=700),
        row(block_size=64, seconds={"cupaged": 1.25}),
        row(num_seqs=64, context=8192, seconds={"cupaged": 2.0}, bytes=1900),
        row(num_seqs=64, context=8192, cache_dtype="float8_e4m3fn", seconds={"cupaged": 1.0}),
        row(num_seqs=64, context=8192, seconds={}),  # wrong: no time
    ]
    blocks = [
        {"name": "swap_blocks out", "block_bytes": 2 << 20, "bytes": 1, "seconds": 1.0, "of_pinned": 0.95},
        {"name": "swap_blocks in", "block_bytes": 2 << 20, "bytes": 1, "seconds": 1.0, "of_pinned": 0.91},
        {"name": "copy_blocks", "block_bytes": 8192, "bytes": 1 << 20, "seconds": 1.0, "of_copy": 0.1},
        {"name": "copy_blocks", "block_bytes": 8192, "bytes": 64 << 20, "wrong": "blocks differ"},
    ]
    chunk = {"num_heads": 8, "query_tokens": 4096, "flop": 330e12}
    prefills = [
        row(**chunk, seconds={"cupaged": 1.0, "sdpa flash": 0.9}),
        row(**chunk, block_size=128, seconds={"cupaged": 0.8, "flashinfer tc": 1.2}),
        row(**chunk | {"num_heads": 32, "flop": 1e12}),
    ]
    results = {"decode": Result(rows=rows), "prefill": Result(rows=prefills), "memory": Result(rows=blocks)}
    results["mixed"] = Result(rows=[{"of_parts": 1.1}, {"of_parts": 0.97}, {"wrong": "NaN"}])
    found = {bar.name: bar.measure(results) for bar in bars.BARS}
    assert [value for value in found.values() if value is not None] == pytest.approx(
        [0.9, 0.8, 0.7, 0.8, 3.0, 0.5, 2.0, 330.0, 0.8, 0.9, 1.5, 0.97, 0.91]
    )
    environment = {"device": "GPU", "driver": "1", "versions": {}, "commit": "c", "modified": False}
    text = "\n".join(tables.summary(environment, results))
    assert text.count(" met") == 7
    assert text.count(" MISSED") == 6


@pytest.mark.parametrize("fault", ["a row", "NaN"])
def test_a_wrong_mixed_batch_has_no_time(context, monkeypatch, fault):
    right = cupaged.paged_attention

    def wrong(query, *arguments):
        out = right(query, *arguments)
        if arguments[-1] is not None:
            out[-1, -1, 0] = 3.0 if fault == "a row" else float("nan")
        return out

    assert "seconds" in mixed.measure(context, mixed.cases(context)[0])
    monkeypatch.setattr(cupaged, "paged_attention", wrong)
    mixed.run(context)
    (row,) = context.result.rows
    assert row["wrong"]
    assert not row["seconds"]
    assert context.result.wrong
    assert "WRONG" in "\n".join(tables.FORMATS["mixed"](context.result.rows))


DAMAGES = {
    "rms_norm": lambda args, options: options["out"].view(-1)[:1].add_(0.1),
    "rms_norm's residual": lambda args, options: options["residual"][:1, :1].add_(0.1),
    "act_and_mul": lambda args, options: options["out"].view(-1)[:1].add_(0.1),
    "rope_and_cache": lambda args, options: args[0][:1, :1, :1].add_(0.1),
    "rope_and_cache's cache": lambda args, options: args[5].view(torch.uint8).add_(args[6].max() >= 0),
}


def damage(monkeypatch, name: str) -> None:
    """Make an operator write something else than it should."""
    operator = name.partition("'")[0]
    right = getattr(cupaged, operator)

    def wrong(*args, **options):
        right(*args, **options)
        DAMAGES[name](args, options)

    monkeypatch.setattr(cupaged, operator, wrong)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_wrong_fused_operator_has_no_time(context, monkeypatch, name):
    """By the reference: the CPU backend would compile its kernels."""
    monkeypatch.setattr(backends, "for_device", lambda device: reference)
    operator = name.partition("'")[0]
    for case in fused.cases(context):
        assert fused.measure(context, case)["of_copy"] > 0
    damage(monkeypatch, name)
    fused.run(context)
    rows = {row["name"]: row for row in context.result.rows}
    assert list(rows) == ["rms_norm", "act_and_mul", "rope_and_cache"]
    assert [name for name, row in rows.items() if "seconds" not in row] == [operator]
    (text,) = context.result.wrong
    assert text == f"{operator} {rows[operator]['case']}: {rows[operator]['wrong']}"
    assert "\n".join(tables.FORMATS["fused"](context.result.rows)).count("WRONG") == 1


def test_steps_of_the_whole_engine_are_timed(context, monkeypatch):
    engine.run(context)
    rows, load = context.result.rows, engine.load_of(context)
    assert [(row["graphs"], row["overlap"]) for row in rows] == list(engine.variants(context))
    for row in rows:
        assert list(row["seconds"]) == [str(count) for count in load.requests]
        assert all(seconds > 0 for seconds in row["seconds"].values())
    assert not context.result.wrong
    monkeypatch.setattr(engine, "_engine", lambda *_: 1 / 0)
    engine.run(context)
    assert len(context.result.wrong) == len(rows) // 2
    lines = list(tables.FORMATS["engine"](rows))
    assert sum("WRONG" in line for line in lines) == len(rows) // 2
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    engine.run(context)
    assert context.result.left_out == ["all of it: transformers is not installed"]
    assert len(context.result.rows) == len(rows)


def test_a_sampler_that_is_wrong_has_no_time(context, monkeypatch, seed):
    monkeypatch.setattr(backends, "for_device", lambda device: reference)
    for dtype in checks.DTYPES:
        sampling.check(CPU, seed, dtype)
    sampling.run(context)
    right = cupaged.sample
    monkeypatch.setattr(cupaged, "sample", lambda x, **settings: (right(x, **settings) + 1) % x.shape[1])
    sampling.run(context)
    rows = [context.result.rows[i :: len(sampling.SETTINGS)] for i in range(len(sampling.SETTINGS))]
    for timed, wrong in rows:
        assert set(timed["seconds"]) == {"cupaged", "torch"}
        assert (wrong["seconds"], timed["failed"]) == ({}, {})
    assert len(context.result.wrong) == len(sampling.SETTINGS)
    lines = list(tables.FORMATS["sampling"](context.result.rows))
    assert sum("WRONG" in line for line in lines) == len(sampling.SETTINGS)


@pytest.mark.parametrize("kind", [fused.Norm, fused.Gated, fused.Rope], ids=lambda kind: kind.name)
def test_fused_operators_are_checked(monkeypatch, seed, kind):
    """Of all dtypes, on the reference; and a wrong result is noticed."""
    monkeypatch.setattr(backends, "for_device", lambda device: reference)
    for dtype in checks.DTYPES:
        fused.check(CPU, seed, kind, dtype=dtype)
    for cache_dtype in checks.QUANTISED if kind is fused.Rope else ():
        fused.check(CPU, seed, kind, dtype=torch.float16, cache_dtype=cache_dtype)
    damage(monkeypatch, kind.name)
    with pytest.raises(AssertionError, match="maximum error"):
        fused.check(CPU, seed, kind, dtype=torch.float32)
