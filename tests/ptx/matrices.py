"""Tensor core instructions, a warp at a time, with the layouts of the PTX manual. Lane = 4 * g + t.

    8x8 matrix   register: row g, columns 2t and 2t + 1
    A (16x16)    four 8x8 matrices: rows 0-7 left, rows 8-15 left, rows 0-7 right, rows 8-15 right
    B (16x8)     register r: rows 8r + 2t and 8r + 2t + 1 of column g
    C (16x8)     float i: row g + 8 * (i / 2), column 2t + i % 2

Written from the manual alone, and not with a look at the other emulation in `tests/cuda_host`.
"""

from __future__ import annotations

import numpy as np

from .memory import PtxError, Space

LANES = np.arange(32)
G, T = LANES // 4, LANES % 4


def floats(codes: np.ndarray, kind: str) -> np.ndarray:
    """16-bit codes of "f16" or "bf16" as float32."""
    if kind == "f16":
        return codes.view(np.float16).astype(np.float32)
    return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32)


def load_matrices(shared: Space, addresses: np.ndarray, count: int, transposed: bool) -> np.ndarray:
    """ldmatrix: lane 8m + r has the address of row r of matrix m. Registers [count, 32]."""
    rows = shared.load(addresses[: 8 * count], 16 // 2, 2)  # aligned to 16 bytes
    matrices = np.ascontiguousarray(rows.T).view(np.uint16).reshape(count, 8, 8)
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    pairs = np.ascontiguousarray(matrices).view(np.uint32)  # [count, row, pair]
    return pairs[:, G, T]


def a_matrix(registers: np.ndarray, kind: str) -> np.ndarray:
    """[4, 32] registers as 16x16."""
    a = np.empty((16, 16), np.float32)
    for i in range(4):
        pair = floats(np.ascontiguousarray(registers[i]).view(np.uint16), kind).reshape(32, 2)
        rows, columns = G + 8 * (i % 2), 2 * T + 8 * (i // 2)
        a[rows, columns], a[rows, columns + 1] = pair[:, 0], pair[:, 1]
    return a


def product(a: np.ndarray, b: np.ndarray, c: np.ndarray, kind: str) -> np.ndarray:
    """mma.sync.m16n8k16: registers a [4, 32], b [2, 32], floats c [4, 32]."""
    right = np.empty((16, 8), np.float32)
    for i in range(2):
        pair = floats(np.ascontiguousarray(b[i]).view(np.uint16), kind).reshape(32, 2)
        right[2 * T + 8 * i, G], right[2 * T + 8 * i + 1, G] = pair[:, 0], pair[:, 1]
    return c + spread(a_matrix(a, kind) @ right)


def spread(matrix: np.ndarray) -> np.ndarray:
    """16xN over the lanes: floats [N / 2, 32], four for each 8 columns."""
    first, i = 8 * np.arange(matrix.shape[1] // 8)[:, None, None], np.arange(4)[:, None]
    return matrix[G + 8 * (i // 2), first + 2 * T + i % 2].reshape(-1, 32)


class Descriptor:
    """A matrix in shared memory for wgmma, as the 64 bits of its descriptor say."""

    def __init__(self, bits: int) -> None:
        self._start = (bits & 0x3FFF) << 4
        self._leading = (bits >> 16 & 0x3FFF) << 4
        self._stride = (bits >> 32 & 0x3FFF) << 4
        if bits & ~0x3FFF_3FFF_3FFF != 1 << 62:
            raise PtxError(f"descriptor {bits:#x}: only a swizzle of 128 bytes is known, without an offset")

    def k_major(self, first_row: int, rows: int) -> np.ndarray:
        """Addresses of rows of 16 elements that are next to each other: [rows, 16]."""
        row = np.arange(first_row, first_row + rows)[:, None]
        return _swizzle(self._start + row // 8 * self._stride + row % 8 * 128 + 2 * np.arange(16))

    def transposed(self, columns: int) -> np.ndarray:
        """Addresses of 16 rows of elements that are next to each other, 64 at a time: [16, columns]."""
        row, column = np.arange(16)[:, None], np.arange(columns)
        panel = column // 64 * self._leading + column % 64 * 2
        return _swizzle(self._start + row // 8 * self._stride + row % 8 * 128 + panel)


def _swizzle(addresses: np.ndarray) -> np.ndarray:
    return addresses ^ (addresses >> 7 & 7) << 4


def warpgroup_inputs(
    warp: int, columns: int, a: np.ndarray | int, b: int, transposed: tuple[int, int]
) -> list[np.ndarray]:
    """Addresses of the elements that wgmma reads for warp 0 to 3 of a warpgroup: of b [16, columns], and of
    the warp's rows of a [16, 16] unless they are in registers.

    Args:
        a: registers [4, 32] or a descriptor; b: a descriptor.
        transposed: of a and of b.
    """
    inputs = [Descriptor(b).transposed(columns) if transposed[1] else Descriptor(b).k_major(0, columns).T]
    if isinstance(a, int):
        if transposed[0]:
            raise PtxError("a transposed first matrix is not known")
        inputs.append(Descriptor(a).k_major(16 * warp, 16))
    return inputs


def warpgroup_product(shared: Space, a: np.ndarray | int, inputs: list[np.ndarray], kind: str) -> np.ndarray:
    """wgmma: what a warp adds to its floats [columns / 2, 32]."""
    matrices = [floats(shared.load(i.ravel(), 2)[0], kind).reshape(i.shape) for i in inputs]
    left = matrices[1] if isinstance(a, int) else a_matrix(a, kind)
    return spread(left @ matrices[0])
