"""PagedAttention for torch: CUDA kernels over a paged KV cache, compiled at run time.

Importing this package loads neither CuPy nor numba: a backend is loaded at its first use.
"""

from pathlib import Path as _Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .backends.cuda.raw import raw_kernel
    from .fused import act_and_mul, rms_norm, rope_and_cache
    from .mla import concat_and_cache_mla, mla_attention
    from .ops import (
        copy_blocks,
        merge_attention_states,
        paged_attention,
        reshape_and_cache,
        swap_blocks,
    )
    from .sampling import sample

__version__ = "0.1.0"

# In a checkout `engine/` is beside this package, not inside it: make `cupaged.engine` importable without an
# install, and after a plain install if Python is started in the checkout's root.
_root = _Path(__file__).resolve().parent.parent
if (_root / "engine" / "__init__.py").is_file() and not (_root / "cupaged" / "engine").exists():
    __path__.append(str(_root))

__all__ = [
    "__version__",
    "act_and_mul",
    "concat_and_cache_mla",
    "copy_blocks",
    "merge_attention_states",
    "mla_attention",
    "paged_attention",
    "raw_kernel",
    "reshape_and_cache",
    "rms_norm",
    "rope_and_cache",
    "sample",
    "swap_blocks",
]


def __getattr__(name: str):  # imports torch at the first use of a function
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "raw_kernel":
        from .backends.cuda import raw as module
    else:
        from . import fused, mla, ops, sampling

        module = next(module for module in (fused, mla, sampling, ops) if hasattr(module, name))
    globals()[name] = function = getattr(module, name)  # so that later calls save these 2 us
    return function


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
