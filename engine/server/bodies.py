"""Receive the bodies of requests and parse them without blocking other requests."""

from __future__ import annotations

import asyncio
import copy
import functools
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.message import Message
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from .limits import BusyError, Limits

_Result = TypeVar("_Result")
_Model = TypeVar("_Model", bound=BaseModel)

_SMALL = 16 * 1024  # maximum size in bytes of a body that is processed at once, within milliseconds

_TOO_LARGE_TOGETHER = (
    "the bodies of all requests are too large together (max_bodies_size): send the request again later"
)


class BodyTooLargeError(Exception):
    """Report that a body has more bytes than the server accepts."""


@dataclass(eq=False)
class _Reception:
    """Hold the state of a body that is being received, or that waits to be processed."""

    task: asyncio.Task[Any]
    size: int = 0  # bytes received so far
    complete: bool = False
    dropped: bool = False


class Bodies:
    """Receive and process bodies: small ones at once, large ones one after the other in a thread.

    So large bodies only delay each other.

    Args:
        tokenizer: the engine's tokenizer; it is copied, as fast tokenizers are not thread-safe. None where
            there is no engine.

    Attributes:
        tokenizer: a copy for the server's thread.
    """

    def __init__(self, limits: Limits, tokenizer: Any) -> None:
        self._limits = limits
        self.tokenizer = copy.deepcopy(tokenizer)
        self._thread_tokenizer = copy.deepcopy(tokenizer)
        self._receptions: dict[_Reception, None] = {}  # the oldest first
        self._size = 0  # bytes of all receptions
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cupaged-bodies")

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def read(
        self, request: Request, read: Callable[[bytes, PreTrainedTokenizerBase], _Result]
    ) -> _Result:
        """Receive the body and return the result of ``read``, which gets it with a tokenizer of its thread.

        Raises:
            ValueError: the body is not sent as JSON.
            BodyTooLargeError: it is larger than ``max_body_size``; the rest of it is not received.
            BusyError: all bodies together are larger than ``max_bodies_size``.
            starlette.requests.ClientDisconnect: the client has disconnected.
        """
        if not is_json(request.headers.get("content-type", "")):
            raise ValueError("the body must be a JSON object, sent with Content-Type: application/json")
        task = asyncio.current_task()
        assert task is not None
        reception = _Reception(task)
        self._receptions[reception] = None
        try:
            body = await self._receive(request, reception)
            return await self.work(len(body), functools.partial(read, body))
        finally:
            del self._receptions[reception]
            self._size -= reception.size

    async def work(self, size: int, work: Callable[[PreTrainedTokenizerBase], _Result]) -> _Result:
        """Return the result of work on ``size`` bytes or characters, done at once if that is small."""
        return work(self.tokenizer) if size <= _SMALL else await self.in_thread(work)

    async def in_thread(self, work: Callable[[PreTrainedTokenizerBase], _Result]) -> _Result:
        """Return the result of slow work, done in the thread with its tokenizer."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, work, self._thread_tokenizer)

    def parse(self, body: bytes, model: type[_Model]) -> _Model:
        """Return a body as a request.

        Raises:
            ValueError: the body is not a JSON object, or exceeds a limit.
            pydantic.ValidationError: a field has a wrong value.
        """
        return model.model_validate(self.load(body))

    def load(self, body: bytes) -> dict[str, Any]:
        """Return a body as a JSON object, whose fields are not checked.

        Raises:
            ValueError: the body is not a JSON object, or exceeds a limit.
        """
        self._limits.check_json(body)
        try:
            data = json.loads(body)
        except json.JSONDecodeError as error:
            raise ValueError(f"the body is not JSON: {error.msg} (at character {error.pos})") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"the body is not JSON: {error}") from None
        except (RecursionError, ValueError) as error:  # ValueError: an integer of thousands of digits
            raise ValueError(f"the body cannot be read: {error}") from None
        if not isinstance(data, dict):
            raise ValueError("the body must be a JSON object, sent with Content-Type: application/json")
        self._limits.check_body(data)
        return data

    async def _receive(self, request: Request, reception: _Reception) -> bytes:
        limit = self._limits.max_body_size
        too_large = BodyTooLargeError(
            f"the body has more bytes than the {limit} that the server takes (max_body_size): send less"
        )
        if int(request.headers.get("content-length", 0)) > limit:
            raise too_large
        parts = list[bytes]()
        try:
            async for part in request.stream():
                parts.append(part)
                reception.size += len(part)
                self._size += len(part)
                if reception.size > limit:
                    raise too_large
                while self._size > self._limits.max_bodies_size:
                    self._drop_oldest(reception)
        except asyncio.CancelledError:
            if not reception.dropped:
                raise
            if sys.version_info >= (3, 11):
                reception.task.uncancel()
            raise BusyError(_TOO_LARGE_TOGETHER) from None
        reception.complete = True
        return b"".join(parts)

    def _drop_oldest(self, caller: _Reception) -> None:
        """Cancel the oldest incomplete reception.

        Raises:
            BusyError: that is the caller's.
        """
        oldest = next(each for each in self._receptions if not (each.complete or each.dropped))
        if oldest is caller:
            raise BusyError(_TOO_LARGE_TOGETHER)
        oldest.dropped = True
        self._size -= oldest.size
        oldest.size = 0
        oldest.task.cancel()


def is_json(content_type: str) -> bool:
    """Return whether a Content-Type header says that a body is JSON."""
    header = Message()
    header["content-type"] = content_type
    kind = header.get_content_type()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def json_body(path: str, *models: type[BaseModel]) -> dict[str, Any]:
    """Return the OpenAPI description of a POST request to ``path`` whose body is one of the models."""
    place = f"paths/{path.replace('/', '~1')}/post/requestBody/content/application~1json/schema"
    places = [place] if len(models) == 1 else [f"{place}/anyOf/{index}" for index in range(len(models))]
    schemas = [
        model.model_json_schema(ref_template=f"#/{place}/$defs/{{model}}")
        for model, place in zip(models, places)
    ]
    schema = schemas[0] if len(models) == 1 else {"anyOf": schemas}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
