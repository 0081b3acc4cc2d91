"""Route requests to replicas by the beginning of their prompts, in Ray Serve's interface for routers."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from .prefix_index import ReplicaChoice

MAX_BEGINNINGS = 200_000  # that are remembered: of 13 million characters, in about 50 MB
_MAX_EARLY_ENDS = 1000


@dataclass
class Route:
    """Tell the router about a request, as one of its arguments.

    Args:
        hashes: chained hashes of the chunks of its prompt.
        avoid: ID of a replica that has just refused it; another one is chosen if there is one.
    """

    hashes: list[bytes] = field(default_factory=list)
    avoid: str | None = None


class PrefixRouter(RequestRouter):
    """Send a prompt to the replica that has seen the longest beginning of it, unless that is too busy.

    Every handle has a router of its own, which knows the requests that it has routed itself.
    """

    # Seconds that Ray Serve lets a replica take to say how many requests it has, before it tries the next
    # one: 0.1 by default, in which one whose cores are busy does not answer, and its cache is not used.
    queue_len_response_deadline_s = 2.0
    max_queue_len_response_deadline_s = 10.0

    def initialize_state(self, **settings: Any) -> None:
        self._choice = ReplicaChoice[ReplicaID](settings["max_imbalance"], MAX_BEGINNINGS)
        self._running: dict[str, ReplicaID] = {}  # by the internal IDs of unfinished requests
        # Those that ended before the router learnt that they were accepted, and those it has not routed.
        self._early_ends: OrderedDict[str, None] = OrderedDict()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        self._choice.update({replica.replica_id for replica in replicas})
        super().update_replicas(replicas)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._choice.update(set(self.curr_replicas))

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the candidates in ranks, the best one first and alone."""
        route = _route(pending_request)
        candidates = {replica.replica_id: replica for replica in candidate_replicas}
        willing = [each for each in candidates if each.unique_id != route.avoid] or list(candidates)
        first = self._choice.choose(route.hashes, willing)
        return [[candidates[first]], [replica for each, replica in candidates.items() if each != first]]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._choice.begin(_route(pending_request).hashes, replica_id)
        self._running[pending_request.metadata.internal_request_id] = replica_id
        if pending_request.metadata.internal_request_id in self._early_ends:
            self.on_request_completed(replica_id, pending_request.metadata.internal_request_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        routed_to = self._running.pop(internal_request_id, None)
        if routed_to is not None:
            self._choice.end(routed_to)
            return
        self._early_ends[internal_request_id] = None
        if len(self._early_ends) > _MAX_EARLY_ENDS:
            self._early_ends.popitem(last=False)


def _route(pending_request: PendingRequest | None) -> Route:
    arguments = () if pending_request is None else pending_request.args
    return next((each for each in arguments if isinstance(each, Route)), Route())
