"""Other clients beside one that asks for too much: how long they wait at most."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import httpx

from .conftest import MODEL, Running, wait_until

# Generous, for machines that do other things as well. Without limits it is tens of seconds.
PATIENCE = 5.0


class Beside(contextlib.AbstractContextManager):
    """One client reads stream after stream and another one asks for /health, until the block ends.

    Attributes:
        longest: seconds that either waited at most, for a token or an answer.
    """

    def __init__(self, server: Running, keep_alive: bool = True) -> None:
        self._url, self._engine = server.url, server.engine
        # A connection that is kept alive may be closed by the server just when it is to be used again.
        self._headers = {} if keep_alive else {"connection": "close"}
        self._end = False
        self._errors: list[Exception] = []
        self._tokens = 0
        self.longest = 0.0
        self._threads = [
            threading.Thread(target=self._watch, args=[each]) for each in (self._read, self._ask)
        ]

    def __enter__(self) -> Beside:
        step = self._engine.step
        # A little slower than it could be, as it is the waiting that counts.
        self._engine.step = lambda: (time.sleep(0.005), step())[1]
        for thread in self._threads:
            thread.start()
        wait_until(lambda: self._tokens or self._errors)
        return self

    def __exit__(self, *error) -> None:
        self._end = True
        for thread in self._threads:
            thread.join(timeout=120)
        del self._engine.step
        if error[0] is None:
            assert not self._errors, self._errors
            assert self.longest < PATIENCE, f"others waited {self.longest:.1f} s"

    def _watch(self, work) -> None:
        try:
            with httpx.Client(base_url=self._url, headers=self._headers, timeout=120) as client:
                while not self._end:
                    work(client)
        except Exception as error:
            self._errors.append(error)

    def _read(self, client: httpx.Client) -> None:
        body = {"model": MODEL, "prompt": "x", "max_tokens": 200, "stream": True, "ignore_eos": True}
        before = time.monotonic()
        with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, response.read()
            for _ in response.iter_lines():
                self.longest = max(self.longest, time.monotonic() - before)
                before = time.monotonic()
                self._tokens += 1
                if self._end:
                    return

    def _ask(self, client: httpx.Client) -> None:
        before = time.monotonic()
        assert client.get("/health").status_code == 200
        self.longest = max(self.longest, time.monotonic() - before)
        time.sleep(0.02)


@contextlib.contextmanager
def held(server: Running, monkeypatch) -> Iterator[threading.Event]:
    """An engine that runs nothing until the event is set, or the block ends."""
    go_on, step = threading.Event(), server.engine.step

    def held_step():
        return step() if go_on.wait(0.01) else []

    monkeypatch.setattr(server.engine, "step", held_step)
    try:
        yield go_on
    finally:
        go_on.set()


def connect(server: Running, content: bytes = b"") -> socket.socket:
    """A connection over which so much has been sent."""
    host, port = server.url.removeprefix("http://").split(":")
    found = socket.create_connection((host, int(port)), timeout=30)
    found.sendall(content)
    return found


def head(path: str = "/v1/completions", *fields: str, method: str = "POST") -> bytes:
    """The head of a request over JSON."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *fields]
    return "\r\n".join([*lines, "", ""]).encode()


def read_to_end(connection: socket.socket) -> bytes:
    """Return what the server sends until it closes."""
    found = b""
    while part := connection.recv(65536):
        found += part
    return found
