"""Layer groups as hypothesis draws them."""

from __future__ import annotations

from hypothesis import strategies as st

from cupaged.engine.memory.layer_groups import (
    ONE_GROUP,
    LayerGroup,
    ReadAll,
    ReadChunk,
    ReadState,
    ReadWindow,
    Rule,
)

RULES: st.SearchStrategy[Rule] = st.one_of(
    st.just(ReadAll()),
    st.builds(ReadWindow, st.sampled_from([5, 2, 9, 1])),
    st.builds(ReadChunk, st.sampled_from([4, 3, 8])),
    st.just(ReadState()),
)


def _named(drawn: list[tuple[Rule, int]]) -> tuple[LayerGroup, ...]:
    return tuple(LayerGroup(f"group {i}", rule, scale) for i, (rule, scale) in enumerate(drawn))


LAYER_GROUPS = st.one_of(
    st.just(ONE_GROUP),
    st.lists(st.tuples(RULES, st.sampled_from([1, 1, 2, 3])), min_size=1, max_size=4).map(_named),
)
