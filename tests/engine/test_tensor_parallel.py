"""A model divided among ranks computes what it computes on one device, whatever the scheduler does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from cupaged.engine import EngineConfig, LLMEngine, SamplingParams
from cupaged.engine.distributed.launch import RankGroup
from cupaged.engine.distributed.packet import HEADER_BYTES
from cupaged.engine.model.tensor_parallel import VocabParallelEmbedding
from tests import tiny_models

from .harness import SMALL, Reference, run

CLOSE = 1e-5  # distance of a row of logits, relative to its length
NUM_REQUESTS = 6
FEW = {"num_gpu_blocks_override": 16}  # of some of the requests
SIZE = 2


@pytest.fixture(scope="module")
def group():
    """Start the ranks, which the engines of this module use in turn: a process takes seconds to start."""
    config = EngineConfig(tensor_parallel_size=SIZE, device="cpu", distributed_timeout_seconds=300)
    ranks = RankGroup(config, torch.device("cpu"))
    yield ranks
    ranks.close()
    assert ranks.failure is None


def divided(directory: str, group: RankGroup, **settings: Any) -> LLMEngine:
    settings = {**SMALL, **FEW, "tensor_parallel_size": group.ranks.size, **settings}
    return LLMEngine(directory, EngineConfig(**settings), group)


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
    return {str(i): ({"prompt_token_ids": prompt}, of) for i, (prompt, of) in enumerate(zip(prompts, params))}


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
        distances.append(float(((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).max()))
        return expected

    engine._runner.run = checked
    return distances


def tokens(outputs: dict[str, Any]) -> dict[str, list[list[int]]]:
    return {name: [one.token_ids for one in output.outputs] for name, output in outputs.items()}


def assert_computes_the_same(directory: str, group: RankGroup, seed: int, **settings: Any) -> None:
    """Assert that logits are close and tokens equal, with preemptions and prefix hits."""
    reference = Reference(directory)
    found, farthest = [], []
    for engine in (
        divided(directory, group, **settings),
        LLMEngine(directory, EngineConfig(**{**SMALL, **FEW, **settings})),
    ):
        distances = watch_logits(engine, reference)
        outputs = run(engine, requests(seed))
        farthest.append(max(distances))
        stats = engine.stats()
        assert stats.num_preemptions > 0
        assert stats.prefix_cache_hits > 0
        found.append(tokens(outputs))
        engine.close()
    assert found[0] == found[1]
    # After some tokens the model makes more of rounding, also of that on one rank.
    assert farthest[0] <= max(CLOSE, 2 * farthest[1])


def test_outputs_are_those_of_one_rank(llama_dir, group, seed):
    assert_computes_the_same(llama_dir, group, seed, preemption_mode="swap")


@pytest.mark.matrix
@pytest.mark.parametrize(
    "settings",
    [
        {"preemption_mode": "recompute"},
        {"preemption_mode": "swap", "fuse": False},
        {"preemption_mode": "auto"},
    ],
    ids=str,
)
def test_outputs_are_those_of_one_rank_with(llama_dir, group, seed, settings):
    assert_computes_the_same(llama_dir, group, seed, **settings)


@pytest.mark.matrix
@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_steps_that_are_launched_ahead_give_the_same_tokens(llama_dir, group, seed, mode):
    """The other ranks get the sampled tokens that the host does not know yet from rank 0's device."""
    found = []
    for ahead in (False, True):
        engine = divided(llama_dir, group, preemption_mode=mode, async_scheduling=ahead)
        found.append(tokens(run(engine, requests(seed))))
        assert engine.stats().num_preemptions > 0
        engine.close()
    assert found[0] == found[1]


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_a_quantised_cache_has_the_scales_of_its_heads(llama_dir, group, seed, kind):
    """Outputs are equal, as each rank quantises its heads as one rank does."""
    settings = {"kv_cache_dtype": kind, "preemption_mode": "swap"}
    found = []
    for engine in (
        divided(llama_dir, group, **settings),
        LLMEngine(llama_dir, EngineConfig(**{**SMALL, **FEW, **settings})),
    ):
        outputs = run(engine, requests(seed))
        found.append((tokens(outputs)["0"], engine._cache.scales))
        engine.close()
    (of_rank, scales), (of_one, all_scales) = found
    assert of_rank == of_one
    for own, every in zip(scales, all_scales):
        for mine, whole in zip(own, every):
            torch.testing.assert_close(mine, whole[: len(mine)], rtol=CLOSE, atol=0)


