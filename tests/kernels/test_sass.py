"""The checks of machine code: that they can fail. `test_compile` makes them of the kernels."""

from __future__ import annotations

import pytest

from cupaged.backends.cuda import compile as kc
from cupaged.backends.cuda.specs import KernelSpec

from .sass import MATRIX, NEEDS, complaints, converts_e4m3, opcodes
from .thinned import thinned


@pytest.mark.parametrize("entry", ["paged_decode_mma", "paged_prefill_mma"])
def test_both_ways_to_convert_e4m3_are_among_them(entry):
    of = ("CUPAGED_CACHE_DTYPE", "CUPAGED_FP8_E4M3")
    found = {
        converts_e4m3(*kernel) for kernel in thinned() if kernel[0].entry == entry and of in kernel[0].defines
    }
    assert found == {True, False}


def test_every_kernel_is_checked():
    assert {f"{entry}.cu" for entry in NEEDS} == {path.name for path in kc.cuda_dir().glob("*.cu")}


# A kernel that does each thing the checks look for, or does it wrongly.
PLANTED = """
extern "C" __global__ void planted(%s) { %s }
"""
SCALARS = ("const float* in, float* out", "out[threadIdx.x] = in[threadIdx.x];")
VECTORS = ("const uint4* in, uint4* out", "out[threadIdx.x] = in[threadIdx.x];")
LOCAL = (
    "const int* in, int* out",
    "int x[64]; for (int i = 0; i < 64; ++i) x[in[i]] = i; out[0] = x[in[threadIdx.x]];",
)
NARROW_COPY = (
    "const float* in, float* out",
    """
    __shared__ float x[32 * 4];
    unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(x + 4 * threadIdx.x));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(in + threadIdx.x));
    asm volatile("cp.async.wait_all;");
    reinterpret_cast<float4*>(out)[0] = reinterpret_cast<const float4*>(in)[threadIdx.x];
    out[threadIdx.x] = x[4 * threadIdx.x];
    """,
)


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        (VECTORS, ["no tensor cores", "no ldmatrix"]),
        (SCALARS, ["no wide loads", "no wide stores", "no tensor cores", "no ldmatrix"]),
        (
            LOCAL,
            [
                "LDL (local memory)",
                "STL (local memory)",
                "no wide loads",
                "no wide stores",
                "no tensor cores",
                "no ldmatrix",
            ],
        ),
        (NARROW_COPY, ["no wide loads", "no tensor cores", "no ldmatrix"]),
    ],
    ids=["vectors", "scalars", "local", "narrow copy"],
)
def test_the_checks_can_fail(tmp_path, body, wrong):
    (tmp_path / "planted.cu").write_text(PLANTED % body)
    content, _ = kc.compile_cubin(KernelSpec("planted.cu", "planted"), "90a", sources=tmp_path)
    (tmp_path / "planted.cubin").write_bytes(content)
    assert complaints(opcodes(tmp_path / "planted.cubin"), MATRIX) == wrong


def test_a_file_that_is_no_cubin_is_an_error(tmp_path):
    (tmp_path / "no.cubin").write_bytes(b"\x7fELF")
    with pytest.raises(RuntimeError, match=r"no\.cubin"):
        opcodes(tmp_path / "no.cubin")
