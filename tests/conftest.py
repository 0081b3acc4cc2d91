"""What the whole suite shares."""

from __future__ import annotations

import os
import random

import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--backend",
        action="append",
        choices=["reference", "cpu", "cuda_host", "cuda"],
        help="run the kernel suite on these backends only; may be repeated",
    )


@pytest.fixture
def seed() -> int:
    """Fresh at every run, printed when the test fails; CUPAGED_TEST_SEED repeats one."""
    value = int(os.environ.get("CUPAGED_TEST_SEED") or random.SystemRandom().randrange(2**31))
    print(f"CUPAGED_TEST_SEED={value}")
    return value


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory) -> str:
    from tests import tiny_models  # loads transformers, which most tests do without

    return str(tiny_models.save("llama", tmp_path_factory.mktemp("llama")))
