"""Define the numbers that kernels and their launches must agree on: macros of every kernel."""

from __future__ import annotations

# Which sequences are for a launch (Subset in work.cuh).
ALL_SEQUENCES, SINGLES, MULTI_TOKEN = range(3)

# KV splits that spread a batch evenly have at least so many tokens: in prefill each costs a partial, and a
# block without work.
SMALLEST_SPLIT_TOKENS = 128
SMALLEST_PREFILL_SPLIT_TOKENS = 512
PARTIAL_PADDING = 4  # floats of a split's partial after its output; the first is its lse
MERGE_ELEMENTS = 8  # neighbouring elements of a row that one thread merges

DECODE_TILE_ROWS = 16  # of paged_decode_mma but for wide tiles: (token, head) pairs
MAX_SHARED_TILES = 2  # of those on a split that sequences share; where they would be more, they are wide
MAX_TILE_ROWS = 64  # lists of tiles name rows below 2^32 / MAX_TILE_ROWS (pack_tile in work.cuh)

# Bytes of shared memory: all that is static in paged_decode_mma, at most; a PrefillTile (prefill_tiles.cuh).
DECODE_MMA_STATIC_BYTES = 4 * 1024
PREFILL_TILE_BYTES = 48
PREFILL_WGMMA_ROWS = 128  # of the query

MACROS = tuple((f"CUPAGED_{name}", str(value)) for name, value in sorted(vars().items()) if name.isupper())
