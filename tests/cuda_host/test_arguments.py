"""The arguments of every kernel are laid out in Python as its own compiler has them."""

from __future__ import annotations

import ctypes
import shutil
from dataclasses import replace

import pytest
import torch

from cupaged.backends.cuda import arguments as kernel_arguments
from cupaged.backends.cuda import cache_plans, constants
from cupaged.backends.cuda import specs as kernel_specs
from cupaged.backends.cuda.arguments import FLOAT, INT32, INT64, OF_KERNEL, POINTER, MergeStatesArguments
from cupaged.backends.cuda.compile import cuda_dir
from cupaged.backends.cuda.raw import KERNELS

from .build import load
from .emulator import EmulationError, HostLauncher

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the emulation with")

KINDS = {POINTER: "pc", INT32: "i", INT64: "i", FLOAT: "f"}
SPECS = {
    "copy_blocks": kernel_specs.copy_blocks(16),
    "reshape_and_cache": kernel_specs.reshape_and_cache("bf16", "int8"),
    "paged_decode": kernel_specs.paged_decode("fp32", "fp32", 64, 1),
    "paged_decode_mma": kernel_specs.paged_decode_mma("bf16", "bf16", 64, "80"),
    "paged_prefill": kernel_specs.paged_prefill("fp32", "fp32", 64),
    "paged_prefill_mma": kernel_specs.paged_prefill_mma("bf16", "bf16", 64, "80"),
    "paged_prefill_wgmma": kernel_specs.paged_prefill_wgmma("bf16", 64),
    "mla_attention": kernel_specs.mla_attention("fp32", 192, 128),
    "mla_attention_mma": kernel_specs.mla_attention_mma("bf16", 192, 128, 16, "80"),
    "concat_and_cache_mla": kernel_specs.concat_and_cache_mla("bf16"),
    "merge_splits": kernel_specs.merge_splits("bf16"),
    "merge_states": kernel_specs.merge_states("bf16"),
    "plan_prefill": kernel_specs.plan_prefill(),
    "find_shared_splits": kernel_specs.find_shared_splits(),
    "rms_norm": kernel_specs.rms_norm("bf16"),
    "act_and_mul": kernel_specs.act_and_mul("bf16"),
    "rope_and_cache": kernel_specs.rope_and_cache("bf16", "int8"),
    "sample": kernel_specs.sample("bf16"),
}
# What each kernel writes. All other pointers must be to const: the emulation protects their memory.
WRITTEN = {
    "copy_blocks": {"target"},
    "reshape_and_cache": {"kv_cache"},
    "paged_decode": {"out", "lse", "partials", "split_size"},
    "paged_decode_mma": {"out", "lse", "partials", "split_size"},
    "paged_prefill": {"out", "lse", "workspace", "partials"},
    "paged_prefill_mma": {"out", "lse", "workspace", "partials"},
    "paged_prefill_wgmma": {"out", "lse", "workspace", "partials"},
    "mla_attention": {"out", "lse", "partials"},
    "mla_attention_mma": {"out", "lse", "partials"},
    "concat_and_cache_mla": {"kv_cache"},
    "merge_splits": {"out", "lse"},
    "merge_states": {"out", "lse"},
    "plan_prefill": {"workspace"},
    "find_shared_splits": {"counts", "tiles"},
    "rms_norm": {"residual", "out"},
    "act_and_mul": {"out"},
    "rope_and_cache": {"query", "kv_cache"},
    "sample": {"out"},
}


def test_every_kernel_is_here():
    assert SPECS.keys() == OF_KERNEL.keys() == {path.stem for path in cuda_dir().glob("*.cu")}
    assert KERNELS.keys() == SPECS.keys()  # what raw_kernel has
    assert all(spec.entry == name for name, spec in SPECS.items())


@pytest.mark.parametrize("name", OF_KERNEL)
def test_size_and_every_field_agree(name):
    arguments, module = OF_KERNEL[name], load(SPECS[name])
    assert ctypes.sizeof(arguments) == module.struct_size
    for (field, kind), found in zip(arguments._fields_, module.arguments, strict=True):
        place = getattr(arguments, field)
        assert (place.offset, place.size) == (found.offset, found.size), field
        assert found.kind in KINDS[kind], field
        assert (found.kind == "p") == (field in WRITTEN[name]), field


