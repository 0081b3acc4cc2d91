"""Read a CPU kernel's arguments, and share its rows among a team of threads."""

from __future__ import annotations

from typing import NamedTuple, get_type_hints

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .ir import F64, I8, I32, I64, pointer
from .simd import fetch_add, inner

PARALLEL_BYTES = 1 << 17  # a team takes some microseconds to start
INVALID = 1  # status: an argument's data is out of range, and nothing was written


class Launch(NamedTuple):
    """Hold what `run_parallel` needs; the first fields of every struct of arguments."""

    team: int  # address of GOMP_parallel
    work: int  # address of the function that each thread runs
    threads: int


HEADER_BYTES = 8 * len(Launch._fields)


@intrinsic
def read(typingctx, kind, address):
    """Return the `kind`, a NamedTuple class of int and float fields, whose struct is at `address`."""
    cls = kind.instance_class
    members = [types.float64 if hint is float else types.int64 for hint in get_type_hints(cls).values()]
    uniform = len(set(members)) == 1
    result = types.NamedUniTuple(members[0], len(members), cls) if uniform else types.NamedTuple(members, cls)

    def codegen(context, builder, signature, args):
        values = []
        for i, member in enumerate(members):
            element = F64 if member is types.float64 else I64
            at = builder.add(args[1], I64(8 * i))
            values.append(builder.load(pointer(builder, at, element), align=8))
        return context.make_tuple(builder, result, values)

    return result(kind, types.int64), codegen


@intrinsic
def run_parallel(typingctx, launch, data):
    """Run the kernel's work on `data`, an address, in every thread of a team, and wait for all."""
    work_type = ir.FunctionType(I64, [I64])
    team_type = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I64, I32, I32])

    def codegen(context, builder, signature, args):
        team, work, threads = (builder.extract_value(args[0], i) for i in range(3))
        alone = builder.icmp_signed("<=", threads, I64(1))
        with builder.if_else(alone) as (then, otherwise):
            with then:
                builder.call(builder.inttoptr(work, work_type.as_pointer()), [args[1]])
            with otherwise:
                function = builder.inttoptr(work, I8.as_pointer())
                count = builder.trunc(threads, I32)
                builder.call(
                    builder.inttoptr(team, team_type.as_pointer()), [function, args[1], count, I32(0)]
                )
        return context.get_dummy_value()

    return types.void(launch, types.int64), codegen


class Rows(NamedTuple):
    """Hold what the threads of `run_rows` share: addresses and counts."""

    arguments: int
    counter: int  # int64, the next chunk
    count: int
    chunk: int


@inner
def run_rows(launch, arguments, count, chunk, num_bytes):
    """Run the kernel's work, which takes rows by `next_rows`, on `count` rows in chunks of `chunk`.

    Args:
        arguments: address of the kernel's arguments.
        num_bytes: bytes that are read and written; with few of them one thread is faster than a team.
    """
    rows = np.zeros(5, np.int64)  # a Rows, and the counter
    rows[0] = arguments
    rows[1] = rows.ctypes.data + 8 * 4
    rows[2] = count
    rows[3] = chunk
    threads = launch.threads if num_bytes >= PARALLEL_BYTES and count > chunk else 1
    run_parallel(Launch(launch.team, launch.work, threads), np.int64(rows.ctypes.data))
    return min(rows.size, 0)  # keeps the array alive until here


@inner
def next_rows(rows):
    """Return the first row of the next chunk and the one after its last; no rows when none is left."""
    first = min(fetch_add(rows.counter) * rows.chunk, rows.count)
    return first, min(first + rows.chunk, rows.count)
