"""What `generate` gives back: where outputs end and why, several outputs of one prompt, the progress bar."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import transformers as tf

from cupaged.engine import LLM, CompletionOutput, RequestOutput, SamplingParams
from cupaged.engine.sampling.sampler import Sampler
from cupaged.engine.sampling.samples import LaunchedSamples, SamplerOutput
from tests import tiny_models
from tests.distribution import uniform, weights

from .harness import SMALL, assert_clean, finish, run, small_engine

NEAR = 5e-4  # logits differ by up to 1e-4 from transformers'; at temperature 0.7 a probability by up to this
PROMPT = [17 * i % 256 for i in range(20)]  # two full blocks and a half


@pytest.fixture
def says(llama_dir, monkeypatch):
    """An engine whose model says a given text, a byte a token, and then the ids given."""
    llm = LLM(llama_dir, **SMALL)

    def generate(text: str, *ids: int, **params) -> CompletionOutput:
        tokens = iter([*llm.engine.tokenizer(text)["input_ids"], *ids])
        monkeypatch.setattr(Sampler, "launch", lambda *_: LaunchedSamples(SamplerOutput([[next(tokens)]])))
        (output,) = llm.generate({"prompt_token_ids": PROMPT}, SamplingParams(**params), use_tqdm=False)
        assert output.finished
        assert_clean(llm.engine)
        return output.outputs[0]

    return generate


EOS = tiny_models.EOS
INCLUDE = {"include_stop_str_in_output": True}


@pytest.mark.parametrize(
    ("said", "params", "text", "num_tokens", "reason", "stop_reason"),
    [
        (("hello", EOS, 1), {}, "hello", 6, "stop", None),
        (("hello", EOS, 1), {"ignore_eos": True, "max_tokens": 7}, 'hello"', 7, "length", None),
        (("hello",), {"max_tokens": 5}, "hello", 5, "length", None),
        (("hello", EOS), {"max_tokens": 6}, "hello", 6, "stop", None),
        (("hello", 259), {"stop_token_ids": [259]}, "hello", 6, "stop", 259),
        (("hello!",), {"stop_token_ids": [0]}, "hello", 6, "stop", 0),  # "!", a token with a text
        (("hello", EOS), {"stop_token_ids": [EOS]}, "hello", 6, "stop", EOS),
        (("hello", EOS), {"stop_token_ids": [EOS], "ignore_eos": True}, "hello", 6, "stop", EOS),
        (("one, two",), {"stop": ","}, "one", 4, "stop", ","),
        (("one, two",), {"stop": ["two", "e, "]}, "on", 5, "stop", "e, "),
        (("one, two",), {"stop": ["x"], "max_tokens": 8}, "one, two", 8, "length", None),
        (("one, two",), {"stop": ["two"], "max_tokens": 8}, "one, ", 8, "stop", "two"),
        (("aab", EOS), {"stop": ["ac"]}, "aab", 4, "stop", None),
        (("é☃", EOS), {"stop": ["☃"]}, "é", 5, "stop", "☃"),
        (("one, two",), {"stop": [", "], **INCLUDE}, "one, ", 5, "stop", ", "),
        (("hello!",), {"stop_token_ids": [0], **INCLUDE}, "hello!", 6, "stop", 0),
        (("hello", EOS), {"skip_special_tokens": False, **INCLUDE}, "hello<eos>", 6, "stop", None),
        (("hello", EOS), {"skip_special_tokens": False}, "hello", 6, "stop", None),
        # a stop string counts from the token on that makes the output long enough
        (("a,b,c,",), {"stop": [","], "min_tokens": 3}, "a,b", 4, "stop", ","),
        (("a,b,c,",), {"stop": [","], "min_tokens": 4}, "a,b", 4, "stop", ","),
        (("a,b,c,",), {"stop": [",b,"], "min_tokens": 4, **INCLUDE}, "a,b,", 4, "stop", ",b,"),
        (("a,b,c,",), {"stop": [",b"], "min_tokens": 4, "max_tokens": 5}, "a,b,c", 5, "length", None),
    ],
)
def test_an_output_ends_where_it_should(says, said, params, text, num_tokens, reason, stop_reason):
    output = says(*said, **params)
    assert (output.text, len(output.token_ids)) == (text, num_tokens)
    assert (output.finish_reason, output.stop_reason) == (reason, stop_reason)


def test_what_may_become_a_stop_string_is_held_back(llama_dir, monkeypatch):
    engine = small_engine(llama_dir)
    tokens = iter(engine.tokenizer("one, two, three")["input_ids"])
    monkeypatch.setattr(Sampler, "launch", lambda *_: LaunchedSamples(SamplerOutput([[next(tokens)]])))
    engine.add_request("x", {"prompt_token_ids": PROMPT}, SamplingParams(stop=", three", max_tokens=64))
    seen = []
    while engine.has_unfinished():
        seen += [output.outputs[0].text for output in engine.step()]
    assert seen[-1] == "one, two"
    assert all(seen[-1].startswith(text) for text in seen)


def test_without_max_tokens_the_models_length_ends_it(llama_dir):
    engine = small_engine(llama_dir)
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    output = run(engine, {"x": ({"prompt_token_ids": PROMPT}, params)})["x"].outputs[0]
    assert len(output.token_ids) == SMALL["max_model_len"] - len(PROMPT)
    assert output.finish_reason == "length"


def test_the_outputs_of_a_prompt_share_its_blocks_until_they_write(llama_dir):
    engine = small_engine(llama_dir)
    params = SamplingParams(n=4, seed=3, max_tokens=6, ignore_eos=True)
    engine.add_request("x", {"prompt_token_ids": PROMPT}, params)
    used = []
    while engine.has_unfinished():
        engine.step()
        used.append(engine._blocks.gpu.num_blocks - engine._blocks.gpu.num_free)
    # The prompt; then two full blocks that all share, and the third of each; then nothing.
    assert used == [3, 6, 6, 6, 6, 0]
    assert_clean(engine)


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_several_outputs_are_the_models_own_draws_under_preemption(llama_dir, mode, seed):
    """Each token against transformers' logits of the whole text so far, drawn as the sampler documents. Where
    top_p or the number drawn falls on a border between two tokens, float32 may take either side of it."""
    model = tf.AutoModelForCausalLM.from_pretrained(llama_dir, attn_implementation="eager").eval()
    engine = small_engine(llama_dir, num_gpu_blocks_override=14, max_model_len=96, preemption_mode=mode)
    params = [
        SamplingParams(
            n=n, seed=seed + n, temperature=0.7, top_k=40, top_p=0.9, max_tokens=24, ignore_eos=True
        )
        for n in (3, 1, 2, 3)
    ]
    prompts = [[(t + i) % 256 for t in PROMPT[: 20 - 3 * i]] for i in range(len(params))]
    for i, (prompt, one) in enumerate(zip(prompts, params)):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, one)
    outputs = finish(engine)
    assert engine.stats().num_preemptions > 0
    for i, (prompt, one) in enumerate(zip(prompts, params)):
        request = outputs[str(i)]
        assert [output.index for output in request.outputs] == list(range(one.n))
        for output in request.outputs:
            ids = [*prompt, *output.token_ids]
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
            positions = np.arange(len(prompt), len(ids), dtype=np.uint64)
            index = np.full(len(positions), output.index, dtype=np.uint64)
            numbers = torch.from_numpy(uniform(np.full_like(positions, one.seed), index, positions))
            right = torch.zeros(len(numbers), dtype=torch.bool)
            for by, shift in itertools.product((0, -NEAR, NEAR), repeat=2):
                top_p = one.top_p + by
                settings = (np.full(len(logits), x) for x in (one.temperature, one.min_p, one.top_k, top_p))
                cumulative = weights(logits, *settings).double().cumsum(-1)
                drawn = (numbers + shift).clamp(0, 1 - 1e-9)[:, None] * cumulative[:, -1:]
                tokens = torch.searchsorted(cumulative, drawn, right=True)[:, 0]
                right |= tokens == torch.tensor(output.token_ids)
            assert right.all()


def test_a_seed_repeats_and_the_engines_seed_stands_in(llama_dir):
    def tokens(engine_seed: int, **params) -> list[list[int]]:
        llm = LLM(llama_dir, **{**SMALL, "seed": engine_seed})
        sampling = SamplingParams(max_tokens=12, ignore_eos=True, **params)
        outputs = llm.generate([{"prompt_token_ids": PROMPT}] * 2, sampling, use_tqdm=False)
        return [out.outputs[0].token_ids for out in outputs]

    first, second = tokens(0)
    assert first != second, "requests without a seed have one each"
    assert tokens(0) == [first, second]
    assert tokens(1) != [first, second]
    mine = tokens(0, seed=9)
    assert mine[0] == mine[1]
    assert tokens(1, seed=9) == mine


def test_the_outputs_have_the_names_that_vllms_users_know(llama_dir):
    llm = LLM(llama_dir, **SMALL)
    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    text, ids = llm.generate(["abc", {"prompt_token_ids": [97, 98, 99]}], greedy, use_tqdm=False)
    assert isinstance(text, RequestOutput)
    assert (text.prompt, text.prompt_token_ids) == ("abc", llm.engine.tokenizer("abc")["input_ids"])
    assert (ids.prompt, ids.prompt_token_ids) == (None, [97, 98, 99])
    for request in (text, ids):
        (output,) = request.outputs
        assert output.text == llm.engine.tokenizer.decode(output.token_ids, skip_special_tokens=True)
        assert (output.index, output.finish_reason, output.stop_reason) == (0, "length", None)
    assert text.request_id != ids.request_id
    (alone,) = llm.generate("abc", greedy, use_tqdm=False)
    assert alone.outputs == text.outputs


def test_the_progress_bar_counts_requests(llama_dir, capsys):
    llm = LLM(llama_dir, **SMALL)
    params = SamplingParams(max_tokens=2)
    llm.generate(["a", "b", "c"], params)
    assert "3/3" in capsys.readouterr().err
    llm.generate(["a"], params, use_tqdm=False)
    assert capsys.readouterr().err == ""
