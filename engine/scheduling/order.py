"""Choose the order in which requests run. No torch.

A rank is fixed when a request is first admitted, so that of those which have run, the same one always comes
first: it can take the memory of all others, and everybody is served in the end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from ..validation import is_number, make_policy
from .request import SequenceGroup


class SchedulingPolicy(ABC):
    """Rank requests: lower ranks are admitted first and preempted last, equal ones by their arrival."""

    preempts = False  # a request that waits takes the memory of running ones that rank after it
    reads_priority = False  # requests may have a priority
    num_reranked = 0  # number of waiting requests, from the first on, that are ranked again when one may run

    @abstractmethod
    def rank(self, group: SequenceGroup, num_cached: int) -> float:
        """Return the rank of a request.

        Args:
            group: the request; ``arrival`` is its place in the order of arrival.
            num_cached: number of tokens of its prompt that are in the prefix cache; 0 when it arrives.
        """

    def place(self, group: SequenceGroup, num_cached: int = 0) -> tuple[float, int]:
        """Return the rank, and the place in the order of arrival for equal ones.

        Raises:
            ValueError: the rank is no number.
        """
        rank = self.rank(group, num_cached)
        if not is_number(rank):
            raise ValueError(
                f"scheduling_policy gave request {group.request_id} the rank {rank!r}: `rank` of "
                f"{type(self).__name__} must return a finite number"
            )
        return rank, group.arrival


class FirstComeFirstServed(SchedulingPolicy):
    """Run requests in the order of their arrival."""

    def rank(self, group: SequenceGroup, num_cached: int) -> float:
        return 0


class Priority(SchedulingPolicy):
    """Run the requests with the lowest number first; the others may wait for as long as such come."""

    preempts = reads_priority = True

    def rank(self, group: SequenceGroup, num_cached: int) -> float:
        return group.priority


class ShortestPrompt(SchedulingPolicy):
    """Run short prompts before long ones.

    Nobody starves: of two requests the later one goes first only if its prompt is shorter by more than
    ``tokens_per_place`` times the places between them in the order of arrival.

    Args:
        tokens_per_place: number of tokens of a prompt for which one later request may pass it.
    """

    def __init__(self, tokens_per_place: float = 8) -> None:
        self._tokens_per_place = tokens_per_place

    def rank(self, group: SequenceGroup, num_cached: int) -> float:
        return group.arrival + group.prompt_len / self._tokens_per_place


class LongestPrefix(SchedulingPolicy):
    """Run requests first whose prompts begin with much that the prefix cache holds, while it is there.

    As in SGLang (Zheng et al., 2024), but that nobody starves: of two requests the later one goes first only
    if it has more than ``tokens_per_place`` cached tokens more for each place between them.

    Args:
        tokens_per_place: number of cached tokens for which a request may pass one that came before it.
    """

    num_reranked = 64

    def __init__(self, tokens_per_place: float = 8) -> None:
        self._tokens_per_place = tokens_per_place

    def rank(self, group: SequenceGroup, num_cached: int) -> float:
        return group.arrival - num_cached / self._tokens_per_place


SCHEDULING_POLICIES: dict[str, type[SchedulingPolicy]] = {
    "fcfs": FirstComeFirstServed,
    "priority": Priority,
    "shortest-prompt": ShortestPrompt,
    "longest-prefix": LongestPrefix,
}
MakeSchedulingPolicy = Callable[[], SchedulingPolicy]


def make_scheduling_policy(policy: str | MakeSchedulingPolicy) -> SchedulingPolicy:
    """Return the policy of this name, or the one that is made; ValueError if that is something else."""
    return make_policy("scheduling_policy", policy, SCHEDULING_POLICIES, SchedulingPolicy)
