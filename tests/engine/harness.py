"""An engine over a tiny model, with poison in every block that holds nothing."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

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


class Reference:
    """Knows a model's logits as transformers computes them, for one sequence and without a cache.

    An engine that samples from them, and not from its own, gives equal tokens for equal requests in every
    batch, bit for bit. Its own logits differ by their rounding, which turns an answer where two tokens are as
    likely as each other: in one run of some hundred tokens out of a thousand.
    """

    def __init__(self, directory: str) -> None:
        model = tf.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
        self._model = model.eval()
        self._known: dict[tuple[int, ...], torch.Tensor] = {}

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Return the logits after these tokens, float32 [vocabulary]."""
        key = tuple(tokens)
        if key not in self._known:
            with torch.no_grad():
                self._known[key] = self._model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        return self._known[key]

    def replace_logits(self, engine: LLMEngine) -> None:
        """Let the engine sample from these logits, to which its own have to be close."""
        run = engine._runner.run

        def checked(scheduled, blocks, cache, sampled=None):
            logits = run(scheduled, blocks, cache, sampled)
            expected = []
            for item in scheduled:
                tokens = item.seq.token_ids[: item.start + item.num_tokens]
                if tokens[-1] < 0:  # the host does not know it yet
                    tokens[-1] = int(sampled[-1 - tokens[-1]])
                if item.num_samples:
                    expected.append(self.logits(tokens))
            if expected:
                torch.testing.assert_close(logits, torch.stack(expected), rtol=1e-3, atol=1e-3)
                logits = torch.stack(expected)
            return logits

        engine._runner.run = checked


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
    structured = sampler._structured
    assert not sampler._grammars
    assert not structured._states
    assert sorted(structured._free) == list(range(len(structured._masks)))
    assert len(sampler._penalties._free) == len(sampler._penalties._seen)
    assert not any(tables.on_gpu or tables.swapped for tables in engine._blocks.layers)
