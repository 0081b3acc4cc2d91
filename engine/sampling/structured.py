"""Rule out the tokens that grammars do not permit. The masks of a step are computed while others run."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as SequenceABC
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import llguidance as ll
import numpy as np
import torch

from ..scheduling.request import Sequence
from .grammar import Grammar, Matcher
from .logits_processors import Users

_FOR_POOL = 4  # number of masks for which it pays to wake llguidance's threads


class GrammarError(RuntimeError):
    """Report that an output cannot be continued by its grammar: a limit of llguidance, or of the model."""


@dataclass(eq=False)
class _State:
    """Hold where an output is in its grammar, after the first ``matcher.num_tokens`` of its tokens."""

    seq: Sequence
    matcher: Matcher
    slot: int  # row of the masks
    ends: np.ndarray | None  # tokens that end the output, if they are not those of the grammar

    @property
    def new_tokens(self) -> list[int]:
        """Return the output's tokens that the matcher does not have, without the one that ended it."""
        return self.seq.token_ids[self.seq.prompt_len + self.matcher.num_tokens :]


class StructuredOutputs:
    """Keep matchers and masks of sequences that have a grammar.

    A matcher follows the tokens that its sequence has, whatever became of the steps that computed them: so
    forks begin with their parent's tokens, and a preempted sequence goes on where it was.

    Args:
        eos_token_ids: the tokens that llguidance permits where a grammar may end.
    """

    def __init__(self, eos_token_ids: Collection[int]) -> None:
        self._eos = np.array(sorted(eos_token_ids), dtype=np.int64)
        self._states: dict[int, _State] = {}  # by row
        self._free: list[int] = []
        self._masks = np.zeros((0, 0), dtype=np.int32)  # [slots, words], a bit for each token
        self._sampled: list[_State] = []  # in the last step
        self._pending: Future[None] | None = None  # computes masks
        self._known = np.zeros(0, dtype=np.int32)  # the bits of the model's tokens
        self._thread: ThreadPoolExecutor | None = None
        self._pool: ll.LLExecutor | None = None

    def add(self, row: int, seq: Sequence, grammar: Grammar, ends: Collection[int]) -> None:
        """Give a grammar to a row that has none.

        Args:
            ends: tokens that end the output, permitted where the grammar may end and nowhere else.
        """
        self._wait()
        if not self._free:
            old, words = len(self._masks), len(grammar.first_mask)
            masks = np.zeros((max(8, 2 * old), words), dtype=np.int32)
            masks[:old] = self._masks if old else 0
            self._masks, self._free = masks, list(range(len(masks) - 1, old - 1, -1))
        own_ends = np.array(sorted(ends), dtype=np.int64)
        same = np.array_equal(own_ends, self._eos)
        state = _State(seq, grammar.matcher(), self._free.pop(), None if same else own_ends)
        self._masks[state.slot] = grammar.first_mask
        self._set_ends(state)
        self._states[row] = state

    def remove(self, row: int) -> None:
        self._wait()
        state = self._states.pop(row)
        self._free.append(state.slot)
        self._sampled = [other for other in self._sampled if other is not state]

    def apply(self, logits: torch.Tensor, users: Users) -> None:
        """Set the logits of the tokens that the users' grammars do not permit to -inf, in place.

        Raises:
            GrammarError: an output cannot be continued.
        """
        self._wait()
        states = [self._states[row] for row in users.rows.tolist()]
        self._compute([(state, new) for state in states if (new := state.new_tokens)])  # of new forks
        slots = np.array([state.slot for state in states])
        masks = self._masks[slots] & self._model_tokens(logits.shape[-1])
        for state, has_tokens in zip(states, masks.any(-1).tolist()):
            if state.matcher.error is not None or not has_tokens:
                raise GrammarError(
                    "structured_outputs: the output cannot be continued: "
                    + (state.matcher.error or "the model has no token that the grammar permits")
                )
        _rule_out_others(logits, masks, users.positions)
        self._sampled = states

    def prepare(self) -> None:
        """Begin to compute the next masks of the sequences sampled last, in another thread.

        To be called when the sequences have their new tokens.
        """
        if not self._sampled:
            return
        self._wait()
        work = [(state, state.new_tokens) for state in self._sampled if not state.seq.finished]
        self._sampled = []
        if work:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="cupaged-grammars")
            self._pending = self._thread.submit(self._compute, work)

    def _model_tokens(self, num_tokens: int) -> np.ndarray:
        """Return a mask of the first ``num_tokens`` tokens: a tokenizer may have more than the model."""
        if not len(self._known):
            bits = np.arange(self._masks.shape[1] * 32) < num_tokens
            self._known = np.packbits(bits, bitorder="little").view(np.int32)
        return self._known

    def _wait(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _compute(self, work: SequenceABC[tuple[_State, list[int]]]) -> None:
        """Append tokens to matchers and compute the masks of what may follow."""
        if not work:
            return
        for state, tokens in work:
            state.matcher.advance(tokens)
        masks, size = self._masks, self._masks.strides[0]
        if len(work) < _FOR_POOL:
            for state, _ in work:
                state.matcher.raw.unsafe_compute_mask_ptr(masks[state.slot].ctypes.data, size)
        else:
            self._pool = self._pool or ll.LLExecutor()
            raw = [(state.matcher.raw, state.slot) for state, _ in work]
            self._pool.unsafe_compute_mask_ptr(raw, masks.ctypes.data, size, len(masks))
        for state, _ in work:
            self._set_ends(state)

    def _set_ends(self, state: _State) -> None:
        """Permit the tokens that end an output where its grammar may end, and only there.

        Where the grammar permits nothing else, they are text and cut the output, as stop strings do.
        """
        if state.ends is None:
            return
        mask = self._masks[state.slot]
        bits = _bits(mask, mask.size * 32)
        bits[self._eos] = False
        text_before = bits[state.ends]
        bits[state.ends] = state.matcher.may_end
        if not bits.any():
            bits[state.ends] = text_before
        mask[:] = np.packbits(bits, bitorder="little").view(np.int32)


def _rule_out_others(logits: torch.Tensor, masks: np.ndarray, positions: np.ndarray) -> None:
    """Set the logits whose bits are 0 to -inf, in place.

    Args:
        masks: int32 ``[M, words]``.
        positions: int64 ``[M]``, the rows of the logits.
    """
    size, device = logits.shape[-1], logits.device
    if device.type == "cpu":
        ruled_out = torch.from_numpy(_bits(~masks, size))
    else:  # a bit takes less time to copy than a byte
        words = torch.from_numpy(~masks).to(device)
        shifts = torch.arange(32, dtype=torch.int32, device=device)
        ruled_out = ((words[:, :, None] >> shifts) & 1).flatten(1)[:, :size].bool()
    if len(positions) == len(logits):  # in this order
        logits.masked_fill_(ruled_out, -torch.inf)
    else:
        at = torch.from_numpy(positions).to(device)
        logits[at] = logits[at].masked_fill_(ruled_out, -torch.inf)


def _bits(masks: np.ndarray, size: int) -> np.ndarray:
    """Return the first ``size`` bits of each row as bool."""
    return np.unpackbits(masks.view(np.uint8), axis=-1, count=size, bitorder="little").view(bool)
