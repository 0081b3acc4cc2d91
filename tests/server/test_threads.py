"""Which thread does what: steps on the main thread, HTTP on another, and signals whatever both do."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading

import httpx
import pytest

from cupaged.engine import EngineConfig, LLMEngine, SamplingParams
from cupaged.engine.server.app import create_app
from cupaged.engine.server.async_engine import AsyncEngine, EngineDeadError
from cupaged.engine.server.http_server import Server

from .conftest import MODEL, wait_until
from .test_failed_steps import BODY, ask, text
from .test_shutdown import Command

WHERE = """
import atexit, sys, threading
from cupaged import serve
from cupaged.engine.llm_engine import LLMEngine
from cupaged.engine.model.model_runner import ModelRunner
from cupaged.engine.server.http_server import Server

def noted(kind, name):
    original = getattr(kind, name)
    def call(*arguments, **options):
        names.setdefault(name, set()).add(threading.current_thread().name)
        return original(*arguments, **options)
    setattr(kind, name, call)

names = {}
noted(LLMEngine, "__init__")
noted(ModelRunner, "run")
noted(LLMEngine, "step")
noted(Server, "on_tick")
atexit.register(lambda: print(sorted((name, *threads) for name, threads in names.items()), file=sys.stderr))
sys.exit(serve.main(sys.argv[1:]))
"""


@pytest.mark.matrix
def test_the_command_loads_and_steps_on_the_main_thread(llama_dir):
    """So that there is one OpenMP team."""
    with Command(llama_dir, script=WHERE) as server:
        assert len(text(ask(server, max_tokens=5))) > 0
        server.process.terminate()
        log = server.end()
    main = "MainThread"
    expected = [("__init__", main), ("on_tick", "cupaged-http"), ("run", main), ("step", main)]
    assert log.splitlines()[-1] == repr(expected)


def engine(directory: str) -> LLMEngine:
    return LLMEngine(directory, EngineConfig(device="cpu", block_size=8, max_num_seqs=16))


def test_an_event_loop_is_woken_once_a_step(llama_dir, monkeypatch):
    """However many streams there are."""
    llm = engine(llama_dir)
    served, step, steps, wakes = AsyncEngine(llm), llm.step, [], []

    def counted_step():
        outputs = step()
        steps.extend([len(outputs)] if outputs else [])
        return outputs

    monkeypatch.setattr(llm, "step", counted_step)

    async def read(name: str, tokens: int) -> int:
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=tokens)
        return len([output async for output in served.generate(name, "x", params)])

    async def read_all() -> list[int]:
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *a: (wakes.append(a), wake(*a)))
        return await asyncio.gather(*(read(str(i), 5 + i) for i in range(8)))

    served.start()
    try:
        assert asyncio.run(read_all()) == [5 + i for i in range(8)], "every output of each is there"
    finally:
        assert served.stop(60)
    assert max(steps) > 1
    assert len(wakes) == len(steps)


def test_several_event_loops_have_their_own_outputs(llama_dir):
    served, found = AsyncEngine(engine(llama_dir)), {}

    async def read(name: str) -> None:
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=9)
        *_, last = [output async for output in served.generate(name, "x", params)]
        found[last.request_id] = len(last.outputs[0].token_ids)

    served.start()
    threads = [threading.Thread(target=lambda i=i: asyncio.run(read(str(i)))) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert served.stop(60)
    assert found == {"0": 9, "1": 9, "2": 9}


def test_run_takes_the_thread_that_calls_it(llama_dir, monkeypatch):
    llm = engine(llama_dir)
    served, step, idents = AsyncEngine(llm), llm.step, set()
    monkeypatch.setattr(llm, "step", lambda: (idents.add(threading.get_ident()), step())[1])

    async def read() -> None:
        async for _ in served.generate("x", "x", SamplingParams(max_tokens=3)):
            pass
        served.request_stop()

    thread = threading.Thread(target=lambda: asyncio.run(read()))
    thread.start()
    served.run()
    thread.join()
    assert idents == {threading.get_ident()}
    with pytest.raises(EngineDeadError, match="shutting down"):
        asyncio.run(read())


def test_an_application_of_its_own_runs_the_engine_beside_it(llama_dir, monkeypatch):
    """As an embedder may serve it, with any ASGI server."""
    llm = engine(llama_dir)
    served, step, names = AsyncEngine(llm), llm.step, set()
    monkeypatch.setattr(llm, "step", lambda: (names.add(threading.current_thread().name), step())[1])
    app = create_app(served, MODEL)

    async def complete() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60) as client,
        ):
            assert (await client.get("/health")).status_code == 200
            return await client.post("/v1/completions", json=BODY)

    assert len(text(asyncio.run(complete()))) > 0
    assert names == {"cupaged-engine"}
    assert "shutting down" in str(served.error)


def test_an_engine_that_never_ran_is_stopped_at_once(llama_dir):
    assert AsyncEngine(engine(llama_dir)).stop()


def test_an_error_at_the_start_ends_the_server(llama_dir):
    """It is raised where the engine would run on, and nothing is left running."""

    def fail() -> None:
        raise RuntimeError("planted")

    before = set(threading.enumerate())
    with pytest.raises(RuntimeError, match="planted"):
        Server(AsyncEngine(engine(llama_dir)), "tiny", on_start=fail).run(sockets=[])
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not [name for name in left if name.startswith(("cupaged-http", "cupaged-signals"))]


HANGS = """
import ctypes, sys
from cupaged import serve
from cupaged.engine.model.model_runner import ModelRunner
from cupaged.engine.server import http_server

http_server._LAST_SECONDS = http_server.LAST_STEP_SECONDS = 0.5

def hang(self, scheduled, *rest, run=ModelRunner.run):
    if scheduled[0].group.request_id.startswith("cmpl-"):
        mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
        lock(mutex), lock(mutex)  # in native code, which runs no handlers of Python, and for ever
    return run(self, scheduled, *rest)

ModelRunner.run = hang
sys.exit(serve.main(sys.argv[1:]))
"""


def ask_in_vain(server: Command) -> None:
    with contextlib.suppress(httpx.HTTPError):
        ask(server)


@pytest.mark.matrix
@pytest.mark.parametrize("signals", [1, 2])
def test_signals_end_a_command_whose_step_hangs(llama_dir, signals):
    """The main thread runs no instruction of Python any more."""
    timeout = "0.3" if signals == 1 else "60"
    with Command(llama_dir, "--shutdown-timeout", timeout, "--step-timeout", "0.2", script=HANGS) as server:
        asking = threading.Thread(target=ask_in_vain, args=[server])
        asking.start()
        wait_until(lambda: httpx.get(f"{server.url}/health", timeout=60).status_code == 503)
        server.process.terminate()
        if signals == 2:
            url = f"{server.url}/v1/completions"
            wait_until(lambda: "shutting down" in httpx.post(url, timeout=60).text)
            server.process.terminate()
        log = server.end()
        asking.join()
    assert server.process.returncode == (0 if signals == 1 else 128 + signal.SIGTERM)
    assert ("still in a step" in log) == (signals == 1)
    assert "Traceback" not in log
