"""Describe layers whose memory has one shape and one rule.

Sequences have a block table for each layer group, and the blocks of all groups are of one pool, so they have
the same number of bytes. How many tokens a block holds follows from the group's bytes a token. What stands in
a block is the caller's business: here a rule says what a token reads, and what no token will read is free.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass


class Rule(ABC):
    """Say what a token reads of the memory of the tokens before it.

    Attributes:
        reach: maximum number of tokens before its own that a token reads; None: all.
        is_state: a block holds the sum of all tokens to its end, or to the last token so far, instead of
            something of each token. A step overwrites it, and ends at a block's end at the latest: what is
            full stays as it is.
    """

    reach: int | None = None
    is_state = False

    @abstractmethod
    def first_read(self, position: int) -> int:
        """Return the position of the first token whose memory the token at a position reads.

        It does not decrease from one position to the next; below 1 is the first token of all.
        """


class ReadAll(Rule):
    """Every token reads all before it."""

    def first_read(self, position: int) -> int:
        return 0


@dataclass(frozen=True)
class ReadWindow(Rule):
    """A token reads the last ``size`` tokens, its own included."""

    size: int

    @property
    def reach(self) -> int:  # type: ignore[override]
        return self.size - 1

    def first_read(self, position: int) -> int:
        return position - self.size + 1


@dataclass(frozen=True)
class ReadChunk(Rule):
    """A token reads those before it since the last multiple of ``size`` tokens."""

    size: int

    @property
    def reach(self) -> int:  # type: ignore[override]
        return self.size - 1

    def first_read(self, position: int) -> int:
        return position // self.size * self.size


class ReadState(Rule):
    """A token reads the state after the token before it. A sequence has one, and the prefix cache more."""

    reach = 1
    is_state = True

    def first_read(self, position: int) -> int:
        return position - 1


@dataclass(frozen=True)
class LayerGroup:
    """Name layers that share their block tables.

    Args:
        name: what reports call it.
        rule: what their tokens read.
        scale: number of tokens of a block, as a multiple of the block manager's ``block_size``.
    """

    name: str
    rule: Rule = ReadAll()  # noqa: RUF009  it has no state
    scale: int = 1

    def most_blocks(self, block_size: int, max_step_tokens: int | None) -> int:
        """Return the maximum number of blocks that a sequence of any length holds at once.

        Args:
            block_size: that of the block manager.
            max_step_tokens: maximum number of tokens that a sequence appends at once; None: any.
        """
        size, reach = block_size * self.scale, self.rule.reach
        if self.rule.is_state:
            return 2  # the one that is read, and the one that is written
        if reach is None or max_step_tokens is None:
            return sys.maxsize
        return (reach + max_step_tokens + size - 2) // size + 1


ONE_GROUP = (LayerGroup("all layers"),)


def check_layer_groups(layer_groups: Sequence[LayerGroup]) -> None:
    """Raise ValueError for groups that cannot share a pool."""
    names = [layer_group.name for layer_group in layer_groups]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"layer_groups has the names {names}: pass at least one group, each with its own")
    for layer_group in layer_groups:
        if layer_group.scale < 1:
            raise ValueError(
                f"layer group {layer_group.name!r} has scale {layer_group.scale}: a block holds 1 or more "
                "times block_size tokens"
            )
