"""Change logits before sampling, for all sequences of a step at once.

A processor keeps its state in arrays over all sequences that use it, changes only their rows of the logits,
and costs nothing if no sequence uses it. The sampler assigns each sequence a row in these arrays.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass

import numpy as np
import torch

from ..scheduling.request import Sequence
from ..transfer import to_device, with_sampled

_UNSEEN = -1  # tokens counted for a new sequence: even with a prompt of one token, more than one is missing


@dataclass(frozen=True)
class Users:
    """Hold the M sequences of a step that use a processor.

    Args:
        positions: int64 ``[M]``, their rows of the logits.
        rows: int64 ``[M]``, their rows in the processors' arrays.
        lengths: int64 ``[M]``, their numbers of tokens.
        sampled: the tokens that the step before has sampled; ``-1 - row`` stands for one that the host does
            not know yet.
    """

    positions: np.ndarray
    rows: np.ndarray
    lengths: np.ndarray
    seqs: SequenceABC[Sequence]
    sampled: torch.Tensor | None = None

    def last_tokens(self, which: np.ndarray) -> np.ndarray:
        """Return the last tokens, int64, of the sequences that a bool ``[M]`` array selects."""
        return np.array([self.seqs[i].token_ids[-1] for i in np.flatnonzero(which).tolist()], dtype=np.int64)

    def known(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return tokens on the device in which there is none that the host does not know."""
        return tokens if self.sampled is None else with_sampled(tokens, self.sampled)


class TokenTable:
    """Hold lists of tokens by sequence, with values to add to their logits or to rule the tokens out."""

    def __init__(self) -> None:
        self._rows = np.zeros(0, dtype=np.int64)
        self._tokens = np.zeros(0, dtype=np.int64)
        self._values = np.zeros(0, dtype=np.float32)
        self._selected: tuple[bytes, list[torch.Tensor]] | None = None

    def add(self, row: int, tokens: SequenceABC[int], values: SequenceABC[float] | float = 0.0) -> None:
        """Set the tokens of a row that has none."""
        self._rows = np.append(self._rows, np.full(len(tokens), row))
        self._tokens = np.append(self._tokens, np.array(tokens, dtype=np.int64))
        self._values = np.append(
            self._values, np.broadcast_to(np.array(values, dtype=np.float32), len(tokens))
        )
        self._selected = None

    def remove(self, row: int) -> None:
        kept = self._rows != row
        self._rows, self._tokens, self._values = self._rows[kept], self._tokens[kept], self._values[kept]
        self._selected = None

    def add_to(self, logits: torch.Tensor, users: Users) -> None:
        """Add the values to the logits of the tokens, in place."""
        at, tokens, values, _ = self._select(users, logits.device)
        logits[at, tokens] += values

    def rule_out(self, logits: torch.Tensor, users: Users) -> None:
        """Set the logits of the tokens to -inf, in place."""
        at, tokens, *_ = self._select(users, logits.device)
        logits[at, tokens] = -torch.inf

    def rule_out_others(self, logits: torch.Tensor, users: Users) -> None:
        """Set the logits of all other tokens to -inf, in place."""
        at, tokens, _, positions = self._select(users, logits.device)
        kept = logits[at, tokens]
        logits[positions] = -torch.inf
        logits[at, tokens] = kept

    def _select(self, users: Users, device: torch.device) -> list[torch.Tensor]:
        """Return the position in the batch, token and value of each entry of the users, and their positions.

        The tensors are kept on the device until the users change.
        """
        key = users.positions.tobytes() + users.rows.tobytes()
        if self._selected is None or self._selected[0] != key:
            position_of = np.full(max(self._rows.max(initial=0), users.rows.max(initial=0)) + 1, -1)
            position_of[users.rows] = users.positions
            positions = position_of[self._rows]
            chosen = positions >= 0
            arrays = positions[chosen], self._tokens[chosen], self._values[chosen], users.positions
            self._selected = key, to_device(arrays, device)
        return self._selected[1]


