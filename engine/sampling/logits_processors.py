"""What requests change in the logits before a token is drawn, for all sequences of a step at once.

A processor has its state in arrays over all sequences that use it, changes their rows of the logits alone,
and costs nothing where no sequence does. A sequence is known by its row, a small integer that is the
sampler's to give.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass

import numpy as np
import torch

from ..scheduling.request import Sequence

_NOTHING = -1  # for what a sequence has not shown yet: even a prompt of one token is two more


@dataclass(frozen=True)
class Users:
    """The M sequences of a step that use a processor."""

    positions: np.ndarray  # int64 [M], their rows of the logits
    rows: np.ndarray  # int64 [M], what they are known by
    lengths: np.ndarray  # int64 [M], how many tokens they have
    seqs: SequenceABC[Sequence]

    def last_tokens(self, which: np.ndarray) -> np.ndarray:
        """int64, of those that the bool ``[M]`` array names."""
        return np.array([self.seqs[i].token_ids[-1] for i in np.flatnonzero(which).tolist()], dtype=np.int64)


class TokenTable:
    """Values of single tokens, for sequences that have any: biases, or tokens to rule out."""

    def __init__(self) -> None:
        self._rows = np.zeros(0, dtype=np.int64)
        self._tokens = np.zeros(0, dtype=np.int64)
        self._values = np.zeros(0, dtype=np.float32)
        self._selected: tuple[bytes, tuple[torch.Tensor, ...]] | None = None

    def add(self, row: int, tokens: SequenceABC[int], values: SequenceABC[float] | float = 0.0) -> None:
        """Give a row that has none these tokens."""
        self._rows = np.append(self._rows, np.full(len(tokens), row))
        self._tokens = np.append(self._tokens, np.array(tokens, dtype=np.int64))
        self._values = np.append(
            self._values, np.broadcast_to(np.array(values, dtype=np.float32), len(tokens))
        )
        self._selected = None

    def remove(self, row: int) -> None:
        stay = self._rows != row
        self._rows, self._tokens, self._values = self._rows[stay], self._tokens[stay], self._values[stay]
        self._selected = None

    def add_to(self, logits: torch.Tensor, users: Users) -> None:
        at, tokens, values = self._select(users, logits.device)
        logits[at, tokens] += values

    def rule_out(self, logits: torch.Tensor, users: Users) -> None:
        at, tokens, _ = self._select(users, logits.device)
        logits[at, tokens] = -torch.inf

    def rule_out_others(self, logits: torch.Tensor, users: Users) -> None:
        at, tokens, _ = self._select(users, logits.device)
        kept = logits[at, tokens]
        logits[torch.from_numpy(users.positions).to(logits.device)] = -torch.inf
        logits[at, tokens] = kept

    def _select(self, users: Users, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Of each entry of the users: the position in the batch, the token, the value.

        While the users are the same so are they, and nothing is made or moved to the device.
        """
        key = users.positions.tobytes() + users.rows.tobytes()
        if self._selected is None or self._selected[0] != key:
            position_of = np.full(max(self._rows.max(initial=0), users.rows.max(initial=0)) + 1, -1)
            position_of[users.rows] = users.positions
            found = position_of[self._rows]
            chosen = found >= 0
            arrays = found[chosen], self._tokens[chosen], self._values[chosen]
            self._selected = key, tuple(torch.from_numpy(array).to(device) for array in arrays)
        return self._selected[1]


class Penalties:
    """Repetition, frequency and presence penalties.

    Repetition counts the tokens of prompt and output; frequency and presence those of the output alone.
    """

    def __init__(self) -> None:
        # Few sequences have penalties, and what is counted for one is a vocabulary long: it has a slot.
        self._slots = np.zeros(0, dtype=np.int64)  # [rows]
        self._free: list[int] = []
        self._settings = np.zeros((0, 3), dtype=np.float32)  # repetition, frequency, presence
        self._seen = np.zeros(0, dtype=np.int64)  # tokens of the sequence that are counted
        self._counts = torch.zeros((0, 0), dtype=torch.int32)  # [slots, vocabulary], of the output
        self._in_prompt = torch.zeros((0, 0), dtype=torch.bool)  # [slots, vocabulary]

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
        self._seen[slot] = _NOTHING

    def remove(self, row: int) -> None:
        self._free.append(int(self._slots[row]))

    def apply(self, logits: torch.Tensor, users: Users) -> None:
        """Change the users' rows of the float32 logits."""
        device, slots = logits.device, self._slots[users.rows]
        self._make_room(logits)
        self._count(slots, users)
        at, where = torch.from_numpy(users.positions).to(device), torch.from_numpy(slots).to(device)
        settings = torch.from_numpy(self._settings[slots]).to(device)
        repetition, frequency, presence = settings[:, :, None].unbind(1)
        rows, number = logits[at], self._counts[where]
        in_output = number > 0
        penalised = torch.where(rows > 0, rows / repetition, rows * repetition)
        rows = torch.where(in_output | self._in_prompt[where], penalised, rows)
        logits[at] = rows.sub_(number * frequency).sub_(in_output * presence)

    def _make_room(self, logits: torch.Tensor) -> None:
        missing = len(self._seen) - len(self._counts)
        if missing:
            old, shape = len(self._counts), (missing, logits.shape[-1])
            counts, in_prompt = (logits.new_zeros(shape, dtype=dtype) for dtype in (torch.int32, torch.bool))
            self._counts = torch.cat([self._counts, counts]) if old else counts
            self._in_prompt = torch.cat([self._in_prompt, in_prompt]) if old else in_prompt

    def _count(self, slots: np.ndarray, users: Users) -> None:
        device = self._counts.device
        missing = users.lengths - self._seen[slots]
        self._seen[slots] = _NOTHING  # until it is done: after an error all is counted again
        one = missing == 1
        at, tokens = (torch.from_numpy(array).to(device) for array in (slots[one], users.last_tokens(one)))
        self._counts[at, tokens] += 1
        for i in np.flatnonzero((missing != 0) & ~one).tolist():  # at a sequence's first step
            slot, seq = slots[i], users.seqs[i]
            output = torch.tensor(seq.output_token_ids, dtype=torch.int64, device=device)
            self._counts[slot] = 0
            self._counts[slot].index_add_(0, output, torch.ones_like(output, dtype=torch.int32))
            self._in_prompt[slot] = False
            prompt = torch.tensor(seq.token_ids[: seq.prompt_len], device=device)
            self._in_prompt[slot, prompt[prompt < self._in_prompt.shape[1]]] = True  # others are not sampled
        self._seen[slots] = users.lengths
