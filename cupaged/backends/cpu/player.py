"""The numba kernel that calls other kernels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .ir import I64
from .simd import load_scalar
from .team import HEADER_BYTES, read

_I64 = np.dtype(np.int64)


class Calls(NamedTuple):
    """Hold the arguments: an address and a size."""

    table: int  # int64 [count, 2]: address of a kernel's entry, address of its arguments
    count: int


@intrinsic
def _call_entry(typingctx, entry, arguments):
    """Call a kernel's entry; return its status."""

    def codegen(context, builder, signature, args):
        function = builder.inttoptr(args[0], ir.FunctionType(I64, [I64]).as_pointer())
        return builder.call(function, [args[1]])

    return types.int64(types.int64, types.int64), codegen


def play(address):
    calls = read(Calls, address + HEADER_BYTES)
    for i in range(calls.count):
        at = calls.table + 16 * i
        status = _call_entry(load_scalar(_I64, at), load_scalar(_I64, at + 8))
        if status != 0:
            return status
    return 0
