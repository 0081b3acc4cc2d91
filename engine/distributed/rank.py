"""Be one of the ranks but the first: ``python -m cupaged.engine.distributed.rank``, which rank 0 runs."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from typing import NoReturn

import torch

from .follow import follow
from .launch import by_torchrun, environment_store, own_device
from .ranks import Ranks


def is_follower(tensor_parallel_size: int) -> bool:
    """Return whether torchrun has started this process as another rank than the first."""
    return tensor_parallel_size > 1 and by_torchrun() and int(os.environ["RANK"]) > 0


def run_follower(device_type: str, timeout: float) -> NoReturn:
    """Follow rank 0, and end the process when it ends."""
    # They go to all processes of a terminal or a container. Rank 0 finishes its requests first.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = own_device(torch.device(device_type), int(os.environ["LOCAL_RANK"]))
    store = environment_store()
    store.set(f"started/{rank}", "")
    follow(Ranks(store, rank, size, device, timeout))
    os._exit(0)  # other threads may wait for ranks that have ended


def main() -> None:
    """Run a rank that rank 0 has started."""
    words = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    threading.Thread(target=_end_with_rank_0, daemon=True).start()
    try:
        run_follower(sys.argv[1], float(sys.argv[2]))
    except BaseException as error:
        traceback.print_exc()
        print(
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            file=words,
            flush=True,
        )
        sys.stderr.flush()
        os._exit(1)


def _end_with_rank_0() -> None:
    """Wait for the pipe from rank 0 to end."""
    while os.read(0, 1):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
