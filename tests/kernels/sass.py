"""The machine code of a cubin, through NVIDIA's disassembler."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from cuda import pathfinder
from cupaged.backends.cuda.compile import cubin
from cupaged.backends.cuda.specs import KernelSpec

from .thinned import has_fp8

WIDE = ("wide loads", "wide stores")
MATRIX = (*WIDE, "tensor cores", "ldmatrix")

# What the code of a kernel must have, by its entry point.
NEEDS: dict[str, tuple[str, ...]] = {
    "reshape_and_cache": WIDE,
    "copy_blocks": WIDE,
    "rms_norm": WIDE,
    "act_and_mul": WIDE,
    "rope_and_cache": WIDE,
    "sample": WIDE[:1],
    "find_shared_splits": (),
    "plan_prefill": (),
    "concat_and_cache_mla": WIDE,
    "mla_attention": WIDE,
    "mla_attention_mma": MATRIX,
    "merge_splits": WIDE,
    "merge_states": WIDE,
    "paged_decode": WIDE,
    "paged_decode_mma": MATRIX,
    "paged_prefill": WIDE,
    "paged_prefill_mma": MATRIX,
    "paged_prefill_wgmma": (*WIDE, "warpgroup products"),
}

# `/*02a0*/   @!P1 LDG.E.128.CONSTANT R4, desc[...` : address, perhaps a predicate, the opcode.
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


def opcodes(path: Path) -> list[str]:
    """Every instruction's opcode with its modifiers, in the order of the code: ``LDG.E.128.CONSTANT``."""
    tool = pathfinder.find_nvidia_binary_utility("nvdisasm")
    if tool is None:
        raise FileNotFoundError("nvdisasm is missing: pip install nvidia-cuda-nvdisasm (in cupaged[test])")
    # Without the data-flow analysis, which only names branch targets.
    done = subprocess.run([tool, "-c", "-ndf", str(path)], capture_output=True, text=True)
    found = _INSTRUCTION.findall(done.stdout)
    if done.returncode or not found:
        raise RuntimeError(f"nvdisasm failed on {path.name}: {done.stderr.strip() or 'no instruction'}")
    return found


def wide(opcode: str) -> bool:
    """Whether an access moves 16 bytes a thread."""
    return "128" in opcode.split(".")


def complaints(code: list[str], needs: tuple[str, ...]) -> list[str]:
    """What is wrong with a kernel's machine code.

    Args:
        needs: of "wide loads" (16 bytes from global memory, and no narrower asynchronous copy), "wide
            stores", "tensor cores" (HMMA or IMMA), "warpgroup products" (HGMMA), "ldmatrix". Local memory is
            wrong for every kernel.
    """
    by_name: dict[str, list[str]] = {}
    for opcode in code:
        by_name.setdefault(opcode.partition(".")[0], []).append(opcode)
    found = [f"{name} (local memory)" for name in ("LDL", "STL") if name in by_name]
    copies = by_name.get("LDGSTS", [])
    satisfied = {
        "wide loads": any(map(wide, copies + by_name.get("LDG", []))) and all(map(wide, copies)),
        "wide stores": any(map(wide, by_name.get("STG", []))),
        "tensor cores": "HMMA" in by_name or "IMMA" in by_name,
        "warpgroup products": "HGMMA" in by_name,
        "ldmatrix": "LDSM" in by_name,
    }
    return found + [f"no {need}" for need in needs if not satisfied[need]]


def converts_e4m3(spec: KernelSpec, arch: str) -> bool:
    """Return whether a kernel of tensor cores has the instruction: see quant.cuh."""
    return has_fp8(arch) and "CUPAGED_ROW_GROUPS" not in dict(spec.defines)


def machine_code_complaints(spec: KernelSpec, arch: str) -> list[str]:
    """Return what is wrong with the machine code of a kernel, of those in `cuda/`."""
    code = opcodes(cubin(spec, arch).path)
    names = {opcode.partition(".")[0] for opcode in code}
    defines = dict(spec.defines)
    needs = () if defines.get("CUPAGED_UNIT_BYTES") == "1" else NEEDS[spec.entry]
    found = complaints(code, needs)
    if spec.entry == "paged_prefill_wgmma":
        if not {"USETMAXREG.DEALLOC.CTAPOOL", "USETMAXREG.TRY_ALLOC.CTAPOOL"} <= set(code):
            found.append("registers stay where they are")
        if "HMMA" in names:
            found.append("products of a warp")
    if defines.get("CUPAGED_CACHE_DTYPE") == "CUPAGED_FP8_E4M3" and needs == MATRIX:
        converts = any(opcode.startswith("F2FP.F16.E4M3.UNPACK") for opcode in code)
        if converts != converts_e4m3(spec, arch):
            found.append("converts e4m3" if converts else "does not convert e4m3")
    code_of = {"CUPAGED_FP8_E4M3": "E4M3", "CUPAGED_FP8_E5M2": "E5M2"}.get(
        defines.get("CUPAGED_CACHE_DTYPE", "")
    )
    if code_of and spec.entry in ("reshape_and_cache", "rope_and_cache"):
        packs = any(opcode.startswith("F2FP") and code_of in opcode.split(".") for opcode in code)
        if packs != has_fp8(arch):
            found.append(f"packs {code_of}" if packs else f"does not pack {code_of}")
    return [f"{spec} sm_{arch}: {complaint}" for complaint in found]
