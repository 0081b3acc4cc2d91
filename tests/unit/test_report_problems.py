"""The problems that the benchmarks time: equal for every contender, and checked."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from benchmarks import peers
from benchmarks.problems import Batch, Case, attention
from cupaged.backends import reference
from cupaged.params import AttentionParams

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "case",
    [
        Case("float32", 3, 1, 70, 4, 2, 64),
        Case("bfloat16", 2, 1, 64, 6, 2, 32, block_size=8, shared_prefix=32),
        Case("float32", 2, 5, 33, 4, 4, 64),
        Case("float32", 2, 40, 40, 4, 1, 64),
    ],
    ids=str,
)
def test_the_problems_are_the_same_dense_and_paged(case):
    """By the reference in float64 over the paged cache, in every set, and with poison around."""
    batch = Batch(case, CPU, min_bytes=2 * case.kv_bytes)
    assert batch.num_sets == 2
    for s in range(2):
        expected, _ = reference.attend(
            batch.query[s].double(),
            batch.kv_cache.double(),
            batch.block_tables[s],
            batch.seq_lens,
            batch.query_start_loc,
            AttentionParams(scale=case.head_size**-0.5),
            compute_dtype=torch.float64,
        )
        dense = peers.sdpa(batch)[s]().double()
        torch.testing.assert_close(dense, expected, atol=0.03 if case.dtype == "bfloat16" else 1e-4, rtol=0)
        assert batch.complaint(lambda s: peers.sdpa(batch)[s](), slack=4.0, floor=1e-3) is None
    shared = case.shared_prefix // case.block_size
    tables_ = batch.block_tables
    assert (tables_[:, :, :shared] == tables_[:, :1, :shared]).all()
    used = torch.cat([tables_[:, :1, :shared].flatten(), tables_[:, :, shared:].flatten()])
    assert len(used.unique()) == len(used)
    filled = ~batch.kv_cache.isnan().all(dim=-1)
    blocks = -(-case.context // case.block_size)
    unused = 2 * case.num_seqs * (blocks * case.block_size - case.context)
    assert int((~filled[:, 0, 0]).sum()) == unused


@pytest.mark.parametrize("rows", ["first", "last"])
def test_a_wrong_row_of_a_large_query_is_noticed(rows):
    """Only a sample is looked at, which has the last rows of the last sequence."""
    batch = Batch(Case("float32", 2, 100, 100, 2, 1, 32), CPU)

    def run(s):
        out = batch.paged(s).clone()
        out[-1, 0, 0] = 0.3 if rows == "last" else float("nan")
        return out

    assert batch.complaint(run)


def test_flashinfer_is_given_what_its_interface_asks_for(monkeypatch):
    """A stand-in with FlashInfer's interface that reads the pages by its own arguments."""

    class Wrapper:
        def __init__(self, workspace, kv_layout, use_tensor_cores=None):
            assert kv_layout == "HND"
            assert workspace.dtype == torch.uint8

        def run(self, query, cache):
            starts, pages, indices, last, heads, kv_heads, head_size, page_size = self.planned
            out = torch.empty_like(query)
            assert cache.shape[1:] == (2, kv_heads, page_size, head_size)
            for s in range(len(pages) - 1):
                ids = indices[pages[s] : pages[s + 1]].long()
                length = (len(ids) - 1) * page_size + int(last[s])
                key, value = (cache[ids, i].transpose(0, 1).flatten(1, 2)[:, :length] for i in range(2))
                rows = slice(int(starts[s]), int(starts[s + 1]))
                positions = torch.arange(length - (rows.stop - rows.start), length)
                group = heads // kv_heads
                for h in range(kv_heads):
                    some = slice(h * group, (h + 1) * group)
                    out[rows, some] = attention(query[rows, some], key[h], value[h], positions, torch.float32)
            return out

    class Decode(Wrapper):
        def plan(self, indptr, indices, last, *heads, q_data_type, kv_data_type):
            self.planned = (torch.arange(len(indptr)), indptr, indices, last, *heads)

    class Prefill(Wrapper):
        def plan(self, qo_indptr, indptr, indices, last, *heads, causal, q_data_type, kv_data_type):
            assert causal
            self.planned = (qo_indptr, indptr, indices, last, *heads)

    module = types.ModuleType("flashinfer")
    module.BatchDecodeWithPagedKVCacheWrapper = Decode
    module.BatchPrefillWithPagedKVCacheWrapper = Prefill
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    for case in (Case("float32", 3, 1, 70, 4, 2, 64), Case("float32", 2, 5, 33, 4, 2, 64)):
        batch = Batch(case, CPU, min_bytes=2 * case.kv_bytes)
        runs = peers.flashinfer(batch, tensor_cores=True)
        assert batch.complaint(lambda s, runs=runs: runs[s]()) is None


@pytest.mark.parametrize("context", [70, 80])
def test_flashinfers_cascade_is_given_what_its_interface_asks_for(monkeypatch, context):
    """A stand-in that reads each sequence's pages of both levels, one after the other."""

    class Cascade:
        def __init__(self, num_levels, workspace, kv_layout):
            assert (num_levels, kv_layout) == (2, "HND")

        def plan(self, starts, pages, indices, last, *heads, q_data_type, kv_data_type):
            self.planned = (starts, pages, indices, last, *heads)

        def run(self, query, cache):
            starts, pages, indices, last, heads, kv_heads, _, page_size = self.planned
            assert starts[0].tolist() == [0, len(query)]
            assert starts[1].tolist() == list(range(len(query) + 1))
            assert int(last[0][0]) == page_size
            assert pages[0].tolist() == [0, len(indices[0])]
            out = torch.empty_like(query)
            group = heads // kv_heads
            for s in range(len(query)):
                ids = torch.cat([indices[0], indices[1][pages[1][s] : pages[1][s + 1]]]).long()
                length = (len(ids) - 1) * page_size + int(last[1][s])
                key, value = (cache[ids, i].transpose(0, 1).flatten(1, 2)[:, :length] for i in range(2))
                for h in range(kv_heads):
                    some = slice(h * group, (h + 1) * group)
                    inputs = (query[s : s + 1, some], key[h], value[h])
                    out[s : s + 1, some] = attention(*inputs, torch.tensor([length - 1]), torch.float32)
            return out

    module = types.ModuleType("flashinfer")
    module.MultiLevelCascadeAttentionWrapper = Cascade
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    case = Case("float32", 3, 1, context, 4, 2, 64, shared_prefix=48)
    batch = Batch(case, CPU, min_bytes=2 * case.kv_bytes)
    runs = peers.flashinfer_cascade(batch)
    assert batch.complaint(lambda s: runs[s]()) is None
