"""Token ids that a tokenizer or a generation config has and the model has not."""

from __future__ import annotations

import json
import random

import pytest
import torch

from cupaged import backends
from cupaged.backends import reference
from cupaged.engine import LLM, SamplingParams
from cupaged.engine.model import loader
from tests import tiny_models

SETTINGS = {"device": "cpu", "num_gpu_blocks_override": 32, "check_integrity": True}
BEYOND = 400  # the model has 320


def llama(directory, added_tokens: int = 0, **generation) -> LLM:
    """A model whose tokenizer has tokens beyond its rows, and whose generation config is so."""
    tiny_models.save("llama", directory)
    if added_tokens:
        tokenizer = tiny_models.tokenizer()
        tokenizer.add_tokens([f"<added {i}>" for i in range(added_tokens)])
        tokenizer.save_pretrained(directory)
    path = directory / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **generation}))
    return LLM(directory, **SETTINGS)


def run(llm: LLM, *prompts: str, **params):
    given = SamplingParams(max_tokens=12, temperature=0, **params)
    return [o.outputs[0] for o in llm.generate(list(prompts or ["some text"]), given, use_tqdm=False)]


def test_ends_that_never_come_are_ignored(tmp_path):
    llm = llama(tmp_path / "a", eos_token_id=[tiny_models.EOS, BEYOND, -1])
    plain = LLM(tiny_models.save("llama", tmp_path / "b"), **SETTINGS)
    for params in ({}, {"min_tokens": 2}, {"min_tokens": 12}, {"beam_width": 3}):
        assert run(llm, **params) == run(plain, **params)


def test_ends_that_come_end(tmp_path):
    free = run(llama(tmp_path / "a"))[0].token_ids
    end = free[4]
    llm = llama(tmp_path / "b", eos_token_id=[BEYOND, end, 10**12])
    assert run(llm)[0].token_ids == free[: free.index(end) + 1]
    assert end not in run(llm, min_tokens=12)[0].token_ids[:-1]


def test_beams_count_only_what_can_be_sampled(tmp_path):
    llama(tmp_path, eos_token_id=[tiny_models.EOS, BEYOND])
    settings = {**SETTINGS, "max_num_seqs": 400, "num_gpu_blocks_override": 800}
    engine = LLM(tmp_path, **settings).engine
    engine.add_request("all", "text", SamplingParams(beam_width=319, max_tokens=2))
    with pytest.raises(ValueError, match="beam_width is 320, and of the model's 320 tokens 319 do not end"):
        engine.add_request("more", "text", SamplingParams(beam_width=320, max_tokens=2))
    while engine.has_unfinished():
        outputs = engine.step()
    assert outputs[0].finished


def test_bad_words_that_never_come_are_ignored(tmp_path):
    llm = llama(tmp_path, added_tokens=200)
    tokenizer = llm.engine.tokenizer
    never = [name for i in range(200) if tokenizer.convert_tokens_to_ids(name := f"<added {i}>") >= 320]
    assert len(never) > 100
    free = run(llm)[0]
    assert run(llm, bad_words=never)[0] == free
    assert run(llm, bad_words=[f"a {never[0]}", f"{never[1]} b"])[0] == free
    chosen = free.token_ids[0]
    if chosen < 256:  # a byte, whose text as a word rules it out
        mixed = run(llm, bad_words=[*never, tokenizer.decode([chosen])])[0]
        assert mixed.token_ids[0] != chosen or not tokenizer.decode([chosen]).strip()


def test_texts_with_tokens_that_the_model_lacks_are_refused_by_name(tmp_path):
    llm = llama(tmp_path, added_tokens=200)
    last = llm.engine.tokenizer.convert_tokens_to_ids("<added 199>")
    with pytest.raises(ValueError, match=f"got {last}, which the tokenizer makes of the text"):
        run(llm, "some <added 199> text")
    assert run(llm)


@pytest.mark.parametrize("name", ["logit_bias", "allowed_token_ids", "stop_token_ids"])
def test_ids_that_a_request_asks_for_are_refused_by_name(tmp_path, name):
    llm = llama(tmp_path, added_tokens=200)
    value = {BEYOND: 1.0} if name == "logit_bias" else [5, BEYOND]
    with pytest.raises(ValueError, match=rf"{name} must have token ids from 0 to 319, got {BEYOND}"):
        run(llm, **{name: value})
    with pytest.raises(ValueError, match=rf"prompt_token_ids must be integers from 0 to 319, got {BEYOND}"):
        llm.generate([{"prompt_token_ids": [BEYOND]}], use_tqdm=False)
    assert run(llm)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_reads_more_tokens_than_it_writes(tmp_path, monkeypatch, seed, dtype):
    """As those that read the begin of a sound and do not write it."""
    # It is about the model's output; the kernels would be compiled for another dtype.
    monkeypatch.setattr(backends, "for_device", lambda device_type: reference)
    tiny_models.save("llama", tmp_path)
    load = loader.load_weights

    def trimmed(*args, **options):
        model = load(*args, **options)
        old = model.lm_head
        model.lm_head = torch.nn.Linear(old.in_features, 300, bias=False, dtype=old.weight.dtype)
        model.lm_head.weight = torch.nn.Parameter(old.weight[:300].detach().clone())
        return model

    monkeypatch.setattr(loader, "load_weights", trimmed)
    llm = LLM(tmp_path, dtype=dtype, **SETTINGS)
    draw = random.Random(seed)
    prompt = {"prompt_token_ids": [draw.randrange(320) for _ in range(10)] + [draw.randrange(300, 320)]}

    def generate(**params):
        given = SamplingParams(max_tokens=8, ignore_eos=True, seed=seed, **params)
        return llm.generate([prompt], given, use_tqdm=False)[0].outputs[0].token_ids

    for params in (
        {"repetition_penalty": 1.5, "presence_penalty": 0.5},
        {"logit_bias": {299: 5.0}},
        {"temperature": 0, "logprobs": 3},
        {"min_tokens": 3, "stop_token_ids": [299]},
    ):
        assert max(generate(**params)) < 300
    with pytest.raises(ValueError, match="logit_bias must have token ids from 0 to 299, got 300"):
        generate(logit_bias={300: 5.0})
    with pytest.raises(ValueError, match="prompt_logprobs is asked for, and the model gives token 3"):
        generate(prompt_logprobs=1)
