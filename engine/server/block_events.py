"""Send what happens to the KV blocks as server-sent events: `/kv_cache/events`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import deque
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from ..scheduling.block_watch import BlockWatch, Json
from .async_engine import AsyncEngine, EngineDeadError

_log = logging.getLogger("cupaged.server")
PATH = "/kv_cache/events"
_INTERVAL = 0.05  # seconds between two reports
_MAX_QUEUED = 64  # reports that wait for a watcher who does not read, before a snapshot replaces them
_KEEP_ALIVE = 15.0  # seconds without an event after which a comment is sent
_LARGE = 1000  # number of blocks from which on a snapshot is written in another thread


def add_block_events(app: FastAPI, engine: AsyncEngine) -> None:
    """Add the endpoint. The OpenAPI document is without it: what tests that would wait for its end."""
    events = BlockEvents(engine)

    @app.get(PATH, include_in_schema=False)
    async def block_events(request: Request) -> Response:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        if request.scope.get("head"):
            return Response(media_type="text/event-stream", headers=headers)
        return StreamingResponse(events.stream(), media_type="text/event-stream", headers=headers)


class BlockEvents:
    """Report the changes of an engine's blocks to any number of watchers.

    The engine is asked for them between two steps, every ``_INTERVAL`` while there are watchers; without any
    it keeps no journal.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._watchers: set[_Watcher] = set()
        self._watch: BlockWatch | None = None  # used by the engine's thread only
        self._task: asyncio.Task[None] | None = None

    async def stream(self) -> AsyncIterator[str]:
        """Yield a snapshot and then the changes, until the engine ends."""
        watcher = _Watcher()
        self._watchers.add(watcher)
        try:
            if self._task is None:
                self._task = asyncio.create_task(self._report())
            while (reports := await watcher.take()) is not None:
                yield "".join([await _event(report) for report in reports]) or ": nothing has changed\n\n"
        finally:
            self._watchers.discard(watcher)

    async def _report(self) -> None:
        try:
            while self._watchers:
                behind = [watcher for watcher in self._watchers if watcher.is_behind]
                changes, snapshot = await self._engine.call(lambda: self._look(bool(behind)))  # noqa: B023
                for watcher in self._watchers:
                    if watcher in behind:
                        watcher.restart(snapshot)
                    elif changes is not None:
                        watcher.put(changes)
                await asyncio.sleep(_INTERVAL)
        except EngineDeadError:
            pass
        except Exception:  # a fault of ours; the engine goes on
            _log.exception("the blocks cannot be reported")
        finally:
            self._task = None  # who comes from now on starts another one, which looks after this one closes
            for watcher in self._watchers:
                watcher.end()
            self._watchers.clear()
            with contextlib.suppress(EngineDeadError):
                await self._engine.call(self._close)

    def _look(self, with_snapshot: bool) -> tuple[Json | None, Json | None]:
        if self._watch is None:
            self._watch = self._engine.engine.watch_blocks()
        changes = self._watch.changes()
        return changes, self._watch.snapshot() if with_snapshot else None

    def _close(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None


class _Watcher:
    """Hold the reports that a watcher has not taken yet.

    Attributes:
        is_behind: a snapshot has to come next: it is new, or has not read for too long.
    """

    def __init__(self) -> None:
        self.is_behind = True
        self._ended = False
        self._reports: deque[Json] = deque()
        self._arrived = asyncio.Event()

    def restart(self, snapshot: Json | None) -> None:
        """Put a snapshot in the place of all reports."""
        if snapshot is not None:
            self._reports.clear()
            self.is_behind = False
            self.put(snapshot)

    def put(self, report: Json) -> None:
        """Add a report; where there are too many, ask for a snapshot instead."""
        if len(self._reports) >= _MAX_QUEUED:
            self._reports.clear()
            self.is_behind = True
        elif not self.is_behind:
            self._reports.append(report)
            self._arrived.set()

    def end(self) -> None:
        """Let `take` return None."""
        self._ended = True
        self._arrived.set()

    async def take(self) -> list[Json] | None:
        """Return the next reports, none if there are none for a while, or None at the end."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._arrived.wait(), _KEEP_ALIVE)
        if self._ended:
            return None
        self._arrived.clear()
        reports = list(self._reports)
        self._reports.clear()
        return reports


async def _event(report: Json) -> str:
    """Return a report as an event."""
    if report["type"] == "snapshot" and report["num_gpu_blocks"] + report["num_cpu_blocks"] > _LARGE:
        return await asyncio.to_thread(_write, report)
    return _write(report)


def _write(report: Json) -> str:
    data = json.dumps(report, separators=(",", ":"))
    return f"event: {report['type']}\nid: {report['number']}\ndata: {data}\n\n"
