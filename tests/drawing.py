"""The pytest plugin of tests that draw: their seeds, and how often they run.

A test draws from the fixture `seed`, or is given its arguments by Hypothesis. What it draws follows from its
name, so that it is the same for everyone; ``--fresh`` explores.
"""

from __future__ import annotations

import os
import random
import re
import zlib

import pytest

DRAWS = "seed"  # the fixture of the tests that draw


def pytest_addoption(parser):
    parser.addoption(
        "--fresh",
        type=int,
        metavar="RUNS",
        help="run only the tests that draw, each RUNS times with new seeds (make test-fresh)",
    )


def pytest_configure(config):
    if config.getoption("--fresh") and not hasattr(config.option, "fresh_base"):
        config.option.fresh_base = random.SystemRandom().getrandbits(
            31
        )  # the workers of xdist get the options
    if config.pluginmanager.hasplugin("hypothesispytest"):  # a machine that runs the kernels only lacks it
        from hypothesis import HealthCheck, settings

        # A test does the same on every machine: no examples of earlier runs, and however slow it is.
        slow = [HealthCheck.too_slow]
        settings.register_profile("cupaged", database=None, deadline=None, suppress_health_check=slow)
        settings.load_profile("cupaged")
        _forget_constants()


def _forget_constants() -> None:
    """Keep Hypothesis from trying constants of modules: what it draws would follow from what is loaded."""
    from hypothesis.internal.conjecture import providers

    providers.is_local_module_file = lambda path: False


def pytest_generate_tests(metafunc):
    """With ``--fresh``, make each test that draws so many tests."""
    runs = metafunc.config.getoption("--fresh")
    if runs and (DRAWS in metafunc.fixturenames or _is_property(metafunc.function)):
        metafunc.fixturenames.append("run")
        metafunc.parametrize("run", range(runs), ids=[f"run{i}" for i in range(runs)])


def pytest_collection_modifyitems(config, items):
    if config.getoption("--fresh"):
        fixed = [item for item in items if not _draws(item)]
        items[:] = [item for item in items if _draws(item)]
        config.hook.pytest_deselected(items=fixed)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if _is_property(getattr(item, "obj", None)):
        import hypothesis

        hypothesis.seed(_seed_of(item))(item.obj)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    outcome = yield
    report = outcome.get_result()
    if report.failed and _draws(item):
        test = re.sub(r"(?<=\[)run\d+-|-run\d+(?=[-\]])|\[run\d+\]", "", item.nodeid)
        report.sections.append(("Repeat it with", f"CUPAGED_TEST_SEED={_seed_of(item)} pytest '{test}'"))


def pytest_terminal_summary(terminalreporter):
    """Show how each failure of a test that draws is repeated."""
    failed = [*terminalreporter.getreports("failed"), *terminalreporter.getreports("error")]
    lines = [text for report in failed for title, text in report.sections if title == "Repeat it with"]
    if lines:
        terminalreporter.section("repeat what failed with")
        for line in lines:
            terminalreporter.write_line(line)


def _is_property(function: object) -> bool:
    """Return whether Hypothesis gives the function its arguments."""
    return getattr(function, "is_hypothesis_test", False)


def _draws(item: pytest.Item) -> bool:
    return DRAWS in getattr(item, "fixturenames", ()) or _is_property(getattr(item, "obj", None))


def _seed_of(item: pytest.Item) -> int:
    """Return CUPAGED_TEST_SEED; with ``--fresh`` a new seed; else that of the test's name."""
    given = os.environ.get("CUPAGED_TEST_SEED")
    if given:
        return int(given)
    base = getattr(item.config.option, "fresh_base", None)
    return zlib.crc32((item.name if base is None else f"{base} {item.nodeid}").encode()) >> 1


@pytest.fixture
def seed(request) -> int:
    """Return what the test draws from: its own seed, a new one with ``--fresh``, or CUPAGED_TEST_SEED."""
    return _seed_of(request.node)
