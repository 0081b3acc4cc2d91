"""The launch path of a GPU up to the driver: real CuPy, and a libcuda.so.1 that runs emulated kernels."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from cupaged.backends.cuda.compile import toolkit_include_dir

from .build import HERE, build

# Named here as well: what is imported there loads the stand-in for the driver.
CHECKS = (
    "every_argument_arrives_bit_for_bit",
    "threads_do_not_mix_their_arguments",
    "kernels_run_on_what_arrives",
    "large_shared_memory_is_asked_for",
    "the_documented_launch_is_right",
    "a_raw_kernel_of_no_kernel_is_refused",
    "a_kernel_is_loaded_that_cannot_be_kept",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, str]:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the stand-in for the driver with")
    source = HERE / "driver.cpp"
    options = ("-std=c++17", "-O1", "-fPIC", "-Wall", "-isystem", str(toolkit_include_dir()))
    library = build("driver", [source], f'#include "{source}"\n', options, ("-Wl,-soname,libcuda.so.1",))
    folder = tmp_path_factory.mktemp("driver")
    (folder / "libcuda.so.1").symlink_to(library)
    done = subprocess.run(
        [sys.executable, "-m", "tests.cuda_host.over_driver"],
        cwd=HERE.parents[1],
        env={**os.environ, "LD_LIBRARY_PATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("check", CHECKS)
def test_over_the_driver(found, check):
    assert found[check] == ""


def test_every_check_is_named(found):
    assert tuple(found) == CHECKS
