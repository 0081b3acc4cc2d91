"""Check a model's files before anything is imported or loaded, so that wrong paths fail at once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..validation import is_integer

# In the order in which transformers looks for them.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_LENGTHS = ("max_position_embeddings", "n_positions")


def check_files(model: str | None, max_model_len: int | None = None) -> Path | None:
    """Check the names, sizes and headers of a model's files.

    Args:
        model: a directory, a hub ID, a path to a ``.gguf`` file, or None for the demo model.
        max_model_len: maximum number of tokens of a sequence; None: the model's.

    Returns:
        The directory or the ``.gguf`` file; None if there is neither, so that ``model`` may be a hub ID.

    Raises:
        ValueError: there is no such model, it lacks files, or it was made for fewer tokens.
    """
    if model is None:
        return None
    path = Path(model).expanduser()
    if path.is_dir():
        _check_directory(model, path, max_model_len)
        return path
    if path.exists():
        _check_gguf(model, path)
        return path
    if path.suffix == ".gguf":
        raise ValueError(f"model {model!r} is not a file; --model takes the path of a .gguf file")
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ValueError(f"model {model!r} does not exist; it must be a directory, a .gguf file or a hub id")
    return None


def check_length(max_model_len: int | None, model_len: int | None) -> int:
    """Return the maximum number of tokens of a sequence.

    Args:
        max_model_len: maximum that the user asks for; None: the model's.
        model_len: maximum in the model's configuration; None, 0 or -1 (xlnet's): no limit.

    Raises:
        ValueError: neither is given, or the model was made for fewer.
    """
    if model_len is not None and model_len <= 0:
        model_len = None
    wanted = max_model_len or model_len
    if wanted is None:
        raise ValueError("the model's configuration gives no maximum length: pass max_model_len")
    if model_len is not None and wanted > model_len:
        raise ValueError(f"max_model_len is {wanted}, and the model was made for {model_len} tokens")
    return wanted


def check_generation_config(source: str) -> None:
    """Check that ``generation_config``, if it is a directory, has a generation_config.json.

    Raises:
        ValueError: the file does not exist or cannot be read.
    """
    if source not in ("auto", "vllm"):
        file = Path(source).expanduser() / "generation_config.json"
        if not file.is_file():
            raise ValueError(
                f"generation_config must be 'auto', 'vllm' or a directory with a generation_config.json, got "
                f"{source!r}"
            )
        _read_json(file)


def _check_gguf(model: str, path: Path) -> None:
    if path.suffix != ".gguf":
        raise ValueError(
            f"model {model!r} is a file; give the directory that it is in, {path.parent}, or a .gguf file"
        )
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"model {model!r} is not a GGUF file, or a damaged one: download it again")


def _check_directory(model: str, directory: Path, max_model_len: int | None) -> None:
    config_file = directory / "config.json"
    if not config_file.is_file():
        ggufs = sorted(path.name for path in directory.glob("*.gguf"))
        hint = f"; name its file: {directory / ggufs[0]}" if ggufs else ""
        raise ValueError(f"model {model!r} is a directory without a config.json{hint}")
    config = _read_json(config_file)
    text_config = config.get("text_config")
    of_text = text_config if isinstance(text_config, dict) else config
    lengths = [of_text[name] for name in _LENGTHS if is_integer(of_text.get(name))]
    if max_model_len is not None and len(lengths) == 1:
        check_length(max_model_len, lengths[0])
    if (generation := directory / "generation_config.json").is_file():
        _read_json(generation)  # transformers would silently ignore a damaged one
    chosen = config.get("transformers_weights")  # a checkpoint may name its file
    _check_weights(model, directory, (chosen,) if isinstance(chosen, str) else WEIGHTS)


def _check_weights(model: str, directory: Path, names: tuple[str, ...]) -> None:
    """Check the first of these files that exists, which is the one that transformers loads."""
    present = [directory / name for name in names if (directory / name).is_file()]
    if not present:
        raise ValueError(f"model {model!r} is a directory without weights: it has no {' or '.join(names)}")
    files = [present[0]]
    if present[0].suffix == ".json":
        index = _read_json(present[0]).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
            raise ValueError(f"{present[0]} has no weight_map from tensors to files: download it again")
        files = [directory / name for name in sorted(set(index.values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ValueError(
                f"model {model!r} lacks {len(missing)} of the {len(files)} files that {present[0].name} "
                f"names: {shorten(missing)}; download what is missing"
            )
    for file in files:
        if file.suffix == ".safetensors" and not _is_whole(file):
            raise ValueError(f"{file} is damaged or cut short: download it again")


def _is_whole(file: Path) -> bool:
    """Return whether a safetensors file has the length that its header implies."""
    try:
        with file.open("rb") as opened:
            header_size = int.from_bytes(opened.read(8), "little")
            total = os.fstat(opened.fileno()).st_size
            if header_size > total:
                return False
            header = json.loads(opened.read(header_size))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return total == 8 + header_size + max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return False


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}): change its permissions") from error
    except ValueError as error:
        raise ValueError(f"{file} is damaged, or is no JSON ({error}): download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object: download it again")
    return content


def shorten(names: list[str], limit: int = 5) -> str:
    """Return the first ``limit`` names as text, and the number of the others."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
