"""Disable the progress bars of transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from transformers.utils import logging


@contextlib.contextmanager
def without_bars(wanted: bool = True) -> Iterator[None]:
    """Disable the progress bars of transformers and of the hub's client, if ``wanted``."""
    if not (wanted and logging.is_progress_bar_enabled()):
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
