"""The inner loops of the CPU attention for few rows: tiles of accumulators that stay in registers.

A row of K or V is loaded one machine register at a time and widened in registers, which changes the order of
its elements (`formats.order`). The query is reordered likewise once; the output is ordered back at the end.

Measured on an Emerald Rapids: vdpbf16ps, which adds two bfloat16 products, takes as long as two FMAs, and
decode of four rows took 1.5 times as long with it. Without prefetching, large caches took 1.1 to 2 times as
long; with prefetching into the first-level cache instead of the second, up to 1.7 times.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import formats
from . import ir as low
from .ir import F32, I8, I32, I64, NATIVE
from .simd import LANES, Vector

REGISTER = 4 * NATIVE  # bytes
QUAD = 4  # sums per key that `scores_rows` leaves to `sum_quads`
TILE_KEYS = NATIVE // QUAD  # keys of a tile of logits, with an accumulator for each of up to MAX_ROWS rows
TILE_VECTORS = TILE_KEYS  # vectors along D of a tile of outputs, likewise
MAX_ROWS = 4


def _load_register(builder: ir.IRBuilder, address: ir.Value, bytes_left: ir.Value | None) -> ir.Value:
    """Load a register from `address`, or only its first `bytes_left` (a multiple of 4), padded with 0."""
    kind = low.vector(I32, NATIVE)
    pointer = low.pointer(builder, address, kind)
    if bytes_left is None:
        return builder.load(pointer, align=4)
    ramp = ir.Constant(kind, list(range(NATIVE)))
    words = builder.trunc(builder.ashr(bytes_left, I64(2)), I32)
    mask = builder.icmp_signed("<", ramp, low.splat(builder, words, NATIVE))
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(kind, [pointer.type, I32, mask.type, kind]),
        f"llvm.masked.load.v{NATIVE}i32.p0",
    )
    return builder.call(function, [pointer, I32(4), mask, ir.Constant(kind, [0] * NATIVE)])


def _prefetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Prefetch into the second-level cache; the first allows too few lines in flight."""
    pointer = low.pointer(builder, address, I8)
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32]), "llvm.prefetch.p0"
    )
    builder.call(function, [pointer, I32(0), I32(2), I32(1)])


