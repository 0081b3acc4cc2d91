"""Choose between recomputing and swapping out the blocks of preempted groups. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from statistics import median

from ..memory.block_manager import BlockManager
from ..validation import make_policy
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


class PreemptionPolicy(ABC):
    """Choose between swapping out the blocks of a preempted request and computing its tokens again."""

    reads_rates = False  # the rates are measured

    @abstractmethod
    def swaps(self, num_blocks: int, num_tokens: int, rates: Rates) -> bool:
        """Return whether blocks are swapped out; they fit into the swap space.

        Args:
            num_blocks: number of the request's blocks.
            num_tokens: number of tokens to compute again otherwise.
            rates: the measured rates.
        """


class Recompute(PreemptionPolicy):
    """Drop the blocks."""

    def swaps(self, num_blocks: int, num_tokens: int, rates: Rates) -> bool:
        return False


class Swap(PreemptionPolicy):
    """Swap the blocks out."""

    def swaps(self, num_blocks: int, num_tokens: int, rates: Rates) -> bool:
        return True


class Auto(PreemptionPolicy):
    """Take the one of both that costs less time."""

    reads_rates = True

    def swaps(self, num_blocks: int, num_tokens: int, rates: Rates) -> bool:
        return rates.swapping_is_faster(num_blocks, num_tokens)


PREEMPTION_MODES: dict[str, type[PreemptionPolicy]] = {"recompute": Recompute, "swap": Swap, "auto": Auto}
MakePreemptionPolicy = Callable[[], PreemptionPolicy]


class Preemption:
    """Ask the policy of the preemption mode about each preempted group.

    Args:
        mode: name of a policy, or what makes one.
        rates: the measured rates, for policies that read them.

    Attributes:
        reads_rates: whether the policy does.
    """

    def __init__(self, mode: str | MakePreemptionPolicy, rates: Rates | None = None) -> None:
        self._policy = make_policy("preemption_mode", mode, PREEMPTION_MODES, PreemptionPolicy)
        self.reads_rates = self._policy.reads_rates
        if self.reads_rates and rates is None:
            raise ValueError(f"preemption mode {mode!r} compares rates: pass them")
        self._rates = rates or Rates(block_bytes=1)

    def swaps(self, group: SequenceGroup, blocks: BlockManager) -> bool:
        """Return whether the group's blocks are to be swapped out; they fit into the swap space then."""
        seq_ids = [seq.seq_id for seq in group.live]
        return blocks.can_swap_out(seq_ids) and self._policy.swaps(
            blocks.num_distinct(seq_ids), _num_to_recompute(group), self._rates
        )


def _num_to_recompute(group: SequenceGroup) -> int:
    """Return the number of tokens to compute again; the prompt is computed once for all sequences."""
    return sum(_computed(group)) + min(group.prompt_len, group.live[0].num_computed)


def _computed(group: SequenceGroup) -> Iterable[int]:
    return (max(0, seq.num_computed - group.prompt_len) for seq in group.live)
