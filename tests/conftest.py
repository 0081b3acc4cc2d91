"""What the whole suite shares."""

from __future__ import annotations

import gc
import os

import pytest

# Tests run beside each other, and their models are tiny: to hand work to a second thread takes ten times as
# long as the work, and threads that spin while they wait take the cores from the rest. Both are read when
# torch is first imported. The CPU kernels are tested on two threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

pytest_plugins = ["tests.drawing", "tests.thinning"]


def pytest_addoption(parser):
    parser.addoption(
        "--backend",
        action="append",
        choices=["reference", "cpu", "cuda_host", "cuda_ptx", "cuda"],
        help="run the kernel suite on these backends only; may be repeated",
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Let the garbage collector leave the libraries alone: it would look through them again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def exact_exp() -> None:
    """The first exp of a process is off by 1.5e-4 if several threads compute it (pytorch#188792)."""
    import torch  # not for --help

    torch.zeros(1).exp_()


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory) -> str:
    from tests import tiny_models  # loads transformers, which most tests do without

    return str(tiny_models.save("llama", tmp_path_factory.mktemp("llama")))
