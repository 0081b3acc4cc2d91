"""Declare the arguments of each kernel: a struct with the fields of its namesake in `cuda/`, passed by value.

First come the pointers, which a launch fills in with the addresses of its tensors, in this order, then the
numbers. What each is, is told at the head of the kernel. The tests compare every field with the kernel's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from typing import Self

POINTER, INT64, INT32, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
Field = tuple[str, Any]


def _fields(pointers: str, **numbers: str) -> tuple[Field, ...]:
    """Return fields from their names, by type."""
    types = {"int64": INT64, "int32": INT32, "floats": FLOAT}
    found = [(name, POINTER) for name in pointers.split()]
    return (*found, *((name, types[kind]) for kind, names in numbers.items() for name in names.split()))


class KernelArguments(ctypes.Structure):
    """Hold the given numbers, and null pointers.

    Args:
        numbers: every field that is no pointer.

    Raises:
        TypeError: a number is missing, or there is no field of that name.
        OverflowError: a field has no room for its number.
    """

    _fields_: ClassVar[tuple[Field, ...]] = ()

    def __init__(self, **numbers: float) -> None:
        expected = {name for name, kind in self._fields_ if kind is not POINTER}
        if wrong := expected ^ numbers.keys():
            raise TypeError(f"{type(self).__name__} takes each number once, see {', '.join(sorted(wrong))}")
        super().__init__(**numbers)
        for name, kind in self._fields_:
            if kind in (INT32, INT64) and getattr(self, name) != numbers[name]:
                raise OverflowError(f"{type(self).__name__}.{name} has no room for {numbers[name]}")

    def copy(self) -> Self:
        """Return a copy in memory of its own."""
        return type(self).from_buffer_copy(self)

    def point_to(self, addresses: Iterable[int]) -> Self:
        """Fill in the pointers, in the order of the fields, and return the arguments.

        Raises:
            ValueError: there are more or fewer addresses than pointers.
        """
        for name, address in zip(self.pointers(), addresses, strict=True):
            setattr(self, name, address)
        return self

    @classmethod
    def pointers(cls) -> tuple[str, ...]:
        """Return the names of the fields that are pointers."""
        return tuple(name for name, kind in cls._fields_ if kind is POINTER)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and bytes(self) == bytes(other)

    __hash__ = None  # type: ignore[assignment]  # they can be changed


class CopyBlocksArguments(KernelArguments):
    """The arguments of copy_blocks."""

    _fields_ = _fields("source target block_mapping", int64="source_stride target_stride block_units")


class ReshapeAndCacheArguments(KernelArguments):
    """The arguments of reshape_and_cache."""

    _fields_ = _fields(
        "key value kv_cache slot_mapping k_scale v_scale",
        int64="key_token_stride key_head_stride value_token_stride value_head_stride block_stride",
        int32="num_kv_heads head_size block_shift aligned",
    )


# What decode and prefill begin with.
_TENSORS = "query kv_cache block_tables seq_lens query_start_loc alibi_slopes sinks k_scale v_scale out lse"
_STRIDES = "query_token_stride query_head_stride out_token_stride out_head_stride block_stride table_stride"
_SIZES = "num_tokens num_seqs num_heads num_kv_heads block_shift causal window max_splits"
_ALIGNED = "query_aligned out_aligned"
_FACTORS = "query_scale soft_cap_log2"


class DecodeArguments(KernelArguments):
    """The arguments of paged_decode and paged_decode_mma."""

    _fields_ = _fields(
        f"{_TENSORS} partials split_size tile_counts tile_lists",
        int64=_STRIDES,
        int32=f"{_SIZES} {_ALIGNED} split_tokens subset list_capacity",
        floats=_FACTORS,
    )


class PrefillArguments(KernelArguments):
    """The arguments of paged_prefill, paged_prefill_mma and paged_prefill_wgmma."""

    _fields_ = _fields(
        f"{_TENSORS} workspace partials",
        int64=_STRIDES,
        int32=f"{_SIZES} {_ALIGNED} tile_heads",
        floats=_FACTORS,
    )


class MlaArguments(KernelArguments):
    """The arguments of mla_attention and mla_attention_mma."""

    _fields_ = _fields(
        "query kv_cache block_tables seq_lens query_start_loc out lse partials",
        int64=_STRIDES,
        int32="num_tokens num_seqs num_heads key_size value_size block_shift causal max_splits "
        f"{_ALIGNED} split_tokens subset",
        floats="query_scale",
    )


class ConcatAndCacheMlaArguments(KernelArguments):
    """The arguments of concat_and_cache_mla."""

    _fields_ = _fields(
        "kv_c k_pe kv_cache slot_mapping",
        int64="kv_c_stride k_pe_stride block_stride",
        int32="key_size value_size block_shift aligned",
    )


class MergeSplitsArguments(KernelArguments):
    """The arguments of merge_splits."""

    _fields_ = _fields(
        "partials seq_lens query_start_loc split_size sinks out lse",
        int64="out_token_stride out_head_stride",
        int32="num_tokens num_seqs num_heads head_size window split_tokens max_splits subset aligned",
    )


class MergeStatesArguments(KernelArguments):
    """The arguments of merge_states."""

    _fields_ = _fields("outs lses out lse", int64="num_rows", int32="num_states head_size aligned")


class PlanPrefillArguments(KernelArguments):
    """The arguments of plan_prefill."""

    _fields_ = _fields(
        "seq_lens query_start_loc workspace",
        int32="num_tokens num_seqs tile_tokens group num_kv_heads tile_heads window max_splits blocks",
    )


class FindSharedSplitsArguments(KernelArguments):
    """The arguments of find_shared_splits."""

    _fields_ = _fields(
        "block_tables seq_lens query_start_loc counts tiles",
        int64="table_stride",
        int32="num_tokens num_seqs block_shift split_tokens max_splits group wide_rows capacity",
    )


class RmsNormArguments(KernelArguments):
    """The arguments of rms_norm."""

    _fields_ = _fields(
        "input weight residual input_weight out",
        int64="input_stride residual_stride out_stride num_rows",
        int32="size whole_block float_weight aligned",
        floats="epsilon weight_offset",
    )


class ActAndMulArguments(KernelArguments):
    """The arguments of act_and_mul."""

    _fields_ = _fields("input out", int64="input_stride out_stride", int32="size activation aligned")


class RopeAndCacheArguments(KernelArguments):
    """The arguments of rope_and_cache."""

    _fields_ = _fields(
        "query key value cos sin kv_cache slot_mapping query_weight key_weight k_scale v_scale",
        int64="query_token_stride query_head_stride key_token_stride key_head_stride value_token_stride "
        "value_head_stride cos_stride sin_stride block_stride",
        int32="num_heads num_kv_heads head_size num_pairs block_shift lane_shift interleaved float_angles "
        "float_weights aligned",
        floats="epsilon weight_offset",
    )


class SampleArguments(KernelArguments):
    """The arguments of sample."""

    _fields_ = _fields(
        "logits temperature top_k top_p min_p seeds indices positions out",
        int64="stride",
        int32="size fraction_bits aligned",
    )


OF_KERNEL: dict[str, type[KernelArguments]] = {
    "copy_blocks": CopyBlocksArguments,
    "reshape_and_cache": ReshapeAndCacheArguments,
    "paged_decode": DecodeArguments,
    "paged_decode_mma": DecodeArguments,
    "paged_prefill": PrefillArguments,
    "paged_prefill_mma": PrefillArguments,
    "paged_prefill_wgmma": PrefillArguments,
    "mla_attention": MlaArguments,
    "mla_attention_mma": MlaArguments,
    "concat_and_cache_mla": ConcatAndCacheMlaArguments,
    "merge_splits": MergeSplitsArguments,
    "merge_states": MergeStatesArguments,
    "plan_prefill": PlanPrefillArguments,
    "find_shared_splits": FindSharedSplitsArguments,
    "rms_norm": RmsNormArguments,
    "act_and_mul": ActAndMulArguments,
    "rope_and_cache": RopeAndCacheArguments,
    "sample": SampleArguments,
}
