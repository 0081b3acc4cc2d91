"""Check what a contender has answered, before one of its times counts."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from .environments import Contender
from .job import Job
from .processes import ContenderError


class AnswerCheck:
    """Count the tokens of answers, and read those that are token IDs with the dense model.

    Args:
        model: the dense model, with the weights that contenders share.
    """

    def __init__(self, model: tf.PreTrainedModel) -> None:
        self._model = model
        # With other rounding errors greedy answers diverge: a token's logit may be below the largest.
        self._slack = 0.05 if model.dtype == torch.float32 else 1.0
        self._read: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()

    def __call__(self, contender: Contender, job: Job, result: dict[str, Any]) -> None:
        """Check the result of a job.

        Raises:
            ContenderError: an answer has another number of tokens than was asked for, or tokens that the
                dense model would not choose.
        """
        for case in job.cases:
            for answers, counts in _runs(result["cases"][case.name], job.repeats):
                if counts != [case.tokens] * len(case.prompts):
                    wrong = sorted(set(counts) - {case.tokens})
                    raise ContenderError(
                        f"{case.name}: {len(counts)} answers, of {wrong or case.tokens} tokens, "
                        f"instead of {len(case.prompts)} of {case.tokens}"
                    )
                if answers is not None and not contender.own_weights:
                    for prompt, answer in zip(case.prompts, answers):
                        self._check_tokens(case.name, prompt, answer)

    def _check_tokens(self, case: str, prompt: list[int], answer: list[int]) -> None:
        known = (tuple(prompt), tuple(answer))
        if known in self._read:
            return
        if (deficit := largest_deficit(self._model, prompt, answer)) > self._slack:
            raise ContenderError(
                f"{case}: a token's logit is {deficit:.2f} below the largest, {self._slack} is allowed"
            )
        self._read.add(known)


@torch.inference_mode()
def largest_deficit(model: tf.PreTrainedModel, prompt: list[int], answer: list[int]) -> float:
    """Return how far the logit of an answer's token is below the largest one, at most."""
    row = torch.tensor([prompt + answer], device=model.device)
    logits = model(row, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
    chosen = logits.gather(1, row[0, len(prompt) :, None])[:, 0]
    return (logits.max(dim=1).values - chosen).max().item()


def _runs(results: dict[str, Any], repeats: int) -> list[tuple[list[list[int]] | None, list[int]]]:
    """Return the token IDs, None over HTTP, and their number, of each time that a case ran.

    Raises:
        ContenderError: it ran another number of times.
    """
    if "counts" in results:
        runs = [(None, counts) for counts in results["counts"]]
    else:
        runs = [(answers, [len(answer) for answer in answers]) for answers in results["answers"]]
    if len(runs) != repeats or len(results["seconds"]) != repeats:
        raise ContenderError(f"a case ran {len(runs)} times instead of {repeats}")
    return runs
