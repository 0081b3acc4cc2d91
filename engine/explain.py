"""List what of a model is fused, and what is not and why: `python -m cupaged.engine.explain MODEL`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter

from cupaged.device import choose_device

from .config import DTYPES
from .model.attention import ATTENTION_NAME, register_attention
from .model.fusion import fuse_model, layer_operations
from .model.loader import load_model
from .model.model_runner import ModelRunner
from .model.progress import without_bars

_BLOCK_SIZE = 16


def parser() -> argparse.ArgumentParser:
    """Return a parser of the options."""
    cli = argparse.ArgumentParser(
        prog="python -m cupaged.engine.explain",
        description="List the operations of a model's layers in decode, before and after fusing.",
    )
    cli.add_argument(
        "model",
        nargs="?",
        help="Hugging Face directory, hub id or GGUF file; SmolLM2-135M-Instruct if not given",
    )
    cli.add_argument("--dtype", choices=DTYPES, default="auto", help="dtype of the weights")
    cli.add_argument("--device", help='"cuda", "cpu"; a GPU if there is one')
    cli.add_argument("--trust-remote-code", action="store_true", help="run Python files of the model")
    return cli


def main(arguments: list[str] | None = None) -> int:
    """Print the list, and return the exit status."""
    options = parser().parse_args(arguments)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    try:
        print(explain(options.model, options.dtype, options.device, options.trust_remote_code))
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def explain(model: str | None, dtype: str = "auto", device: str | None = None, trust: bool = False) -> str:
    """Return what of a model is fused, and the operations of its layers in a decode step.

    Raises:
        ValueError: the model cannot be served.
    """
    register_attention()
    chosen, _ = choose_device(device)
    with without_bars(model is None):
        loaded, _ = load_model(
            model,
            dtype=dtype,
            device=str(chosen),
            attn_implementation=ATTENTION_NAME,
            trust_remote_code=trust,
        )
    runner = ModelRunner(loaded)
    runner.cache_latents()
    proof = runner.proof(_BLOCK_SIZE)
    before = layer_operations(loaded, proof)
    report = fuse_model(loaded, proof).report
    after = layer_operations(loaded, proof)
    lines = [f"{type(loaded).__name__}, {len(before)} layers, {runner.kv_shape(_BLOCK_SIZE).dtype}, {chosen}"]
    if report.undone is None:
        lines += [f"fused: {count} {kind}" for kind, count in report.fused.items()] or ["fused: nothing"]
        lines += [f"as it is: {line}" for line in report.left_lines()]
    else:
        lines.append(report.line())
    lines.append(f"operations a layer in decode: {_range(before)} before, {_range(after)} now")
    kinds = Counter(tuple(names) for names in after)
    for names, count in kinds.most_common():
        lines.append(f"{count} x {len(names)} operations:")
        lines += [f"  {name}" for name in names]
    return "\n".join(lines)


def _range(operations: list[list[str]]) -> str:
    counts = sorted({len(names) for names in operations})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


if __name__ == "__main__":
    sys.exit(main())
