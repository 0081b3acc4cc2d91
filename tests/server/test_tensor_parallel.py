"""A server over several ranks ends as a whole, whatever becomes of one of them."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from .conftest import MODEL
from .test_shutdown import SLOWLY, Command

pytestmark = pytest.mark.matrix
ROOT = Path(__file__).parents[2]
TIME_LIMIT = 6
ARGUMENTS = [
    *("--tensor-parallel-size", "2", "--distributed-timeout-seconds", str(TIME_LIMIT), "--dtype", "float32"),
    *("--num-gpu-blocks-override", "64", "--max-model-len", "256", "--shutdown-timeout", "20"),
]
LONG = {"model": MODEL, "prompt": "abc", "max_tokens": 200, "ignore_eos": True, "stream": False}


@pytest.fixture
def command(llama_dir):
    with Command(llama_dir, *ARGUMENTS) as command:
        yield command


def ranks_of(command: Command) -> list[psutil.Process]:
    children = psutil.Process(command.process.pid).children(recursive=True)
    return [child for child in children if "cupaged.engine.distributed.rank" in child.cmdline()]


def ask(command: Command, body: dict) -> httpx.Response:
    return httpx.post(f"{command.url}/v1/completions", json=body, timeout=100)


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV], ids=lambda n: n.name)
def test_a_rank_that_fails_ends_the_server(command, number):
    """Requests get an error that says why, and the exit status is 1."""
    (rank,) = ranks_of(command)
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(ask, command, LONG) for _ in range(3)]
        time.sleep(1)
        rank.send_signal(number)
        answers = [one.result() for one in waiting]
    reason = f"within {TIME_LIMIT} s" if number == signal.SIGSTOP else f"ended with signal {number}"
    for answer in answers:
        assert answer.status_code == 503
        assert reason in answer.json()["error"]["message"]
    assert command.process.wait(30) == 1
    assert_gone([rank])
    assert reason in command.process.stderr.read()


def disagreeing(directory: Path, planted: str) -> str:
    """Return the server's script for which the other rank's Python begins with a planted fault."""
    (directory / "sitecustomize.py").write_text("import os\nif 'RANK' in os.environ:\n" + planted)
    return f"import sys; sys.path.insert(0, {str(directory)!r})\n{SLOWLY}"  # which is the ranks' path as well


BUFFER_IS_MISSING = """
    from cupaged.engine.distributed import follow
    def read(buffer, number, read_frame=follow.read_frame):
        return read_frame(buffer, number + os.path.exists({now!r}))
    follow.read_frame = read
"""


def test_a_rank_that_gets_another_step_than_is_next_ends_the_server(llama_dir, tmp_path):
    now = tmp_path / "now"
    script = disagreeing(tmp_path, BUFFER_IS_MISSING.format(now=str(now)))
    with Command(llama_dir, *ARGUMENTS, script=script) as command, ThreadPoolExecutor(3) as pool:
        (rank,) = ranks_of(command)
        waiting = [pool.submit(ask, command, LONG) for _ in range(3)]
        time.sleep(1)
        assert not any(one.done() for one in waiting)
        now.touch()
        for one in waiting:
            assert one.result().status_code == 503
            reason = "rank 1 has ended with exit status 1: OutOfStep: rank 0 has sent number"
            assert reason in one.result().json()["error"]["message"]
        assert command.process.wait(30) == 1
        assert_gone([rank])
        assert "OutOfStep" in command.process.stderr.read()


ANOTHER_PYTHON = """
    import platform
    platform.python_version = lambda: "2.7.18"
"""


def test_a_rank_that_has_found_something_else_ends_the_start(llama_dir, tmp_path):
    script = disagreeing(tmp_path, ANOTHER_PYTHON)
    command = Command(llama_dir, *ARGUMENTS, script=script)
    try:
        _, log = command.process.communicate(timeout=200)
        assert command.process.returncode == 1
        here = platform.python_version()
        assert f"the version of Python is {here} on rank 0 and 2.7.18 on rank 1" in log
    finally:
        command.process.kill()


def test_an_idle_server_ends_when_a_rank_does(command):
    assert ask(command, {**LONG, "max_tokens": 2}).status_code == 200
    (rank,) = ranks_of(command)
    rank.kill()
    assert command.process.wait(30) == 1
    assert "rank 1 has ended with signal 9" in command.process.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_no_rank_is_left_behind(command, number):
    (rank,) = ranks_of(command)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, command, {**LONG, "max_tokens": 60})
        time.sleep(1)
        command.process.send_signal(number)
        if number == signal.SIGKILL:
            with pytest.raises(httpx.HTTPError):
                waiting.result()
        else:  # rank 0 drains, and the other rank works until then
            assert waiting.result().json()["usage"]["completion_tokens"] == 60
    assert command.process.wait(30) == (-number if number == signal.SIGKILL else 0)
    assert_gone([rank])


def test_a_model_that_does_not_divide_is_refused_before_ranks_start(llama_dir):
    command = Command(llama_dir, "--tensor-parallel-size", "4", *ARGUMENTS[2:])
    _, log = command.process.communicate(timeout=100)
    assert command.process.returncode == 1
    assert "4 does not divide the llama model" in log
    assert "2 KV heads" in log
    assert "it can be 2" in log


def test_it_runs_under_torchrun(llama_dir, tmp_path):
    """Each rank runs the script, in which those but the first stay in the constructor."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from cupaged.engine import LLM, SamplingParams\n"
        f"with LLM({llama_dir!r}, tensor_parallel_size=2, device='cpu', dtype='float32',\n"
        "         num_gpu_blocks_override=64, max_model_len=128) as llm:\n"
        "    output = llm.generate('abc', SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)[0]\n"
        "    print('TOKENS', len(output.outputs[0].token_ids))\n"
    )
    python = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert python.returncode == 0, python.stderr
    assert python.stdout.count("TOKENS 5") == 1
