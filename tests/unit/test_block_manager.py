"""The block manager against a simple model of it, in drawn orders of calls."""

from __future__ import annotations

import hypothesis
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cupaged.engine.memory.block_manager import BlockManager
from cupaged.engine.memory.block_tables import NO_BLOCK
from cupaged.engine.memory.layer_groups import LayerGroup, ReadAll, ReadState, ReadWindow
from cupaged.engine.memory.prefix_hash import extend_keys, root_key
from tests.unit.drawn_layer_groups import LAYER_GROUPS
from tests.unit.paged_memory import PagedMemory


class Machine(RuleBasedStateMachine):
    """The model is a list of tokens a sequence; a family forks, swaps and appends as one, and shares full
    blocks with others that have the same tokens."""

    families = Bundle("families")

    @initialize(
        num_gpu=st.integers(1, 20),
        num_cpu=st.integers(0, 20),
        block_size=st.sampled_from([1, 2, 3, 4]),
        layer_groups=LAYER_GROUPS,
    )
    def start(self, num_gpu, num_cpu, block_size, layer_groups):
        self.blocks = BlockManager(num_gpu, num_cpu, block_size, layer_groups=layer_groups)
        self.memory = PagedMemory(self.blocks)
        self.tokens: dict[int, list[int]] = {}
        self.members: dict[int, list[int]] = {}  # family -> sequences, the first of them names it
        self.swapped: set[int] = set()
        self.next_id = 0
        self.next_token = 0

    def new_tokens(self, count: int) -> list[int]:
        self.next_token += count
        return list(range(self.next_token - count, self.next_token))

    def keys(self, tokens: list[int]) -> list[bytes]:
        keys: list[bytes] = []
        extend_keys(keys, root_key(None), tokens, len(tokens), self.blocks.block_size)
        return keys

    def append_to(self, seq_ids: list[int], counts: list[int]) -> None:
        """All or nothing, as a group: first the question, then the appends; the answer must be exact."""
        asked = [(s, len(self.tokens[s]), self.at_once(s, n)) for s, n in zip(seq_ids, counts)]
        free = self.blocks.gpu.num_free
        needed = self.blocks.num_new_blocks(asked)
        if needed > free:
            return
        for seq_id, _, count in asked:
            self.tokens[seq_id] += self.new_tokens(count)
        copies = [self.blocks.append(*append, self.keys(self.tokens[append[0]])) for append in asked]
        assert free - self.blocks.gpu.num_free == needed
        self.memory.move(copies=[pair for pairs in copies for pair in pairs])
        for seq_id, held, _ in asked:
            self.memory.check_states(seq_id, held, self.tokens[seq_id])
        for seq_id, held, _ in asked:
            self.memory.write(seq_id, held, self.tokens[seq_id])
        self.blocks.confirm()
        for seq_id, _, _ in asked:
            for index, size in enumerate(self.blocks.block_sizes):
                assert len(self.blocks.table(seq_id, index)) == -(-len(self.tokens[seq_id]) // size)

    def at_once(self, seq_id: int, count: int) -> int:
        """Return how many tokens an append may have."""
        return min(count, self.blocks.longest_append(len(self.tokens[seq_id])))

    @rule(target=families, count=st.integers(1, 14))
    def create(self, count):
        seq_id = self.next_id
        self.tokens[seq_id] = []
        self.append_to([seq_id], [count])
        if not self.tokens[seq_id]:
            del self.tokens[seq_id]
            assert not self.blocks.holds(seq_id)
            return multiple()
        self.next_id += 1
        self.members[seq_id] = [seq_id]
        return seq_id

    @rule(target=families, family=families, data=st.data())
    def create_alike(self, family, data):
        """A new one that begins like another, or like one that was: what is found is taken, and no more."""
        tokens = self.tokens[data.draw(st.sampled_from(self.members[family]))]
        tokens = tokens[: data.draw(st.integers(1, len(tokens)))]
        keys = self.keys(tokens)
        found, unused, num_tokens = self.blocks.find_prefix(keys)
        free = self.blocks.gpu.num_free
        assert num_tokens == self.longest_found(keys)
        if not num_tokens:
            return multiple()
        seq_id, self.next_id = self.next_id, self.next_id + 1
        self.blocks.take_prefix(seq_id, keys, found)
        assert free - self.blocks.gpu.num_free == sum(unused)
        self.tokens[seq_id] = tokens[:num_tokens]
        self.members[seq_id] = [seq_id]
        return seq_id

    def longest_found(self, keys: list[bytes]) -> int:
        """Try all lengths, the longest first."""
        for num_tokens in range(len(keys) * self.blocks.block_size, 0, -1):
            if all(num_tokens % size == 0 for size in self.blocks.block_sizes) and all(
                self.blocks.gpu.find(keys[(i + 1) * tables.size // self.blocks.block_size - 1] + suffix)
                is not None
                for tables, suffix in zip(self.blocks.layers, (b"", b"\1", b"\2", b"\3"))
                for i in range(num_tokens // tables.size)
                if (i + 1) * tables.size > tables.rule.first_read(num_tokens)
            ):
                return num_tokens
        return 0

    @rule(family=families)
    def free_what_nobody_reads(self, family):
        """Leave exactly the blocks from the first to the last that the next token reads."""
        for seq_id in () if family in self.swapped else self.members[family]:
            tokens = self.tokens[seq_id]
            self.blocks.free_unread(seq_id, len(tokens), self.keys(tokens))
            for index, tables in enumerate(self.blocks.layers):
                first = max(0, tables.rule.first_read(len(tokens))) // tables.size
                held = -(-len(tokens) // tables.size) - first
                assert self.blocks.num_distinct([seq_id], index) == held

    @rule(family=families, data=st.data(), more=st.integers(1, 6))
    def an_append_that_never_runs(self, family, data, more):
        """Its content is found by nobody, then or later, and is written when it is planned again."""
        if family in self.swapped:
            return
        seq_id = data.draw(st.sampled_from(self.members[family]))
        more = self.at_once(seq_id, more)
        held, tokens = len(self.tokens[seq_id]), self.tokens[seq_id] + self.new_tokens(more)
        if self.blocks.num_new_blocks([(seq_id, held, more)]) > self.blocks.gpu.num_free:
            return
        self.memory.move(copies=self.blocks.append(seq_id, held, more, self.keys(tokens)))
        self.blocks.revoke()
        self.append_to([seq_id], [more])

    @rule(family=families, data=st.data())
    def append(self, family, data):
        if family in self.swapped:
            return
        counts = [data.draw(st.integers(1, 6)) for _ in self.members[family]]
        chosen = data.draw(st.integers(1, len(counts)))
        self.append_to(self.members[family][-chosen:], counts[:chosen])

    @rule(family=families, data=st.data())
    def fork(self, family, data):
        if family in self.swapped:
            return
        parent = data.draw(st.sampled_from(self.members[family]))
        count = len(self.tokens[parent])  # what is before may not be there any more
        if not self.blocks.frees_unread:
            count = data.draw(st.integers(1, count))
        child, self.next_id = self.next_id, self.next_id + 1
        free = self.blocks.gpu.num_free
        self.blocks.fork(parent, child, count)
        assert self.blocks.gpu.num_free == free, "sharing takes no block"
        self.tokens[child] = self.tokens[parent][:count]
        self.members[family].append(child)

    @rule(family=families)
    def swap_out(self, family):
        seq_ids = self.members[family]
        if family in self.swapped or not self.blocks.can_swap_out(seq_ids):
            return
        indices = range(len(self.blocks.layers))
        distinct = {block for s in seq_ids for i in indices for block in self.blocks.table(s, i)} - {NO_BLOCK}
        assert self.blocks.num_distinct(seq_ids) == len(distinct)
        pairs = self.blocks.swap_out(seq_ids)
        sources = [gpu for gpu, _ in pairs]
        assert set(sources) <= distinct
        assert len(set(sources)) == len(sources), "what is shared is copied once"
        self.memory.move(swap_out=pairs)
        self.blocks.confirm()
        self.swapped.add(family)

    @precondition(lambda self: getattr(self, "swapped", None))
    @rule(data=st.data())
    def swap_in(self, data):
        """And the question of what appending will then take, asked before."""
        family = data.draw(st.sampled_from(sorted(self.swapped)))
        seq_ids = self.members[family]
        count = data.draw(st.integers(1, 6))
        count = min(self.at_once(seq_id, count) for seq_id in seq_ids)
        asked = [(s, len(self.tokens[s]), count) for s in seq_ids]
        moved, more = self.blocks.num_swapped_blocks(seq_ids), self.blocks.num_new_blocks(asked)
        free = self.blocks.gpu.num_free
        if moved > free:
            return
        self.memory.move(swap_in=self.blocks.swap_in(seq_ids))
        self.blocks.confirm()
        self.swapped.remove(family)
        assert free - self.blocks.gpu.num_free == moved
        assert self.blocks.num_new_blocks(asked) <= more
        for seq_id in seq_ids:
            self.check_writable(seq_id)
        self.append_to(seq_ids, [count] * len(seq_ids))

    @rule(family=families, data=st.data())
    def free_one(self, family, data):
        members = self.members[family]
        if len(members) > 1:
            seq_id = members.pop(data.draw(st.integers(0, len(members) - 1)))
            self.blocks.free(seq_id)
            del self.tokens[seq_id]

    @rule(family=consumes(families))
    def free_all(self, family):
        for seq_id in self.members.pop(family):
            tokens = self.tokens[seq_id]
            self.blocks.free(seq_id, len(tokens), self.keys(tokens))
            self.blocks.free(seq_id)  # a sequence without blocks is no error
            del self.tokens[seq_id]
            assert not self.blocks.holds(seq_id)
        self.swapped.discard(family)

    @invariant()
    def every_sequence_reads_its_tokens(self):
        if not hasattr(self, "blocks"):
            return
        self.blocks.check_integrity()
        self.memory.poison_empty()
        self.memory.check_found()
        for family, seq_ids in self.members.items():
            for seq_id in seq_ids:
                assert self.blocks.holds(seq_id)
                if family not in self.swapped:
                    self.memory.check(seq_id, self.tokens[seq_id], len(self.tokens[seq_id]))
                    self.check_writable(seq_id)

    def check_writable(self, seq_id: int) -> None:
        """What it may write without asking is its own, and nobody finds it."""
        for index, size in enumerate(self.blocks.block_sizes):
            blocks = self.blocks.table(seq_id, index)
            assert self.blocks.writable[seq_id] <= len(blocks) * size
            for position in range(len(self.tokens[seq_id]), self.blocks.writable[seq_id]):
                block = blocks[position // size]
                assert self.blocks.gpu.ref_counts[block] == 1
                assert self.blocks.gpu._keys[block] is None

    def teardown(self):
        for seq_ids in getattr(self, "members", {}).values():
            for seq_id in seq_ids:
                self.blocks.free(seq_id)
        if hasattr(self, "blocks"):
            self.blocks.check_integrity()
            assert self.blocks.gpu.num_free == self.blocks.gpu.num_blocks
            assert self.blocks.cpu.num_free == self.blocks.cpu.num_blocks


def test_any_sequence_of_calls_keeps_the_blocks(seed):
    limits = settings(max_examples=150, stateful_step_count=40)
    run_state_machine_as_test(hypothesis.seed(seed)(Machine), settings=limits)


def test_the_last_writer_of_a_shared_block_keeps_it():
    """Four sequences over a prompt of a block and a half: three copies, and none of the full block."""
    blocks = BlockManager(8, 0, 4)
    blocks.append(0, 0, 6)
    full, partial = blocks.table(0)
    for child in (1, 2, 3):
        blocks.fork(0, child, 6)
    assert blocks.gpu.num_free == 6
    assert blocks.num_new_blocks([(seq, 6, 1) for seq in range(4)]) == 3
    copies = [blocks.append(seq, 6, 1) for seq in range(4)]
    assert [[source for source, _ in pairs] for pairs in copies] == [[partial], [partial], [partial], []]
    assert {blocks.table(seq)[0] for seq in range(4)} == {full}
    assert len({blocks.table(seq)[1] for seq in range(4)}) == 4
    assert blocks.gpu.ref_counts[full] == 4
    assert blocks.gpu.num_free == 3


def test_a_full_last_block_is_not_copied():
    blocks = BlockManager(4, 0, 4)
    blocks.append(0, 0, 4)
    blocks.fork(0, 1, 4)
    assert blocks.num_new_blocks([(0, 4, 1), (1, 4, 1)]) == 2
    assert [blocks.append(seq, 4, 1) for seq in (0, 1)] == [[], []]
    assert blocks.gpu.num_free == 1


def test_what_is_shared_is_still_copied_on_write_after_a_swap():
    blocks = BlockManager(4, 4, 4)
    blocks.append(0, 0, 6)
    blocks.fork(0, 1, 6)
    assert len(blocks.swap_out([0, 1])) == len(blocks.swap_in([0, 1])) == 2
    assert blocks.writable == {0: 0, 1: 0}, "both have to ask"
    assert blocks.append(0, 6, 1)
    assert not blocks.append(1, 6, 1)


def test_what_was_filled_without_asking_is_found_when_it_is_freed():
    """A decode writes to the end of its last block by itself; only `free` hears that it is full."""
    blocks = BlockManager(4, 0, 4)
    keys = [b"first", b"second"]
    blocks.append(0, 0, 5, keys[:1])
    blocks.confirm()
    second = blocks.table(0)[1]
    blocks.free(0, 8, keys)
    assert blocks.find_prefix(keys).tables[0][1:] == [second]
    blocks.check_integrity()


def test_what_is_written_again_is_found_under_its_new_key():
    blocks = BlockManager(4, 0, 4)
    blocks.append(0, 0, 8, [b"first", b"second"])
    first, second = blocks.table(0)
    blocks.append(0, 4, 4, [b"first", b"other"])
    blocks.confirm()
    assert blocks.find_prefix([b"first", b"second"]) == ([[first]], [0], 4)
    assert blocks.find_prefix([b"first", b"other"]) == ([[first, second]], [0], 8)


def test_a_pinned_prefix_is_found_when_the_other_copy_is_gone():
    """Two compute the same at the same time: one of the copies is found, and lost."""
    blocks = BlockManager(2, 0, 4)
    for seq in (0, 1):
        blocks.append(seq, 0, 4, [b"key"])
    blocks.confirm()
    blocks.free(0)
    blocks.append(2, 0, 4)  # where the first copy was
    assert blocks.find_prefix([b"key"]).num_tokens == 0
    blocks.unify(1)
    assert blocks.find_prefix([b"key"]).tables == [blocks.table(1)]
    blocks.check_integrity()


def test_check_integrity_sees_a_sequence_in_two_places():
    blocks = BlockManager(2, 2, 4)
    blocks.append(0, 0, 4)
    blocks.swap_out([0])
    blocks.append(0, 0, 4)
    with pytest.raises(RuntimeError, match="swapped out"):
        blocks.check_integrity()


def damage_the_array(blocks):
    blocks.layers[0].on_gpu._array += 1


def lose_a_block_of_the_swap_space(blocks):
    blocks.cpu.allocate()


def forget_what_may_be_written(blocks):
    del blocks.writable[0]


def write_too_far(blocks):
    blocks.writable[0] += 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_the_array, "row of sequence 0 is not its block table"),
        (lose_a_block_of_the_swap_space, "counts 1 references, 0 exist"),
        (forget_what_may_be_written, "may write and those with GPU blocks differ"),
        (write_too_far, "sequence 0 may write beyond its blocks"),
    ],
)
def test_check_integrity_sees_damage(damage, message):
    blocks = BlockManager(4, 2, 4)
    blocks.append(0, 0, 8)
    blocks.check_integrity()
    damage(blocks)
    with pytest.raises(RuntimeError, match=message):
        blocks.check_integrity()


def test_the_swap_space_may_be_filled_to_the_last_block():
    blocks = BlockManager(3, 2, 4)
    blocks.append(0, 0, 8)
    blocks.append(1, 0, 4)
    assert blocks.can_swap_out([0])
    assert not blocks.can_swap_out([0, 1])


def test_a_failed_step_leaves_what_was_there_before_it():
    """On the GPU, and in the swap space."""
    blocks = BlockManager(4, 4, 4)
    for seq, key in enumerate((b"stays", b"leaves")):
        blocks.append(seq, 0, 4, [key])
    blocks.swap_out([1])
    blocks.confirm()
    blocks.revoke()
    assert blocks.find_prefix([b"stays"]).tables == [blocks.table(0)]
    assert blocks.cpu.find(b"leaves") is not None


def test_layer_groups_in_plain_values():
    """20 tokens: a group that reads all keeps five blocks of 4, a window of 6 tokens the last two of them, a
    group of fewer bytes a token two blocks of 12, and a state is one block of 8 tokens."""
    groups = [
        LayerGroup("all", ReadAll()),
        LayerGroup("window", ReadWindow(6)),
        LayerGroup("small", ReadAll(), scale=3),
        LayerGroup("state", ReadState(), scale=2),
    ]
    blocks = BlockManager(32, 0, 4, layer_groups=groups)
    assert blocks.block_sizes == (4, 4, 12, 8)
    keys = [bytes([i]) * 32 for i in range(6)]
    for held in (0, 8, 16):
        blocks.free_unread(0, held, keys) if held else None
        blocks.append(0, held, min(8, 20 - held), keys)
        blocks.confirm()
    blocks.free_unread(0, 20, keys)
    assert [blocks.num_distinct([0], group) for group in range(4)] == [5, 2, 2, 1]
    assert blocks.num_distinct([0]) == 10
    # The next token reads the tokens from position 15 on, and the state after position 19.
    freed = [list(blocks.table(0, group)).count(NO_BLOCK) for group in range(4)]
    assert freed == [0, 3, 0, 2]
    assert blocks.append(0, 20, 4, keys) == []
    blocks.confirm()
    blocks.free(0, 24, keys)
    assert blocks.gpu.num_free == 32
    # A prefix has to end where blocks of all groups do: after 24 tokens.
    found = blocks.find_prefix(keys)
    assert found.num_tokens == 24
    assert [len(table) - table.count(NO_BLOCK) for table in found.tables] == [6, 2, 2, 1]
    assert blocks.find_prefix(keys[:5]).num_tokens == 0
    # The last token cannot be computed from the state after it.
    assert blocks.find_prefix(keys, num_tokens=24).num_tokens == 0
    assert blocks.find_prefix(keys, num_tokens=25).num_tokens == 24


def test_a_window_needs_its_last_blocks_only():
    """The first block of two is lost: a window of 4 tokens reads the second only, what reads all both."""
    for reads, num_tokens in ((ReadWindow(4), 8), (ReadAll(), 0)):
        blocks = BlockManager(2, 0, 4, layer_groups=[LayerGroup("layers", reads)])
        blocks.append(0, 0, 8, [b"first", b"second"])
        blocks.confirm()
        blocks.gpu.forget(blocks.table(0)[0])
        assert blocks.find_prefix([b"first", b"second"]).num_tokens == num_tokens


def test_a_step_ends_where_states_are_kept():
    blocks = BlockManager(4, 0, 4, layer_groups=[LayerGroup("state", ReadState())])
    assert blocks.longest_append(6) == 2
    with pytest.raises(RuntimeError, match="past the end"):
        blocks.append(0, 0, 5)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "at least one"),
        ([LayerGroup("a"), LayerGroup("a")], "each with its own"),
        ([LayerGroup("a", scale=0)], "'a' has scale 0"),
    ],
)
def test_layer_groups_that_cannot_share_a_pool(groups, message):
    with pytest.raises(ValueError, match=message):
        BlockManager(2, 0, 4, layer_groups=groups)


def test_check_integrity_sees_a_block_of_two_layer_groups():
    blocks = BlockManager(4, 2, 4, layer_groups=[LayerGroup("a"), LayerGroup("b")])
    blocks.append(0, 0, 4)
    first, second = (tables.on_gpu[0] for tables in blocks.layers)
    blocks.gpu.share(first.blocks[0])
    blocks.gpu.release(second.blocks[0])
    blocks.layers[1].on_gpu.replace(second, 0, first.blocks[0])
    with pytest.raises(RuntimeError, match="two layer groups hold the same block"):
        blocks.check_integrity()


def test_check_integrity_sees_a_sequence_that_one_layer_group_has_lost():
    blocks = BlockManager(4, 2, 4, layer_groups=[LayerGroup("a"), LayerGroup("b")])
    blocks.append(0, 0, 4)
    blocks.gpu.release(blocks.layers[1].on_gpu.remove(0).blocks[0])
    with pytest.raises(RuntimeError, match=r"GPU blocks differ \(b\)"):
        blocks.check_integrity()
