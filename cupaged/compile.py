"""Compile the CUDA kernels ahead of time, with no GPU.

    python -m cupaged.compile --arch 90a --out DIR

With ``CUPAGED_CACHE_DIR=DIR`` none of them is compiled again.
"""

from __future__ import annotations

import sys

from .backends.cuda.precompile import main

if __name__ == "__main__":
    sys.exit(main())
