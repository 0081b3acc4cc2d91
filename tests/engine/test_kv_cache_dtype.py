"""Quantised KV caches through the engine: what they cost in logits, what they save in memory."""

from __future__ import annotations

import random
from statistics import median
from typing import Any

import pytest
import torch
import transformers as tf
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cupaged import backends
from cupaged.backends import reference
from cupaged.backends.cpu import backend as cpu
from cupaged.engine import EngineConfig, SamplingParams
from cupaged.engine.model import cache_size
from cupaged.engine.model.kv_scales import CALIBRATION_TOKENS, HEADROOM
from cupaged.engine.model.model_runner import ModelRunner
from cupaged.quantisation import LARGEST, dequantise, quantise
from tests import tiny_models

from .harness import SMALL, run, small_engine

NAMES = {"fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2, "int8": torch.int8}


class Transformers:
    """The same model without the engine, its keys and values seen, and rounded to codes where asked."""

    def __init__(self, directory: str) -> None:
        tf.AttentionInterface.register("rounding", self._attend)
        self._model = tf.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="rounding")
        self._model.eval()
        self.largest: dict[int, torch.Tensor] = {}
        self.scales: Any = None
        self.dtype = torch.int8

    def _attend(self, module, query, key, value, mask, **kwargs):
        layer = module.layer_idx
        self.largest[layer] = torch.stack([x.abs().amax(dim=(0, 2, 3)) for x in (key, value)])
        if self.scales is not None:
            key, value = (
                dequantise(
                    quantise(x.transpose(1, 2), scale, self.dtype).transpose(1, 2), scale, torch.float32
                )
                for x, scale in zip((key, value), self.scales[layer])
            )
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        return self._model(torch.tensor([token_ids]), use_cache=False).logits[0]


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


# The kernels are compiled for each type, which takes longer than to run them.
EVERY_DAY = ("fp8",)


def names(**values):
    """Parameters for each type of cache; the rarer ones belong to the matrix."""
    return [
        pytest.param(name, *values.get(name, ()), marks=() if name in EVERY_DAY else pytest.mark.matrix)
        for name in NAMES
    ]


@pytest.mark.parametrize(("name", "bound"), names(fp8=[0.15], fp8_e5m2=[0.3], int8=[0.1]))
def test_logits_differ_by_the_rounding_of_the_cache_alone(llama_dir, monkeypatch, name, bound):
    """Against transformers with the same rounding, and without: from prefill in chunks through decode."""
    engine = small_engine(llama_dir, kv_cache_dtype=name)
    seen = []
    original = engine._runner.run

    def recording(*args):
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(engine._runner, "run", recording)
    prompt = [random.Random(1).randrange(tiny_models.PAD) for _ in range(75)]  # three chunks
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    outputs = run(engine, {"a": ({"prompt_token_ids": prompt}, params)})
    actual = torch.cat(seen)
    assert len(actual) == 20

    model = Transformers(llama_dir)
    whole = [*prompt, *outputs["a"].outputs[0].token_ids[:-1]]
    plain = model.logits(whole)[len(prompt) - 1 :]
    model.scales, model.dtype = engine._cache.scales, NAMES[name]
    rounded = model.logits(whole)[len(prompt) - 1 :]
    loss = rms(actual - plain)
    assert 0 < loss < bound * rms(plain)
    # A key in float32 that differs in its last bit may round to the neighbouring code.
    assert rms(actual - rounded) < 0.2 * loss


@pytest.mark.parametrize("name", NAMES)
def test_scales_are_those_of_a_drawn_prompt(llama_dir, name):
    """The same at every start, and what the prompt's largest keys and values need."""
    first, second = (
        torch.stack(
            [torch.stack(pair) for pair in small_engine(llama_dir, kv_cache_dtype=name)._cache.scales]
        )
        for _ in range(2)
    )
    assert torch.equal(first, second)
    num_tokens = min(CALIBRATION_TOKENS, SMALL["max_num_batched_tokens"])
    drawn = torch.randint(tiny_models.VOCAB, (num_tokens,), generator=torch.Generator().manual_seed(0))
    model = Transformers(llama_dir)
    model.logits(drawn.tolist())
    largest = torch.stack([model.largest[layer] for layer in range(len(first))])
    dtype = NAMES[name]
    torch.testing.assert_close(first * LARGEST[dtype] / HEADROOM[dtype], largest)


