"""The command line: what it says when it cannot start, and that every setting can be given."""

from __future__ import annotations

import dataclasses
import re
import resource
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


def test_a_host_that_is_not_ours(capsys):
    assert "cannot listen on no.such.host.invalid" in error_of(capsys, "--host", "no.such.host.invalid")


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


def test_a_model_that_is_not_there(capsys):
    assert "model './no-such-model' does not exist" in error_of(capsys, "--port", "0")


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
