"""Make numba's disk cache optional: a kernel that cannot be read or written is compiled, with one warning.

numba itself fails if a file of its cache is damaged or the disk is full. Here each file begins with a
checksum of the rest, because damaged machine code would be executed.
"""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.ccallback import CFunc

_log = logging.getLogger("cupaged")
_DIGEST = hashlib.sha256
_DIGEST_BYTES = _DIGEST().digest_size


def cfunc(function: Callable[..., Any], signature: Any, stamp: str) -> Any:
    """Return a function as a C function, loaded from the disk or compiled.

    Args:
        signature: numba's types of the result and of the arguments.
        stamp: version of the function and of all that it calls; what another version wrote is not read.
            The values in the function's closure are part of its key.
    """
    options = {"nopython": True, "nogil": True, "error_model": "numpy"}
    compiled = CFunc(function, (signature.args, signature.return_type), {}, options)
    try:
        compiled._cache = _OptionalCache(function, stamp)  # type: ignore[attr-defined]
    except RuntimeError:  # raised by numba if no directory is writable
        _warn_not_kept("no directory for them can be written")
    compiled.compile()
    return compiled


class _OptionalCache(FunctionCache):
    def __init__(self, function: Callable[..., Any], stamp: str) -> None:
        super().__init__(function)
        self._cache_file = _CheckedFiles(self.cache_path, self._impl.filename_base, stamp)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:
            _warn_damaged(f"{self.cache_path} ({error})")
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:
            reason = getattr(error, "strerror", None) or error
            _warn_not_kept(f"{self.cache_path} cannot be written ({reason})")


class _CheckedFiles(IndexDataCacheFile):
    """Write and read numba's index and data files with a checksum. A damaged file counts as missing."""

    @contextmanager
    def _open_for_write(self, filepath: str) -> Iterator[io.BytesIO]:
        content = io.BytesIO()
        yield content
        with super()._open_for_write(filepath) as file:
            file.write(_DIGEST(content.getvalue()).digest())
            file.write(content.getvalue())

    def _load_index(self) -> dict:
        if (content := self._read(self._index_path)) is None:
            return {}
        stream = io.BytesIO(content)
        if pickle.load(stream) != self._version:
            return {}  # this version may not be able to read the rest
        stamp, overloads = pickle.load(stream)
        return overloads if stamp == self._source_stamp else {}

    def _load_data(self, name: str) -> Any:
        content = self._read(self._data_path(name))
        return None if content is None else pickle.loads(content)

    @staticmethod
    def _read(path: str) -> bytes | None:
        try:
            file_bytes = Path(path).read_bytes()
        except FileNotFoundError:
            return None
        digest, content = file_bytes[:_DIGEST_BYTES], file_bytes[_DIGEST_BYTES:]
        if _DIGEST(content).digest() == digest:
            return content
        _warn_damaged(path)
        return None


@cache
def _warn_damaged(what: str) -> None:
    _log.warning("a compiled CPU kernel is damaged and compiled again: %s", what)


@cache
def _warn_not_kept(why: str) -> None:
    _log.warning(
        "compiled CPU kernels are not kept, and the next start compiles them again: %s; make room, or set "
        "NUMBA_CACHE_DIR to another directory",
        why,
    )
