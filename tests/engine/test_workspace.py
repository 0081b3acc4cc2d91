"""Decode steps that replay what a step of their size has recorded: the same bits, in a call a layer."""

from __future__ import annotations

import random

import pytest
import torch

import cupaged
from cupaged.backends.cpu import launch
from cupaged.backends.cpu.tape import Tape, recorded
from cupaged.engine import SamplingParams
from cupaged.engine.model.workspace import MAX_SEQS, Buffers, Workspace, Workspaces
from tests import tiny_models

from .harness import finish, small_engine


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    names = "llama", "qwen3", "gemma2", "gemma3"
    return {name: str(tiny_models.save(name, tmp_path_factory.mktemp(name))) for name in names}


def drawn_requests(seed: int) -> list[tuple[dict, SamplingParams]]:
    rng = random.Random(seed)
    requests = []
    for _ in range(rng.randint(3, 12)):
        prompt = {"prompt_token_ids": [rng.randrange(3, 250) for _ in range(rng.randint(1, 40))]}
        params = SamplingParams(
            temperature=rng.choice([0.0, 1.0]),
            seed=rng.randrange(100),
            max_tokens=rng.randint(1, 60),
            n=rng.choice([1, 1, 3]),
            ignore_eos=True,
        )
        requests.append((prompt, params))
    return requests


def seen_logits(engine, seed: int) -> list[torch.Tensor]:
    """Run drawn requests, which arrive at drawn steps, and return the logits of each step."""
    rng, seen, run = random.Random(seed), [], engine._runner.run

    def noted(*arguments):
        seen.append(run(*arguments).clone())
        return seen[-1].clone()

    engine._runner.run = noted
    for i, (prompt, params) in enumerate(drawn_requests(seed)):
        engine.add_request(str(i), prompt, params)
        for _ in range(rng.randint(0, 6)):
            engine.step()
    finish(engine)
    return seen


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("llama", {"dtype": "bfloat16"}),
        ("qwen3", {}),
        ("gemma2", {}),
        ("gemma3", {}),
        ("gemma3", {"kv_cache_dtype": "fp8"}),
    ],
    ids=str,
)
def test_a_replayed_step_has_the_bits_of_a_new_one(directories, seed, monkeypatch, name, settings):
    """Sequences come and go, tables grow, blocks are swapped and shared; what no step has written is NaN."""
    settings = {**settings, "num_gpu_blocks_override": 30, "preemption_mode": "swap"}
    replayed = small_engine(directories[name], **settings)
    plain = small_engine(directories[name], **settings)
    assert replayed._runner._workspaces is not None
    plain._runner._workspaces = None
    begin_step, replays = Workspace.begin_step, []
    workspaces = replayed._runner._workspaces

    def poison(buffers: Buffers) -> None:
        for memory in buffers._memory.values():
            memory.fill_(float("nan"))

    def poisoned_buffer(num_tokens: int):
        poison(workspaces._any_size)
        return Workspaces.buffer(workspaces, num_tokens)

    def poisoned(self, *inputs):
        poison(workspaces._buffers)
        for parts in self._halves:
            for part in parts:
                part.fill_(float("nan"))
        self._tables.fill(-(2**31))
        begin_step(self, *inputs)

    replay = Tape.replay

    def counted(self):
        replays.append(len(self))
        return replay(self)

    monkeypatch.setattr(Workspace, "begin_step", poisoned)
    monkeypatch.setattr(workspaces, "buffer", poisoned_buffer)
    monkeypatch.setattr(Tape, "replay", counted)
    actual, expected = seen_logits(replayed, seed), seen_logits(plain, seed)
    assert len(actual) == len(expected)
    for step, (logits, wanted) in enumerate(zip(actual, expected)):
        assert torch.equal(logits, wanted), step
    assert replays


