"""`LLM` and `AsyncLLM` as users hold them: their life and memory, beam search, outputs in asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import weakref

import pytest
import torch

from cupaged.engine import LLM, AsyncLLM, BeamSearchParams, EngineConfig, LLMEngine, SamplingParams
from tests.server.conftest import wait_until

CONFIG = {
    "device": "cpu",
    "block_size": 8,
    "max_num_batched_tokens": 256,
    "num_gpu_blocks_override": 100,
    "check_integrity": True,
}
PROMPTS = ["The blocks of a sequence", "Tell me", {"prompt_token_ids": [5, 6, 7]}]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def memory_of(engine: LLMEngine) -> list[weakref.ref]:
    """References to the tensors of an engine: its cache, its weights."""
    tensors = [engine._cache.blocks, engine._cache.swap_space]
    tensors += [p for p in engine._runner._model.parameters() if p.numel() > 1000]
    return [weakref.ref(tensor.untyped_storage()) for tensor in tensors] + [weakref.ref(t) for t in tensors]


def texts(outputs) -> list[str]:
    return [output.outputs[0].text for output in outputs]


@pytest.fixture(scope="module")
def expected(llama_dir):
    with LLM(llama_dir, **CONFIG) as llm:
        return texts(llm.generate(PROMPTS, GREEDY, use_tqdm=False))


def test_an_llm_gives_its_memory_back(llama_dir, expected):
    with LLM(llama_dir, **CONFIG) as llm:
        assert texts(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected
        memory = memory_of(llm.engine)
        assert all(reference() is not None for reference in memory)
    assert [reference() for reference in memory] == [None] * len(memory)
    for call in (
        lambda: llm.generate("x"),
        lambda: llm.beam_search("x", BeamSearchParams(2, 3)),
        llm.get_default_sampling_params,
        lambda: llm.engine,
    ):
        with pytest.raises(RuntimeError, match="has given its memory back: create a new LLM"):
            call()
    llm.close()  # again


def test_an_llm_that_is_dropped_gives_its_memory_back(llama_dir):
    llm = LLM(llama_dir, **CONFIG)
    memory = memory_of(llm.engine)
    del llm
    gc.collect()
    assert [reference() for reference in memory] == [None] * len(memory)


def test_repr_says_model_device_dtype_and_blocks(llama_dir):
    config = {**CONFIG, "num_gpu_blocks_override": 9, "preemption_mode": "recompute", "dtype": "bfloat16"}
    with LLM(llama_dir, **config) as llm:
        says = f"model={str(llama_dir)!r}, device='cpu', dtype='bfloat16', num_gpu_blocks=9, num_cpu_blocks=0"
        assert repr(llm) == f"LLM({says}, block_size=8)"
    assert repr(llm) == f"LLM({says}, block_size=8, closed)"


def test_beam_search_is_that_of_the_engine(llama_dir):
    settings = {"length_penalty": 0.5, "max_tokens": 6}
    with LLM(llama_dir, **CONFIG) as llm:
        found = llm.beam_search(PROMPTS, BeamSearchParams(beam_width=3, **settings))
        params = SamplingParams(n=3, beam_width=3, temperature=0, **settings)
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        one = llm.beam_search(PROMPTS[0], BeamSearchParams(beam_width=3, **settings))
        tokenizer = llm.engine.tokenizer
        # What the model itself gives the best beam's tokens.
        best = found[0].sequences[0]
        scored = llm.generate(
            {"prompt_token_ids": best.tokens}, SamplingParams(max_tokens=0, prompt_logprobs=0), use_tqdm=False
        )[0]
    for result, output in zip(found, outputs, strict=True):
        assert [s.tokens for s in result.sequences] == [
            [*output.prompt_token_ids, *beam.token_ids] for beam in output.outputs
        ]
        scores = [beam.cumulative_logprob for beam in output.outputs]
        assert [s.cum_logprob for s in result.sequences] == pytest.approx(scores, abs=1e-4)
        assert [s.text for s in result.sequences] == [tokenizer.decode(s.tokens) for s in result.sequences]
        assert {s.finish_reason for s in result.sequences} <= {"stop", "length"}
    assert [s.tokens for s in one[0].sequences] == [s.tokens for s in found[0].sequences]
    length = len(outputs[0].prompt_token_ids)
    positions = list(zip(best.tokens, scored.prompt_logprobs))[length:]
    assert best.cum_logprob == pytest.approx(sum(p[token].logprob for token, p in positions), abs=1e-3)


def test_settings_of_a_beam_search_are_those_of_a_request():
    settings = {"max_tokens": 5, "ignore_eos": True, "temperature": 1.0, "length_penalty": 0.5}
    settings["include_stop_str_in_output"] = True
    params = BeamSearchParams(beam_width=3, **settings).sampling_params()
    assert params == SamplingParams(n=3, beam_width=3, **settings)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"beam_width": 0}, "beam_width"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": 0.5}, "temperature"),
    ],
)
def test_bad_settings_of_a_beam_search(settings, name):
    with pytest.raises(ValueError, match=name):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 3, **settings})


def test_tasks_get_what_an_llm_gives(llama_dir, expected):
    async def last(llm, prompt):
        count = 0
        async for output in llm.generate(prompt, GREEDY):
            newest, count = output, count + 1
        assert newest.finished
        return newest, count

    async def run():
        async with AsyncLLM(llama_dir, **CONFIG) as llm:
            memory = memory_of(llm.engine.engine)
            answers = await asyncio.gather(*(last(llm, prompt) for prompt in PROMPTS))
            assert any(count > 1 for _, count in answers)
            await asyncio.to_thread(wait_until, lambda: llm.stats().generation_tokens == 36)
            assert repr(llm).startswith(f"AsyncLLM(model={str(llama_dir)!r}, device='cpu', dtype='float32'")
        with pytest.raises(RuntimeError, match="create a new AsyncLLM"):
            await anext(llm.generate("x"))
        return [output for output, _ in answers], memory

    outputs, memory = asyncio.run(run())
    assert texts(outputs) == expected
    assert [reference() for reference in memory] == [None] * len(memory)
    assert not [thread for thread in threading.enumerate() if thread.name == "cupaged-engine"]


@pytest.mark.parametrize("how", ["cancel", "break", "aclose"])
def test_a_request_that_is_left_is_aborted(llama_dir, how):
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)

    async def run():
        async with AsyncLLM(llama_dir, **CONFIG) as llm:
            engine = llm.engine.engine
            step = engine.step
            engine.step = lambda: (threading.Event().wait(0.005), step())[1]
            begun = asyncio.Event()

            async def read():
                outputs = llm.generate("x", params, "mine")
                if how == "break":
                    async for _ in outputs:
                        break
                    return
                async with contextlib.aclosing(outputs):
                    async for _ in outputs:
                        begun.set()
                        if how == "aclose":
                            return

            task = asyncio.create_task(read())
            if how == "cancel":
                await begun.wait()
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            gc.collect()  # the generator that was left is closed when nothing refers to it
            await asyncio.to_thread(wait_until, lambda: not engine.request_ids)
            await asyncio.to_thread(wait_until, lambda: llm.stats().gpu_cache_usage == 0)
            assert engine.stats().generation_tokens < 200
            engine.check_integrity()
            del engine.step

    asyncio.run(run())


def test_what_ends_a_request_is_an_error(llama_dir):
    async def run():
        llm = AsyncLLM(llama_dir, **CONFIG)
        with pytest.raises(ValueError, match="prompt must have at least one token"):
            await anext(llm.generate({"prompt_token_ids": []}))
        outputs = llm.generate("x", SamplingParams(max_tokens=200, ignore_eos=True))
        await anext(outputs)
        await asyncio.to_thread(llm.close)
        with pytest.raises(RuntimeError, match="closed during the request"):
            async for _ in outputs:
                pass

    asyncio.run(run())


def test_a_model_that_cannot_be_served_is_refused_at_once(tmp_path, llama_dir):
    with pytest.raises(ValueError, match="no setting is called 'block'"):
        AsyncLLM(llama_dir, block=3)
    with pytest.raises(ValueError, match=r"config\.json"):
        AsyncLLM(str(tmp_path), device="cpu")
    assert not [thread for thread in threading.enumerate() if thread.name == "cupaged-engine"]


def test_the_engine_says_its_dtype(llama_dir):
    engine = LLMEngine(llama_dir, EngineConfig(**CONFIG))
    assert engine.dtype is torch.float32
