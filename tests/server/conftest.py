"""A real server on a real port, over a tiny model."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import ssl
import threading
import time
from collections.abc import Iterator

import openai
import pytest

from cupaged.engine import EngineConfig, LLMEngine
from cupaged.engine.sampling.samples import LaunchedSamples
from cupaged.engine.server.access import Access
from cupaged.engine.server.async_engine import AsyncEngine
from cupaged.engine.server.http_server import Server
from cupaged.engine.server.limits import Limits
from cupaged.serve import listen
from tests import tiny_models

MODEL = "tiny-llama"


class Running:
    """A server in a thread of the test process."""

    def __init__(
        self,
        directory: str,
        grace: float = 1.0,
        limits: Limits | None = None,
        allowed_hosts=None,
        access: Access | None = None,
        life: dict | None = None,
        **config,
    ) -> None:
        settings = {"block_size": 8, "max_num_seqs": 16, "max_num_batched_tokens": 64, **config}
        self.engine = LLMEngine(directory, EngineConfig(device="cpu", check_integrity=True, **settings))
        self.engine.warm_up()  # as the command does: to compile takes longer than clients wait
        self.async_engine = AsyncEngine(self.engine)
        self._socket = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = Server(
            self.async_engine,
            MODEL,
            grace=grace,
            limits=limits,
            access=access or Access(allowed_hosts=allowed_hosts),
            **{"shutdown_timeout": 1.0, **(life or {})},
        )
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})

    def __enter__(self) -> Running:
        self._thread.start()
        wait_until(lambda: self._server.started)
        return self

    def __exit__(self, *error) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=20)
        self._socket.close()
        assert not self._thread.is_alive(), "the server did not stop"

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)


def wait_until(condition, timeout: float = 20.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def pytest_collection_modifyitems(config, items):
    """Deselect what needs Ray where it is not installed, and say so."""
    if importlib.util.find_spec("ray") is None and (
        of_ray := [i for i in items if i.get_closest_marker("ray")]
    ):
        items[:] = [item for item in items if item not in of_ray]
        config.hook.pytest_deselected(items=of_ray)
        print(f"{len(of_ray)} tests of replicas are left out: Ray is not installed (make test-matrix does)")


@pytest.fixture(scope="session", autouse=True)
def certificates_are_read_once():
    """Each client would read those of the authorities, which takes longer than most of its requests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl, "create_default_context", functools.cache(ssl.create_default_context))
        yield


@pytest.fixture(scope="module")
def server(llama_dir):
    with Running(llama_dir) as running:
        yield running


@pytest.fixture
def client(server):
    with server.client() as found:
        yield found


@contextlib.contextmanager
def saying(server: Running, text: str) -> Iterator[None]:
    """Let the model write this text, whatever it is asked."""
    engine = server.engine
    tokens = [*engine.tokenizer(text, add_special_tokens=False)["input_ids"], tiny_models.EOS]
    launch = engine._sampler.launch

    def scripted(logits, scheduled, sampled):
        output = launch(logits, scheduled, sampled).result()
        output.token_ids = [
            [tokens[item.seq.num_output_tokens]] * len(drawn)
            for item, drawn in zip(scheduled, output.token_ids)
        ]
        return LaunchedSamples(output)

    engine._sampler.launch = scripted
    try:
        yield
    finally:
        engine._sampler.launch = launch
