"""A model's weights, all of them: what transformers would draw at random is an error here."""

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
_UNCONVERTED = re.compile(r"^(.+?)\s*\|[^|]*CONVERSION", re.MULTILINE)  # in transformers' report


def load_weights(place: str | Path, **options: Any) -> PreTrainedModel:
    """Load a decoder with every one of its weights.

    Weights that are tied to others, and what transformers itself knows to be absent, need not be there.

    Args:
        options: those of ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        ValueError: tensors are missing, or their shapes are not those of the model.
    """
    with _report() as reports:
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                place, **options, ignore_mismatched_sizes=True, output_loading_info=True
            )
        except RuntimeError as error:
            # Weights that transformers keeps in one tensor and checkpoints in many, as experts'.
            names = sorted({name for report in reports for name in _UNCONVERTED.findall(report)})
            if not names:
                raise
            raise ValueError(
                f"of the tensors that make up {shorten(names)} some are missing or have other shapes; "
                "download it again, or save it whole"
            ) from error
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"it lacks {len(missing)} of its tensors: {shorten(missing)}; download it again, or save it whole"
        )
    if mismatched := sorted(found["mismatched_keys"]):
        shapes = [f"{name} is {list(is_)}, not {list(wanted)}" for name, is_, wanted in mismatched]
        raise ValueError(
            f"it has tensors of other shapes than its config.json says: {shorten(shapes, 3)}; take "
            "weights and config.json from the same place"
        )
    if unexpected := sorted(found["unexpected_keys"]):
        _log.warning("%d tensors of the checkpoint are not used: %s", len(unexpected), shorten(unexpected))
    return model


@contextmanager
def _report() -> Iterator[list[str]]:
    """Keep what is not so here out of transformers' log, and give it: that what is missing was drawn, and
    that sampling settings may be ignored."""
    reports: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        wrong = "LOAD REPORT" in message or "generation flags are not valid" in message
        if wrong:
            reports.append(message)
        return not wrong

    loggers = [logging.getLogger(f"transformers.{name}") for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield reports
    finally:
        for logger in loggers:
            logger.removeFilter(keep)
