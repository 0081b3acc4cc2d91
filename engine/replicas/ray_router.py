"""Route requests to replicas by the beginning of their prompts, in Ray Serve's interface for routers."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from .prefix_index import ReplicaChoice

MAX_BEGINNINGS = 200_000  # that are remembered: of up to 13 million characters, in about 50 MB
_MAX_ENDED = 1000


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
    # one: 0.1 by default, in which one whose cores are busy does not answer, and its cache is not used. One
    # that has died does not take them.
    queue_len_response_deadline_s = 10.0
    max_queue_len_response_deadline_s = 10.0

    def initialize_state(self, **settings: Any) -> None:
        self._choice = ReplicaChoice[ReplicaID](settings["max_imbalance"], MAX_BEGINNINGS)
        self._running: dict[str, ReplicaID] = {}  # by the internal IDs of unfinished requests
        self._ended: OrderedDict[str, None] = OrderedDict()  # the latest: one can end before it is accepted

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
        if pending_request is not None:  # counted from now on, so that those chosen at once are balanced
            self._begin(pending_request, first)
            pending_request.future.add_done_callback(partial(self._unless_sent, pending_request))
        return [[candidates[first]], [replica for each, replica in candidates.items() if each != first]]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        request_id = pending_request.metadata.internal_request_id
        if request_id not in self._ended and self._running.get(request_id) != replica_id:
            self._begin(pending_request, replica_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._end(internal_request_id)
        self._ended[internal_request_id] = None
        if len(self._ended) > _MAX_ENDED:
            self._ended.popitem(last=False)

    def _begin(self, pending_request: PendingRequest, replica_id: ReplicaID) -> None:
        request_id = pending_request.metadata.internal_request_id
        self._end(request_id)  # at the replica that was chosen before
        self._running[request_id] = replica_id
        self._choice.begin(_route(pending_request).hashes, replica_id)

    def _end(self, request_id: str) -> None:
        if (replica_id := self._running.pop(request_id, None)) is not None:
            self._choice.end(replica_id)

    def _unless_sent(self, pending_request: PendingRequest, future: Any) -> None:
        if future.cancelled():  # the client has left before a replica was free
            self._end(pending_request.metadata.internal_request_id)


def _route(pending_request: PendingRequest | None) -> Route:
    arguments = () if pending_request is None else pending_request.args
    return next((each for each in arguments if isinstance(each, Route)), Route())
