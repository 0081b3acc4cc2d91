"""A stand-in for CUDA graphs on a machine without a GPU: it records torch's operations, and repeats them.

As a graph does, it repeats them on the memory of the capture, whatever the Python objects then refer to. What
a graph would get wrong without a word is an error here: memory that is gone or has moved, or that was not
there before the capture and is no part of it; so is what CUDA refuses in a capture: a host that waits for the
device. Between replays the graph's own memory holds NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from cupaged.backends.cuda.kernels import Launch

# Operations whose result has a size that depends on data, or that read a number.
WAITING = {
    "_local_scalar_dense", "_pin_memory", "_unique2", "bincount", "equal", "is_nonzero", "item",
    "masked_select", "nonzero", "unique_consecutive", "unique_dim",
}  # fmt: skip
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class GraphError(RuntimeError):
    """A graph would be wrong, or could not be captured."""


def poison(tensor: torch.Tensor) -> None:
    """Fill all of a tensor's memory with 0xFF: NaN, or -1."""
    torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).fill_(0xFF)


class Outside:
    """Stand for a tensor that a graph uses and does not own: its memory, but no reference to it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._memory, self._address = StorageWeakRef(storage), storage.data_ptr()
        self._dtype = tensor.dtype
        self._layout = tensor.storage_offset(), tensor.size(), tensor.stride()

    def tensor(self) -> torch.Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self._memory.cdata)
        if storage is None:
            raise GraphError("a replay reads memory that has been given back since the capture")
        if storage.data_ptr() != self._address:
            raise GraphError("a replay reads memory that has moved since the capture")
        return torch.empty(0, dtype=self._dtype).set_(storage, *self._layout)


@dataclass
class Operation:
    """Hold an operation, with `Outside`s in place of tensors that the graph does not own."""

    function: Any
    args: Any
    kwargs: Any
    results: list[torch.Tensor]  # new ones, which the graph owns

    def run(self) -> None:
        args, kwargs = tree_map_only(Outside, Outside.tensor, (self.args, self.kwargs))
        found = self.function(*args, **kwargs)
        if self.results:
            for result, new in zip(self.results, tree_iter(found), strict=True):
                if result.shape != new.shape:
                    raise GraphError(f"{self.function} has a result of another shape than in the capture")
                result.copy_(new)


@dataclass
class Launches:
    """Hold what an operator of ours has launched: prepared kernels, and their tensors or `Outside`s."""

    launches: list[tuple[Launch, list[Any]]]

    def run(self) -> None:
        for launch, tensors in self.launches:
            launch(tree_map_only(Outside, Outside.tensor, tensors))


class RecordingLauncher:
    """Note what is launched, as a `Launcher` over another one.

    Attributes:
        launched: what was launched, if a list is there to hold it.
        scratch: the memory that launches got between them, likewise.
        num_prepared: number of launches that were planned.
    """

    def __init__(self, launcher: Any) -> None:
        self._launcher = launcher
        self.launched: list[tuple[Launch, Sequence[torch.Tensor | None]]] | None = None
        self.scratch: list[torch.Tensor] = []
        self.num_prepared = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._launcher, name)

    def empty(self, *arguments: Any) -> torch.Tensor:
        self.scratch.append(self._launcher.empty(*arguments))
        return self.scratch[-1]

    def prepare(self, call: Any, device: torch.device) -> Launch:
        prepared = self._launcher.prepare(call, device)
        self.num_prepared += 1

        def launch(tensors: Sequence[torch.Tensor | None]) -> None:
            if self.launched is not None:
                self.launched.append((prepared, tensors))
            prepared(tensors)

        return launch


class TapeGraphs:
    """Makes graphs.

    Args:
        declared: returns the tensors that stay where they are and may be used; None: any may.
        launcher: what our kernels are launched by, so that their launches are repeated and not the operators.

    Attributes:
        made: the graphs so far.
    """

    def __init__(
        self,
        declared: Callable[[], Iterable[torch.Tensor]] | None = None,
        launcher: RecordingLauncher | None = None,
    ) -> None:
        self.declared, self.launcher = declared, launcher
        self.made: list[TapeGraph] = []

    def __call__(self) -> TapeGraph:
        allowed = None
        if self.declared is not None:
            allowed = {tensor.untyped_storage()._cdata for tensor in self.declared()}
        self.made.append(TapeGraph(allowed, self.launcher))
        return self.made[-1]

    def warming_up(self) -> AbstractContextManager[None]:
        return nullcontext()


class TapeGraph:
    """Records operations and repeats them."""

    def __init__(self, allowed: set[int] | None, launcher: RecordingLauncher | None) -> None:
        self.replays = 0
        self.operations: list[Operation | Launches] = []
        self.launcher = launcher
        self._allowed = allowed
        self._own: dict[int, torch.Tensor] = {}  # by the address of their storage
        self._numbers: dict[int, torch.Tensor] = {}  # made by the host, which a launch takes by their value

    @contextmanager
    def capture(self) -> Iterator[None]:
        with _Recording(self):
            yield
        self.poison()

    def poison(self) -> None:
        for tensor in self._own.values():
            poison(tensor)

    def replay(self) -> None:
        self.replays += 1
        self.poison()
        for operation in self.operations:
            operation.run()

    def owns(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._own

    def record(self, function: Any, args: Any, kwargs: Any, results: list[torch.Tensor]) -> None:
        new = [] if _writes(function) else [result for result in results if not self._is_known(result, args)]
        if function == torch.ops.aten.lift_fresh.default and not args[0].dim():
            self._numbers[args[0].untyped_storage()._cdata] = args[0]
        if not new and not _writes(function):
            return  # a view
        args, kwargs = tree_map_only(torch.Tensor, self._kept, (args, kwargs))
        for result in new:
            self._own[result.untyped_storage()._cdata] = result
        if function.overloadpacket.__name__ not in EMPTY:
            self.operations.append(Operation(function, args, kwargs, new))

    def record_launches(self, launcher: RecordingLauncher) -> None:
        for tensor in launcher.scratch:
            self._own[tensor.untyped_storage()._cdata] = tensor
        launches = [
            (launch, tree_map_only(torch.Tensor, self._kept, list(tensors)))
            for launch, tensors in launcher.launched or []
        ]
        self.operations.append(Launches(launches))

    def _is_known(self, result: torch.Tensor, args: Any) -> bool:
        """Return whether a result shares memory with an argument."""
        given = (leaf for leaf in tree_iter(args) if isinstance(leaf, torch.Tensor))
        return result.untyped_storage()._cdata in {tensor.untyped_storage()._cdata for tensor in given}

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor | Outside:
        memory = tensor.untyped_storage()
        if memory._cdata in self._own or memory._cdata in self._numbers:
            return tensor
        if self._allowed is not None and memory.nbytes() and memory._cdata not in self._allowed:
            raise GraphError(
                f"a step uses a tensor {list(tensor.shape)} that was not there before the capture"
            )
        return Outside(tensor)


class _Recording(TorchDispatchMode):
    def __init__(self, graph: TapeGraph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode operations arrive that consist of others
            result = function.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        name = function.overloadpacket.__name__
        waits = name in WAITING or kwargs.get("pin_memory") or (name == "index" and _has_mask(args))
        if waits or (function == torch.ops.aten.repeat_interleave.Tensor and not kwargs.get("output_size")):
            raise GraphError(f"the host waits for the device in a capture ({name})")
        launcher = self._graph.launcher
        if launcher is not None and function.namespace == "cupaged":
            launcher.launched, launcher.scratch = [], []
            result = function(*args, **kwargs)
            self._graph.record_launches(launcher)
            launcher.launched = None
            return result
        result = function(*args, **kwargs)
        self._graph.record(
            function, args, kwargs, [leaf for leaf in tree_iter(result) if isinstance(leaf, torch.Tensor)]
        )
        return result


def _writes(function: Any) -> bool:
    return any(a.alias_info is not None and a.alias_info.is_write for a in function._schema.arguments)


def _has_mask(args: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool for leaf in tree_iter(args[1]))
