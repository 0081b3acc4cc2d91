"""A model divided among ranks computes what it computes on one device, whatever the scheduler does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from cupaged.engine import EngineConfig, LLMEngine, SamplingParams
from cupaged.engine.distributed.launch import RankGroup
from cupaged.engine.distributed.packet import HEADER_BYTES
from tests import tiny_models

from .harness import SMALL, Reference, run
from .sweep import save

CLOSE = 1e-5  # relative to a row's largest logit
NUM_REQUESTS = 6
SIZE = 2


@pytest.fixture(scope="module")
def group():
    """The ranks, which the engines of this module use in turn: a process takes seconds to start."""
    config = EngineConfig(tensor_parallel_size=SIZE, device="cpu", distributed_timeout_seconds=120)
    ranks = RankGroup(config, torch.device("cpu"))
    yield ranks
    ranks.close()
    assert ranks.failure is None


def divided(directory: str, group: RankGroup, **settings: Any) -> LLMEngine:
    size = group.ranks.size
    return LLMEngine(directory, EngineConfig(**{**SMALL, "tensor_parallel_size": size, **settings}), group)


def requests(seed: int) -> dict[str, Any]:
    """Half of the prompts begin alike; one output has a sibling, and one is of a beam."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(2, tiny_models.PAD, (count,), generator=generator).tolist()

    prefix = draw(16)
    prompts = [prefix * (i % 2) + draw(5 + 7 * i) for i in range(NUM_REQUESTS)]
    params = [SamplingParams(temperature=0, max_tokens=20, ignore_eos=True) for _ in prompts]
    params[1] = SamplingParams(n=2, max_tokens=12, seed=seed, ignore_eos=True)
    params[2] = SamplingParams(temperature=0, beam_width=3, n=2, max_tokens=8, ignore_eos=True)
    return {
        str(i): ({"prompt_token_ids": prompt}, of) for i, (prompt, of) in enumerate(zip(prompts, params))
    }


def watch_logits(engine: LLMEngine, reference: Reference) -> list[float]:
    """Let an engine sample from a reference's logits; return the distances of its own, relative."""
    compute, distances = engine._runner.run, []

    def checked(scheduled, *arguments):
        logits = compute(scheduled, *arguments)
        sampling = [item for item in scheduled if item.num_samples]
        if not sampling:
            return logits
        known = [reference.logits(i.seq.token_ids[: i.start + i.num_tokens]) for i in sampling]
        expected = torch.stack(known)
        distances.append(float(((logits - expected).abs().amax(-1) / expected.abs().amax(-1)).max()))
        return expected

    engine._runner.run = checked
    return distances


def tokens(outputs: dict[str, Any]) -> dict[str, list[list[int]]]:
    return {name: [one.token_ids for one in output.outputs] for name, output in outputs.items()}


def assert_computes_the_same(directory: str, group: RankGroup, seed: int, **settings: Any) -> None:
    """Assert that logits are close and tokens equal, with preemptions and prefix hits."""
    reference = Reference(directory)
    found = []
    for engine in (
        divided(directory, group, **settings),
        LLMEngine(directory, EngineConfig(**{**SMALL, **settings})),
    ):
        distances = watch_logits(engine, reference)
        outputs = run(engine, requests(seed))
        assert max(distances) <= CLOSE
        stats = engine.stats()
        assert stats.num_preemptions > 0
        assert stats.prefix_cache_hits > 0
        found.append(tokens(outputs))
        engine.close()
    assert found[0] == found[1]


def test_outputs_are_those_of_one_rank(llama_dir, group, seed):
    assert_computes_the_same(llama_dir, group, seed, preemption_mode="swap")
