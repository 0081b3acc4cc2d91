"""Sampling settings: what is refused, and that the message names it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cupaged.engine import SamplingParams

BAD = {
    "n": [0, -1, 1.0, "2", None, True],
    "temperature": [-0.1, math.nan, math.inf, "warm", None, 10**400],
    "top_k": [-2, 1.5, "all", None],
    "top_p": [0, 0.0, -0.5, 1.01, math.nan, "1", None],
    "seed": [1.5, "abc", True],
    "max_tokens": [-1, -5, 2.5, "10"],
    "stop": ["", ["a", ""], [1], 5, [None]],
    "stop_token_ids": [5, [1.0], ["a"], "abc", [True], [None]],
    "ignore_eos": [1, None, "yes"],
    "skip_special_tokens": [0, None],
    "best_of": [0, 1.5, True],
    "min_p": [-0.1, 1.1, math.nan, None],
    "presence_penalty": [-2.1, 2.1, math.nan, "1", None],
    "frequency_penalty": [-2.1, 2.1, math.inf, None],
    "repetition_penalty": [0, -1, 0.001, 1000, math.nan, None],
    "logit_bias": [5, [1], {"5": 1.0}, {5: 101}, {5: -101}, {5: math.nan}, {5: "1"}, {1.5: 1}],
    "allowed_token_ids": [[], 5, [1.5], ["a"], [True]],
    "bad_words": ["", [" "], [1], 5, [None]],
    "min_tokens": [-1, 1.5, None, True],
    "include_stop_str_in_output": [1, None],
    "logprobs": [-2, 1.5, True, "2"],
    "prompt_logprobs": [-2, 1.5, True, "2"],
    "beam_width": [0, -1, 1.5, True, "2"],
    "length_penalty": [-17, 16.5, math.nan, math.inf, None, "1"],
    "early_stopping": [1, None, "always"],
    "structured_outputs": [{"regex": "a"}, "a", 1, True],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_a_bad_value_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got "):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0},
        {"temperature": 1e-300},
        {"top_k": -1},
        {"top_k": 2**80},
        {"top_p": 1e-9},
        {"seed": -1},
        {"seed": 2**200},
        {"max_tokens": None},
        {"max_tokens": 0},
        {"stop": None, "stop_token_ids": None},
        {"n": 2, "best_of": 2, "min_tokens": 16, "min_p": 1, "bad_words": None, "logit_bias": {}},
        {"logprobs": -1, "prompt_logprobs": 0, "allowed_token_ids": (5,), "logit_bias": {np.int64(5): 100}},
        {"n": np.int64(2), "top_k": np.int32(5), "top_p": np.float32(0.5)},
    ],
)
def test_what_can_be_served_is_taken(settings):
    SamplingParams(**settings)


def test_stop_is_a_tuple_however_it_was_given():
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams().stop == ()
    assert SamplingParams(stop_token_ids=iter([1, 2])).stop_token_ids == (1, 2)


def test_settings_that_contradict_each_other_are_refused_by_name():
    with pytest.raises(ValueError, match=r"^best_of must be at least n, which is 3, got 2"):
        SamplingParams(n=3, best_of=2)
    with pytest.raises(ValueError, match=r"^min_tokens must be at most max_tokens, which is 4, got 5"):
        SamplingParams(min_tokens=5, max_tokens=4)
    SamplingParams(min_tokens=5000, max_tokens=None)


@pytest.mark.parametrize("name", ["logit_bias", "allowed_token_ids", "stop_token_ids"])
@pytest.mark.parametrize("token", [-1, 50])
def test_tokens_beyond_the_vocabulary_are_refused_by_name(name, token):
    params = SamplingParams(**{name: {token: 1.0} if name == "logit_bias" else [token]})
    with pytest.raises(ValueError, match=f"^{name} must have token ids from 0 to 49, got {token}"):
        params.check_vocabulary(50)


def test_a_callers_own_dictionary_may_change():
    bias = {5: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[5] = 1000.0
    assert params.logit_bias == {5: 1.0}
