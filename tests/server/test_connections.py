"""Connections that are held open, hosts that are not the server's, and a process without descriptors."""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from cupaged.engine.server.hosts import allowed_hosts
from cupaged.engine.server.limits import Limits

from .beside import PATIENCE, Beside, connect, head, held, read_to_end
from .conftest import MODEL, Running, wait_until

BODY = {"model": MODEL, "prompt": "x", "max_tokens": 200, "ignore_eos": True}
SHORT = Limits(header_timeout=0.5, body_timeout=0.5, send_timeout=0.5, keep_alive_timeout=0.5)


def connections(server) -> int:
    return len(server._server.server_state.connections)


def sent_slowly(server, start: bytes, then: bytes) -> bytes:
    """What comes back while one byte after the other is sent, every tenth of a second for ten seconds."""
    with connect(server, start) as connection:
        found = b""
        connection.settimeout(0.1)
        for i in range(100):
            with contextlib.suppress(TimeoutError):
                part = connection.recv(1000)
                if not part:
                    return found
                found += part
                continue
            with contextlib.suppress(OSError):
                connection.sendall(then[i % len(then) :][:1] if then else b"")
    raise AssertionError("the connection stays open")


@pytest.mark.parametrize(
    ("start", "then", "what"),
    [
        (b"", b"", b"head"),
        (b"", b"x", b"head"),
        (head()[:-2], b"x", b"head"),
        (head("/v1/completions", "Content-Length: 1000"), b"", b"body"),
        (head("/v1/completions", "Content-Length: 1000"), b"x", b"body"),
        (head("/v1/completions", "Transfer-Encoding: chunked"), b"1\r\nx\r\n", b"body"),
    ],
)
def test_a_request_has_to_come_in_time(llama_dir, start, then, what):
    """Nothing of it, a byte now and then, or all but its end."""
    with Running(llama_dir, limits=SHORT) as server:
        answer = sent_slowly(server, start, then)
        assert answer.startswith(b"HTTP/1.1 408"), answer
        assert what in answer
        assert b'"error"' in answer
        wait_until(lambda: connections(server) == 0)


@pytest.mark.parametrize("start", [b"", head()[:-2], head("/v1/completions", "Content-Length: 1000")])
def test_who_sends_on_gets_to_read_why_not(llama_dir, start):
    """Bytes that come after the end would reset the connection, and take the answer with them."""
    with Running(llama_dir, limits=SHORT) as server, connect(server, start) as connection:
        time.sleep(0.8)  # it has been answered
        for _ in range(3):
            connection.sendall(b"x")
            time.sleep(0.05)
        connection.settimeout(10)
        assert read_to_end(connection).startswith(b"HTTP/1.1 408")


def test_a_request_that_came_is_answered_however_long_that_takes(llama_dir, monkeypatch):
    """The timeouts are for what clients do. So it is with a stream, and with a second request."""
    with Running(llama_dir, limits=SHORT) as server, httpx.Client(base_url=server.url) as client:
        step = server.engine.step
        monkeypatch.setattr(server.engine, "step", lambda: (time.sleep(0.02), step())[1])
        for stream in (False, True):
            body = {**BODY, "max_tokens": 40, "stream": stream}
            assert client.post("/v1/completions", json=body, timeout=60).status_code == 200
        time.sleep(1)
        assert connections(server) == 0  # kept alive for half a second
        assert client.get("/health").status_code == 200


def test_a_body_that_nobody_reads_has_a_timeout_too(llama_dir):
    with Running(llama_dir, limits=SHORT) as server:
        answer = sent_slowly(server, head("/health", "Content-Length: 1000", method="GET"), b"x")
        assert answer.startswith(b"HTTP/1.1 200")
        wait_until(lambda: connections(server) == 0)


