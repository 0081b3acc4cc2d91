"""Tokenize bad words and rule out the tokens that would complete one."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceABC

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .logits_processors import Users

# Texts after which a word is tokenized too. Tokenizers such as Llama 2's put a space before every text, so
# the tokens of a word by itself are those that it has after a space.
_CONTEXTS = ("\n", "!", "-", "0", "a")
_PADDING = -1  # matches any token where it pads a word, and no token where it pads an output


def tokenize(
    tokenizer: PreTrainedTokenizerBase, words: SequenceABC[str], max_tokens: int
) -> tuple[tuple[int, ...], ...]:
    """Return the token IDs of each word at the start of a text, after a space and after other characters.

    A tokenization that ends with another one is left out: it is never complete unless the other is. One of
    more than ``max_tokens`` tokens cannot occur in an output and is left out to save memory.

    Args:
        max_tokens: maximum number of tokens of an output.

    Raises:
        ValueError: a word has no tokens or is not valid text.
    """
    if not words:
        return ()

    def encode(texts: SequenceABC[str]) -> list[tuple[int, ...]]:
        # In one call: thousands of calls would take as long as a step or more.
        return list(map(tuple, tokenizer(list(texts), add_special_tokens=False)["input_ids"]))

    texts = [text for word in words for text in (word.lstrip(), f" {word.lstrip()}")]
    try:
        forms = encode(texts)
        in_context = _encode_in_context(tokenizer, encode, texts) if hasattr(tokenizer, "decode") else []
    except (TypeError, UnicodeError) as error:  # half of a surrogate pair
        raise ValueError(f"bad_words: the tokenizer refuses one of {words!r}: {error}") from error
    for word, form in zip((word for word in words for _ in range(2)), forms):
        if not form:
            raise ValueError(f"bad_words: the tokenizer has no tokens for {word!r}; leave it out")
    unique = dict.fromkeys(form for form in [*forms, *in_context] if form and len(form) <= max_tokens)
    # Sorted in reverse token order, forms that end with another form come right after it.
    kept: list[tuple[int, ...]] = []
    for reverse in sorted(form[::-1] for form in unique):
        if not kept or reverse[: len(kept[-1])] != kept[-1]:
            kept.append(reverse)
    needed = set(kept)
    return tuple(form for form in unique if form[::-1] in needed)


def _encode_in_context(
    tokenizer: PreTrainedTokenizerBase,
    encode: Callable[[SequenceABC[str]], list[tuple[int, ...]]],
    texts: SequenceABC[str],
) -> list[tuple[int, ...]]:
    """Return the tokens of each text after the first of `_CONTEXTS` that tokenizes separately from it."""

    def decode(token_ids: tuple[int, ...]) -> str:
        return str(tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False))

    forms = []
    for context in _CONTEXTS:
        if not texts:
            break
        start = encode([context])[0]
        start_text, remaining = decode(start), []
        for text, both in zip(texts, encode([context + text for text in texts])):
            # A token may span the border, or the tokenizer may normalize the text.
            if both[: len(start)] == start and decode(both) == f"{start_text}{text}":
                forms.append(both[len(start) :])
            else:
                remaining.append(text)
        texts = remaining
    return forms


class BadWords:
    """Rule out the last token of every bad word whose other tokens an output ends with.

    Only tokens of the output count, as in vLLM: a word may begin in the prompt.
    """

    def __init__(self) -> None:
        self._rows = np.zeros(0, dtype=np.int64)  # [W], row of the sequence that has the word
        self._starts = np.zeros((0, 0), dtype=np.int64)  # [W, L], all but the last token, right-aligned
        self._ends = np.zeros(0, dtype=np.int64)  # [W], the last token
        self._tails = np.zeros((0, 0), dtype=np.int64)  # [rows, L], the last tokens of the outputs
        self._seen = np.zeros(0, dtype=np.int64)  # [rows], length of the sequence when its tail was updated

    def add(self, row: int, words: SequenceABC[SequenceABC[int]]) -> None:
        """Set the bad words of a row that has none; each word has one or more tokens."""
        length = max(len(word) - 1 for word in words)
        self._grow(row + 1, length)
        length = self._starts.shape[1]
        starts = np.full((len(words), length), _PADDING)
        for start, word in zip(starts, words):
            start[length - len(word) + 1 :] = word[:-1]
        self._rows = np.append(self._rows, np.full(len(words), row))
        self._starts = np.concatenate([self._starts, starts])
        self._ends = np.append(self._ends, [word[-1] for word in words])
        self._seen[row] = _PADDING

    def remove(self, row: int) -> None:
        kept = self._rows != row
        self._rows, self._starts, self._ends = self._rows[kept], self._starts[kept], self._ends[kept]

    def apply(self, logits: torch.Tensor, users: Users) -> None:
        """Change the users' rows of the float32 logits in place.

        Where no other token is left to sample, the bad words of the row are allowed.
        """
        self._update_tails(users)
        position_of = np.full(len(self._tails), -1)
        position_of[users.rows] = users.positions
        positions = position_of[self._rows]  # [W], -1 where the row is not in the batch
        starts_match = ((self._starts == _PADDING) | (self._starts == self._tails[self._rows])).all(-1)
        match = starts_match & (positions >= 0)
        if not match.any():
            return
        at, tokens = (torch.from_numpy(array[match]).to(logits.device) for array in (positions, self._ends))
        original = logits[at, tokens]
        logits[at, tokens] = -torch.inf
        changed, which = at.unique(return_inverse=True)
        nothing_left = logits[changed].amax(-1) == -torch.inf
        logits[at, tokens] = original.masked_fill(~nothing_left[which], -torch.inf)

    def _grow(self, rows: int, length: int) -> None:
        old = self._tails.shape
        rows = old[0] if rows <= old[0] else max(rows, 2 * old[0])
        wider = max(length - old[1], 0)
        self._tails = np.pad(self._tails, ((0, rows - old[0]), (wider, 0)), constant_values=_PADDING)
        self._starts = np.pad(self._starts, ((0, 0), (wider, 0)), constant_values=_PADDING)
        self._seen = np.pad(self._seen, (0, rows - old[0]), constant_values=_PADDING)

    def _update_tails(self, users: Users) -> None:
        length = self._tails.shape[1]
        num_new = users.lengths - self._seen[users.rows]
        one_new = num_new == 1
        if length:  # some word has several tokens
            rows = users.rows[one_new]
            self._tails[rows, :-1] = self._tails[rows, 1:]
            self._tails[rows, -1] = users.last_tokens(one_new)
            for i in np.flatnonzero((num_new != 0) & ~one_new).tolist():  # at a sequence's first step
                row, seq = users.rows[i], users.seqs[i]
                tail = seq.output_token_ids[-length:]
                self._tails[row] = _PADDING
                self._tails[row, length - len(tail) :] = tail
        self._seen[users.rows] = users.lengths