def test_a_step_is_one_buffer_and_two_sums_a_layer(llama_dir, group, monkeypatch):
    """Count what docs/tensor_parallel.md predicts times from: a step's operations, and their bytes."""
    engine = divided(llama_dir, group)
    seen: list[tuple[str, int]] = []

    def count(name: str, tensor_of) -> None:
        original = getattr(dist, name)

        def counted(*args, **kwargs):
            seen.append((name, tensor_of(args).nbytes))
            return original(*args, **kwargs)

        monkeypatch.setattr(dist, name, counted)

    count("all_reduce", lambda args: args[0])
    count("all_gather", lambda args: args[1])
    count("broadcast", lambda args: args[0])
    count("barrier", lambda args: torch.empty(0))
    prompts = [[5] * 3, [6] * 7, [9] * 4]
    for i, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
    layers, hidden, vocabulary, item = 3, 64, tiny_models.VOCAB, 4
    leader = engine.ranks.group.leader
    for step, num_tokens in enumerate((14, 3, 3, 3)):
        seen.clear()
        sent = leader.bytes_sent
        engine.step()
        assert seen[0] == ("broadcast", 1 << 16)
        # Token, position and slot; a row of logits, a length, a start and a block table of each sequence.
        table = 4 * -(-(7 + step) // SMALL["block_size"])
        assert leader.bytes_sent - sent == HEADER_BYTES + 24 * num_tokens + 3 * (8 + 4 + 4 + table) + 4
        sums = [("all_reduce", num_tokens * hidden * item)] * (divides_embedding(engine) + 2 * layers)
        assert seen[1:-1] == sums
        assert seen[-1] == ("all_gather", 3 * vocabulary // SIZE * item)
    engine.close()


def test_weights_and_cache_are_halved(llama_dir, group):
    whole = LLMEngine(llama_dir, EngineConfig(**{**SMALL, **FEW}))
    part = divided(llama_dir, group)
    assert part._cache.blocks.nbytes * SIZE == whole._cache.blocks.nbytes
    assert part._cache.blocks.shape[0] == whole._cache.blocks.shape[0]
    on_every_rank = 7 * 64  # the norms
    if not divides_embedding(part):
        on_every_rank += tiny_models.VOCAB * 64
    assert (num_weights(part) - on_every_rank) * SIZE == num_weights(whole) - on_every_rank
    part.close()


def divides_embedding(engine: LLMEngine) -> bool:
    """Return whether transformers' plan divides the embedding, which older ones do not."""
    return isinstance(engine._runner._model.get_input_embeddings(), VocabParallelEmbedding)


def num_weights(engine: LLMEngine) -> int:
    """Count the elements of all weights, packed ones too."""
    modules = [m for m in engine._runner._model.modules() if not m._modules]
    return sum(m.weight.numel() for m in modules if getattr(m, "weight", None) is not None)


def test_a_long_step_is_sent_whole(llama_dir, group):
    """Its buffer is longer than what is sent at once."""
    settings = {"num_gpu_blocks_override": 600, "max_num_batched_tokens": 4096, "max_num_seqs": 64}
    engine = divided(llama_dir, group, **settings)
    whole = LLMEngine(llama_dir, EngineConfig(**{**SMALL, **FEW, **settings}))
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=1)
    prompts = {str(i): ({"prompt_token_ids": [2 + i] * 100}, params) for i in range(40)}
    sent = engine.ranks.group.leader.bytes_sent
    outputs = [run(of, prompts) for of in (engine, whole)]
    assert engine.ranks.group.leader.bytes_sent - sent > 1 << 16
    found, expected = ([output.outputs[0].cumulative_logprob for output in of.values()] for of in outputs)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    engine.close()


def test_a_failing_sampler_does_not_end_the_ranks(llama_dir, group, monkeypatch):
    """Its error comes when all ranks have computed the step; the model's error ends the engine."""
    engine = divided(llama_dir, group)
    original = engine._sampler.launch
    failures = iter([True])

    def launch(*args):
        if next(failures, False):
            raise ValueError("planted")
        return original(*args)

    monkeypatch.setattr(engine._sampler, "launch", launch)
    engine.add_request("x", {"prompt_token_ids": [5, 6, 7]}, SamplingParams(temperature=0, max_tokens=3))
    with pytest.raises(ValueError, match="planted"):
        engine.step()
    engine.probe()
    assert len(run(engine, {})["x"].outputs[0].token_ids) == 3
    engine.close()