class Penalties:
    """Apply repetition, frequency and presence penalties.

    Repetition considers the tokens of prompt and output, frequency and presence those of the output only.
    """

    def __init__(self) -> None:
        # Few sequences have penalties and their counts are as long as the vocabulary, so these get slots.
        self._slots = np.zeros(0, dtype=np.int64)  # [rows]
        self._free: list[int] = []
        self._settings = np.zeros((0, 3), dtype=np.float32)  # repetition, frequency, presence
        self._seen = np.zeros(0, dtype=np.int64)  # number of counted tokens of the sequence
        self._counts = torch.zeros((0, 0), dtype=torch.int32)  # [slots, vocabulary], tokens of the output
        self._in_prompt = torch.zeros((0, 0), dtype=torch.bool)  # [slots, vocabulary]
        self._selected: tuple[bytes, list[torch.Tensor]] | None = None

    def add(self, row: int, repetition: float, frequency: float, presence: float) -> None:
        if row >= len(self._slots):
            self._slots = np.pad(self._slots, (0, row + 1))
        if not self._free:
            old, new = len(self._seen), max(8, 2 * len(self._seen))
            self._settings = np.pad(self._settings, ((0, new - old), (0, 0)))
            self._seen = np.pad(self._seen, (0, new - old))
            self._free = list(range(new - 1, old - 1, -1))
        slot = self._slots[row] = self._free.pop()
        self._settings[slot] = repetition, frequency, presence
        self._selected = None
        self._seen[slot] = _UNSEEN

    def remove(self, row: int) -> None:
        self._free.append(int(self._slots[row]))

    def apply(self, logits: torch.Tensor, users: Users) -> None:
        """Change the users' rows of the float32 logits in place."""
        slots = self._slots[users.rows]
        self._make_room(logits)
        self._count(slots, users)
        key = users.positions.tobytes() + slots.tobytes()
        if self._selected is None or self._selected[0] != key:  # kept on the device until the users change
            arrays = users.positions, slots, self._settings[slots]
            self._selected = key, to_device(arrays, logits.device)
        at, where, settings = self._selected[1]
        repetition, frequency, presence = settings[:, :, None].unbind(1)
        rows, counts = logits[at], self._counts[where]
        in_output = counts > 0
        penalized = torch.where(rows > 0, rows / repetition, rows * repetition)
        rows = torch.where(in_output | self._in_prompt[where], penalized, rows)
        logits[at] = rows.sub_(counts * frequency).sub_(in_output * presence)

    def _make_room(self, logits: torch.Tensor) -> None:
        missing = len(self._seen) - len(self._counts)
        if missing:
            old, shape = len(self._counts), (missing, logits.shape[-1])
            counts, in_prompt = (logits.new_zeros(shape, dtype=dtype) for dtype in (torch.int32, torch.bool))
            self._counts = torch.cat([self._counts, counts]) if old else counts
            self._in_prompt = torch.cat([self._in_prompt, in_prompt]) if old else in_prompt

    def _count(self, slots: np.ndarray, users: Users) -> None:
        device = self._counts.device
        num_new = users.lengths - self._seen[slots]
        self._seen[slots] = _UNSEEN  # until all are counted: an error in between makes them be counted again
        one_new = num_new == 1
        at, tokens = to_device([slots[one_new], users.last_tokens(one_new)], device)
        self._counts[at, users.known(tokens)] += 1
        for i in np.flatnonzero((num_new != 0) & ~one_new).tolist():  # at a sequence's first step
            slot, seq = slots[i], users.seqs[i]
            prompt = np.array(seq.token_ids[: seq.prompt_len], dtype=np.int64)
            prompt = prompt[prompt < self._in_prompt.shape[1]]  # other tokens cannot be sampled
            generated = np.array(seq.token_ids[seq.prompt_len :], dtype=np.int64)
            in_prompt, output = to_device([prompt, generated], device)
            self._counts[slot] = 0
            ones = torch.ones_like(output, dtype=torch.int32)
            self._counts[slot].index_add_(0, users.known(output), ones)
            self._in_prompt[slot] = False
            self._in_prompt[slot, in_prompt] = True
        self._seen[slots] = users.lengths