@pytest.mark.parametrize("name", OF_KERNEL)
def test_pointers_come_first(name):
    """One pack fills them in."""
    arguments = OF_KERNEL[name]
    offsets = [getattr(arguments, field).offset for field in arguments.pointers()]
    assert offsets == [8 * i for i in range(len(offsets))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields[:-1], "fields that are not named"),
        (lambda fields: (*fields[:-1], ("alligned", INT32)), "alligned"),
        (lambda fields: (*fields[:4], fields[5], fields[4], *fields[6:]), "has num_states at 40, 4 bytes"),
        (lambda fields: (*fields[:-1], (fields[-1][0], FLOAT)), "has aligned at 48, 4 bytes of kind i"),
        (lambda fields: (*fields[:-1], (fields[-1][0], INT64)), "has aligned at 48, 4 bytes of kind i"),
    ],
    ids=["missing", "misspelt", "order", "kind", "width"],
)
def test_a_struct_that_differs_is_refused(monkeypatch, change, message):
    wrong = type(
        "Wrong", (kernel_arguments.KernelArguments,), {"_fields_": change(MergeStatesArguments._fields_)}
    )
    monkeypatch.setitem(OF_KERNEL, "merge_states", wrong)
    outs, lses = torch.zeros(2, 1, 1, 8), torch.zeros(2, 1, 1)
    call = kernel_specs.KernelCall(
        kernel_specs.merge_states("fp32"), (1, 1), wrong.from_buffer_copy(bytes(64))
    )
    with pytest.raises((EmulationError, RuntimeError), match=message):
        HostLauncher(0).prepare(call, torch.device("cpu"))((outs, lses, outs[0].clone(), lses[0].clone()))


def test_arguments_are_named_and_fit():
    numbers = {"num_rows": 3, "num_states": 2, "head_size": 64, "aligned": True}
    made = MergeStatesArguments(**numbers)
    assert {name: getattr(made, name) for name in numbers} == numbers
    assert [getattr(made, name) for name in made.pointers()] == [None] * 4
    copy = made.copy().point_to([1, 2, 3, 0])
    assert (copy.outs, copy.lse, made.outs) == (1, None, None)
    for wrong in ({"num_rows": 3}, numbers | {"rows": 1}, numbers | {"outs": 1}):
        with pytest.raises(TypeError, match="takes each number once"):
            MergeStatesArguments(**wrong)
    with pytest.raises(OverflowError, match="num_states has no room for 2147483648"):
        MergeStatesArguments(**numbers | {"num_states": 1 << 31})
    with pytest.raises(ValueError, match="zip"):
        made.point_to([1, 2, 3])


def test_a_tensor_too_few_is_refused():
    cache = torch.zeros(4, 2, 1, 8, 8)
    call = cache_plans.copy_blocks(cache, cache, 1)
    with pytest.raises(EmulationError, match="6 parameters, 5 were given"):
        HostLauncher(0).prepare(call, torch.device("cpu"))((cache, cache))


@pytest.mark.parametrize("name", ["DYNAMIC_BYTES", "THREADS"])
def test_a_launch_that_is_not_what_the_kernel_is_made_for_does_not_compile(name):
    """Its shared memory and its threads are told to the compiler."""
    spec = SPECS["paged_decode_mma"]
    field = {"DYNAMIC_BYTES": "dynamic_shared_memory", "THREADS": "threads"}[name]
    with pytest.raises(RuntimeError, match="as launched"):
        load(replace(spec, **{field: getattr(spec, field) + 16}))


def test_constants_of_both_sides_are_macros_of_every_kernel():
    """And no kernel has a number of its own for one."""
    macros = dict(SPECS["plan_prefill"].macros)
    assert macros["CUPAGED_SMALLEST_SPLIT_TOKENS"] == str(constants.SMALLEST_SPLIT_TOKENS)
    text = "".join(path.read_text() for path in cuda_dir().glob("*.cu*"))
    assert [name for name, _ in constants.MACROS if name not in text] == []
    assert [name for name, _ in constants.MACROS if f"#ifndef {name}" in text] == []
