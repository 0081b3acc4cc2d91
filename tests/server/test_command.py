"""The command line: what it says when it cannot start, and that every setting can be given."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import resource
import shlex
from pathlib import Path

import pytest

from cupaged import serve
from cupaged.engine import EngineConfig
from cupaged.engine.server.limits import Limits


def error_of(capsys, *arguments: str) -> str:
    """What is printed before anything is loaded: no model is called so."""
    assert serve.main(["--model", "./no-such-model", "--device", "cpu", *arguments]) == 1
    return capsys.readouterr().err


def test_a_port_in_use_is_said_before_a_model_is_loaded(capsys):
    """By a server that may still be loading its own model."""
    with serve.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        error = error_of(capsys, "--port", str(port))
    assert error.startswith(f"error: cannot listen on 127.0.0.1:{port} (Address already in use): choose")


@pytest.mark.parametrize("host", ["192.0.2.7", "2001:db8::7"])  # addresses that are for documents only
def test_an_address_that_is_not_of_this_machine(capsys, host):
    error = error_of(capsys, "--host", host, "--port", "0")
    assert error.startswith(f"error: cannot listen on {host}:0 (")
    assert f"{host} is not an address of this machine" in error or "no addresses of that kind" in error
    assert "choose another --host" in error
    assert "--port" not in error


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a" * 70 + ".invalid", "10.1.2.3.4"])
def test_a_host_that_nobody_knows(capsys, host):
    error = error_of(capsys, "--host", host)
    assert error.startswith(f"error: cannot listen on {host}:8000: no address is known for the --host (")
    assert "--port" not in error


def refusing(number: int):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EACCES, "(Permission denied): this user may not take that port, .*; choose another --port"),
        (errno.EADDRNOTAVAIL, "127.0.0.1 is not an address of this machine; choose another --host"),
        (errno.EADDRINUSE, "(Address already in use): choose another --port"),
        (errno.ENOBUFS, "(No buffer space available): choose another --host or --port"),
    ],
)
def test_each_refusal_of_the_system_has_its_remedy(capsys, monkeypatch, number, remedy):
    monkeypatch.setattr(serve.socket.socket, "bind", refusing(number))
    assert re.search(remedy.replace("(", r"\(").replace(")", r"\)"), error_of(capsys, "--port", "80"))


@pytest.mark.parametrize("text", ["-1", "inf", "nan", "soon"])
def test_seconds_that_are_none(capsys, text):
    with pytest.raises(SystemExit):
        serve.parser().parse_args([f"--shutdown-timeout={text}"])
    assert "argument --shutdown-timeout" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["-1", "65536", "http"])
def test_a_port_that_is_none(capsys, port):
    with pytest.raises(SystemExit):
        serve.main([f"--port={port}"])
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith("python -m cupaged.serve: error: argument --port")
    )


@pytest.mark.parametrize(
    ("host", "address"),
    [("0.0.0.0", "http://localhost:80"), ("10.0.0.1", "http://10.0.0.1:80"), ("::1", "http://[::1]:80")],
)
def test_the_address_that_is_shown_is_one(host, address):
    assert serve._address(host, 80) == address


def test_the_greeting_is_for_the_model_there_is():
    """One without a chat template is not chatted with."""
    chat = serve._greeting("http://localhost:80", "tiny", chat=True)
    assert "chat in a browser" in chat
    assert request_of(chat)[0] == "http://localhost:80/v1/chat/completions"
    text = serve._greeting("http://localhost:80", "tiny", chat=False)
    assert "chat in a browser" not in text
    assert "no chat template" in text
    path, body = request_of(text)
    assert path == "http://localhost:80/v1/completions"
    assert set(body) == {"model", "prompt", "max_tokens"}


def request_of(greeting: str) -> tuple[str, dict]:
    """Address and body of the request that it shows."""
    _, address, *_, body = shlex.split(greeting[greeting.index("curl") : greeting.index("\n\nCtrl-C")])
    return address, json.loads(body)


def test_a_model_that_is_not_there(capsys):
    assert "model './no-such-model' does not exist" in error_of(capsys, "--port", "0")


def test_what_may_be_on_the_hub_and_is_not(capsys, monkeypatch, tmp_path):
    """A wrong relative path looks like the name of a model there, where nobody may answer for long."""
    monkeypatch.chdir(tmp_path)
    asked = []

    def ask(place, **_):
        asked.append(capsys.readouterr().out)
        raise OSError(f"no {place}")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", ask)
    assert serve.main(["--model", "models/nothing", "--port", "0", "--device", "cpu"]) == 1
    assert asked[0].startswith("cupaged: no 'models/nothing' is here; it is looked for on the hub")
    error = "error: model 'models/nothing' is not here, and cannot be loaded from the hub: no models/nothing"
    assert capsys.readouterr().err.splitlines()[-1] == error


def test_a_setting_out_of_range(capsys):
    assert error_of(capsys, "--block-size", "12").startswith("error: block_size must be")


def test_a_cache_that_cannot_be_written(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUPAGED_CACHE_DIR", str(tmp_path / "file"))
    assert serve.main(["--device", "cpu", "--port", "0"]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_a_limit_out_of_range(capsys):
    assert error_of(capsys, "--max-body-size", "0").startswith("error: max_body_size must be")


@pytest.mark.parametrize("settings", [EngineConfig, Limits])
def test_every_setting_is_an_option_with_a_text(settings):
    options = {action.dest: action for action in serve.parser()._actions}
    defaults = serve.parser().parse_args([])
    for field in dataclasses.fields(settings):
        if field.name == "check_integrity":
            continue
        assert options[field.name].help
        assert getattr(defaults, field.name) == field.default


def test_settings_are_given_as_what_they_are():
    given = serve.parser().parse_args(["--swap-space", "0.5", "--max-model-len", "64", "--dtype", "float16"])
    assert (given.swap_space, given.max_model_len, given.dtype) == (0.5, 64, "float16")
    given = serve.parser().parse_args(["--max-choices", "3", "--body-timeout", "1.5", "--allowed-hosts", "a"])
    assert (given.max_choices, given.body_timeout, given.allowed_hosts) == (3, 1.5, ["a"])


def test_the_limits_are_those_of_the_documentation():
    text = (Path(__file__).resolve().parents[2] / "docs" / "server.md").read_text()
    listed = dict(re.findall(r"^\| `--([\w-]+)` \| ([\d.]+) \|", text, re.MULTILINE))
    limits = dataclasses.asdict(Limits())
    assert listed == {name.replace("_", "-"): str(value) for name, value in limits.items()}


def test_there_are_descriptors_for_the_connections(monkeypatch):
    """As far as the system lets the process have them."""
    for limits, expected in (
        ((256, 4096), (1256, 4096)),
        ((256, 512), (512, 512)),
        ((256, resource.RLIM_INFINITY), (1256, resource.RLIM_INFINITY)),
        ((2000, 4096), None),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), None),
    ):
        found = []
        monkeypatch.setattr(resource, "getrlimit", lambda which, limits=limits: limits)
        monkeypatch.setattr(resource, "setrlimit", lambda which, pair, found=found: found.append(pair))
        serve._allow_descriptors(1000)
        assert found == ([expected] if expected else [])
