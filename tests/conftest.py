"""What the whole suite shares."""

from __future__ import annotations

import os
import random
import zlib

import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--backend",
        action="append",
        choices=["reference", "cpu", "cuda_host", "cuda_ptx", "cuda"],
        help="run the kernel suite on these backends only; may be repeated",
    )


@pytest.fixture(scope="session", autouse=True)
def exact_exp() -> None:
    """The first exp of a process is off by 1.5e-4 if several threads compute it (pytorch#188792)."""
    import torch  # not for --help

    torch.zeros(1).exp_()


@pytest.fixture
def seed(request) -> int:
    """Fresh at every run, in CI the test's own; printed on failure. CUPAGED_TEST_SEED repeats one."""
    own = zlib.crc32(request.node.name.encode()) >> 1
    fresh = random.SystemRandom().getrandbits(31)
    value = int(os.environ.get("CUPAGED_TEST_SEED") or (own if "CI" in os.environ else fresh))
    print(f"CUPAGED_TEST_SEED={value}")
    return value


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory) -> str:
    from tests import tiny_models  # loads transformers, which most tests do without

    return str(tiny_models.save("llama", tmp_path_factory.mktemp("llama")))