def test_a_client_has_to_read_what_it_asked_for(llama_dir):
    """Its requests are many, and their answers more than systems keep."""
    with Running(llama_dir, limits=SHORT) as server, connect(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            for _ in range(10):
                connection.sendall(head("/openapi.json", method="GET") * 100)
        wait_until(lambda: connections(server) == 1)
        wait_until(lambda: connections(server) == 0)
        connection.settimeout(10)
        with pytest.raises(ConnectionResetError):
            read_to_end(connection)


@pytest.mark.parametrize("opened", [40, pytest.param(600, marks=pytest.mark.matrix)])
@pytest.mark.parametrize("sent", [b"", head()[:-2], head("/v1/completions", "Content-Length: 1000")])
def test_who_holds_connections_makes_way(llama_dir, opened, sent):
    """A new one takes the place of that which has been without a request for the longest time."""
    with (
        Running(llama_dir, limits=Limits(max_connections=16)) as server,
        Beside(server),
        contextlib.ExitStack() as stack,
    ):
        held = [stack.enter_context(connect(server, sent)) for _ in range(opened)]
        start = time.monotonic()
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert time.monotonic() - start < PATIENCE
        assert connections(server) <= 16
        held[0].settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert held[0].recv(100) == b""
        held[-1].settimeout(0.1)
        with pytest.raises(TimeoutError):
            held[-1].recv(100)


def test_connections_with_requests_stay_and_further_requests_are_refused(llama_dir, monkeypatch):
    with (
        Running(llama_dir, limits=Limits(max_connections=8)) as server,
        ThreadPoolExecutor(8) as threads,
        held(server, monkeypatch) as engine,
    ):
        url = f"{server.url}/v1/completions"
        running = [threads.submit(httpx.post, url, json=BODY, timeout=60) for _ in range(7)]
        wait_until(lambda: server.async_engine.stats().num_waiting == 7)
        for _ in range(20):
            response = httpx.post(url, json=BODY)
            assert response.status_code == 429
            assert "max_connections" in response.json()["error"]["message"]
            assert response.headers["retry-after"] == "1"
            assert httpx.get(f"{server.url}/health").status_code == 200
        assert not any(one.done() for one in running)
        engine.set()
        assert [one.result().status_code for one in running] == [200] * 7
        assert httpx.post(url, json=BODY, timeout=60).status_code == 200


def test_what_is_no_request_is_refused_in_the_same_shape(server):
    for nonsense in (b"GET /\r\n\r\n", b"\x16\x03\x01" * 100 + b"\r\n\r\n", head("/" + "x" * 100_000)):
        with connect(server, nonsense) as connection:
            answer = read_to_end(connection)
        assert answer.startswith(b"HTTP/1.1 400"), answer[:100]
        assert b'"invalid_request_error"' in answer
        assert len(answer) < 1000


def test_a_process_without_descriptors_waits_for_them(llama_dir, monkeypatch, caplog):
    """It neither spins nor fills its log, and evicts who only holds a connection."""
    accept, tries = socket.socket.accept, []

    def failing(self):
        tries.append(time.monotonic())
        if len(tries) <= 2:
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(self)

    with Running(llama_dir) as server, caplog.at_level(logging.INFO), connect(server) as idle:
        wait_until(lambda: connections(server) == 1)
        with Beside(server, keep_alive=False):
            monkeypatch.setattr(socket.socket, "accept", failing)
            assert httpx.get(f"{server.url}/health", timeout=20).status_code == 200
        with contextlib.suppress(ConnectionResetError):
            assert idle.recv(100) == b""
    assert 1.5 < tries[2] - tries[0] < 10
    logged = [record.getMessage() for record in caplog.records]
    assert len([message for message in logged if "Too many open files" in message]) == 1, logged
    assert not [message for message in logged if "out of system resource" in message]


@contextlib.contextmanager
def command(llama_dir, *options: str, descriptors: int | None = None):
    """The server as a process of its own, its address, and a file with what it has said."""

    def limit() -> None:
        if descriptors:
            resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))

    arguments = ["--model", llama_dir, "--served-model-name", MODEL, "--device", "cpu", "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cupaged.serve", *arguments, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
    )
    try:
        lines = []
        while not lines or not lines[-1].startswith("Ctrl-C"):
            lines.append(process.stdout.readline())
            assert lines[-1], process.stderr.read()
        yield process, re.search(r"http://localhost:(\d+)", "".join(lines))[0]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.matrix
def test_a_process_with_few_descriptors_serves_and_ends(llama_dir):
    with command(llama_dir, descriptors=200) as (process, url), contextlib.ExitStack() as stack:
        port = int(url.rsplit(":", 1)[1])
        for _ in range(600):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
        large = head("/v1/completions", "Transfer-Encoding: chunked") + b"186a0\r\n" + b"z" * 100_000
        for _ in range(50):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30)).sendall(large)
        start = time.monotonic()
        response = httpx.post(f"{url}/v1/completions", json={**BODY, "max_tokens": 5}, timeout=30)
        assert response.status_code == 200
        assert time.monotonic() - start < 10
        assert httpx.get(f"{url}/health", headers={"Host": "evil.example"}, timeout=30).status_code == 403
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert len(errors.splitlines()) < 20, errors[:3000]
    assert "Traceback" not in errors
    assert "the limit of file descriptors leaves room for" in errors
    assert process.returncode in (0, -signal.SIGTERM)


