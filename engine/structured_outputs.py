"""Define and check what the text of an output has to be."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_KINDS = ("json", "json_object", "regex", "choice", "grammar")
_FOR_JSON = ("disable_any_whitespace", "whitespace_pattern")


@dataclass(frozen=True)
class StructuredOutputsParams:
    """Hold what the outputs of a request have to be, under vLLM's names.

    Exactly one of the first five fields is given. Outputs are complete by the grammar unless ``max_tokens``
    or a stop string cuts them.

    Args:
        json: JSON schema, as a dictionary or as text; it is kept as text. The properties of an object come in
            the order of the schema.
        json_object: True: any JSON object.
        regex: regular expression that the whole text matches, in the syntax of Rust's ``regex``: without
            lookaround and back-references.
        choice: the possible texts.
        grammar: context-free grammar in Lark's syntax as llguidance takes it, whose rule ``start`` is the
            text; or in GBNF, whose first rule is ``root``.
        disable_any_whitespace: no whitespace between the tokens of JSON.
        whitespace_pattern: regular expression for whitespace between the tokens of JSON.

    Raises:
        ValueError: a field has a wrong value, or there is none or several of the first five. Whether schemas,
            expressions and grammars can be compiled is only known to an engine.
    """

    json: str | Mapping[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Iterable[str] | None = None
    grammar: str | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        if self.json_object is False:
            object.__setattr__(self, "json_object", None)
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs must have exactly one of {', '.join(_KINDS)}, got "
                f"{' and '.join(given) or 'none'}"
            )
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        for name in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(
                    f"structured_outputs: {name} must be a string that is not empty, got {value!r}"
                )
        for name in ("json_object", "disable_any_whitespace"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise ValueError(f"structured_outputs: {name} must be True or False, got {value!r}")
        for name in _FOR_JSON:
            if getattr(self, name) and self.kind not in ("json", "json_object"):
                raise ValueError(
                    f"structured_outputs: {name} is for json and json_object, got it with {self.kind}: leave "
                    "it out"
                )
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise ValueError(
                "structured_outputs: whitespace_pattern does not go with disable_any_whitespace: leave it out"
            )

    @property
    def kind(self) -> str:
        """Return the name of the field that is given: json, json_object, regex, choice or grammar."""
        return next(name for name in _KINDS if getattr(self, name) is not None)

    @property
    def size(self) -> int:
        """Return the number of characters of the schema, expression, choices or grammar."""
        value = getattr(self, self.kind)
        if isinstance(value, bool):
            return 0
        return len(value) if isinstance(value, str) else sum(map(len, value))


def _schema_text(schema: Any) -> str:
    try:
        if isinstance(schema, str):
            parsed = json.loads(schema)
        elif isinstance(schema, Mapping):
            schema = json.dumps(parsed := dict(schema), ensure_ascii=False, allow_nan=False)
        else:
            parsed = None
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"structured_outputs: json is not a JSON schema: {error}") from None
    if not isinstance(parsed, (dict, bool)):
        raise ValueError(
            "structured_outputs: json must be a JSON schema, a dictionary or the text of one, got "
            f"{schema!r:.80}"
        )
    return schema


def _choices(choices: Any) -> tuple[str, ...]:
    texts = () if isinstance(choices, (str, Mapping)) or not isinstance(choices, Iterable) else tuple(choices)
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(
            f"structured_outputs: choice must be one or more strings, none of them empty, got {choices!r:.80}"
        )
    return texts
