"""List the operations that a model's layers run in a decode step: on a GPU each is a kernel launch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .proof import Proof

# Operators that compute nothing, though their schema does not say so.
_WITHOUT_LAUNCH = {"_unsafe_view", "detach", "empty", "empty_like", "empty_strided", "new_empty"}
_MERGE = "paged_attention (merge of KV splits)"


def layer_operations(model: Any, proof: Proof) -> list[list[str]]:
    """Return the names of the operations that each decoder layer runs in a decode step.

    Views and allocations are left out. Attention stands there twice: its KV splits are merged.
    """
    parents = {child: module for module in model.modules() for child in module.children()}
    layers = dict.fromkeys(parents[module] for module in proof.attending)
    operations: list[list[str]] = []
    proof.logits(decode_watch=_listing(list(layers), operations))
    return operations


class _Listing(TorchDispatchMode):
    """Add the names of operations to a list, if there is one at the time."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] | None = None

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.names is not None and not _is_free(function):
            name = function._schema.name.partition("::")[2]
            self.names.append(name)
            if name == "paged_attention":
                self.names.append(_MERGE)
        return function(*args, **(kwargs or {}))


def _is_free(function: Any) -> bool:
    """Return whether an operator is a view or an allocation."""
    schema = function._schema
    if schema.name.partition("::")[2] in _WITHOUT_LAUNCH:
        return True
    aliases = [result.alias_info for result in schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


@contextmanager
def _listing(layers: list[torch.nn.Module], operations: list[list[str]]) -> Iterator[None]:
    listing = _Listing()

    def begin(*_: Any) -> None:
        listing.names = []

    def end(*_: Any) -> None:
        operations.append(listing.names or [])
        listing.names = None

    handles = [layer.register_forward_pre_hook(begin) for layer in layers]
    handles += [layer.register_forward_hook(end) for layer in layers]
    try:
        with listing:
            yield
    finally:
        for handle in handles:
            handle.remove()
