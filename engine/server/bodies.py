"""Bodies of requests: received up to a size, and read without keeping the others waiting."""

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
from transformers import PreTrainedTokenizerBase

from .limits import BusyError, Limits
from .protocol import ChatCompletionRequest, CompletionRequest

_Result = TypeVar("_Result")
_Model = TypeVar("_Model", ChatCompletionRequest, CompletionRequest)

_SMALL = 16 * 1024  # bytes that take a few milliseconds to read, whatever is in them

_TOO_LARGE_TOGETHER = (
    "the bodies of all requests are too large together (max_bodies_size): send the request again later"
)


class BodyTooLargeError(Exception):
    """A body has more bytes than the server takes."""


@dataclass(eq=False)
class _Reception:
    """A body that is received, or received and not read yet."""

    task: asyncio.Task[Any]
    size: int = 0  # bytes so far
    complete: bool = False
    dropped: bool = False


class Bodies:
    """Receives bodies and has them read: small ones at once, larger ones in a thread, one after the other.

    So what is large waits for what is large, and for nothing else; and for as long as a text is tokenized
    others go on.

    Args:
        tokenizer: the engine's; it is copied, as fast tokenizers are not for two threads at once.
    """

    def __init__(self, limits: Limits, tokenizer: PreTrainedTokenizerBase) -> None:
        self._limits = limits
        self.tokenizer = copy.deepcopy(tokenizer)  # of the thread of the server
        self._tokenizer_of_large = copy.deepcopy(tokenizer)
        self._receptions: dict[_Reception, None] = {}  # the oldest first
        self._size = 0  # bytes of all of them
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cupaged-bodies")

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def read(
        self, request: Request, read: Callable[[bytes, PreTrainedTokenizerBase], _Result]
    ) -> _Result:
        """Return what ``read`` makes of the body, with a tokenizer for it alone.

        Raises:
            BodyTooLargeError: it is larger than ``max_body_size``; the rest of it is not received.
            BusyError: all bodies together are larger than ``max_bodies_size``.
            starlette.requests.ClientDisconnect: the client has gone.
        """
        if not _is_json(request.headers.get("content-type", "")):
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
        """Return the result of work on so many bytes, or characters: at once, or of many in the thread."""
        return work(self.tokenizer) if size <= _SMALL else await self.in_thread(work)

    async def in_thread(self, work: Callable[[PreTrainedTokenizerBase], _Result]) -> _Result:
        """Return the result of what takes long, with a tokenizer for it alone."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, work, self._tokenizer_of_large)

    def parse(self, body: bytes, model: type[_Model]) -> _Model:
        """Return the request that a body is.

        Raises:
            ValueError: it is not JSON, or beyond a limit.
            pydantic.ValidationError: a field of it is wrong.
        """
        self._limits.check_json(body)
        try:
            found = json.loads(body)
        except json.JSONDecodeError as error:
            raise ValueError(f"the body is not JSON: {error.msg} (at character {error.pos})") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"the body is not JSON: {error}") from None
        except (RecursionError, ValueError) as error:  # or an integer of thousands of digits
            raise ValueError(f"the body cannot be read: {error}") from None
        if not isinstance(found, dict):
            raise ValueError("the body must be a JSON object, sent with Content-Type: application/json")
        self._limits.check_body(found)
        return model.model_validate(found)

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
        """End the reception that is the slowest; raises BusyError where that is the caller's."""
        oldest = next(each for each in self._receptions if not (each.complete or each.dropped))
        if oldest is caller:
            raise BusyError(_TOO_LARGE_TOGETHER)
        oldest.dropped = True
        self._size -= oldest.size
        oldest.size = 0
        oldest.task.cancel()


def _is_json(content_type: str) -> bool:
    header = Message()
    header["content-type"] = content_type
    kind = header.get_content_type()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def json_body(path: str, model: type[_Model]) -> dict[str, Any]:
    """Return what OpenAPI says of a POST to ``path`` whose body is this model."""
    place = f"paths/{path.replace('/', '~1')}/post/requestBody/content/application~1json/schema"
    schema = model.model_json_schema(ref_template=f"#/{place}/$defs/{{model}}")
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
