"""Advance beam searches, as transformers defines them.

A group's beams are its live sequences. In every step a surviving parent goes on as its first child; further
children are forked from it, and beams without children are dropped. No torch.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter

from .request import Beams, Hypothesis, Sequence, SequenceGroup

Candidate = tuple[float, Sequence, int]  # a beam, a token after it, and their log probability


def num_candidates(group: SequenceGroup) -> int:
    """Return how many candidates a beam needs so that ``beam_width`` of all do not end a sequence."""
    return max(2, 1 + len(group.stop_ids)) * group.width


def advance(
    group: SequenceGroup,
    beams: Beams,
    fork: Callable[[SequenceGroup, Sequence, int], Sequence],
    drop: Callable[[SequenceGroup, Sequence], None],
) -> bool:
    """Take one step when all beams of the group have their candidates.

    Returns:
        True if the search has ended; the beams are as they were then.
    """
    count, width = num_candidates(group), group.width
    found: list[Candidate] = []
    for seq in group.live:
        score, best = beams.scores.get(seq.seq_id, 0.0), beams.candidates[seq.seq_id]
        found += [(score + logprob, seq, token) for logprob, token in zip(best.logprobs, best.token_ids)]
    found.sort(key=itemgetter(0), reverse=True)
    length = group.live[0].num_output_tokens + 1
    going_on: list[Candidate] = []
    for rank, (total, parent, token) in enumerate(found[:count]):
        if token in group.stop_ids or length >= group.max_tokens:
            if rank < width:  # those after them only stand in for beams that ended
                beams.hypotheses.append(_hypothesis(group, parent, token, total))
        elif len(going_on) < width:
            going_on.append((total, parent, token))
    beams.hypotheses.sort(key=lambda hypothesis: -hypothesis.score)
    del beams.hypotheses[width:]
    if not going_on or _is_done(group, beams, length, going_on[0][0]):
        return True
    _continue(group, beams, going_on, fork, drop)
    return False


def _hypothesis(group: SequenceGroup, parent: Sequence, token: int, total: float) -> Hypothesis:
    token_ids = [*parent.output_token_ids, token]
    return Hypothesis(
        token_ids,
        total,
        total / len(token_ids) ** group.params.length_penalty,
        "stop" if token in group.stop_ids else "length",
        token if token in group.params.stop_token_ids else None,
    )


def _is_done(group: SequenceGroup, beams: Beams, length: int, best: float) -> bool:
    """Return whether no running beam can become one of the best hypotheses.

    Args:
        length: number of output tokens of the running beams.
        best: log probability of the best of them.
    """
    params = group.params
    if len(beams.hypotheses) < group.width:
        return False
    if params.early_stopping is True:
        return True
    if params.early_stopping == "never" and params.length_penalty > 0:
        length = group.max_tokens
    return best / length**params.length_penalty <= beams.hypotheses[-1].score


def _continue(
    group: SequenceGroup,
    beams: Beams,
    going_on: list[Candidate],
    fork: Callable[[SequenceGroup, Sequence, int], Sequence],
    drop: Callable[[SequenceGroup, Sequence], None],
) -> None:
    parents = {parent.seq_id for _, parent, _ in going_on}
    if len(parents) < len(group.live):
        for seq in [seq for seq in group.live if seq.seq_id not in parents]:
            drop(group, seq)
    beams.scores, beams.candidates = {}, {}
    children = []
    for index, (total, parent, _) in enumerate(going_on):  # all forks before any token is appended
        child = fork(group, parent, index) if parent.seq_id in beams.scores else parent
        beams.scores[child.seq_id] = total
        children.append(child)
    for child, (_, _, token) in zip(children, going_on):
        child.token_ids.append(token)
