"""Start the ranks of a divided model, watch them, and end them.

Rank 0 is the process of the engine. It starts the others as torchrun does, each with ``python -m`` and its
number in the environment, so that a user's script is not run again as with multiprocessing. A rank's
standard input is a pipe that nobody writes to: it ends when rank 0 does, however that ends, and then the
rank ends too. Its standard output is a pipe on which it says why it fails; what is printed goes to standard
error.

Under torchrun the ranks are there already: all run the same program, in which those but rank 0 follow as soon
as they come to the engine.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from ..config import EngineConfig
from .leader import Leader
from .ranks import START, RankError, Ranks

_LAST_WORDS = 5.0  # seconds for a rank that has failed to end
_HOST = "127.0.0.1"


def by_torchrun() -> bool:
    """Return whether torchrun has started this process."""
    return dist.is_torchelastic_launched()


class RankGroup:
    """Start the other ranks and lead them.

    Args:
        config: the number of ranks, the device and the time limit.
        device: the device of rank 0.

    Attributes:
        timeout: the time limit of a step in seconds.
        failure: why the group cannot go on; None while it can.
        ended: `close` was called.
        on_failure: called by another thread with the error when a rank has ended by itself.

    Raises:
        ValueError: there are too few devices, or torchrun has started another number of ranks.
        RankError: a rank could not be started.
    """

    def __init__(self, config: EngineConfig, device: torch.device) -> None:
        size = config.tensor_parallel_size
        check_devices(size, device)
        self.failure: RankError | None = None
        self.on_failure: Callable[[RankError], None] | None = None
        self.timeout = config.distributed_timeout_seconds
        self.ended = False
        self._processes: list[subprocess.Popen[str]] = []
        self._watches: list[threading.Thread] = []
        self._num_threads = torch.get_num_threads()
        if by_torchrun():
            store = _torchrun_store(size)
        else:
            store = dist.TCPStore(_HOST, 0, size, is_master=True, timeout=START, wait_for_workers=False)
            for rank in range(1, size):
                self._start(rank, size, store.port, device)
        if device.type == "cpu":
            torch.set_num_threads(_threads(size))
        with self.explained():
            self._wait_for_all(store)
            self.leader = Leader(Ranks(store, 0, size, own_device(device, 0), self.timeout))

    @property
    def ranks(self) -> Ranks:
        """Return the group of ranks."""
        return self.leader.ranks

    @property
    def process_ids(self) -> list[int]:
        """Return the IDs of the other ranks' processes; empty under torchrun."""
        return [process.pid for process in self._processes]

    def _start(self, rank: int, size: int, port: int, device: torch.device) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": _HOST,
            "MASTER_PORT": str(port),
        }
        if device.type == "cpu":
            environment["OMP_NUM_THREADS"] = str(_threads(size))
        process = subprocess.Popen(
            [sys.executable, "-m", "cupaged.engine.distributed.rank", device.type, str(self.timeout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        watch = threading.Thread(
            target=self._watch, args=(rank, process), daemon=True, name=f"cupaged-rank-{rank}"
        )
        self._processes.append(process)
        self._watches.append(watch)
        watch.start()

    def _wait_for_all(self, store: dist.Store) -> None:
        """Wait until the other processes have started.

        Raises:
            RankError: one has ended, or takes too long.
        """
        started = [f"started/{rank}" for rank in range(1, len(self._processes) + 1)]
        end = time.monotonic() + START.total_seconds()
        while started and not store.check(started):
            if self.failure is not None:
                raise self.failure
            if time.monotonic() > end:
                raise RankError(f"the ranks have not started within {START}")
            time.sleep(0.02)

    def _watch(self, rank: int, process: subprocess.Popen[str]) -> None:
        """Wait for a rank to end, which it does not before `close` unless it fails."""
        assert process.stdout is not None
        words = process.stdout.read().strip()
        status = process.wait()
        if _is_about_ranks(words):
            time.sleep(1)  # another has ended first, and its own reason is the better one
        if self.ended or self.failure is not None:
            return
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        self._fail(RankError(f"rank {rank} has ended with {how}{': ' if words else ''}{words}"))

    def _fail(self, error: RankError) -> None:
        self.failure = error
        if self.on_failure is not None:
            self.on_failure(error)

    @contextlib.contextmanager
    def explained(self, always: bool = False) -> Iterator[None]:
        """Raise a RankError in place of an error that comes of a rank that has failed, or hangs, and end.

        Args:
            always: in place of any error, as the others wait for what this rank has not done.
        """
        if self.failure is not None:
            raise self.failure
        try:
            yield
        except BaseException as error:
            self.failure = self._reason(error)
            if self.failure is None and always:
                self.failure = RankError(f"rank 0 has failed: {type(error).__name__}: {error}")
            self.close()
            if self.failure is None or not isinstance(error, Exception):
                raise
            raise self.failure from error

    def _reason(self, error: BaseException) -> RankError | None:
        """Return what the ranks have to do with an error, or None."""
        text = str(error)
        if isinstance(error, RankError):
            return error
        if self.failure is None and _is_about_ranks(text):
            for watch in self._watches:
                watch.join(_LAST_WORDS / len(self._watches))
        if self.failure is not None:
            return self.failure
        if "imed out" in text or "imeout" in text:
            return self.timed_out()
        if _is_about_ranks(text):
            return RankError(f"the ranks cannot reach each other: {text.splitlines()[0]}")
        return None

    def timed_out(self) -> RankError:
        """Return the error of a step that takes too long."""
        return RankError(
            f"a rank has not answered within {self.timeout:g} s (--distributed-timeout-seconds): it hangs, "
            "or the first use of a kernel takes longer to compile"
        )

    def close(self) -> None:
        """End the other ranks. Calling it again has no effect."""
        if self.ended:
            return
        self.ended = True
        if self.failure is None and by_torchrun():
            with contextlib.suppress(RuntimeError):
                self.leader.exit()
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()  # upon which it ends
        for process in self._processes:
            try:
                process.wait(_LAST_WORDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for watch in self._watches:
            watch.join()
        with contextlib.suppress(RuntimeError, AttributeError):
            self.ranks.close()
        torch.set_num_threads(self._num_threads)


def _is_about_ranks(text: str) -> bool:
    """Return whether the text of an error is of torch.distributed."""
    return any(word in text for word in ("gloo", "NCCL", "nccl", "onnection", "Socket", "imed out"))


def check_devices(size: int, device: torch.device) -> None:
    """Check that each rank has a device.

    Raises:
        ValueError: there are fewer.
    """
    if device.type == "cuda":
        if device.index not in (None, 0):
            raise ValueError(
                f"device {str(device)!r} is one GPU, and tensor_parallel_size {size} takes the first {size}: "
                "choose them with CUDA_VISIBLE_DEVICES"
            )
        if (count := torch.cuda.device_count()) < size and not by_torchrun():
            raise ValueError(f"tensor_parallel_size {size} needs as many GPUs, and there are {count}")
    elif torch.cuda.is_available():
        raise ValueError(
            "device 'cpu' with tensor_parallel_size above 1 needs a process that sees no GPU: start it with "
            "CUDA_VISIBLE_DEVICES="
        )


def own_device(device: torch.device, local_rank: int) -> torch.device:
    """Return the device of a rank."""
    if device.type != "cuda":
        return device
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _torchrun_store(size: int) -> dist.Store:
    started = int(os.environ["WORLD_SIZE"])
    if started != size:
        raise ValueError(
            f"torchrun has started {started} ranks, and tensor_parallel_size is {size}: give both the same "
            "number"
        )
    return environment_store()


def environment_store() -> dist.Store:
    """Return the store that the environment names, as torchrun does."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=START))
    return store


def _threads(size: int) -> int:
    """Return how many threads each rank on a CPU has."""
    return max(1, torch.get_num_threads() // size)
