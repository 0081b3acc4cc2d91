"""Define the kernels: the variants of a source in `cuda/`, and what each is compiled and launched with."""

from __future__ import annotations

from dataclasses import dataclass

from . import constants
from .arguments import KernelArguments

DTYPES = ("fp32", "fp16", "bf16")
CACHE_DTYPES = ("fp8_e4m3", "fp8_e5m2", "int8")  # of quantised caches, under queries of any of the above
HEAD_SIZES = (32, 64, 80, 96, 112, 120, 128, 192, 256)
# The most common of them, for which also what is rarer is compiled ahead of time: see `variants`.
COMMON_HEAD_SIZES = (64, 128, 256)
HEAD_TILES = (1, 2, 4, 8)  # query heads that one block of paged_decode handles
# What the kernels of latent attention are compiled for: keys and values of at most so many elements.
MLA_SIZES = ((192, 128), (320, 256), (576, 512))
MLA_TILE_ROWS = (16, 32, 64)  # query rows that a thread block of mla_attention_mma can handle
ARCHS = ("75", "80", "86", "89", "90a", "100", "120")

# Bytes of shared memory that one block can have. Above 48 KiB it has to be dynamic.
STATIC_SHARED_MEMORY = 48 * 1024
SHARED_MEMORY = {
    "70": 96 * 1024,
    "75": 64 * 1024,
    "80": 163 * 1024,
    "86": 99 * 1024,
    "87": 163 * 1024,
    "89": 99 * 1024,
    "90": 227 * 1024,
    "100": 227 * 1024,
    "103": 227 * 1024,
    "110": 227 * 1024,
    "120": 99 * 1024,
    "121": 99 * 1024,
}
# Shared memory of paged_prefill_wgmma besides tiles, at most: items, barriers.
PREFILL_WGMMA_OTHER_BYTES = 256


@dataclass(frozen=True)
class KernelSpec:
    """One kernel to compile: a source in `cuda/`, its ``extern "C"`` entry point and its macros.

    Also what it is launched with: the threads of a block, and its bytes of dynamic shared memory.
    """

    source: str
    entry: str
    defines: tuple[tuple[str, str], ...] = ()
    threads: int = 128
    dynamic_shared_memory: int = 0

    @property
    def macros(self) -> tuple[tuple[str, str], ...]:
        """Return all macros of the source, those that it shares with its launch included."""
        launch = {"CUPAGED_THREADS": self.threads, "CUPAGED_DYNAMIC_BYTES": self.dynamic_shared_memory}
        return (*self.defines, *((name, str(value)) for name, value in launch.items()), *constants.MACROS)

    def __str__(self) -> str:
        values = (f"{name.removeprefix('CUPAGED_').lower()}={value}" for name, value in self.defines)
        return f"{self.entry}[{', '.join(values)}]".lower().replace("cupaged_", "")


@dataclass(frozen=True)
class KernelCall:
    """A launch without its addresses, over blocks of ``spec.threads``."""

    spec: KernelSpec
    grid: tuple[int, int]
    arguments: KernelArguments  # but for its pointers


def reshape_and_cache(dtype: str, cache_dtype: str) -> KernelSpec:
    return KernelSpec("reshape_and_cache.cu", "reshape_and_cache", _defines(dtype, cache_dtype))


def copy_blocks(unit_bytes: int) -> KernelSpec:
    defines = (("CUPAGED_UNIT_BYTES", str(unit_bytes)),)
    return KernelSpec("copy_blocks.cu", "copy_blocks", defines, threads=256)


def paged_decode(dtype: str, cache_dtype: str, head_size: int, head_tile: int) -> KernelSpec:
    defines = _defines(dtype, cache_dtype, HEAD_SIZE=head_size, HEAD_TILE=head_tile)
    return KernelSpec("paged_decode.cu", "paged_decode", defines)


def has_mma(arch: str) -> bool:
    """Return whether the architecture has mma.sync for fp16 and bf16, and cp.async."""
    return int(arch.rstrip("af")) >= 80


