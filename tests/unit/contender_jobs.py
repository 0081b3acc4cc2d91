"""A job for contenders that takes no time."""

from __future__ import annotations

from benchmarks.contenders.job import Case, Job


def small_job(model: str) -> Job:
    """Return two requests of 4 tokens, and a prompt of 8 tokens with 4 that follow its first one."""
    work = [
        Case("2 requests", "requests", [[5, 6, 7], [8, 9]], 4),
        Case("prefill", "prefill", [[10] * 8], 1),
        Case("decode", "decode", [[10] * 8], 5),
    ]
    return Job(model, "float32", "cpu", 1, 32, 2, 2, work)
