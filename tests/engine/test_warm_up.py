"""After the warm-up nothing is compiled any more: a request would wait for it."""

from __future__ import annotations

import gc
import random

import pytest
from numba.core.ccallback import CFunc

from cupaged.backends.cpu import packed_weight, prepared, tape
from cupaged.engine import SamplingParams
from cupaged.layout import Layout

from .harness import finish, small_engine


def forget_kernels() -> None:
    """Forget what other tests have compiled in this process."""
    for kernels in (prepared.kernel_of, packed_weight._kernel, tape._player):
        kernels.cache_clear()
    for layout in gc.get_objects():
        if type(layout) is Layout:
            layout.prepared = None


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_what_requests_meet_is_compiled_before_them(llama_dir, monkeypatch, seed, kv_cache_dtype):
    """Forks that write, swaps in both directions, prefix hits, beams, prompts in chunks."""
    draw = random.Random(seed)
    forget_kernels()
    compiled, compile_one = [], CFunc.compile

    def noted(self):
        compiled.append(self.__qualname__)
        compile_one(self)

    monkeypatch.setattr(CFunc, "compile", noted)
    settings = {"num_gpu_blocks_override": 17, "preemption_mode": "swap", "kv_cache_dtype": kv_cache_dtype}
    engine = small_engine(llama_dir, max_num_batched_tokens=16, **settings)
    engine.warm_up()
    assert compiled, "nobody noticed"
    compiled.clear()

    moved = {"swap_out": 0, "swap_in": 0, "copies": 0}
    move_blocks = engine._cache.move_blocks

    def counted(plan):
        for kind in moved:
            moved[kind] += len(getattr(plan, kind))
        move_blocks(plan)

    monkeypatch.setattr(engine._cache, "move_blocks", counted)
    beginning = [draw.randrange(3, 60) for _ in range(20)]
    kinds = [{"n": 3, "temperature": 1}, {"n": 3, "beam_width": 3}, {}, {"logprobs": 2}]
    for i in range(8):
        params = SamplingParams(**{"temperature": 0, "max_tokens": 30, "ignore_eos": True, **kinds[i % 4]})
        engine.add_request(str(i), {"prompt_token_ids": [*beginning, draw.randrange(3, 60)]}, params)
    finish(engine)
    assert all(moved.values()), moved
    assert engine.stats().prefix_cache_hits
    assert compiled == []
