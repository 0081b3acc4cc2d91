"""Progress bars: those of transformers can be left out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from transformers.utils import logging


@contextlib.contextmanager
def without_bars(wanted: bool = True) -> Iterator[None]:
    """Keep transformers and the hub's client from drawing bars, where that is wanted."""
    if not (wanted and logging.is_progress_bar_enabled()):
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
