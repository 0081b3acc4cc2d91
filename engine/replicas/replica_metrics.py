"""Put the metrics of several servers together, each with the name of its replica as a label."""

from __future__ import annotations

import re
from collections.abc import Mapping

_SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? ([^}]+)")
_COMMENT = re.compile(r"# (?:HELP|TYPE) (\S+) ")


def merged(texts: Mapping[str, str]) -> str:
    """Return the metrics of all replicas in Prometheus's text format.

    Args:
        texts: metrics of each replica in that format, as `prometheus_client` writes them.
    """
    families: dict[str, tuple[dict[str, None], list[str]]] = {}  # comments and samples by name
    for replica, text in texts.items():
        comments: dict[str, None] = {}
        samples: list[str] = []
        for line in text.splitlines():
            if comment := _COMMENT.match(line):
                comments, samples = families.setdefault(comment[1], ({}, []))
                comments[line] = None
            elif sample := _SAMPLE.fullmatch(line):
                labels = f'replica="{replica}"' + (f",{sample[2]}" if sample[2] else "")
                samples.append(f"{sample[1]}{{{labels}}} {sample[3]}")
    return "".join(f"{line}\n" for comments, samples in families.values() for line in (*comments, *samples))
