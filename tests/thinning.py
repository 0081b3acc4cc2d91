"""The pytest plugin that thins products of parameters, by a rule.

A kernel's tests run over products: dtypes x head sizes x features x groups; so do some others, which are
marked `thinned`. By default each value of each parameter is run on each backend at least once, by as few
tests as it takes; the other tests are marked `matrix`, and run with ``make test-all``. Which these are
follows from the parameters alone. A test over a single list of cases keeps all of them.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

FOLDERS = ("kernels", "cuda_host", "ptx")
PLACES = ("backend",)  # where a test runs: each value is run at each of them
# The queries that a quantised cache is read with by choice: each pair of dtypes is another kernel to compile.
QUERIES = {
    "torch.float8_e4m3fn": "torch.float32",
    "torch.float8_e5m2": "torch.bfloat16",
    "torch.int8": "torch.float16",
}

Value = tuple[str, str]  # a parameter, and how its value is written


@pytest.hookimpl(tryfirst=True)  # before those that are not wanted are deselected
def pytest_collection_modifyitems(items):
    products = defaultdict(list)
    for item in items:
        wanted = item.path.parent.name in FOLDERS or item.get_closest_marker("thinned")
        if wanted and hasattr(item, "callspec"):
            values = {name: repr(value) for name, value in item.callspec.params.items()}
            run = values.pop("run", None)  # of ``--fresh``: each run has the same tests
            products[item.path, item.originalname, run].append((item, values))
    for tests in products.values():
        kept = covering([values for _, values in tests])
        for position, (item, _) in enumerate(tests):
            if position not in kept:
                item.add_marker(pytest.mark.matrix)


def covering(tests: list[dict[str, str]]) -> set[int]:
    """Return the positions of a few tests that have each value at each place that any test has it at.

    Of tests that add as many values the one is taken whose pair of dtypes is that of `QUERIES`, then the one
    whose values are the rarest so far.

    Args:
        tests: the parameters of each test and their values.
    """
    wanted = [_values_at_place(values) for values in tests]
    missing = set().union(*wanted)
    kept: set[int] = set()
    used: Counter = Counter()

    def worth(position: int) -> tuple[int, bool, int]:
        values = tests[position]
        usual = QUERIES.get(values.get("cache_dtype", "")) == values.get("dtype", "")
        return len(wanted[position] & missing), usual, -sum(used[value] for value in wanted[position])

    while missing:
        best = max(range(len(tests)), key=worth)
        kept.add(best)
        missing -= wanted[best]
        used.update(wanted[best])
    return kept


def _values_at_place(values: dict[str, str]) -> set[tuple[tuple[Value, ...], Value]]:
    place = tuple((name, values[name]) for name in PLACES if name in values)
    return {(place, value) for value in values.items()}
