"""What the rule of `thinned` claims of the kernels that it takes."""

from __future__ import annotations

import pytest

from cupaged.backends.cuda import specs as kernel_specs

from .thinned import KINDS, all_kernels, counted_values, head_size, kind_of, thinned, values_of


def test_there_are_these_kinds():
    assert sorted({kind_of(spec) for spec, _ in all_kernels()}) == list(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_every_value(kind):
    reached = [kernel for kernel in all_kernels() if kind_of(kernel[0]) == kind]
    taken = [kernel for kernel in thinned() if kind_of(kernel[0]) == kind]
    assert set(taken) <= set(reached)
    # Each architecture, dtype and whatever else: all but the head sizes that no model has.
    every = frozenset().union(*(counted_values(*kernel) for kernel in reached))
    assert every <= frozenset().union(*(values_of(*kernel) for kernel in taken))
    archs = [arch for arch in kernel_specs.ARCHS if any(a == arch for _, a in reached)]
    assert [arch for arch in kernel_specs.ARCHS if ("ARCH", arch) in every] == archs
    if head_size(reached[0][0]):
        sizes = {value for name, value in every if name == "CUPAGED_HEAD_SIZE"}
        assert sizes == set(map(str, kernel_specs.HEAD_SIZES))
        caches = {value for name, value in every if name == "CUPAGED_CACHE_DTYPE"}
        assert len(caches) == (1 if kind == "paged_prefill_wgmma" else 4)


def test_each_head_size_is_there():
    assert {head_size(spec) for spec, _ in thinned()} - {""} == set(map(str, range(8, 257, 8)))


def test_nothing_is_drawn():
    assert thinned() == thinned.__wrapped__()
    assert len(set(thinned())) == len(thinned())


def test_few_are_taken():
    """A run of the tests compiles them all, at half a second each."""
    assert len(thinned()) <= 170
