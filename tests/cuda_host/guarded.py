"""Copies of tensors that lie against inaccessible pages."""

from __future__ import annotations

import ctypes
import random
from dataclasses import dataclass
from types import TracebackType

import torch

PAGE = 4096
GUARD = 1 << 20  # bytes of inaccessible memory on either side
POISON = 0xFF
# A larger tensor is used where it is: it is meant to be mostly untouched memory.
LARGEST = 1 << 30

_PROT_NONE, _PROT_READ, _PROT_WRITE = 0, 1, 2
_MAP_PRIVATE, _MAP_ANONYMOUS = 0x02, 0x20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@dataclass
class _Span:
    """The bytes [begin, end) of a storage that the tensors of a launch cover, and their copy."""

    begin: int
    end: int
    constant: bool  # only read by the kernel
    mapping: int = 0
    mapping_bytes: int = 0
    copy: int = 0  # address; 0 if the original is used

    @property
    def size(self) -> int:
        return self.end - self.begin


class GuardedMemory:
    """Copies tensors into guarded memory, and back at the end.

    Tensors of one storage share a copy, at the distance they have. The copy ends right before
    inaccessible memory or starts right after it (drawn), as far as the tensor's alignment to 16 bytes allows.
    The rest of the pages is filled with 0xFF and must be so at the end. What the kernel takes as pointer to
    const is read-only.

    Args:
        tensors: on the CPU.
        constants: by id of the tensor, whether the kernel only reads it.
    """

    def __init__(self, tensors: list[torch.Tensor], constants: dict[int, bool], seed: int) -> None:
        self._spans: dict[int, _Span] = {}
        generator = random.Random(seed)
        for tensor in tensors:
            if tensor.device.type != "cpu":
                raise ValueError(f"the emulation takes tensors on the CPU, got one on {tensor.device}")
            begin = tensor.data_ptr()
            end = begin + _span_bytes(tensor)
            span = self._spans.get(_storage(tensor))
            if span is None:
                self._spans[_storage(tensor)] = _Span(begin, end, constants[id(tensor)])
            elif end > begin:
                span.begin, span.end = min(span.begin, begin), max(span.end, end)
                span.constant &= constants[id(tensor)]
        for span in self._spans.values():
            if 0 < span.size <= LARGEST:
                _copy_in(span, at_end=generator.random() < 0.5)

    def address(self, tensor: torch.Tensor) -> int:
        """Where the kernel finds the tensor."""
        span = self._spans[_storage(tensor)]
        return tensor.data_ptr() - span.begin + span.copy if span.copy else tensor.data_ptr()

    def problem(self, kernel: str) -> str:
        """What is wrong with the memory around the copies, or nothing."""
        for span in self._spans.values():
            if span.copy and not _margins_intact(span):
                return (
                    f"{kernel}: wrote outside a tensor of {span.size} bytes, less than {PAGE} bytes from it"
                )
        return ""

    def __enter__(self) -> GuardedMemory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for span in self._spans.values():
            if not span.copy:
                continue
            if not span.constant:
                ctypes.memmove(span.begin, span.copy, span.size)
            _libc.munmap(span.mapping, span.mapping_bytes)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _span_bytes(tensor: torch.Tensor) -> int:
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.element_size()


def _copy_in(span: _Span, at_end: bool) -> None:
    inner = -(-(span.size + 15) // PAGE) * PAGE
    span.mapping_bytes = inner + 2 * GUARD
    mapping = _libc.mmap(
        None, span.mapping_bytes, _PROT_READ | _PROT_WRITE, _MAP_PRIVATE | _MAP_ANONYMOUS, -1, 0
    )
    if mapping in (None, ctypes.c_void_p(-1).value):
        raise MemoryError(f"cannot map {span.mapping_bytes} bytes")
    span.mapping = mapping
    first = mapping + GUARD
    last = first + inner
    skew = span.begin % 16
    span.copy = last - span.size - (last - span.size - skew) % 16 if at_end else first + skew
    ctypes.memset(first, POISON, span.copy - first)
    ctypes.memset(span.copy + span.size, POISON, last - span.copy - span.size)
    ctypes.memmove(span.copy, span.begin, span.size)
    _libc.mprotect(mapping, GUARD, _PROT_NONE)
    _libc.mprotect(last, GUARD, _PROT_NONE)
    if span.constant:
        _libc.mprotect(first, inner, _PROT_READ)


def _margins_intact(span: _Span) -> bool:
    if span.constant:
        return True
    first, last = span.mapping + GUARD, span.mapping + span.mapping_bytes - GUARD
    before = ctypes.string_at(first, span.copy - first)
    after = ctypes.string_at(span.copy + span.size, last - span.copy - span.size)
    return not (before + after).strip(bytes([POISON]))
