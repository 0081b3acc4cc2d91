"""Run a contender's process for a bounded time, and tell why it failed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

MARK = "RESULT "
TAIL_LINES = 12
GRACE_S = 15.0  # for a server to end after SIGTERM


class ContenderError(RuntimeError):
    """Report that a contender gave no result, or a wrong one."""


def run_script(
    command: Sequence[str], environment: Mapping[str, str], job: Mapping[str, Any], timeout: float
) -> dict[str, Any]:
    """Run a script that gets the job as a file, and return the result that it prints.

    Raises:
        ContenderError: it failed, or took longer than ``timeout`` seconds; with the last lines it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        job_file = Path(folder) / "job.json"
        job_file.write_text(json.dumps(job))
        with _started([*command, str(job_file)], environment, folder) as (process, log):
            try:
                status = process.wait(timeout)
            except subprocess.TimeoutExpired:
                raise ContenderError(f"no result after {timeout:.0f} s\n{tail(log)}") from None
        results = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(MARK)]
        if status or not results:
            raise ContenderError(f"exit status {status}, {len(results)} results\n{tail(log)}")
        return json.loads(results[-1].removeprefix(MARK))


@contextlib.contextmanager
def server(
    command: Sequence[str],
    environment: Mapping[str, str],
    is_ready: Callable[[], bool],
    timeout: float,
) -> Iterator[float]:
    """Run a server until the block ends, and yield the seconds until it was ready.

    Raises:
        ContenderError: it ended, or was not ready after ``timeout`` seconds, or the block failed; with the
            last lines it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with _started(command, environment, folder) as (process, log):
            try:
                while not is_ready():
                    if process.poll() is not None:
                        raise ContenderError(f"the server ended with status {process.returncode}")
                    if time.perf_counter() - start > timeout:
                        raise ContenderError(f"the server was not ready after {timeout:.0f} s")
                    time.sleep(0.1)
                yield time.perf_counter() - start
            except ContenderError as error:
                raise ContenderError(f"{error}\n{tail(log)}") from error


def tail(log: Path) -> str:
    """Return the last lines of a log, those of results left out."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if not line.startswith(MARK)]
    return "\n".join(lines[-TAIL_LINES:])


@contextlib.contextmanager
def _started(
    command: Sequence[str], environment: Mapping[str, str], folder: str
) -> Iterator[tuple[subprocess.Popen, Path]]:
    """Start a process in a session of its own, which ends with the block, and yield it with its log."""
    log = Path(folder) / "log"
    with log.open("w") as output:
        process = _start(command, environment, folder, output)
        try:
            yield process, log
        finally:
            _end(process)


def _start(
    command: Sequence[str], environment: Mapping[str, str], folder: str, output: TextIO
) -> subprocess.Popen:
    try:
        return subprocess.Popen(
            command,
            env={**os.environ, **environment},
            cwd=folder,  # nothing of the checkout is imported by chance
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise ContenderError(f"{command[0]} cannot be run: {error}") from error


def _end(process: subprocess.Popen) -> None:
    """End a process if it still runs, and what it has started."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):  # nothing is left of its group
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
