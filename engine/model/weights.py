"""Load a model's weights and refuse checkpoints for which transformers would initialize some at random."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from .model_files import shorten

_log = logging.getLogger("cupaged.engine")
_LOGGERS = ("modeling_utils", "generation.configuration_utils")
_UNCONVERTED = re.compile(r"^(.+?)\s*\|[^|]*CONVERSION", re.MULTILINE)  # tensor names in transformers' report


def load_weights(place: str | Path, **options: Any) -> PreTrainedModel:
    """Load a decoder with all of its weights.

    Tied weights, and others that transformers expects to be absent, may be missing from the checkpoint.

    Args:
        place: a directory or a hub ID.
        options: options of ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        ValueError: tensors are missing, or have other shapes than the model's.
    """
    with _captured_reports() as reports:
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                place, **options, ignore_mismatched_sizes=True, output_loading_info=True
            )
        except RuntimeError as error:
            # Weights that transformers merges from several tensors of the checkpoint, such as experts'.
            names = sorted({name for report in reports for name in _UNCONVERTED.findall(report)})
            if not names:
                raise
            raise ValueError(
                f"of the tensors that make up {shorten(names)} some are missing or have other shapes; "
                "download it again, or save it whole"
            ) from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"it lacks {len(missing)} of its tensors: {shorten(missing)}; download it again, or save it whole"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        shapes = [f"{name} is {list(is_)}, not {list(wanted)}" for name, is_, wanted in mismatched]
        raise ValueError(
            f"it has tensors of other shapes than its config.json says: {shorten(shapes, 3)}; take "
            "weights and config.json from the same place"
        )
    if unexpected := sorted(info["unexpected_keys"]):
        _log.warning("%d tensors of the checkpoint are not used: %s", len(unexpected), shorten(unexpected))
    return model


@contextmanager
def _captured_reports() -> Iterator[list[str]]:
    """Remove two messages from transformers' log that do not apply here, and collect them.

    They say that missing weights were initialized, and that sampling settings may be ignored.
    """
    reports: list[str] = []

    def is_logged(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        captured = "LOAD REPORT" in message or "generation flags are not valid" in message
        if captured:
            reports.append(message)
        return not captured

    loggers = [logging.getLogger(f"transformers.{name}") for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(is_logged)
    try:
        yield reports
    finally:
        for logger in loggers:
            logger.removeFilter(is_logged)
