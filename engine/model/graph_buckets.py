"""Choose the sizes that decode steps are padded to, so that few graphs cover all steps."""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

LONG_PREFIX = 1024  # minimum number of shared prompt tokens for which kernels look for shared prefixes
MAX_SEQS = 512  # of a bucket; larger steps keep a GPU busy for longer than Python takes
_SEQS_STEP = 64  # from here on numbers of sequences are its multiples; below, powers of two
_NARROWEST = 512  # tokens of the narrowest block tables: a sequence has one KV split


class Bucket(NamedTuple):
    """Stand for decode steps of at most so many sequences, with block tables of at most so many columns."""

    num_seqs: int
    width: int
    shared_prefix: bool


class Buckets:
    """Hold all buckets.

    Args:
        max_num_seqs: maximum number of sequences of a step.
        max_model_len: maximum number of tokens of a sequence.
        block_size: number of tokens of a block.
        with_prefixes: there are buckets for steps in which kernels look for shared prefixes.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, with_prefixes: bool) -> None:
        self.max_model_len = max_model_len
        self.numbers_of_seqs = _numbers_of_seqs(min(max_num_seqs, MAX_SEQS))
        self.widths = _widths(-(-max_model_len // block_size), max(1, _NARROWEST // block_size))
        self._long_width = LONG_PREFIX // block_size if with_prefixes else self.widths[-1]

    def all(self) -> list[Bucket]:
        """Return the buckets, the largest first: the other graphs find room in what its graph has freed."""
        return [
            Bucket(num_seqs, width, shared)
            for num_seqs in reversed(self.numbers_of_seqs)
            for width in reversed(self.widths)
            for shared in (True, False)
            if not shared or (num_seqs > 1 and width > self._long_width)
        ]

    def find(self, num_seqs: int, width: int, shared_prefix: bool) -> Bucket | None:
        """Return the smallest bucket for a step; None if there is none.

        Args:
            num_seqs: number of sequences of the step, at least 1.
            width: number of columns of its block tables.
            shared_prefix: kernels are to look for shared prefixes.
        """
        seqs_at, width_at = bisect_left(self.numbers_of_seqs, num_seqs), bisect_left(self.widths, width)
        if seqs_at == len(self.numbers_of_seqs) or width_at == len(self.widths):
            return None
        num_seqs, width = self.numbers_of_seqs[seqs_at], self.widths[width_at]
        return Bucket(num_seqs, width, shared_prefix and num_seqs > 1 and width > self._long_width)


def _numbers_of_seqs(most: int) -> list[int]:
    powers = [1 << i for i in range(_SEQS_STEP.bit_length() - 1)]
    multiples = range(_SEQS_STEP, most + _SEQS_STEP, _SEQS_STEP)
    return [n for n in powers if n < most] + [min(n, most) for n in multiples]


def _widths(widest: int, narrowest: int) -> list[int]:
    widths = []
    while narrowest < widest:
        widths.append(narrowest)
        narrowest *= 2
    return [*widths, widest]
