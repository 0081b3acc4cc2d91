"""Define types for the fields of requests, and format values for error messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
from pydantic_core import PydanticCustomError


def sendable(text: str) -> str:
    """Return a text with escapes in place of lone surrogates, which JSON can contain and UTF-8 cannot."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shown(value: Any) -> str:
    """Return a value of a request as JSON of at most 80 characters, for an error message."""
    text = ""
    for part in json.JSONEncoder(ensure_ascii=False, default=str).iterencode(value):
        text += sendable(part[:81])
        if len(text) > 80:  # do not encode the rest of a long value
            break
    return shortened(text, 80)


def shortened(text: str, length: int = 1000) -> str:
    """Return a text cut to at most ``length`` characters."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def must_be(description: str) -> WrapValidator:
    """Return a validator that reports one error for a field of several types, not one for each type."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(f"must be {description}, got {shown(value)}") from None

    return WrapValidator(validate)


def refuse_unsupported(
    data: Mapping[str, Any], unsupported: Mapping[str, tuple[Any, ...]], instead: Mapping[str, str]
) -> None:
    """Refuse a request with a field that would change the answer and is not supported.

    Args:
        unsupported: names of such fields, with values that have no effect.
        instead: what to do instead, by name, if it is not to leave the field out.

    Raises:
        PydanticCustomError: there is one; its type is ``unsupported``.
    """
    for name, neutral in unsupported.items():
        value = data.get(name)
        # logprobs=0 is a setting although 0 == False
        same = (value == n for n in neutral if isinstance(n, bool) == isinstance(value, bool))
        if value is not None and not any(same):
            raise PydanticCustomError(
                "unsupported",
                "{name} is not supported; {instead}",
                {"name": name, "instead": instead.get(name, "leave it out")},
            )


def _without_fraction(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


# JSON has one type of number, and some clients write all numbers with a fraction: accept 2.0 as 2.
Integer = Annotated[int, BeforeValidator(_without_fraction)]

# Lists are validated up to the first wrong entry, as each error takes a kilobyte.
Strings = Annotated[list[str], Field(fail_fast=True)]
Integers = Annotated[list[Integer], Field(fail_fast=True)]
IntegerLists = Annotated[list[Integers], Field(fail_fast=True)]


class Strict(BaseModel):
    """Accept only JSON's own types: neither true nor "1" is a number. Null is the same as no field."""

    model_config = ConfigDict(strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        """Remove nulls, which some clients send for fields that are not set."""
        if isinstance(data, dict):
            return {name: value for name, value in data.items() if value is not None}
        return data


class Closed(Strict):
    """Refuse unknown members."""

    model_config = ConfigDict(extra="forbid")
