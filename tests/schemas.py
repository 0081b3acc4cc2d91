"""Draw JSON schemas and regular expressions whose texts are short."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]

_TEXTS = ("a", "bé", 'say "hi"', "\\", "\u4e2d\n", "{")


def draw_schema(rng: random.Random, depth: int = 2) -> Schema:
    """Return a schema of objects and lists at most ``depth`` deep."""
    definitions = {f"d{i}": _draw(rng, 0, {}) for i in range(rng.randrange(3))} if depth else {}
    schema = _draw(rng, depth, definitions)
    return {**schema, "$defs": definitions} if definitions else schema


def _draw(rng: random.Random, depth: int, definitions: dict[str, Schema]) -> Schema:
    leaves = [_integer, _string, _pattern, _enum, _const, _type, _date]
    inner = [_object, _object, _list, _tuple, _any_of] if depth else []
    if definitions and rng.random() < 0.2:
        return {"$ref": f"#/$defs/{rng.choice(list(definitions))}"}
    kind = rng.choice(inner if inner and rng.random() < 0.8 else leaves)
    return kind(rng, depth, definitions)


def _integer(rng: random.Random, *_: Any) -> Schema:
    low = rng.randrange(-2000, 2000)
    return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(5000)}


def _string(rng: random.Random, *_: Any) -> Schema:
    low = rng.randrange(3)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randrange(4)}


def _pattern(rng: random.Random, *_: Any) -> Schema:
    return {"type": "string", "pattern": f"^{draw_regex(rng, 1)}$"}


def _enum(rng: random.Random, *_: Any) -> Schema:
    values = [*_TEXTS, 1, -3, True, None, [1, 2], {"a": "b"}]
    return {"enum": rng.sample(values, rng.randint(1, 4))}


def _const(rng: random.Random, *_: Any) -> Schema:
    return {"const": rng.choice([*_TEXTS, 17, False, None, {}, ["x"]])}


def _type(rng: random.Random, *_: Any) -> Schema:
    return {"type": rng.choice(["boolean", "null", ["boolean", "null"]])}


def _date(rng: random.Random, *_: Any) -> Schema:
    return {"type": "string", "format": "date"}


def _object(rng: random.Random, depth: int, definitions: dict[str, Schema]) -> Schema:
    names = rng.sample(["name", "age", "é", "a b", "$x", "items", '"'], rng.randrange(4))
    properties = {name: _draw(rng, depth - 1, definitions) for name in names}
    required = [name for name in names if rng.random() < 0.6]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _list(rng: random.Random, depth: int, definitions: dict[str, Schema]) -> Schema:
    low = rng.randrange(2)
    items = _draw(rng, depth - 1, definitions)
    return {"type": "array", "items": items, "minItems": low, "maxItems": low + rng.randrange(3)}


def _tuple(rng: random.Random, depth: int, definitions: dict[str, Schema]) -> Schema:
    items = [_draw(rng, depth - 1, definitions) for _ in range(rng.randint(1, 3))]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}


def _any_of(rng: random.Random, depth: int, definitions: dict[str, Schema]) -> Schema:
    return {"anyOf": [_draw(rng, depth - 1, definitions) for _ in range(rng.randint(1, 3))]}


def draw_regex(rng: random.Random, depth: int = 2) -> str:
    """Return a regular expression that Rust and Python read alike."""
    atom = rng.choice(["a", "[b-f]", "[0-9]", r"\.", "é", '[^a-z0-9\\x00-\\x1f"\\\\]'])
    if depth and rng.random() < 0.5:
        atom = f"({draw_regex(rng, depth - 1)}|{draw_regex(rng, depth - 1)})"
    low = rng.randrange(3)
    repeated = f"{atom}{rng.choice(['', '?', f'{{{low},{low + rng.randrange(3)}}}'])}"
    return repeated + (draw_regex(rng, depth - 1) if depth else "x")
