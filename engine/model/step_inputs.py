"""Build what the model reads in a step from its plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..memory.block_manager import BlockManager
from ..scheduling.step_plan import ScheduledSequence


@dataclass(frozen=True)
class StepInputs:
    """Hold the batch of a step: the tokens of all sequences, one sequence after the other.

    Args:
        token_ids: int64 [T]. One that the host does not know yet is ``-1 - row``, with its row in the tensor
            of the tokens that the step before has sampled.
        positions: int64 [T], in the sequences.
        slots: int64 [T] of the cache, where keys and values are written; -1 where they are not.
        kept_rows: int64 [N], the tokens whose logits are wanted.
        seq_lens: int32 [S], number of tokens of each sequence after the step.
        query_start_loc: int32 [S + 1], the first token of each sequence, and T.
        block_tables: int32 [S, W].
        is_decode: each sequence has one token.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    kept_rows: np.ndarray
    seq_lens: np.ndarray
    query_start_loc: np.ndarray
    block_tables: np.ndarray
    is_decode: bool

    @classmethod
    def padding(cls) -> StepInputs:
        """Return a decode step without sequences."""
        nothing, start = np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int32)
        table = np.zeros((0, 0), dtype=np.int32)
        return cls(nothing, nothing, nothing, nothing, start[:0], start, table, is_decode=True)

    @classmethod
    def of(cls, scheduled: Sequence[ScheduledSequence], blocks: BlockManager) -> StepInputs:
        """Return the batch of a step plan's sequences, of which there is at least one."""
        block_tables = blocks.tables([item.seq.seq_id for item in scheduled])
        counts = np.array([item.num_tokens for item in scheduled], dtype=np.int32)
        starts = np.array([item.start for item in scheduled], dtype=np.int64)
        query_start_loc = np.zeros(len(scheduled) + 1, dtype=np.int32)
        np.cumsum(counts, out=query_start_loc[1:])
        token_ids: list[int] = []
        for item in scheduled:
            token_ids += item.seq.token_ids[item.start : item.start + item.num_tokens]
        row_of = np.repeat(np.arange(len(scheduled)), counts)
        positions = np.arange(len(token_ids)) + (starts - query_start_loc[:-1])[row_of]
        size = blocks.block_size
        slots = block_tables[row_of, positions // size].astype(np.int64) * size
        slots += positions % size
        stored = starts + [item.num_stored for item in scheduled]
        slots[positions < stored[row_of]] = -1
        kept_rows = (query_start_loc[1:] - 1)[[item.num_samples > 0 for item in scheduled]]
        if any(item.group.params.needs_whole_prompt for item in scheduled):
            first = zip(query_start_loc[:-1], scheduled)
            prompts = [np.arange(start, start + item.num_prompt_logits) for start, item in first]
            kept_rows = np.sort(np.concatenate([kept_rows, *prompts]))
        return cls(
            token_ids=np.array(token_ids, dtype=np.int64),
            positions=positions,
            slots=slots,
            kept_rows=kept_rows.astype(np.int64),
            seq_lens=(starts + counts).astype(np.int32),
            query_start_loc=query_start_loc,
            block_tables=block_tables,
            is_decode=bool(counts.max() == 1),
        )
