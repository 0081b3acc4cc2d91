"""Read literals and calls that are written in Python, without running them."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Sequence
from typing import Any

_CONSTANTS = {"true": True, "false": False, "null": None}  # as JSON has them


def literal(text: str) -> Any:
    """Return the value of a literal.

    Raises:
        ValueError: it is none.
    """
    return _value(_expression(text))


def call_arguments(text: str, names: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of a call by name, from their text in parentheses.

    Args:
        names: names of the parameters, for arguments without one.

    Raises:
        ValueError: they are not literals, or not the arguments of a call.
    """
    call = _expression("f" + text)
    if not isinstance(call, ast.Call) or len(call.args) > len(names):
        raise ValueError("this is not a call, or has too many arguments")
    arguments = {name: _value(node) for name, node in zip(names, call.args)}
    for keyword in call.keywords:
        if keyword.arg is None or keyword.arg in arguments:
            raise ValueError("an argument has no name, or that of another one")
        arguments[keyword.arg] = _value(keyword.value)
    return arguments


def _expression(text: str) -> ast.expr:
    try:
        with warnings.catch_warnings():  # of escapes that are none
            warnings.simplefilter("ignore")
            return ast.parse(text, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(str(error)) from None


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, (str, int, float, type(None))):
        return node.value
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _value(node.operand)
        if isinstance(value, (int, float)):
            return -value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(element) for element in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_value(key) if key is not None else None for key in node.keys]
        if all(isinstance(key, str) for key in keys):
            return dict(zip(keys, map(_value, node.values)))
    raise ValueError("this is not a literal that JSON has")
