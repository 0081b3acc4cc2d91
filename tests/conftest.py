"""What the whole suite shares."""

from __future__ import annotations

import os

import pytest

# Tests run beside each other. Threads that spin while they wait for work would take the cores from the rest:
# five times as many CPU seconds. It is read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

pytest_plugins = ["tests.drawing", "tests.thinning"]


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


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory) -> str:
    from tests import tiny_models  # loads transformers, which most tests do without

    return str(tiny_models.save("llama", tmp_path_factory.mktemp("llama")))
