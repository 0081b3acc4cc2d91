"""What ptxas made of the kernels: 16-byte accesses, tensor cores where they are meant, no local memory."""

from __future__ import annotations

import pytest

from cupaged import compile as kc
from cupaged import specs as kernel_specs
from cupaged.specs import KernelSpec

from .sass import complaints, opcodes

ARCHS = ("75", "80", "90a", "120")
WIDE = ("wide loads", "wide stores")
WARPGROUP = (*WIDE, "warpgroup products")
MATRIX = (*WIDE, "tensor cores", "ldmatrix")

# (kernel, what its code must have).
TABLE: tuple[tuple[KernelSpec, tuple[str, ...]], ...] = (
    (kernel_specs.reshape_and_cache("bf16", "bf16"), WIDE),
    (kernel_specs.reshape_and_cache("fp32", "fp32"), WIDE),
    (kernel_specs.reshape_and_cache("bf16", "fp8_e4m3"), WIDE),
    (kernel_specs.copy_blocks(16), WIDE),
    (kernel_specs.copy_blocks(1), ()),
    (kernel_specs.find_shared_pieces(), ()),
    (kernel_specs.plan_prefill(), ()),
    (kernel_specs.merge_splits("bf16"), WIDE),
    (kernel_specs.merge_states("fp16"), WIDE),
    (kernel_specs.paged_decode("bf16", "bf16", 128, 1), WIDE),
    (kernel_specs.paged_decode("bf16", "bf16", 128, 8), WIDE),
    (kernel_specs.paged_decode("fp16", "fp16", 64, 4), WIDE),
    (kernel_specs.paged_decode("fp32", "fp32", 256, 2), WIDE),
    (kernel_specs.paged_prefill("fp32", "fp32", 128), WIDE),
    (kernel_specs.paged_prefill("fp16", "fp16", 80), WIDE),
)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("spec", "needs"), TABLE, ids=str)
def test_machine_code(spec, needs, arch):
    assert complaints(opcodes(kc.cubin(spec, arch).path), needs) == []


def wide_decode(dtype: str, cache_dtype: str, head_size: int, arch: str) -> KernelSpec:
    return kernel_specs.paged_decode_mma(dtype, cache_dtype, head_size, arch, wide=True)


@pytest.mark.parametrize("arch", ["80", "86", "90a", "120"])
@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "head_size"),
    [("bf16", "bf16", 128), ("fp16", "fp16", 64), ("bf16", "bf16", 256), ("bf16", "fp8_e4m3", 128)],
)
@pytest.mark.parametrize("make", [kernel_specs.paged_decode_mma, wide_decode, kernel_specs.paged_prefill_mma])
def test_machine_code_of_tensor_core_kernels(make, dtype, cache_dtype, head_size, arch):
    spec = make(dtype, cache_dtype, head_size, arch)
    assert complaints(opcodes(kc.cubin(spec, arch).path), MATRIX) == []


@pytest.mark.parametrize(("dtype", "head_size"), [("bf16", 128), ("fp16", 64), ("bf16", 256)])
def test_machine_code_of_hoppers_kernel(dtype, head_size):
    code = opcodes(kc.cubin(kernel_specs.paged_prefill_wgmma(dtype, head_size), "90a").path)
    assert complaints(code, WARPGROUP) == []
    assert {"USETMAXREG.DEALLOC.CTAPOOL", "USETMAXREG.TRY_ALLOC.CTAPOOL"} <= set(code)
    assert "HMMA" not in {opcode.partition(".")[0] for opcode in code}


@pytest.mark.parametrize("make", [kernel_specs.paged_decode_mma, kernel_specs.paged_prefill_mma])
@pytest.mark.parametrize(("arch", "converts"), [("80", False), ("89", True), ("90a", True), ("120", True)])
def test_e4m3_is_converted_where_there_is_an_instruction(make, arch, converts):
    code = opcodes(kc.cubin(make("bf16", "fp8_e4m3", 128, arch), arch).path)
    assert any(opcode.startswith("F2FP.F16.E4M3.UNPACK") for opcode in code) == converts


def test_every_kernel_is_checked():
    others = {"paged_decode_mma.cu", "paged_prefill_mma.cu", "paged_prefill_wgmma.cu"}
    checked = {spec.source for spec, _ in TABLE} | others
    assert checked == {path.name for path in kc.cuda_dir().glob("*.cu")}


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
