"""Parts of what serves replicas, without Ray: their command line, their metrics, a server's Unix socket."""

from __future__ import annotations

import argparse
import random

import httpx
import pytest
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cupaged import serve
from cupaged.engine.replicas.replica_metrics import merged
from cupaged.options import parser, replica_arguments

from .conftest import MODEL
from .test_shutdown import Command


def drawn_value(action: argparse.Action, rng: random.Random) -> list[str]:
    """Return an option with a value that is not its default."""
    if isinstance(action, argparse.BooleanOptionalAction):
        wanted = [name for name in action.option_strings if name.startswith("--no-") == bool(action.default)]
        return [rng.choice(wanted)]
    if action.choices:
        return [action.option_strings[0], rng.choice([c for c in action.choices if c != action.default])]
    if action.type in (int, float, None):
        values = {int: "7", float: "0.625", None: "a b=c"}
    else:  # a port, seconds, a path
        values = {action.type: "11"}
    return [action.option_strings[0], *[values[action.type]] * (2 if action.nargs == "+" else 1)]


def test_replicas_get_the_options_that_are_given_but_for_the_gateways(seed):
    rng = random.Random(seed)
    actions = [action for action in parser()._actions if action.dest != "help"]
    given = rng.sample(actions, rng.randrange(len(actions)))
    options = parser().parse_args([word for action in given for word in drawn_value(action, rng)])
    received = parser().parse_args(replica_arguments(options))
    gateways = {"host", "port", "uds", "replicas", "max_imbalance", "allowed_hosts", "allowed_origins"}
    gateways |= {"api_key", "root_path", "ssl_certfile", "ssl_keyfile", "keep_alive_timeout"}
    for action in actions:
        value = getattr(received, action.dest)
        if action.dest not in gateways:
            assert value == getattr(options, action.dest), action.dest
        elif action.dest != "keep_alive_timeout":
            assert value == action.default, action.dest
    assert received.keep_alive_timeout > 60, "the gateway closes idle connections, never the replica"


def metrics_of(rng: random.Random) -> str:
    registry = CollectorRegistry()
    Gauge("vllm:waiting", "Requests {that} wait.", ["model_name"], registry=registry).labels('a"}b\\').set(
        rng.randrange(9)
    )
    Counter("vllm:tokens", "Tokens.", registry=registry).inc(rng.randrange(9))
    Histogram("vllm:seconds", "Seconds.", ["model_name"], registry=registry).labels("m").observe(rng.random())
    return generate_latest(registry).decode()


def samples(text: str) -> set:
    return {
        (family.type, family.documentation, sample.name, tuple(sorted(sample.labels.items())), sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_of_replicas_differ_by_a_label(seed):
    """Each name has one comment, and its samples stand together, as Prometheus requires."""
    rng = random.Random(seed)
    texts = {name: metrics_of(rng) for name in ("one", "two", "three")}
    text = merged(texts)
    expected = {
        (kind, about, name, tuple(sorted([*labels, ("replica", replica)])), value)
        for replica, each in texts.items()
        for kind, about, name, labels, value in samples(each)
    }
    assert samples(text) == expected
    comments = [line.split()[1:3] for line in text.splitlines() if line.startswith("#")]
    assert len(comments) == len({tuple(comment) for comment in comments})
    assert merged({}) == ""


@pytest.mark.matrix
def test_a_server_on_a_unix_socket(llama_dir, tmp_path):
    """Listen at the last address that is given, and on no port."""
    path = tmp_path / "socket"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Command, "__enter__", lambda self: self)
        with Command(llama_dir, "--uds", str(path)) as server:
            for line in iter(
                server.process.stdout.readline, f"{MODEL} is served on the Unix socket {path}\n"
            ):
                assert line, server.process.stderr.read()
                assert "localhost" not in line
            transport = httpx.HTTPTransport(uds=str(path))
            with httpx.Client(transport=transport, base_url="http://any.example") as client:
                assert client.get("/health").status_code == 200
                body = {"model": MODEL, "prompt": "x", "max_tokens": 3}
                assert client.post("/v1/completions", json=body).status_code == 200
            server.process.terminate()
            server.end()
            assert server.process.returncode == 0
    assert not path.exists()


def test_a_unix_socket_that_cannot_be(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    for path in (tmp_path / "taken", tmp_path / "no" / "folder", tmp_path / ("x" * 110)):
        assert serve.main(["--uds", str(path), "--model", "./no", "--device", "cpu"]) == 1
        assert f"cannot listen on {str(path)!r}" in capsys.readouterr().err


@pytest.mark.parametrize("replicas", ["0", "-1"])
def test_a_number_of_replicas_that_is_none(replicas, capsys):
    assert serve.main([f"--replicas={replicas}", "--device", "cpu", "--port", "0"]) == 1
    assert f"replicas must be at least 1, got {replicas}" in capsys.readouterr().err


def test_each_replica_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device, replicas, ranks in (("cpu", 5, 2), ("cuda", 1, 1), ("cuda", 2, 1), ("cuda", 1, 2)):
        serve._check_gpus(torch.device(device), replicas, ranks)
    with pytest.raises(ValueError, match="replicas is 3, and there are 2 GPUs, one for each"):
        serve._check_gpus(torch.device("cuda"), 3, 1)
    with pytest.raises(ValueError, match="replicas is 2, and there are 2 GPUs, 2"):
        serve._check_gpus(torch.device("cuda"), 2, 2)
    with pytest.raises(ValueError, match="each replica has a GPU of its own: give 'cuda'"):
        serve._check_gpus(torch.device("cuda:1"), 1, 1)
