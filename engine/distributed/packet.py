"""Write what rank 0 tells the other ranks into one buffer of bytes, and read it. No process group."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from ..model.step_inputs import StepInputs
from ..scheduling.step_plan import BlockPairs, Plan

_MAGIC = 0x63757061676564  # "cupaged"
_FIELDS = 14
HEADER_BYTES = _FIELDS * 8


class Kind(IntEnum):
    """Name what the other ranks are told to do."""

    LOAD = 1  # a model
    STEP = 2
    MOVE = 3  # blocks, without a step
    PROBE = 4  # compute a token in a cache of its own
    DROP = 5  # the model
    EXIT = 6


class OutOfStep(RuntimeError):
    """Say that a rank has not got what rank 0 has sent."""


@dataclass(frozen=True)
class Step:
    """Hold a step as the other ranks run it.

    Args:
        inputs: the batch.
        moves: the moves of blocks that come before.
        num_sampled: number of tokens that the step before has sampled and that the host does not know, which
            rank 0 sends separately, from its device; 0: the batch does not need them.
    """

    inputs: StepInputs
    moves: Plan
    num_sampled: int


def frame(kind: Kind, number: int, payload: bytes = b"", fields: Sequence[int] = ()) -> bytes:
    """Return a payload with its header.

    Args:
        number: how many buffers were sent before.
        fields: numbers that say how to read the payload.
    """
    header = np.zeros(_FIELDS, dtype=np.int64)
    header[:5] = _MAGIC, kind, number, len(payload), zlib.crc32(payload)
    header[5 : 5 + len(fields)] = fields
    return header.tobytes() + payload


def payload_bytes(header: bytes) -> int:
    """Return how many bytes follow a header.

    Raises:
        OutOfStep: it is none.
    """
    magic, _, _, size, *_ = np.frombuffer(header[:HEADER_BYTES], dtype=np.int64).tolist()
    if magic != _MAGIC:
        raise OutOfStep("what rank 0 has sent does not begin with a header")
    return size


def read_frame(buffer: bytes, number: int) -> tuple[Kind, list[int], bytes]:
    """Return the kind, the fields and the payload of a buffer.

    Raises:
        OutOfStep: it is not the one with this number, or not as it was sent.
    """
    size = payload_bytes(buffer)
    payload = buffer[HEADER_BYTES : HEADER_BYTES + size]
    _, kind, sent_as, _, checksum, *fields = np.frombuffer(buffer[:HEADER_BYTES], dtype=np.int64).tolist()
    if sent_as != number:
        raise OutOfStep(f"rank 0 has sent number {sent_as}, and number {number} is next")
    if zlib.crc32(payload) != checksum:
        raise OutOfStep(f"number {number} is not as rank 0 has sent it: its checksum is another")
    return Kind(kind), fields, payload


def write_step(number: int, step: Step) -> bytes:
    """Return a step as a buffer."""
    inputs, moves = step.inputs, step.moves
    pairs = (moves.swap_out, moves.swap_in, moves.copies)
    arrays = [
        inputs.token_ids,
        inputs.positions,
        inputs.slots,
        inputs.kept_rows,
        *(np.array(of, dtype=np.int64) for of in pairs),
        inputs.seq_lens,  # after those of 8 bytes, all of which so begin at multiples of 8
        inputs.query_start_loc,
        inputs.block_tables,
    ]
    fields = (
        len(inputs.token_ids),
        len(inputs.kept_rows),
        *inputs.block_tables.shape,
        inputs.is_decode,
        step.num_sampled,
        *map(len, pairs),
    )
    return frame(Kind.STEP, number, b"".join(array.tobytes() for array in arrays), fields)


def read_step(fields: Sequence[int], payload: bytes) -> Step:
    """Return the step of a buffer's fields and payload."""
    num_tokens, num_kept, num_seqs, width, is_decode, num_sampled, *num_moves = fields
    place = 0

    def take(dtype: type[np.generic], *shape: int) -> np.ndarray:
        nonlocal place
        count = int(np.prod(shape))
        array = np.frombuffer(payload, dtype, count, place).reshape(shape).copy()  # torch wants it writable
        place += array.nbytes
        return array

    token_ids, positions, slots = (take(np.int64, num_tokens) for _ in range(3))
    kept_rows = take(np.int64, num_kept)
    swap_out, swap_in, copies = (_pairs(take(np.int64, count, 2)) for count in num_moves)
    inputs = StepInputs(
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        kept_rows=kept_rows,
        seq_lens=take(np.int32, num_seqs),
        query_start_loc=take(np.int32, num_seqs + 1),
        block_tables=take(np.int32, num_seqs, width),
        is_decode=bool(is_decode),
    )
    return Step(inputs, Plan(swap_out=swap_out, swap_in=swap_in, copies=copies), num_sampled)


def _pairs(array: np.ndarray) -> BlockPairs:
    return tuple((source, destination) for source, destination in array.tolist())
