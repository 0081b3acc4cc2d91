"""The engine's settings: what is refused, and that each is honoured."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from cupaged.engine import LLM, EngineConfig, SamplingParams
from cupaged.engine.model import cache_size
from cupaged.engine.model.kv_cache import KVShape
from cupaged.engine.sampling.sampler import Sampler
from tests import tiny_models

BAD = {
    "block_size": [0, 12, 512, 16.0, "16", None, True],
    "gpu_memory_utilization": [0, -0.1, 1.5, math.nan, "0.9", None, True],
    "num_gpu_blocks_override": [0, -1, 2.5, "8", True],
    "swap_space": [-1, math.nan, math.inf, "4", None, True],
    "max_num_seqs": [0, 1.5, None, "8", True],
    "max_num_batched_tokens": [0, 2048.0, None, True],
    "max_model_len": [0, 1, -5, 1.5, "128", True],
    "preemption_mode": ["drop", None, 1],
    "scheduling_policy": ["lifo", None, 1],
    "memory_policy": ["orca", None, 1],
    "batching": ["dynamic", None, True],
    "eviction_policy": ["fifo", "", None, 1],
    "enable_prefix_caching": ["yes", None, 1],
    "dtype": ["int8", "half", None, torch.float16],
    "kv_cache_dtype": ["bfloat16", "int4", None, torch.int8],
    "seed": [1.5, "x", None, True],
    "generation_config": ["", None, 5, True],
    "trust_remote_code": ["yes", None, 1],
    "device": [5, True, torch.device("cpu")],
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_setting_is_refused_by_name(name):
    for value in BAD[name]:
        with pytest.raises(ValueError, match=rf"^{name} must be .*, got "):
            EngineConfig(**{name: value})


def test_settings_that_contradict_each_other_or_do_not_exist():
    with pytest.raises(ValueError, match=r"max_num_batched_tokens \(100\) must be at least max_num_seqs"):
        EngineConfig(max_num_batched_tokens=100)
    with pytest.raises(ValueError, match="no setting is called 'tensor_parallel'; there are block_size, "):
        LLM("no-such-model", tensor_parallel=2)


SHAPE = KVShape(num_layers=30, num_kv_heads=3, block_size=16, head_size=64, dtype=torch.bfloat16)


def test_swap_space_is_gib_and_never_more_than_the_cache():
    def blocks(gib: float, gpu_blocks: int = 10**6, mode: str = "swap") -> int:
        config = EngineConfig(swap_space=gib, preemption_mode=mode)
        return cache_size.num_cpu_blocks(config, SHAPE, gpu_blocks)

    assert SHAPE.block_bytes == 30 * 2 * 3 * 16 * 64 * 2
    assert blocks(1) == 2**30 // SHAPE.block_bytes
    assert blocks(2.5) == int(2.5 * 2**30) // SHAPE.block_bytes
    assert blocks(4, gpu_blocks=100) == 100
    assert blocks(0) == 0
    assert blocks(4, mode="recompute") == 0


def test_gpu_memory_utilization_is_a_share_of_all_memory(monkeypatch):
    """Weights and the largest step take 30 GiB of 80, graphs 3, other processes 5."""
    gib = 2**30
    runner = SimpleNamespace(
        device=torch.device("cuda"), kv_shape=lambda *_: SHAPE, graph_bytes=lambda *_: 3 * gib
    )
    cache = SimpleNamespace(blocks=SimpleNamespace(nbytes=2 * gib))
    monkeypatch.setattr(cache_size, "dry_run", lambda *_, **__: cache)
    for name, value in {
        "reset_peak_memory_stats": None,
        "synchronize": None,
        "empty_cache": None,
        "max_memory_allocated": 32 * gib,  # the profiling run's own cache included
        "memory_reserved": 33 * gib,
        "mem_get_info": (42 * gib, 80 * gib),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)

    def blocks(share: float, **settings) -> int:
        config = EngineConfig(gpu_memory_utilization=share, max_num_seqs=2048, **settings)
        return cache_size.num_gpu_blocks(config, runner, SHAPE, max_model_len=8192)

    assert blocks(0.9) == int((80 * 0.9 - 30 - 3 - 5) * gib) // SHAPE.block_bytes
    assert blocks(0.5, enforce_eager=True) == int((80 * 0.5 - 30 - 5) * gib) // SHAPE.block_bytes
    with pytest.raises(ValueError, match=r"no memory is left .* raise gpu_memory_utilization"):
        blocks(0.4)


def test_the_cache_is_no_larger_than_the_sequences_can_use(monkeypatch):
    monkeypatch.setattr(cache_size, "_available_cpu_bytes", lambda: 64 * 2**30)
    runner = SimpleNamespace(device=torch.device("cpu"))
    for running, useful in ((21, 22), (99 * 7, 100 * 7 + 1)):  # a hundredth stays free while requests run
        config = EngineConfig(max_num_seqs=running // 7, enable_prefix_caching=False)
        assert cache_size.num_gpu_blocks(config, runner, SHAPE, max_model_len=100) == useful
        config = EngineConfig(max_num_seqs=running // 7)
        assert cache_size.num_gpu_blocks(config, runner, SHAPE, max_model_len=100) == 2 * useful
    assert cache_size.num_gpu_blocks(EngineConfig(), runner, SHAPE, 8192) == 4 * 2**30 // SHAPE.block_bytes
    assert cache_size.num_gpu_blocks(EngineConfig(num_gpu_blocks_override=5), runner, SHAPE, 8192) == 5


@pytest.mark.parametrize(
    ("seqs", "tokens", "longest", "lengths"),
    [
        (4, 10, 100, [3, 3, 2, 2]),
        (4, 1000, 5, [5] * 4),  # no sequence is longer than the model takes
        (4, 4, 100, [1] * 4),
        (1, 10, 100, [10]),
    ],
)
def test_the_largest_step_has_all_tokens_and_all_sequences(seqs, tokens, longest, lengths):
    config = EngineConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens)
    assert cache_size.largest_step(config, longest) == lengths


def test_the_largest_step_is_one_that_a_model_can_run(tmp_path, monkeypatch):
    """A model with a table of positions ends at its last one; all sequences that run are sampled for."""
    engine = LLM(tiny_models.save("gpt2", tmp_path / "gpt2"), device="cpu", num_gpu_blocks_override=20).engine
    sampled = []
    sample = Sampler.sample

    def record(self, logits, scheduled):
        output = sample(self, logits, scheduled)
        sampled.append(sum(map(len, output.token_ids)))
        return output

    monkeypatch.setattr(Sampler, "sample", record)
    for name in ("reset_peak_memory_stats", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    for name in ("max_memory_allocated", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2**30, 2**30))
    config = EngineConfig(max_num_seqs=12, max_num_batched_tokens=12 * 300)
    assert tiny_models.MAX_LEN < 300
    free = cache_size._free_gpu_bytes(config, engine._runner, tiny_models.MAX_LEN)
    assert sampled == [12]
    cache = 12 * -(-tiny_models.MAX_LEN // 16) * engine._runner.kv_shape(16).block_bytes
    assert free == int(0.9 * 2**30) + cache  # the dry run's own cache is no part of the peak


def test_all_sequences_run_at_their_longest(llama_dir):
    """The memory found by itself has room for them, and for what comes later and begins alike."""
    settings = {"device": "cpu", "max_num_seqs": 2, "max_num_batched_tokens": 1024}
    llm = LLM(llama_dir, **settings)
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    prompts = [{"prompt_token_ids": [first] * 250} for first in (1, 2)]
    for i, prompt in enumerate(prompts):
        llm.engine.add_request(str(i), prompt, params)
    llm.engine.step()
    assert llm.engine.stats().num_running == 2
    while llm.engine.has_unfinished():
        llm.engine.step()
    llm.generate([{"prompt_token_ids": [3] * 250}], params, use_tqdm=False)
    before = llm.engine.stats().prefix_cache_hits
    llm.generate(prompts, params, use_tqdm=False)
    assert llm.engine.stats().prefix_cache_hits - before == 2 * 240


def test_what_is_available_to_a_cpu_counts_what_the_page_cache_gives_back(monkeypatch):
    available = SimpleNamespace(available=8 * 2**30, free=2**30)
    monkeypatch.setattr("psutil.virtual_memory", lambda: available)
    monkeypatch.setattr(cache_size.cgroup, "available_bytes", lambda: None)
    runner = SimpleNamespace(device=torch.device("cpu"))
    assert cache_size.num_gpu_blocks(EngineConfig(), runner, SHAPE, 8192) == 2 * 2**30 // SHAPE.block_bytes
    available.available = 2**20
    with pytest.raises(ValueError, match=r"no memory is left for the KV cache: .*free memory"):
        cache_size.num_gpu_blocks(EngineConfig(), runner, SHAPE, 8192)


def test_the_engine_follows_its_settings(llama_dir, caplog):
    settings = {"device": "cpu", "block_size": 32, "num_gpu_blocks_override": 6, "dtype": "bfloat16"}
    engine = LLM(llama_dir, **settings, preemption_mode="swap", swap_space=0.001).engine
    assert engine._cache.blocks.shape == (6, 3, 2, 2, 32, 16)
    assert engine._cache.blocks.dtype == torch.bfloat16
    assert engine._cache.swap_space.shape[0] == min(6, int(0.001 * 2**30) // engine._cache.shape.block_bytes)
    assert engine.max_model_len == 6 * 32  # less than the model's 256: what the cache holds
    assert "sequences end at 192 tokens, which the KV cache holds, not at 256" in caplog.text
    assert LLM(llama_dir, device="cpu", max_model_len=64).engine.max_model_len == 64
    assert LLM(llama_dir, device="cpu").engine._cache.blocks.dtype == torch.float32  # as the checkpoint
    with pytest.raises(ValueError, match="max_model_len is 300, and the model was made for 256 tokens"):
        LLM(llama_dir, device="cpu", max_model_len=300)
    with pytest.raises(ValueError, match="max_model_len is 200, and the KV cache holds 192 tokens"):
        LLM(llama_dir, **settings, max_model_len=200)
