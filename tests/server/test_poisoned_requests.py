"""Requests whose forward fails end alone; all others get what they would have got without them."""

from __future__ import annotations

import asyncio
import math
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from cupaged.engine import EngineConfig, LLMEngine, SamplingParams
from cupaged.engine.server.async_engine import AsyncEngine, StepFailedError
from tests.engine.harness import SMALL, Reference, assert_clean

from .conftest import Running
from .test_failed_steps import POISON, ask, assert_server_error, assert_well, plant, poisoned, text

SETTINGS = {
    "plain": {},
    "chunks": {"max_num_batched_tokens": 10},
    "no prefix cache": {"enable_prefix_caching": False},
    "swapping": {"num_gpu_blocks_override": 17, "preemption_mode": "swap"},
    "recomputing": {"num_gpu_blocks_override": 17, "preemption_mode": "recompute"},
    "ahead": {"async_scheduling": True, "num_gpu_blocks_override": 17, "preemption_mode": "swap"},
}


def requests(draw: random.Random) -> dict[str, tuple[list[int], SamplingParams]]:
    """Some share beginnings, some are groups of outputs or beams."""
    beginnings = [[draw.randrange(3, 60) for _ in range(24)] for _ in range(2)]
    found = {}
    for i in range(draw.randint(3, 14)):
        prompt = draw.choice(beginnings)[: draw.choice([0, 8, 16, 24])]
        prompt = prompt + [draw.randrange(3, 60) for _ in range(draw.randint(1, 12))]
        more = draw.choice([{}, {}, {}, {"n": 2}, {"n": 2, "beam_width": 2}])
        params = SamplingParams(
            temperature=0, ignore_eos=True, max_tokens=draw.randint(1, 20), seed=i, **more
        )
        if draw.random() < 0.2:
            params = SamplingParams(temperature=1, max_tokens=12, seed=i, repetition_penalty=1.3)
        found[f"r{i}"] = (prompt, params)
    return found


def serve(engine: LLMEngine, wanted, later=()) -> dict[str, object]:
    """What becomes of the requests: their outputs' tokens, or the error."""
    served, found = AsyncEngine(engine), {}

    async def one(name: str) -> None:
        if name in later:
            await asyncio.sleep(0.05)
        prompt, params = wanted[name]
        try:
            async for output in served.generate(name, {"prompt_token_ids": prompt}, params):
                found[name] = [list(one.token_ids) for one in output.outputs]
        except StepFailedError as error:
            found[name] = error

    async def all_of_them() -> None:
        await asyncio.gather(*map(one, wanted))

    served.start()
    try:
        asyncio.run(all_of_them())
    finally:
        served.stop()
    assert_clean(engine)
    return found


@pytest.fixture(scope="module")
def reference(llama_dir) -> Reference:
    return Reference(llama_dir)


@pytest.mark.thinned
@pytest.mark.parametrize("kind", ["always", "after some tokens", "passing", "pair", "sampler"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_others_are_as_if_nothing_had_failed(llama_dir, reference, seed, name, kind):
    draw = random.Random(seed)
    settings = {**SMALL, **SETTINGS[name]}
    wanted = requests(draw)
    names = list(wanted)
    culprits = set(draw.sample(names, draw.randint(1, 3)))
    threshold = {culprit: draw.randint(1, 12) if kind == "after some tokens" else 0 for culprit in culprits}
    undisturbed, engine = (LLMEngine(llama_dir, EngineConfig(**settings)) for _ in range(2))
    for one in (undisturbed, engine):
        reference.replace_logits(one)
    expected = serve(undisturbed, wanted)
    target = engine._sampler if kind == "sampler" else engine._runner
    method = "launch" if kind == "sampler" else "run"
    original, failures = getattr(target, method), []

    def planted(*arguments):
        scheduled = arguments[1 if kind == "sampler" else 0]
        bad = {
            item.group.request_id
            for item in scheduled
            if item.group.request_id in culprits
            and len(item.seq.token_ids) - item.seq.prompt_len >= threshold[item.group.request_id]
        }
        fails = bool(bad)
        if kind == "pair":
            fails = len({item.group.request_id for item in scheduled}) > 2
        elif kind == "passing":
            fails = fails and len(failures) % 2 == 0 and draw.random() < 0.5
            failures.extend([0] if not fails and len(failures) % 2 else [])
        if fails:
            engine.check_integrity()
            failures.append(len({item.group.request_id for item in scheduled}))
            original(*arguments)  # what it writes does no harm
            raise RuntimeError("planted")
        return original(*arguments)

    setattr(target, method, planted)
    found = serve(engine, wanted, later=draw.sample(names, 2))
    if kind in ("pair", "passing"):
        culprits = set()
    elif kind == "after some tokens":
        reaching = {n: max(map(len, tokens)) for n, tokens in expected.items()}
        culprits = {n for n in culprits if reaching[n] > threshold[n]}
    assert {n for n, result in found.items() if isinstance(result, StepFailedError)} == culprits
    assert {n: r for n, r in found.items() if n not in culprits} == {
        n: r for n, r in expected.items() if n not in culprits
    }
    if kind in ("always", "sampler", "after some tokens"):
        assert len(failures) <= len(culprits) * (math.ceil(math.log2(len(wanted))) + 4)


def test_eight_of_48_requests_fail_and_40_are_answered(llama_dir, monkeypatch):
    """Over HTTP, some as streams."""
    fields = [
        {"prompt": f"{i} po~ison" if i % 6 == 1 else f"{i} is well", "stream": i % 5 == 0, "max_tokens": 30}
        for i in range(48)
    ]
    with Running(llama_dir, max_num_seqs=64, max_num_batched_tokens=512) as server:
        with ThreadPoolExecutor(48) as threads:
            expected = [text(answer) for answer in threads.map(lambda body: ask(server, **body), fields)]
            failed = plant(monkeypatch, server.engine, poisoned)
            answers = list(threads.map(lambda body: ask(server, **body), fields))
        for i, (answer, whole) in enumerate(zip(answers, expected)):
            if i % 6 == 1:
                assert_server_error(answer)
            else:
                assert text(answer) == whole
        assert max(failed) > 8, "they did not run together"
        assert len(failed) <= 8 * (6 + 3)
        assert_well(server)


def test_a_prefix_that_fails_is_let_go(llama_dir, monkeypatch):
    with Running(llama_dir) as server:
        server.engine.add_prefix("bad", {"prompt_token_ids": [POISON] * 16})
        plant(monkeypatch, server.engine, poisoned)
        assert len(text(ask(server))) > 0
        assert not server.engine._scheduler.pinned.groups
        assert_well(server)
