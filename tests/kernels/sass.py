"""The machine code of a cubin, through NVIDIA's disassembler."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from cuda import pathfinder

# `/*02a0*/   @!P1 LDG.E.128.CONSTANT R4, desc[...` : address, perhaps a predicate, the opcode.
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


def opcodes(cubin: Path) -> list[str]:
    """Every instruction's opcode with its modifiers, in the order of the code: ``LDG.E.128.CONSTANT``."""
    tool = pathfinder.find_nvidia_binary_utility("nvdisasm")
    if tool is None:
        raise FileNotFoundError("nvdisasm is missing: pip install nvidia-cuda-nvdisasm (in cupaged[test])")
    # Without the data-flow analysis, which only names branch targets.
    done = subprocess.run([tool, "-c", "-ndf", str(cubin)], capture_output=True, text=True)
    found = _INSTRUCTION.findall(done.stdout)
    if done.returncode or not found:
        raise RuntimeError(f"nvdisasm failed on {cubin.name}: {done.stderr.strip() or 'no instruction'}")
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
