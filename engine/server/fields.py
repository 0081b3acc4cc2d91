"""Types of a request's fields, and what is said about a value that is none of theirs."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)


def sendable(text: str) -> str:
    """With an escape for half of a surrogate pair, which JSON can carry and UTF-8 cannot."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shown(value: Any) -> str:
    """A value of a request as JSON, cut short, for a message about it."""
    text = ""
    for part in json.JSONEncoder(ensure_ascii=False, default=str).iterencode(value):
        text += sendable(part[:81])
        if len(text) > 80:  # of a long value no more is written
            break
    return shortened(text, 80)


def shortened(text: str, length: int = 1000) -> str:
    """Return a text without its end if it is longer than ``length``: an error is no place for megabytes."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def must_be(description: str) -> WrapValidator:
    """One message for a field of several types, instead of one for each of them."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(f"must be {description}, got {shown(value)}") from None

    return WrapValidator(validate)


def _without_fraction(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


# JSON has one type of number, and some writers give all of them a fraction: 2.0 is the integer 2.
Integer = Annotated[int, BeforeValidator(_without_fraction)]

# Lists that are validated up to their first wrong entry: an error of each of them takes a kilobyte.
Strings = Annotated[list[str], Field(fail_fast=True)]
Integers = Annotated[list[Integer], Field(fail_fast=True)]
IntegerLists = Annotated[list[Integers], Field(fail_fast=True)]


class Strict(BaseModel):
    """JSON's own types: true is no number, and neither is "1". Null is a field left out."""

    model_config = ConfigDict(strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        """Clients that write all their fields send null for those that are not set."""
        if isinstance(data, dict):
            return {name: value for name, value in data.items() if value is not None}
        return data


class Closed(Strict):
    """Every member is used, so an unknown one is refused."""

    model_config = ConfigDict(extra="forbid")
