"""What ptxas made of the kernels: 16-byte accesses, tensor cores where they are meant, no local memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cupaged import compile as kc
from cupaged.compile import KernelSpec

from .sass import complaints, opcodes

ARCHS = ("75", "80", "90a", "120")
WIDE = ("wide loads", "wide stores")
MATRIX = (*WIDE, "tensor cores", "ldmatrix")

# (kernel, its arguments, what its code must have). A kernel that does not exist is left out.
TABLE: tuple[tuple[str, tuple, tuple[str, ...]], ...] = (
    ("reshape_and_cache", ("bf16",), WIDE),
    ("reshape_and_cache", ("fp32",), WIDE),
    ("copy_blocks", (16,), WIDE),
    ("copy_blocks", (1,), ()),
    ("merge_splits", ("bf16",), WIDE),
    ("merge_states", ("fp16",), WIDE),
    ("paged_decode", ("bf16", 128, 1), WIDE),
    ("paged_decode", ("bf16", 128, 8), WIDE),
    ("paged_decode", ("fp16", 64, 4), WIDE),
    ("paged_decode", ("fp32", 256, 2), WIDE),
    ("paged_decode_mma", ("bf16", 128), MATRIX),
    ("paged_prefill", ("bf16", 128), WIDE),
    ("paged_prefill", ("fp16", 80), WIDE),
)


def spec_of(kernel: str) -> Callable[..., KernelSpec] | None:
    return getattr(kc, f"spec_{kernel}", None)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("spec", "needs"),
    [(make(*args), needs) for kernel, args, needs in TABLE if (make := spec_of(kernel))],
    ids=str,
)
def test_machine_code(spec, needs, arch):
    assert complaints(opcodes(kc.cubin(spec, arch).path), needs) == []


def test_every_kernel_is_in_the_table():
    assert {name.removeprefix("spec_") for name in vars(kc) if name.startswith("spec_")} <= {
        kernel for kernel, _, _ in TABLE
    }


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
