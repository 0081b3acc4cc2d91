"""`/kv_cache/events`: a snapshot, then changes; and what watchers cost the server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from cupaged.engine.server import block_events
from cupaged.engine.server.block_events import BlockEvents
from tests.unit.test_block_watch import Replay

from .conftest import MODEL, Running, wait_until

ROOT = Path(__file__).resolve().parents[2]
PATH = "/kv_cache/events"
LONG = {"model": MODEL, "prompt": "a" * 44, "n": 3, "max_tokens": 60, "ignore_eos": True, "temperature": 1.0}


@pytest.fixture(scope="module")
def small(llama_dir):
    """A server whose memory is short, so that blocks move."""
    with Running(llama_dir, num_gpu_blocks_override=40, swap_space=0.1, preemption_mode="swap") as running:
        yield running


def parsed(text: str) -> Iterator[dict]:
    """The reports of some events."""
    for event in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in event.splitlines() if not line.startswith(":"))
        if fields:
            report = json.loads(fields["data"])
            assert (fields["event"], fields["id"]) == (report["type"], str(report["number"]))
            yield report


def equals_truth(replay: Replay, server) -> bool:
    """Whether an idle server's blocks are as replayed."""
    pools = {"gpu": server.engine._blocks.gpu, "cpu": server.engine._blocks.cpu}
    keys = {name: {b: pool.key_of(b) for b in range(pool.num_blocks)} for name, pool in pools.items()}
    truth = {
        name: {b: (0, key[:8].hex()) for b, key in keys[name].items() if key is not None} for name in pools
    }
    return replay.pools == truth and not replay.requests


def test_a_load_is_followed_to_its_end(small):
    replay = Replay()
    with ThreadPoolExecutor() as pool, httpx.stream("GET", small.url + PATH, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        texts = response.iter_text()
        rest, sent = "", []
        for text in texts:
            *events, rest = (rest + text).split("\n\n")
            for event in events:
                for report in parsed(event):
                    replay.read(report)
            if not sent:
                sent = [
                    pool.submit(httpx.post, f"{small.url}/v1/completions", json=LONG, timeout=60)
                    for _ in "1234"
                ]
            if all(answer.done() for answer in sent) and equals_truth(replay, small):
                break
    assert all(answer.result().status_code == 200 for answer in sent)
    assert {"fork", "copy_on_write", "swap_out", "swap_in"} <= set(replay.happened)
    wait_until(lambda: small.engine._blocks.journal is None)  # nobody watches any more


@pytest.mark.parametrize("salt", [None, "sálz"])
def test_the_documented_hashes_are_those_of_the_blocks(small, salt):
    """docs/server.md has the function with which a router computes them."""
    documented = re.search(r"```python\n(.*?)```", (ROOT / "docs/server.md").read_text(), re.DOTALL)[1]
    scope: dict = {}
    exec(documented, scope)
    body = {"model": MODEL, "prompt": "What a router knows of", "max_tokens": 1, "cache_salt": salt}
    if salt is None:
        del body["cache_salt"]
    assert httpx.post(f"{small.url}/v1/completions", json=body, timeout=60).status_code == 200
    tokens = small.engine.tokenizer(body["prompt"])["input_ids"]
    hashes = scope["block_hashes"](tokens, 8, salt)
    assert len(hashes) == 2
    with httpx.stream("GET", small.url + PATH, timeout=60) as response:
        rest = ""
        for text in response.iter_text():
            rest += text
            if "\n\n" in rest:
                break
    replay = Replay()
    replay.read(next(parsed(rest)))
    assert set(hashes) <= replay.hashes["GPU"]


def test_only_the_head_is_asked_for(small):
    response = httpx.head(small.url + PATH, timeout=10)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")


def test_a_server_with_watchers_stops_at_once(llama_dir):
    with Running(llama_dir) as running, httpx.stream("GET", running.url + PATH, timeout=60) as response:
        texts = response.iter_text()
        next(texts)
        running._server.should_exit = True
        start = time.monotonic()
        assert "".join(texts) == ""
        assert time.monotonic() - start < 4, "it waits for the watcher until its patience ends"


def test_who_does_not_read_gets_a_snapshot_instead(small, monkeypatch):
    """Of two watchers one reads; what waits for the other is bounded, and replaced."""
    monkeypatch.setattr(block_events, "_MAX_QUEUED", 3)
    monkeypatch.setattr(block_events, "_INTERVAL", 0.001)

    async def watch() -> None:
        events = BlockEvents(small.async_engine)
        slow, fast = events.stream(), events.stream()
        replays = {slow: Replay(), fast: Replay()}
        kinds = {slow: [], fast: []}

        async def read(stream) -> None:
            for report in parsed(await anext(stream)):
                replays[stream].read(report)
                kinds[stream].append(report["type"])

        await asyncio.gather(read(slow), read(fast))
        assert kinds[slow] == kinds[fast] == ["snapshot"]
        async with httpx.AsyncClient(timeout=60) as client:
            sent = asyncio.gather(*[client.post(f"{small.url}/v1/completions", json=LONG) for _ in "12"])
            while not (sent.done() and equals_truth(replays[fast], small)):
                await read(fast)
            for answer in await sent:
                assert answer.status_code == 200
        while not equals_truth(replays[slow], small):
            await read(slow)
        assert len(kinds[slow]) <= 2 + 3
        assert kinds[slow][-1] == "snapshot" or "snapshot" in kinds[slow][1:]
        assert "snapshot" not in kinds[fast][1:] or len(kinds[fast]) > 10
        await slow.aclose()
        assert small.engine._blocks.journal is not None, "the other one still watches"
        await fast.aclose()
        while small.engine._blocks.journal is not None:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(watch(), 60))


def test_a_watch_begins_anew_while_the_last_one_ends(small):
    """At any moment of its end, the journal is not left off for the one who has just come."""

    async def watch() -> None:
        events = BlockEvents(small.async_engine)
        for i in range(30):
            stream = events.stream()
            first = await asyncio.wait_for(anext(stream), 10)
            assert first.startswith("event: snapshot")
            await stream.aclose()
            await asyncio.sleep(0.004 * i if i % 2 else 0)
        while small.engine._blocks.journal is not None:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(watch(), 60))


def test_a_call_that_nobody_waits_for_does_not_end_the_engine(small):
    async def cancel() -> None:
        engine = small.async_engine
        blocking = asyncio.create_task(engine.call(lambda: time.sleep(0.2)))
        await asyncio.sleep(0.05)
        waiting = asyncio.create_task(engine.call(lambda: 1))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await blocking
        assert await engine.call(lambda: 2) == 2
        with pytest.raises(ZeroDivisionError):
            await engine.call(lambda: 1 // 0)
        assert engine.error is None

    asyncio.run(asyncio.wait_for(cancel(), 20))


def test_an_engine_that_has_ended_ends_the_stream(llama_dir):
    with Running(llama_dir) as running:
        pass

    async def watch() -> list[str]:
        with contextlib.suppress(StopAsyncIteration):
            return [text async for text in BlockEvents(running.async_engine).stream()]
        return []

    assert asyncio.run(asyncio.wait_for(watch(), 10)) == []
