"""Tests that draw: always the same by default, new ones with ``--fresh``, and how a failure is repeated."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Without those that take seconds to load.
_PLUGINS = [
    f"-p{name}"
    for name in ("tests.drawing", "no:cacheprovider", "no:schemathesis", "no:langsmith_plugin", "no:anyio")
]
# Each run appends what was drawn to the file DRAWN. One seed in two fails, and 3 is among the integers.
TESTS = """
import os
import pytest
from hypothesis import given, settings, strategies as st

def log(*what):
    with open(os.getenv("DRAWN"), "a") as file:
        print(*what, file=file)

@pytest.mark.parametrize("size", [1, 2])
def test_seed(seed, size):
    log("seed", size, seed)
    assert seed % 2 == 0 or "FAIL" not in os.environ

@settings(max_examples=int(os.getenv("EXAMPLES", "5")))
@given(st.integers(0, 10**9))
def test_property(number):
    log("property", number)

def test_that_draws_nothing():
    log("nothing")
"""


@pytest.fixture
def run(tmp_path):
    """A function that runs the tests above: their lines, sorted, and what pytest printed."""
    (tmp_path / "test_drawn.py").write_text(TESTS)
    drawn = tmp_path / "drawn"

    def run(*arguments: str, **environment: str) -> tuple[list[str], str]:
        drawn.unlink(missing_ok=True)
        kept = {name: value for name, value in os.environ.items() if name not in ("CI", "CUPAGED_TEST_SEED")}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *_PLUGINS, *arguments],
            cwd=tmp_path,
            env={**kept, "PYTHONPATH": str(ROOT), "DRAWN": str(drawn), **environment},
            capture_output=True,
            text=True,
        )
        return sorted(drawn.read_text().splitlines()), done.stdout + done.stderr

    return run


@pytest.mark.matrix
def test_seeds_are_the_tests_own(run):
    first, _ = run()
    assert len(first) == 2 + 5 + 1
    assert len({line.split()[2] for line in first if line.startswith("seed")}) == 2, "each test has another"
    assert run("-n", "2", CI="true")[0] == first


@pytest.mark.matrix
def test_properties_do_not_draw_from_the_modules_that_are_loaded(run, tmp_path):
    """Hypothesis would try their constants, and other tests load other modules."""
    first, _ = run("-k", "property", EXAMPLES="200")
    (tmp_path / "constants.py").write_text(f"NUMBERS = {list(range(10**6, 10**6 + 50))}")
    assert (
        run("-k", "property", "-p", "constants", EXAMPLES="200", PYTHONPATH=f"{ROOT}:{tmp_path}")[0] == first
    )


@pytest.mark.matrix
def test_fresh_seeds_are_new_and_only_what_draws_runs(run):
    lines, output = run("--fresh", "3", "-n", "2")
    again, _ = run("--fresh", "3")
    for found in (lines, again):
        assert len([line for line in found if line.startswith("seed")]) == 6
        assert len([line for line in found if line.startswith("property")]) == 15
        assert "nothing" not in found
    assert "9 passed" in output
    assert len({line for line in lines + again if line.startswith("seed")}) == 12
    assert len({line for line in lines + again if line.startswith("property")}) > 20


@pytest.mark.matrix
def test_a_failure_says_how_it_is_repeated(run):
    lines, output = run("--fresh", "6", FAIL="1")
    failed = {
        tuple(line.split()[1:]) for line in lines if line.startswith("seed") and int(line.split()[2]) % 2
    }
    repeats = re.findall(
        r"^CUPAGED_TEST_SEED=(\d+) pytest (.*)$", output.split("repeat what failed with")[1], re.M
    )
    assert len(repeats) == len(failed)
    for value, test in repeats[:1]:
        again, output = run(*shlex.split(test), FAIL="1", CUPAGED_TEST_SEED=value)
        assert "1 failed" in output
        assert tuple(again[0].split()[1:]) in failed
