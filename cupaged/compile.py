"""Compile the CUDA kernels ahead of time. Needs no GPU.

    python -m cupaged.compile --arch 90a --out DIR

A process with ``CUPAGED_CACHE_DIR=DIR`` loads them from there.
"""

from __future__ import annotations

import sys

from .backends.cuda.precompile import main

if __name__ == "__main__":
    sys.exit(main())