@pytest.mark.parametrize("start", [b"", head()[:-2], head("/v1/completions", "Content-Length: 1000")])
def test_a_server_that_stops_waits_for_no_request_that_has_not_come(llama_dir, start, caplog):
    with Running(llama_dir, grace=20) as server, contextlib.ExitStack() as stack:
        held = [stack.enter_context(connect(server, start)) for _ in range(20)]
        wait_until(lambda: connections(server) == 20)
        time.sleep(0.1)
        server._server.should_exit, before = True, time.monotonic()
        answers = [read_to_end(each) for each in held]
        assert time.monotonic() - before < 10
    for answer in answers:
        assert answer[:12] == (b"HTTP/1.1 503" if start.endswith(b"\r\n\r\n") else b"")
    assert not caplog.records, caplog.text


HOSTS = {
    "localhost": 200,
    "localhost:8000": 200,
    "LOCALHOST.": 200,
    "127.0.0.1:8000": 200,
    "127.8.0.1": 200,
    "[::1]:8000": 200,
    "named.example": 200,
    "Named.Example:80": 200,
    "evil.example": 403,
    "evil.example:8000": 403,
    "localhost.evil.example": 403,
    "127.0.0.1.evil.example": 403,
    "evil.example@localhost": 403,
    "localhost@evil.example": 403,
    "localhost/evil.example": 403,
    "8.8.8.8": 403,
    "[::2]": 403,
    "[localhost": 403,
    "localhost:port": 403,
    "": 403,
}


def test_a_server_of_this_machine_is_known_by_its_names_only(llama_dir):
    """Others are how a page somewhere would have a browser talk to it."""
    with Running(
        llama_dir, allowed_hosts=allowed_hosts("127.0.0.1", "127.0.0.1", ["named.example"])
    ) as server:
        for host, status in HOSTS.items():
            for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/")):
                body = {**BODY, "max_tokens": 1} if method == "POST" else None
                headers = {"Host": host}
                response = httpx.request(method, f"{server.url}{path}", json=body, headers=headers)
                assert response.status_code == status, (host, response.text)
                if status == 403:
                    error = response.json()["error"]
                    assert error["type"] == "invalid_request_error"
                    assert "--allowed-hosts" in error["message"]
        with connect(server, b"GET /health HTTP/1.0\r\n\r\n") as connection:  # no browser
            assert read_to_end(connection).startswith(b"HTTP/1.1 200")
        large = head("/v1/completions", "Content-Length: 100000000").replace(b"localhost", b"evil.example")
        with connect(server, large) as connection:
            assert read_to_end(connection).startswith(b"HTTP/1.1 403")


@pytest.mark.parametrize(
    ("bound_to", "host", "more", "expected"),
    [
        ("127.0.0.1", "127.0.0.1", [], {"localhost", "127.0.0.1"}),
        ("127.0.0.1", "My-Machine", ["b.example"], {"localhost", "127.0.0.1", "my-machine", "b.example"}),
        ("::1", "::1", [], {"localhost", "::1"}),
        ("127.0.0.1", "127.0.0.1", ["*"], None),
        ("0.0.0.0", "0.0.0.0", [], None),
        ("10.0.0.1", "10.0.0.1", [], None),
        ("0.0.0.0", "0.0.0.0", ["b.example"], {"localhost", "0.0.0.0", "b.example"}),
    ],
)
def test_which_hosts_are_allowed(bound_to, host, more, expected):
    assert allowed_hosts(bound_to, host, more) == expected


@pytest.mark.parametrize(
    ("path", "content_type", "status"),
    [
        ("/v1/completions", "text/plain", 400),
        ("/nowhere", "application/json", 404),
        ("/v1/models", "application/json", 405),
    ],
)
def test_an_answer_before_the_body_says_that_the_connection_ends(server, path, content_type, status):
    """Otherwise a client may send its next request over it, which is lost."""
    body = b"x" * 30
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        f"Content-Type: {content_type}",
        "Content-Length: 30",
    ]
    request = "\r\n".join([*lines, "", ""]).encode()
    for sent, ends in ((request, True), (request + body[:9], True), (request + body, False)):
        with connect(server, sent) as connection:
            answer = connection.recv(65536)
        assert answer.startswith(f"HTTP/1.1 {status} ".encode())
        assert (b"\r\nconnection: close\r\n" in answer.lower()) == ends