def _load_floats(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.load(low.pointer(builder, address, low.vector(F32, NATIVE)), align=4)


def _load_i64(builder: ir.IRBuilder, array: ir.Value, index: ir.Value | int) -> ir.Value:
    at = I64(8 * index) if isinstance(index, int) else builder.shl(index, I64(3))
    return builder.load(low.pointer(builder, builder.add(array, at), I64))


def _merge(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, group: int) -> ir.Value:
    """Add the two halves of every group of lanes: of the groups of `a`, then of those of `b`."""
    lanes, half = a.type.count, group // 2
    first_half = [g + i for g in range(0, 2 * lanes, group) for i in range(half)]
    halves = [
        builder.shuffle_vector(a, b, ir.Constant(low.vector(I32, lanes), [i + shift for i in first_half]))
        for shift in (0, half)
    ]
    return builder.fadd(*halves)


def _merge_all(builder: ir.IRBuilder, vectors: list[ir.Value], group: int) -> ir.Value:
    while len(vectors) > 1:
        vectors = [_merge(builder, a, b, group) for a, b in zip(vectors[::2], vectors[1::2])]
        group //= 2
    return vectors[0]


@intrinsic
def prefetch(typingctx, address):
    """Prefetch the cache line at `address`."""

    def codegen(context, builder, signature, args):
        _prefetch(builder, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def code_unit(typingctx, kv_dtype):
    """Return the factor of `formats.code_unit` for keys or values of this dtype."""
    unit = formats.code_unit(formats.kind_of(kv_dtype))
    return types.float32(kv_dtype), lambda context, builder, signature, args: F32(unit)


@intrinsic
def padded_size(typingctx, kv_dtype, size):
    """Return `size` rounded up to whole tiles: the elements of a row of the query and the output."""
    tile = NATIVE * max(TILE_VECTORS, formats.widths(formats.kind_of(kv_dtype)))

    def codegen(context, builder, signature, args):
        return builder.and_(builder.add(args[1], I64(tile - 1)), I64(-tile))

    return types.int64(kv_dtype, types.int64), codegen


def _reorder(builder: ir.IRBuilder, places: list[int], address: ir.Value, size: ir.Value) -> None:
    if places == sorted(places):
        return
    mask = ir.Constant(low.vector(I32, len(places)), places)
    with cgutils.for_range_slice(builder, I64(0), size, I64(len(places))) as (i, _):
        at = builder.add(address, builder.shl(i, I64(2)))
        pointer = low.pointer(builder, at, low.vector(F32, len(places)))
        floats = builder.load(pointer, align=4)
        builder.store(builder.shuffle_vector(floats, floats, mask), pointer, align=4)


@intrinsic
def reorder_query(typingctx, kv_dtype, address, size):
    """Reorder `size` (a `padded_size`) float32 like the widened elements of the cache."""

    def codegen(context, builder, signature, args):
        _reorder(builder, formats.order(formats.kind_of(kv_dtype)), args[1], args[2])
        return context.get_dummy_value()

    return types.void(kv_dtype, types.int64, types.int64), codegen


@intrinsic
def reorder_output(typingctx, kv_dtype, address, size):
    """Undo `reorder_query`."""

    def codegen(context, builder, signature, args):
        order = formats.order(formats.kind_of(kv_dtype))
        _reorder(builder, [order.index(i) for i in range(len(order))], args[1], args[2])
        return context.get_dummy_value()

    return types.void(kv_dtype, types.int64, types.int64), codegen


@intrinsic(prefer_literal=True)
def scores_rows(
    typingctx, kv_dtype, rows, query, query_stride, keys, count, row_bytes, ahead, out, out_stride
):
    """Compute for each of `rows` query rows and `count` keys QUAD sums that add up to q.k.

    Also prefetches, for each key, as many bytes at a distance of `ahead` bytes.

    Args:
        kv_dtype: dtype of the keys.
        rows: number of query rows, a constant from 1 to MAX_ROWS.
        query, query_stride: address and byte stride of float32 rows from `reorder_query`.
        keys: address of an int64 array with the address of each key, padded to a multiple of TILE_KEYS.
        out, out_stride: address and byte stride of rows of QUAD float32 per key.
    """
    if not isinstance(rows, types.IntegerLiteral):
        return None
    num_rows, width = rows.literal_value, formats.widths(formats.kind_of(kv_dtype))

    def codegen(context, builder, signature, args):
        query, query_stride, keys, count, row_bytes, ahead, out, out_stride = args[2:]
        q_rows = [builder.add(query, builder.mul(query_stride, I64(r))) for r in range(num_rows)]
        zero = ir.Constant(low.vector(F32, NATIVE), [F32(0.0)] * NATIVE)
        cells = [cgutils.alloca_once(builder, zero.type) for _ in range(num_rows * TILE_KEYS)]
        whole = builder.and_(row_bytes, I64(-REGISTER))

        def step(k_rows: list[ir.Value], at: ir.Value, left: ir.Value | None) -> None:
            wide = []
            for k in k_rows:
                address = builder.add(k, at)
                wide.append(formats.widen(builder, kv_dtype, _load_register(builder, address, left)))
                _prefetch(builder, builder.add(address, ahead))
            for v in range(width):
                place = builder.add(builder.mul(at, I64(width)), I64(v * REGISTER))
                for r, row in enumerate(q_rows):
                    q = _load_floats(builder, builder.add(row, place))
                    for k in range(TILE_KEYS):
                        cell = cells[r * TILE_KEYS + k]
                        builder.store(low.fma(builder, q, wide[k][v], builder.load(cell)), cell)

        with cgutils.for_range_slice(builder, I64(0), count, I64(TILE_KEYS)) as (first, _):
            k_rows = [_load_i64(builder, keys, builder.add(first, I64(k))) for k in range(TILE_KEYS)]
            for cell in cells:
                builder.store(zero, cell)
            with cgutils.for_range_slice(builder, I64(0), whole, I64(REGISTER)) as (at, _):
                step(k_rows, at, None)
            with builder.if_then(builder.icmp_signed("<", whole, row_bytes)):
                step(k_rows, whole, builder.sub(row_bytes, whole))
            place = builder.add(out, builder.mul(first, I64(4 * QUAD)))
            for r in range(num_rows):
                sums = [builder.load(cell) for cell in cells[r * TILE_KEYS : (r + 1) * TILE_KEYS]]
                target = builder.add(place, builder.mul(out_stride, I64(r)))
                quads = _merge_all(builder, sums, NATIVE)
                builder.store(quads, low.pointer(builder, target, quads.type), align=4)
        return context.get_dummy_value()

    return types.void(kv_dtype, rows, *[types.int64] * 8), codegen


@intrinsic
def sum_quads(typingctx, address):
    """Return LANES sums, each of QUAD consecutive float32 from `address` on."""

    def codegen(context, builder, signature, args):
        kind = low.vector(F32, LANES)
        vectors = [
            builder.load(low.pointer(builder, builder.add(args[0], I64(4 * LANES * i)), kind), align=4)
            for i in range(QUAD)
        ]
        return _merge_all(builder, vectors, QUAD)

    return Vector(LANES)(types.int64), codegen


@intrinsic(prefer_literal=True)
def values_rows(
    typingctx,
    kv_dtype,
    rows,
    weights,
    weights_stride,
    values,
    offset,
    count,
    row_bytes,
    ahead,
    out,
    out_stride,
    alpha,
):
    """Compute out[r, :] = alpha[r] * out[r, :] + sum over k < count of weights[r, k] * values[k, :].

    Also prefetches the rows at the addresses in `ahead`.

    Args:
        kv_dtype: dtype of the values.
        rows: number of rows r, a constant from 1 to MAX_ROWS.
        weights, weights_stride: address and byte stride of float32 rows.
        values, offset: address of an int64 array of addresses; value k is at `offset` bytes from the k-th.
        ahead: address of an int64 array of `count` addresses.
        out, out_stride: address and byte stride of float32 rows, for `reorder_output`.
        alpha: address of `rows` float32.
    """
    if not isinstance(rows, types.IntegerLiteral):
        return None
    num_rows, width = rows.literal_value, formats.widths(formats.kind_of(kv_dtype))
    loads = max(1, TILE_VECTORS // width)

    def codegen(context, builder, signature, args):
        weights, weights_stride, values, offset, count, row_bytes, ahead, out, out_stride, alpha = args[2:]

        def tile(at: ir.Value, lefts: list[ir.Value] | None) -> None:
            base = builder.add(out, builder.mul(at, I64(width)))
            places = [
                builder.add(builder.add(base, builder.mul(out_stride, I64(r))), I64(REGISTER * i))
                for r in range(num_rows)
                for i in range(loads * width)
            ]
            cells = [cgutils.alloca_once(builder, low.vector(F32, NATIVE)) for _ in places]
            for i, (place, cell) in enumerate(zip(places, cells)):
                factor = builder.add(alpha, I64(4 * (i // (loads * width))))
                factor = low.splat(builder, builder.load(low.pointer(builder, factor, F32)), NATIVE)
                builder.store(builder.fmul(_load_floats(builder, place), factor), cell)
            start = builder.add(offset, at)
            with cgutils.for_range(builder, count) as loop:
                address = builder.add(_load_i64(builder, values, loop.index), start)
                following = builder.add(_load_i64(builder, ahead, loop.index), at)
                wide = []
                for i in range(loads):
                    step = I64(REGISTER * i)
                    left = None if lefts is None else lefts[i]
                    bits = _load_register(builder, builder.add(address, step), left)
                    wide += formats.widen(builder, kv_dtype, bits)
                    _prefetch(builder, builder.add(following, step))
                weight = builder.add(weights, builder.shl(loop.index, I64(2)))
                for r in range(num_rows):
                    place = builder.add(weight, builder.mul(weights_stride, I64(r)))
                    w = low.splat(builder, builder.load(low.pointer(builder, place, F32)), NATIVE)
                    for value, cell in zip(wide, cells[r * len(wide) :]):
                        builder.store(low.fma(builder, w, value, builder.load(cell)), cell)
            for place, cell in zip(places, cells):
                value = builder.load(cell)
                builder.store(value, low.pointer(builder, place, value.type), align=4)

        span = loads * REGISTER
        whole = builder.and_(row_bytes, I64(-span))
        with cgutils.for_range_slice(builder, I64(0), whole, I64(span)) as (at, _):
            tile(at, None)
        with builder.if_then(builder.icmp_signed("<", whole, row_bytes)):
            left = builder.sub(row_bytes, whole)
            tile(whole, [builder.sub(left, I64(REGISTER * i)) for i in range(loads)])
        return context.get_dummy_value()

    return types.void(kv_dtype, rows, *[types.int64] * 10), codegen
