"""Choose how much memory stays free for running requests when another one is admitted. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

from ..validation import make_policy


class AdmissionPolicy(ABC):
    """Reserve blocks; a request that would run alone is admitted without."""

    @abstractmethod
    def num_reserved(self, num_blocks: int, growth: Iterable[int]) -> int:
        """Return the number of blocks that stay free when a request is admitted with all tokens that it has.

        Args:
            num_blocks: number of blocks of the KV cache.
            growth: of the request and of each running one, the maximum number of blocks that it may come to
                take for tokens that it does not have yet; counted while it is read.
        """


class Watermark(AdmissionPolicy):
    """Keep a share of all blocks, at least one, so that newcomers are not preempted in their next steps.

    Args:
        share: of the blocks.
    """

    def __init__(self, share: float = 0.01) -> None:
        self._share = share

    def num_reserved(self, num_blocks: int, growth: Iterable[int]) -> int:
        return max(1, int(num_blocks * self._share))


class Greedy(AdmissionPolicy):
    """Admit whatever fits: most requests run at once, and most are preempted."""

    def num_reserved(self, num_blocks: int, growth: Iterable[int]) -> int:
        return 0


class Conservative(AdmissionPolicy):
    """Keep what requests may take until they reach their ``max_tokens``, or a share of it.

    With all of it nobody is preempted for want of memory; where outputs end far below their ``max_tokens``,
    most of the memory is never used then.

    Args:
        share: of what requests may take.
    """

    def __init__(self, share: float = 1.0) -> None:
        self._share = share

    def num_reserved(self, num_blocks: int, growth: Iterable[int]) -> int:
        return int(self._share * sum(growth))


ADMISSION_POLICIES: dict[str, type[AdmissionPolicy]] = {
    "watermark": Watermark,
    "greedy": Greedy,
    "conservative": Conservative,
}
MakeAdmissionPolicy = Callable[[], AdmissionPolicy]


def make_admission_policy(policy: str | MakeAdmissionPolicy) -> AdmissionPolicy:
    """Return the policy of this name, or the one that is made; ValueError if that is something else."""
    return make_policy("admission_policy", policy, ADMISSION_POLICIES, AdmissionPolicy)
