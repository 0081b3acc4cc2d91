"""Send a job to an OpenAI-compatible server as streams, and time it."""

from __future__ import annotations

import asyncio
import json
import time
from http.client import HTTPConnection, HTTPException
from typing import Any

import httpx

from .job import Case, Job
from .processes import ContenderError

MODEL = "model"  # what the servers call the model
WARM_UP_REQUESTS, WARM_UP_TOKENS = 4, 8


def is_ready(url: str) -> bool:
    """Return whether a server says that it is ready."""
    connection = HTTPConnection(url.removeprefix("http://"), timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def run(url: str, job: Job, timeout: float) -> dict[str, Any]:
    """Run every case, and return for each the seconds and the number of tokens of every answer.

    Raises:
        ContenderError: a request failed, or a case took longer than ``timeout`` seconds.
    """
    return asyncio.run(_run(url, job, timeout))


async def _run(url: str, job: Job, timeout: float) -> dict[str, Any]:
    first = job.cases[0]
    tokens = min(WARM_UP_TOKENS, first.tokens)
    await _timed(url, Case("warm-up", first.kind, first.prompts[:WARM_UP_REQUESTS], tokens), timeout)
    results = {}
    for case in job.cases:
        runs = [await _timed(url, case, timeout) for _ in range(job.repeats)]
        results[case.name] = {"seconds": [s for s, _ in runs], "counts": [counts for _, counts in runs]}
    return results


async def _timed(url: str, case: Case, timeout: float) -> tuple[float, list[int]]:
    """Send a case's requests at once; return the time until the last one has ended, and their tokens."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits, trust_env=False) as client:
        start = time.perf_counter()
        requests = [_stream(client, prompt, case.tokens) for prompt in case.prompts]
        try:
            streams = await asyncio.wait_for(asyncio.gather(*requests), timeout)
        except asyncio.TimeoutError:
            raise ContenderError(f"{case.name}: no answer after {timeout:.0f} s") from None
        except httpx.HTTPError as error:
            raise ContenderError(f"{case.name}: {type(error).__name__} {error}") from error
        seconds = time.perf_counter() - start
    # Read after the time is taken: what the client does takes the cores from the server.
    return seconds, [_num_tokens(stream, len(prompt)) for stream, prompt in zip(streams, case.prompts)]


async def _stream(client: httpx.AsyncClient, prompt: list[int], tokens: int) -> bytes:
    body = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with client.stream("POST", "/v1/completions", json=body) as response:
        content = b"".join([part async for part in response.aiter_bytes()])
    if response.status_code != 200:
        raise ContenderError(f"status {response.status_code}: {content.decode(errors='replace')[:500]}")
    return content


def _num_tokens(stream: bytes, prompt_tokens: int) -> int:
    """Return the number of generated tokens by the last event of a stream.

    Raises:
        ContenderError: the stream is not whole, tells an error, or is of another prompt.
    """
    lines = stream.decode().splitlines()
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        raise ContenderError(f"a stream has no end: {stream[-300:].decode(errors='replace')}")
    usage = None
    for event in map(json.loads, events[:-1]):
        if "error" in event:
            raise ContenderError(f"a stream tells an error: {event['error']}")
        usage = event.get("usage") or usage
    if usage is None or usage["prompt_tokens"] != prompt_tokens:
        raise ContenderError(f"usage {usage} for a prompt of {prompt_tokens} tokens")
    return usage["completion_tokens"]
