"""Choose between recomputing and swapping out the blocks of preempted groups. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import median

from ..memory.block_manager import BlockManager
from .request import SequenceGroup

_MEASUREMENTS = 15  # the median of these: a step that compiles a kernel does not count


class Rates:
    """Hold the measured rates at which this machine moves blocks and computes prompts.

    Args:
        block_bytes: size of a block in bytes.
    """

    def __init__(self, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self._link: deque[float] = deque(maxlen=_MEASUREMENTS)
        self._prefill: deque[float] = deque(maxlen=_MEASUREMENTS)

    @property
    def link_bytes_per_s(self) -> float | None:
        """Return bytes a second between GPU and swap space, in one direction; None if not measured yet."""
        return median(self._link) if self._link else None

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Return prompt tokens a second; None if not measured yet."""
        return median(self._prefill) if self._prefill else None

    def moved(self, num_blocks: int, seconds: float) -> None:
        """Note the duration of a swap."""
        if num_blocks and seconds > 0:
            self._link.append(num_blocks * self.block_bytes / seconds)

    def computed(self, num_tokens: int, seconds: float) -> None:
        """Note the duration of a step that computed prompts."""
        if num_tokens and seconds > 0:
            self._prefill.append(num_tokens / seconds)

    def swapping_is_faster(self, num_blocks: int, num_tokens: int) -> bool:
        """Return whether moving blocks out and in again takes less time than computing tokens again.

        True as long as one of the rates has not been measured.
        """
        link, prefill = self.link_bytes_per_s, self.prefill_tokens_per_s
        if link is None or prefill is None:
            return True
        return 2 * num_blocks * self.block_bytes / link < num_tokens / prefill


class Preemption:
    """Decide for each preempted group by the preemption mode.

    Args:
        mode: "recompute", "swap", or "auto", which takes the one that costs less time.
        rates: the measured rates, for "auto".
    """

    def __init__(self, mode: str, rates: Rates | None = None) -> None:
        if mode == "auto" and rates is None:
            raise ValueError("preemption mode 'auto' compares rates: pass them")
        self._mode = mode
        self._rates = rates

    def swaps(self, group: SequenceGroup, blocks: BlockManager) -> bool:
        """Return whether the group's blocks are to be swapped out; they fit into the swap space then."""
        seq_ids = [seq.seq_id for seq in group.live]
        if self._mode == "recompute" or not blocks.can_swap_out(seq_ids):
            return False
        if self._mode == "swap":
            return True
        assert self._rates is not None
        return self._rates.swapping_is_faster(blocks.num_distinct(seq_ids), _num_to_recompute(group))


def _num_to_recompute(group: SequenceGroup) -> int:
    """Return the number of tokens to compute again; the prompt is computed once for all sequences."""
    return sum(_computed(group)) + min(group.prompt_len, group.live[0].num_computed)


def _computed(group: SequenceGroup) -> Iterable[int]:
    return (max(0, seq.num_computed - group.prompt_len) for seq in group.live)
