"""Words that an output must not have: from texts to tokens, and from there to tokens that are ruled out."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceABC

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .logits_processors import Users

# What a word may follow. Tokenizers such as Llama 2's put a space of their own before a text, so that the
# tokens of a word alone are those that it has after a space.
_BEFORE = ("\n", "!", "-", "0", "a")
_NONE = -1  # no token: matches any in a word, and none in an output


def tokenise(
    tokenizer: PreTrainedTokenizerBase, words: SequenceABC[str], max_tokens: int
) -> tuple[tuple[int, ...], ...]:
    """Each word as the tokens it has at the start of a text, after a space, and right after other characters.

    One that ends in another one is left out: it is never complete where the other is not. So is one of more
    tokens than an output has, ``max_tokens``; it would take memory for as many of every sequence.

    Raises:
        ValueError: a word has no tokens, or is no text.
    """
    if not words:
        return ()

    def ids(texts: SequenceABC[str]) -> list[tuple[int, ...]]:
        # All at once: one by one, thousands of them take as long as a step or more.
        return list(map(tuple, tokenizer(list(texts), add_special_tokens=False)["input_ids"]))

    texts = [text for word in words for text in (word.lstrip(), f" {word.lstrip()}")]
    try:
        forms = ids(texts)
        within = _within(tokenizer, ids, texts) if hasattr(tokenizer, "decode") else []
    except (TypeError, UnicodeError) as error:  # half of a surrogate pair
        raise ValueError(f"bad_words: the tokenizer refuses one of {words!r}: {error}") from error
    for word, form in zip((word for word in words for _ in range(2)), forms):
        if not form:
            raise ValueError(f"bad_words: the tokenizer has no tokens for {word!r}; leave it out")
    found = dict.fromkeys(form for form in [*forms, *within] if form and len(form) <= max_tokens)
    # Backwards and sorted, those that end in a word follow it.
    kept: list[tuple[int, ...]] = []
    for backwards in sorted(ids[::-1] for ids in found):
        if not kept or backwards[: len(kept[-1])] != kept[-1]:
            kept.append(backwards)
    needed = set(kept)
    return tuple(ids for ids in found if ids[::-1] in needed)


def _within(
    tokenizer: PreTrainedTokenizerBase,
    ids: Callable[[SequenceABC[str]], list[tuple[int, ...]]],
    texts: SequenceABC[str],
) -> list[tuple[int, ...]]:
    """Return the tokens that texts have right after another one, where the tokenizer changes nothing."""

    def decode(token_ids: tuple[int, ...]) -> str:
        return str(tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False))

    found = []
    for before in _BEFORE:
        if not texts:
            break
        start = ids([before])[0]
        first, left = decode(start), []
        for text, both in zip(texts, ids([before + text for text in texts])):
            # The two may melt into a token, or something may be lost.
            if both[: len(start)] == start and decode(both) == f"{first}{text}":
                found.append(both[len(start) :])
            else:
                left.append(text)
        texts = left
    return found


class BadWords:
    """Rules out the last token of every word whose other tokens an output ends in.

    Only tokens of the output count, as in vLLM: a word may be half in the prompt.
    """

    def __init__(self) -> None:
        self._rows = np.zeros(0, dtype=np.int64)  # [W], whose word it is
        self._starts = np.zeros((0, 0), dtype=np.int64)  # [W, L], all but the last token, right-aligned
        self._ends = np.zeros(0, dtype=np.int64)  # [W], the last token
        self._tails = np.zeros((0, 0), dtype=np.int64)  # [rows, L], the last tokens of the outputs
        self._seen = np.zeros(0, dtype=np.int64)  # [rows], tokens of the sequence that the tail follows

    def add(self, row: int, words: SequenceABC[SequenceABC[int]]) -> None:
        """Give a row that has none these words, each one or more tokens."""
        length = max(len(word) - 1 for word in words)
        self._grow(row + 1, length)
        length = self._starts.shape[1]
        starts = np.full((len(words), length), _NONE)
        for start, word in zip(starts, words):
            start[length - len(word) + 1 :] = word[:-1]
        self._rows = np.append(self._rows, np.full(len(words), row))
        self._starts = np.concatenate([self._starts, starts])
        self._ends = np.append(self._ends, [word[-1] for word in words])
        self._seen[row] = _NONE

    def remove(self, row: int) -> None:
        stay = self._rows != row
        self._rows, self._starts, self._ends = self._rows[stay], self._starts[stay], self._ends[stay]

    def apply(self, logits: torch.Tensor, users: Users) -> None:
        """Change the users' rows of the float32 logits. A row with nothing else left keeps its bad words."""
        self._follow(users)
        position_of = np.full(len(self._tails), -1)
        position_of[users.rows] = users.positions
        found = position_of[self._rows]
        match = ((self._starts == _NONE) | (self._starts == self._tails[self._rows])).all(-1) & (found >= 0)
        if not match.any():
            return
        at, tokens = (torch.from_numpy(array[match]).to(logits.device) for array in (found, self._ends))
        kept = logits[at, tokens]
        logits[at, tokens] = -torch.inf
        changed, which = at.unique(return_inverse=True)
        dead = logits[changed].amax(-1) == -torch.inf
        logits[at, tokens] = kept.masked_fill(~dead[which], -torch.inf)

    def _grow(self, rows: int, length: int) -> None:
        old = self._tails.shape
        rows = old[0] if rows <= old[0] else max(rows, 2 * old[0])
        wider = max(length - old[1], 0)
        self._tails = np.pad(self._tails, ((0, rows - old[0]), (wider, 0)), constant_values=_NONE)
        self._starts = np.pad(self._starts, ((0, 0), (wider, 0)), constant_values=_NONE)
        self._seen = np.pad(self._seen, (0, rows - old[0]), constant_values=_NONE)

    def _follow(self, users: Users) -> None:
        length = self._tails.shape[1]
        missing = users.lengths - self._seen[users.rows]
        one = missing == 1
        if length:  # some word has several tokens
            rows = users.rows[one]
            self._tails[rows, :-1] = self._tails[rows, 1:]
            self._tails[rows, -1] = users.last_tokens(one)
            for i in np.flatnonzero((missing != 0) & ~one).tolist():  # at a sequence's first step
                row, seq = users.rows[i], users.seqs[i]
                tail = seq.output_token_ids[-length:]
                self._tails[row] = _NONE
                self._tails[row, length - len(tail) :] = tail
        self._seen[users.rows] = users.lengths
