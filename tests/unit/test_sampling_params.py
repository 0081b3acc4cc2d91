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
    "max_tokens": [0, -5, 2.5, "10"],
    "stop": ["", ["a", ""], [1], 5, [None]],
    "stop_token_ids": [5, [1.0], ["a"], "abc", [True], [None]],
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
        {"stop": None, "stop_token_ids": None},
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
