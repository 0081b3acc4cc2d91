"""What the rule for products of parameters keeps."""

from __future__ import annotations

import random
from itertools import product

from tests.thinning import QUERIES, covering


def test_each_value_is_kept_with_values_in_turn():
    sizes, dtypes = ("32", "64", "80", "96"), ("fp32", "fp16")
    tests = [{"size": size, "dtype": dtype} for size, dtype in product(sizes, dtypes)]
    kept = [tests[position] for position in sorted(covering(tests))]
    assert [test["size"] for test in kept] == list(sizes)
    assert sorted(test["dtype"] for test in kept) == ["fp16", "fp16", "fp32", "fp32"]


def test_each_value_is_kept_on_each_backend():
    tests = [{"backend": b, "x": x, "y": y} for b, x, y in product(("cpu", "host"), "abc", "de")]
    kept = [tests[position] for position in covering(tests)]
    assert len(kept) == 6
    for name in ("x", "y"):
        assert {(test["backend"], test[name]) for test in kept} == {(t["backend"], t[name]) for t in tests}


def test_quantised_caches_are_read_by_the_queries_that_other_tests_read_them_by():
    wanted = list(QUERIES.values())
    for dtypes in (wanted, wanted[::-1]):
        tests = [{"dtype": d, "cache_dtype": c} for d, c in product(dtypes, QUERIES)]
        kept = [tests[position] for position in covering(tests)]
        assert {test["cache_dtype"]: test["dtype"] for test in kept} == QUERIES
        assert len(kept) == 3


def test_one_list_of_cases_is_kept_whole():
    assert covering([{"case": case} for case in "abcde"]) == set(range(5))


def test_drawn_lists_are_covered_by_few(seed):
    rng = random.Random(seed)
    tests = [{name: str(rng.randrange(4)) for name in ("backend", "x", "y", "z")} for _ in range(60)]
    kept = covering(tests)
    for name in ("x", "y", "z"):
        values = {(test["backend"], test[name]) for test in tests}
        assert {(tests[position]["backend"], tests[position][name]) for position in kept} == values
    assert len(kept) <= 4 * (4 + 3 + 3)
    assert covering(tests) == kept