def decode_mma_rows(head_size: int, arch: str, wide: bool) -> int:
    """Return the query rows of a tile of paged_decode_mma: 16, or more with `wide`, for shared prefixes."""
    # Rows of 512 bytes leave a block of 99 KiB no room for more.
    if not wide:
        return constants.DECODE_TILE_ROWS
    return 32 if head_size > 240 and _shared_memory(arch) < 128 * 1024 else constants.MAX_TILE_ROWS


def paged_decode_mma(
    dtype: str, cache_dtype: str, head_size: int, arch: str, wide: bool = False
) -> KernelSpec:
    """Return the kernel with three stages of keys and values if they fit, else with two."""
    rows = decode_mma_rows(head_size, arch, wide)
    phases, group_rows = (4, 32 if wide else 16) if head_size <= 128 else (2, 16)
    query_row, cache_row = _mma_rows(cache_dtype, head_size)
    for stages in (3, 2):
        shared_bytes = rows * query_row + phases * stages * 2 * 16 * cache_row
        if shared_bytes + constants.DECODE_MMA_STATIC_BYTES <= _shared_memory(arch):
            break
    spread = 16 if cache_dtype in CACHE_DTYPES else 8
    out_row = 4 * (head_size + (spread if head_size // spread % 2 == 0 else 0))
    shared_bytes = max(shared_bytes, rows * query_row + phases * group_rows * out_row)
    row_groups = rows // group_rows
    sizes = {"HEAD_SIZE": head_size, "STAGES": stages} | ({"ROW_GROUPS": row_groups} if wide else {})
    return KernelSpec(
        "paged_decode_mma.cu",
        "paged_decode_mma",
        _defines(dtype, cache_dtype, **sizes),
        32 * phases * row_groups,
        shared_bytes,
    )


def _shared_memory(arch: str) -> int:
    return SHARED_MEMORY[arch.rstrip("af")]


def _mma_rows(cache_dtype: str, head_size: int) -> tuple[int, int]:
    """Return the bytes of a query row and of a cache row in the shared memory of mma_attention.cuh."""
    chunks = 2 * -(-head_size // (32 if cache_dtype in CACHE_DTYPES else 16))  # of 16 bytes
    elements = chunks * (16 if cache_dtype in CACHE_DTYPES else 8)
    return 16 * (elements // 8 + 1), 16 * (chunks + 1)


def find_shared_splits() -> KernelSpec:
    return KernelSpec("find_shared_splits.cu", "find_shared_splits", ())


def plan_prefill() -> KernelSpec:
    return KernelSpec("plan_prefill.cu", "plan_prefill", threads=256)


def paged_prefill(dtype: str, cache_dtype: str, head_size: int) -> KernelSpec:
    defines = _defines(dtype, cache_dtype, HEAD_SIZE=head_size)
    return KernelSpec("paged_prefill.cu", "paged_prefill", defines)


def prefill_mma_rows(head_size: int) -> int:
    """Return the query rows of a thread block of paged_prefill_mma."""
    return 128 if head_size <= 128 else 64


def paged_prefill_mma(dtype: str, cache_dtype: str, head_size: int, arch: str) -> KernelSpec:
    """Return the kernel with as many keys and stages as fit."""
    query_row, cache_row = _mma_rows(cache_dtype, head_size)
    # The logits of 32 keys fit into registers everywhere but on sm_120, where ptxas spills.
    most_keys = 16 if arch.startswith("12") and head_size > 112 else 32
    for keys, stages in ((most_keys, 3), (most_keys, 2), (16, 3), (16, 2)):
        tile_bytes = keys * (2 * cache_row + 4)
        shared_bytes = (
            constants.PREFILL_TILE_BYTES + prefill_mma_rows(head_size) * query_row + stages * tile_bytes
        )
        if shared_bytes <= _shared_memory(arch):
            break
    defines = _defines(dtype, cache_dtype, HEAD_SIZE=head_size, TILE_KEYS=keys, STAGES=stages)
    return KernelSpec("paged_prefill_mma.cu", "paged_prefill_mma", defines, 128, shared_bytes)


def has_wgmma(arch: str) -> bool:
    """Return whether the architecture is Hopper, whose warpgroups multiply out of shared memory."""
    return arch == "90a"


def paged_prefill_wgmma(dtype: str, head_size: int) -> KernelSpec:
    """Return the kernel with as many keys a tile as leave registers for the output, and then stages."""
    keys = 128 if head_size <= 128 else 96 if head_size <= 192 else 80
    stages = 3 if head_size <= 128 else 2
    row_bytes = 128 * -(-head_size // 64)
    shared_bytes = (constants.PREFILL_WGMMA_ROWS + stages * 2 * keys) * row_bytes + PREFILL_WGMMA_OTHER_BYTES
    defines = _defines(dtype, HEAD_SIZE=head_size, TILE_KEYS=keys, STAGES=stages)
    return KernelSpec("paged_prefill_wgmma.cu", "paged_prefill_wgmma", defines, 384, shared_bytes)


def mla_sizes(key_size: int, value_size: int) -> tuple[int, int]:
    """Return the smallest of `MLA_SIZES` that has room for keys and values of these sizes."""
    return next(sizes for sizes in MLA_SIZES if key_size <= sizes[0] and value_size <= sizes[1])


def mla_attention(dtype: str, key_size: int, value_size: int) -> KernelSpec:
    """Return the kernel for keys and values of sizes that are among `MLA_SIZES`."""
    defines = _defines(dtype, KEY_SIZE=key_size, VALUE_SIZE=value_size, TILE_ROWS=8)
    return KernelSpec("mla_attention.cu", "mla_attention", defines)


def mla_attention_mma(dtype: str, key_size: int, value_size: int, tile_rows: int, arch: str) -> KernelSpec:
    """Return the kernel for keys and values of sizes that are among `MLA_SIZES`.

    Its tiles have ``tile_rows`` query rows, or fewer where shared memory has no room for them. Of 16 rows two
    blocks run at once where they fit. Then come keys of a tile, then stages.
    """
    rows, others = tile_rows, [(32, 3, 1), (32, 2, 1), (16, 3, 1), (16, 2, 1)]
    while True:
        for keys, stages, blocks in [(32, 2, 2), *others] if rows == 16 else others:
            shared_bytes = _mla_shared_bytes(key_size, value_size, rows, keys, stages)
            if blocks * (shared_bytes + 2 * 1024) <= _shared_memory(arch) + 1024:
                sizes = {"KEY_SIZE": key_size, "VALUE_SIZE": value_size, "TILE_ROWS": rows}
                defines = _defines(dtype, "", **sizes, TILE_KEYS=keys, STAGES=stages)
                return KernelSpec("mla_attention_mma.cu", "mla_attention_mma", defines, 256, shared_bytes)
        rows //= 2


def _mla_shared_bytes(key_size: int, value_size: int, rows: int, keys: int, stages: int) -> int:
    """Return the size of Shared in mla_attention_mma.cu."""
    slices = 8 // (rows // 16 * (keys // 16))
    tiles = max((rows + stages * keys) * (2 * key_size + 16), 4 * rows * (value_size + 8))
    weights, logits = 16 * rows * (keys // 8 + 1), 4 * slices * rows * (keys + 8)
    return -(-(tiles + weights + logits + 12 * rows) // 16) * 16


def concat_and_cache_mla(dtype: str) -> KernelSpec:
    return KernelSpec("concat_and_cache_mla.cu", "concat_and_cache_mla", _defines(dtype))


def head_tiles(cache_dtype: str) -> tuple[int, ...]:
    """Return how many query heads a thread block of paged_decode can handle.

    With 8-bit codes a lane holds twice the elements of a row, and 8 heads of them do not fit in registers.
    """
    return HEAD_TILES[:-1] if cache_dtype in CACHE_DTYPES else HEAD_TILES


def merge_splits(dtype: str) -> KernelSpec:
    return KernelSpec("merge_splits.cu", "merge_splits", _defines(dtype))


def merge_states(dtype: str) -> KernelSpec:
    return KernelSpec("merge_states.cu", "merge_states", _defines(dtype))


def rms_norm(dtype: str) -> KernelSpec:
    """Return the kernel with threads that keep a row of 16384 elements in registers."""
    return KernelSpec("rms_norm.cu", "rms_norm", _defines(dtype), 1024 if dtype == "fp32" else 512)


def act_and_mul(dtype: str) -> KernelSpec:
    return KernelSpec("act_and_mul.cu", "act_and_mul", _defines(dtype))


def rope_and_cache(dtype: str, cache_dtype: str) -> KernelSpec:
    return KernelSpec("rope_and_cache.cu", "rope_and_cache", _defines(dtype, cache_dtype))


def sample(dtype: str) -> KernelSpec:
    return KernelSpec("sample.cu", "sample", _defines(dtype), 1024)


def variants(arch: str) -> tuple[KernelSpec, ...]:
    """Return the kernels of an architecture that are compiled ahead of time: for head sizes that models have.

    Of latent attention those for the largest keys, which DeepSeek's models have.

    For the most common of these sizes also over quantised caches, under bfloat16 queries, with wide tiles, in
    float32 on GPUs with tensor cores, and in bfloat16 on those before.

    The others are compiled when they are met.
    """
    specs = [*(copy_blocks(unit_bytes) for unit_bytes in (16, 1)), plan_prefill()]
    if has_mma(arch):
        specs.append(find_shared_splits())
    for dtype in DTYPES:
        specs += [merge_splits(dtype), merge_states(dtype), rms_norm(dtype), act_and_mul(dtype)]
        specs += [sample(dtype), concat_and_cache_mla(dtype)]
        for cache_dtype in (dtype, *CACHE_DTYPES):
            specs += [reshape_and_cache(dtype, cache_dtype), rope_and_cache(dtype, cache_dtype)]
        tensor_cores = dtype != "fp32" and has_mma(arch)
        if tensor_cores:
            kernels = [mla_attention_mma(dtype, *MLA_SIZES[-1], rows, arch) for rows in MLA_TILE_ROWS]
            specs += dict.fromkeys(kernels)
        else:
            specs.append(mla_attention(dtype, *MLA_SIZES[-1]))
        usual = dtype != ("fp32" if has_mma(arch) else "bf16")
        for cache_dtype in (dtype, *CACHE_DTYPES) if dtype == "bf16" else (dtype,):
            for head_size in HEAD_SIZES if usual and cache_dtype == dtype else COMMON_HEAD_SIZES:
                if tensor_cores:
                    for wide in (False, True) if head_size in COMMON_HEAD_SIZES else (False,):
                        specs.append(paged_decode_mma(dtype, cache_dtype, head_size, arch, wide))
                    if has_wgmma(arch) and cache_dtype == dtype:
                        specs.append(paged_prefill_wgmma(dtype, head_size))
                    else:
                        specs.append(paged_prefill_mma(dtype, cache_dtype, head_size, arch))
                else:
                    tiles = head_tiles(cache_dtype)
                    specs += [paged_decode(dtype, cache_dtype, head_size, tile) for tile in tiles]
                    specs.append(paged_prefill(dtype, cache_dtype, head_size))
    return tuple(specs)


def _defines(dtype: str, cache_dtype: str = "", **values: int) -> tuple[tuple[str, str], ...]:
    named = [(f"CUPAGED_{name}", str(value)) for name, value in values.items()]
    if cache_dtype in CACHE_DTYPES:
        named.insert(0, ("CUPAGED_CACHE_DTYPE", f"CUPAGED_{cache_dtype.upper()}"))
    return (("CUPAGED_DTYPE", f"CUPAGED_{dtype.upper()}"), *named)