@pytest.mark.parametrize("backend", [reference, cpu])
@pytest.mark.parametrize("mode", ["swap", "recompute"])
@pytest.mark.parametrize("name", names())
def test_moved_blocks_keep_their_codes(llama_dir, monkeypatch, seed, name, mode, backend):
    """Samples that share a prompt, in a memory too small for them: after copies on write and swaps every
    logit is that of transformers with the same rounding, and nothing reads a poisoned slot."""
    monkeypatch.setattr(backends, "for_device", lambda device_type: backend)
    engine = small_engine(
        llama_dir, kv_cache_dtype=name, preemption_mode=mode, num_gpu_blocks_override=14, max_model_len=64
    )
    seen: list[tuple[Any, int, torch.Tensor]] = []  # sequence, tokens so far, logits after them
    moved = dict.fromkeys(("copies", "swap_out", "swap_in"), 0)
    run_model, move_blocks = engine._runner.run, engine._cache.move_blocks

    def recording(scheduled, *args):
        logits = run_model(scheduled, *args)
        sampling = [item for item in scheduled if item.num_samples]
        seen.extend((i.seq, i.start + i.num_tokens, row) for i, row in zip(sampling, logits, strict=True))
        return logits

    def counting(plan):
        for kind in moved:
            moved[kind] += len(getattr(plan, kind))
        move_blocks(plan)

    monkeypatch.setattr(engine._runner, "run", recording)
    monkeypatch.setattr(engine._cache, "move_blocks", counting)
    rng = random.Random(seed)
    requests = {}
    for key, length in {"a": 21, "b": 11, "c": 30, "d": 17}.items():  # they decide who is preempted
        tokens = [rng.randrange(tiny_models.PAD) for _ in range(length)]
        params = SamplingParams(n=3, temperature=1, seed=rng.randrange(2**31), max_tokens=12, ignore_eos=True)
        requests[key] = ({"prompt_token_ids": tokens}, params)
    run(engine, requests)
    assert engine.stats().num_preemptions > 0
    assert moved["copies"] > 0
    assert (moved["swap_out"] > 0, moved["swap_in"] > 0) == 2 * (mode == "swap",)

    model = Transformers(llama_dir)
    model.scales, model.dtype = engine._cache.scales, NAMES[name]
    expected = {seq: model.logits(seq.token_ids) for seq in dict.fromkeys(seq for seq, _, _ in seen)}
    errors = []
    for seq, length, logits in seen:
        wanted = expected[seq][length - 1]
        errors.append(rms(logits - wanted) / rms(wanted))
    # A key that rounds to the neighbouring code moves the logits of a few rows a little.
    assert median(errors) < 1e-4
    assert max(errors) < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_the_same_memory_holds_twice_the_blocks(llama_dir, monkeypatch, name):
    model = tf.AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.bfloat16)
    runner = ModelRunner(model)
    monkeypatch.setattr(cache_size, "_available_cpu_bytes", lambda: 4 * 700_000)
    config = EngineConfig(device="cpu", kv_cache_dtype=name)
    counts = [
        cache_size.num_gpu_blocks(config, runner, runner.kv_shape(16, kind), 256) for kind in ("auto", name)
    ]
    block_bytes = 2 * 3 * 2 * 16 * 16  # keys and values, layers, heads, tokens, elements
    assert counts == [700_000 // (2 * block_bytes), 700_000 // block_bytes]


def test_heads_that_cannot_be_quantised_are_an_error(llama_dir):
    config = tf.AutoConfig.from_pretrained(llama_dir)
    config.head_dim = 24
    runner = ModelRunner(tf.AutoModelForCausalLM.from_config(config))
    assert runner.kv_shape(16).head_size == 24
    with pytest.raises(
        ValueError, match="'fp8' needs a head size that is a multiple of 16, and llama has 24"
    ):
        runner.kv_shape(16, "fp8")


def test_keys_that_overflow_are_an_error(llama_dir, tmp_path):
    model = tf.AutoModelForCausalLM.from_pretrained(llama_dir)
    model.model.layers[1].self_attn.k_proj.weight.data *= torch.inf
    model.save_pretrained(tmp_path)
    tiny_models.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"keys or values overflow in torch\.float32"):
        small_engine(str(tmp_path), kv_cache_dtype="fp8")