def test_a_replayed_step_makes_one_call_a_layer(llama_dir, monkeypatch):
    engine = small_engine(llama_dir)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    for i in range(3):
        engine.add_request(str(i), {"prompt_token_ids": [5, 6, 7]}, params)
    calls, call = [], launch.Kernel.__call__

    def counted(self, arguments):
        calls.append(arguments)
        return call(self, arguments)

    monkeypatch.setattr(launch.Kernel, "__call__", counted)
    counts = []
    while engine.has_unfinished():
        calls.clear()
        engine.step()
        counts.append(len(calls))
    assert min(counts) == 3 + 3  # layers, last norm, head, sampling
    assert sum(count == min(counts) for count in counts) > 30


def test_the_number_of_threads_may_change(llama_dir, monkeypatch):
    engine = small_engine(llama_dir)
    used, pack = set(), launch.Kernel.__call__
    engine.add_request("a", {"prompt_token_ids": [5, 6, 7]}, SamplingParams(max_tokens=9, ignore_eos=True))

    def noted(self, arguments):
        used.add(torch.get_num_threads())
        return pack(self, arguments)

    before = torch.get_num_threads()
    try:
        for threads in (1, 1, 1, 2, 2, 2):
            torch.set_num_threads(threads)
            engine.step()
        finish(engine)
    finally:
        torch.set_num_threads(before)
    assert {key[2] for key in engine._runner._workspaces._workspaces} == {1, 2, before}


def test_larger_steps_and_other_models_run_as_they_are(llama_dir, tmp_path):
    engine = small_engine(llama_dir)
    assert engine._runner._workspaces.get(engine._cache, MAX_SEQS + 1, 1) is None
    assert engine._runner._workspaces.get(engine._cache, MAX_SEQS, 1) is not None
    assert small_engine(llama_dir, fuse=False)._runner._workspaces is None
    tiny_models.save("opt", tmp_path)
    assert small_engine(str(tmp_path))._runner._workspaces is None


def test_buffers_of_all_sizes_share_memory(seed):
    """A smaller step writes where a larger one did, so that no new page is mapped; names keep apart."""
    rng, buffers, largest = random.Random(seed), Buffers(torch.float32), 0
    for _ in range(20):
        num_rows = rng.randint(1, 100)
        addresses = {name: memory.data_ptr() for name, memory in buffers._memory.items()}
        buffer = buffers.of(num_rows)
        names = [("a", 5), ("a", 7), ("b", 5)]
        for number, (name, columns) in enumerate(names):
            rows = buffer(name, columns)
            assert rows.shape == (num_rows, columns)
            assert rows.is_contiguous()
            assert num_rows > largest or rows.data_ptr() == addresses[name, columns]
            rows.fill_(number)
        assert [float(buffer(*name).unique()) for name in names] == [0, 1, 2]
        largest = max(largest, num_rows)


def test_few_workspaces_are_kept(llama_dir):
    engine = small_engine(llama_dir)
    workspaces = engine._runner._workspaces
    first = workspaces.get(engine._cache, 1, 1)
    for num_seqs in range(1, MAX_SEQS + 1):
        for width in (1, 2, 3, 4):
            workspaces.get(engine._cache, num_seqs, width)
    assert len(workspaces._workspaces) <= 64
    assert workspaces.get(engine._cache, 1, 1) is not first


def test_a_tape_stops_where_a_kernel_refuses(seed):
    """The slots of the second call are changed after the recording; the third call is not made."""
    torch.manual_seed(seed)
    caches = [torch.zeros(2, 2, 1, 8, 8) for _ in range(3)]
    key, slots = torch.randn(1, 1, 8), [torch.tensor([i]) for i in range(3)]
    with torch.inference_mode(), recorded() as calls:
        for cache, slot in zip(caches, slots):
            cupaged.reshape_and_cache(key, key, cache, slot)
    tape = Tape(calls)
    assert len(tape) == 3
    for cache in caches:
        cache.zero_()
    slots[0][0] = 5
    assert tape.replay()
    for cache, slot in zip(caches, (5, 1, 2)):
        assert torch.equal(cache[0, :, 0, slot], key[0].expand(2, -1))
        cache.zero_()
    slots[1][0] = 16
    assert not tape.replay()
    assert [bool(cache.any()) for cache in caches] == [True, False, False]
