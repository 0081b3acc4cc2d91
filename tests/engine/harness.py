"""An engine over a tiny model, with poison in every block that holds nothing."""

from __future__ import annotations

from typing import Any

import torch

from cupaged.engine import EngineConfig, LLMEngine, RequestOutput, SamplingParams

SMALL: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "block_size": 8,
    "num_gpu_blocks_override": 24,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 32,
    "max_model_len": 128,
    "swap_space": 0.25,
    "check_integrity": True,
}


class PoisonedEngine(LLMEngine):
    """Fills empty blocks, on the GPU and in the swap space, with NaN before every step; a cache of int8 with
    -128, which is no code."""

    def step(self) -> list[RequestOutput]:
        memories = (self._cache.blocks, self._blocks.gpu), (self._cache.swap_space, self._blocks.cpu)
        for memory, pool in memories:
            empty = pool.empty_blocks()
            if memory.dtype.itemsize == 1:
                memory.view(torch.uint8)[empty] = 0x80 if memory.dtype == torch.int8 else 0x7F
            else:
                memory[empty] = torch.nan
        return super().step()


def small_engine(directory: str, **settings: Any) -> PoisonedEngine:
    return PoisonedEngine(directory, EngineConfig(**{**SMALL, **settings}))


def run(engine: LLMEngine, requests: dict[str, tuple[Any, SamplingParams]]) -> dict[str, RequestOutput]:
    """Add all, step to the end."""
    for request_id, (prompt, params) in requests.items():
        engine.add_request(request_id, prompt, params)
    return finish(engine)


def finish(engine: LLMEngine) -> dict[str, RequestOutput]:
    """Step to the end; the last outputs of every request that finished on the way."""
    finished = {}
    while engine.has_unfinished():
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output
    assert_clean(engine)
    return finished


def assert_clean(engine: LLMEngine) -> None:
    """Nothing is left of any request."""
    engine.check_integrity()
    stats = engine.stats()
    assert stats.gpu_cache_usage == stats.cpu_cache_usage == 0
    assert stats.num_running == stats.num_waiting == stats.num_swapped == 0
    assert not engine._groups
    assert not engine._processor._states
    assert not engine._processor._prompts
    sampler = engine._sampler
    assert not sampler._row_of
    assert sorted(sampler._free) == list(range(len(sampler._settings)))
    assert not any(
        len(of._rows) for of in (sampler._allowed, sampler._ending, sampler._biases, sampler._bad_words)
    )
    assert len(sampler._penalties._free) == len(sampler._penalties._seen)
    assert not engine._blocks._tables
    assert not engine._blocks._swapped
