"""Record how a model calls its modules, and call modules with some of their children replaced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface


class NotRecognised(Exception):
    """Say why a module is left as it is."""


@dataclass(frozen=True, eq=False)
class Call:
    """Hold one call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def hidden(self) -> torch.Tensor | None:
        """Return the hidden states that a layer or a part of it was called with, if they are clear."""
        named = self.kwargs.get("hidden_states")
        value = self.args[0] if self.args and named is None else named
        return value if isinstance(value, torch.Tensor) and value.is_floating_point() else None

    def with_hidden(self, hidden: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with other hidden states."""
        if "hidden_states" in self.kwargs:
            return self.args, {**self.kwargs, "hidden_states": hidden}
        return (hidden, *self.args[1:]), self.kwargs


Calls = dict[torch.nn.Module, list[Call]]


@contextmanager
def recorded(model: torch.nn.Module, calls: Calls) -> Iterator[None]:
    """Record the calls of all modules below ``model``."""

    def record(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.setdefault(module, []).append(Call(args, kwargs, output))

    handles = [
        module.register_forward_hook(record, with_kwargs=True)
        for module in model.modules()
        if module is not model
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def untouchable(model: torch.nn.Module) -> dict[torch.nn.Module, str]:
    """Return the modules that must stay as they are, with the reason.

    These have hooks or a forward of their own (as with tensor parallelism), or stand in several places.
    """
    places = Counter(
        child for module in model.modules() for child in module._modules.values() if child is not None
    )
    reasons = {module: "it is used in several places" for module, count in places.items() if count > 1}
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            reasons[module] = "it has hooks"
        elif "forward" in vars(module):
            reasons[module] = "its forward was replaced"
    return reasons


@dataclass
class Stub:
    """Stand in for a child module in one call of its parent.

    Args:
        original: the child, whose attributes the parent may read.
        result: return the result for the hidden states that it is called with.
    """

    original: torch.nn.Module
    result: Callable[[torch.Tensor], Any]
    calls: list[Call] = field(default_factory=list)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = Call(args, kwargs, None)
        if call.hidden is None:
            raise NotRecognised("a part of it is called without hidden states")
        output = self.result(call.hidden)
        self.calls.append(Call(args, kwargs, output))
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    @property
    def call(self) -> Call:
        """Return the only call.

        Raises:
            NotRecognised: there was none, or several.
        """
        if len(self.calls) != 1:
            raise NotRecognised(f"{type(self.original).__name__} is called {len(self.calls)} times in it")
        return self.calls[0]


def call_with_stubs(
    module: torch.nn.Module, stubs: dict[str, Stub], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call a module's own forward with stubs in place of children.

    Raises:
        NotRecognised: its code fails with them.
    """
    children = dict(module._modules)
    module._modules.update(stubs)  # type: ignore[arg-type]
    try:
        return module.forward(*args, **kwargs)
    except NotRecognised:
        raise
    except (AttributeError, TypeError, LookupError, RuntimeError, ValueError) as error:
        raise NotRecognised(f"its code fails with a stand-in: {type(error).__name__}") from error
    finally:
        module._modules.update(children)


@contextmanager
def attention_function(model: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Let a transformers model call ``function`` for its attention. transformers keeps the function."""
    AttentionInterface.register(name, function)
    original = model.config.get_text_config(decoder=True)._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(original)
