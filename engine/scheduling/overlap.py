"""Decide whether a step is launched before the tokens of the step before are known. No torch."""

from __future__ import annotations

from .request import SequenceGroup
from .step_plan import Plan


class Overlap:
    """Find what has to wait for the tokens of a step.

    Args:
        enabled: launch steps ahead where nothing has to wait; False: every step waits.
        default: what None stands for.
    """

    def __init__(self, enabled: bool | None, default: bool = False) -> None:
        self.enabled = default if enabled is None else enabled

    def reason_to_wait(self, plan: Plan) -> str | None:
        """Return why the next step cannot be launched before this one's tokens are known, or None.

        The model takes sampled tokens from the device. It is the host that needs some to choose the next
        ones. That outputs end by their length is known before, and that one may end by a stop token or a stop
        string costs a token that is computed and dropped: neither is a reason.
        """
        if not self.enabled:
            return "overlap is off"
        for item in plan.scheduled:
            if item.num_samples and item.group.needs_host is not None:
                return item.group.needs_host
        return None


def reason_for_host(group: SequenceGroup) -> str | None:
    """Return what of a request needs its sampled tokens on the host before the next ones can be sampled."""
    params = group.params
    if params.beam_width is not None:
        return "beam search: the next beams are forks of the best candidates"
    if params.structured_outputs is not None:
        return "structured_outputs: the grammar follows the tokens"
    if group.bad_words:
        return "bad_words: the last tokens may begin one"
    if params.needs_whole_prompt:
        return "prompt_logprobs: the step is waited for anyway"
    return None
