"""Blocks of a paged cache: no random sequence of calls loses or doubles one."""

import gc
import random
import unittest

from mlx_quantized_sdpa.blocks import (
    BlockAllocator,
    BlockTable,
    PoolExhausted,
    append_all,
    common_prefix,
)


class Model:
    """Tables beside plain lists of tokens, and what each block was written with."""

    def __init__(self, n_blocks, block_size, seed):
        self.random = random.Random(seed)
        self.size = block_size
        self.allocator = BlockAllocator(n_blocks)
        self.memory = [[None] * block_size for _ in range(n_blocks)]
        self.rows = []
        self.next_token = 0
        self.exhausted = 0
        self.copied = 0

    def new(self):
        self.rows.append((BlockTable(self.allocator, self.size), []))

    def append(self):
        rows = self.random.sample(self.rows, self.random.randint(0, len(self.rows)))
        counts = [self.random.choice((0, 1, 1, 2, 7, 13)) for _ in rows]
        before = [(list(t.blocks), t.length) for t, _ in rows]
        free = self.allocator.n_free
        try:
            copies, changed = append_all([table for table, _ in rows], counts)
        except PoolExhausted:
            self.exhausted += 1
            assert before == [(t.blocks, t.length) for t, _ in rows]
            assert free == self.allocator.n_free
            return
        after = [t.blocks for t, _ in rows]
        assert changed == (after != [blocks for blocks, _ in before])
        self.copied += len(copies)
        for copy in copies:
            self.memory[copy.target] = list(self.memory[copy.source])
        for (table, tokens), count in zip(rows, counts):
            for _ in range(count):
                block = table.blocks[len(tokens) // self.size]
                assert self.allocator.references(block) == 1
                self.memory[block][len(tokens) % self.size] = self.next_token
                tokens.append(self.next_token)
                self.next_token += 1

    def fork(self):
        if self.rows:
            table, tokens = self.random.choice(self.rows)
            length = self.random.choice((None, self.random.randint(0, len(tokens))))
            self.rows.append((table.fork(length), tokens[:length]))

    def trim(self):
        if self.rows:
            table, tokens = self.random.choice(self.rows)
            count = self.random.randint(0, 9)
            assert table.trim(count) == min(count, len(tokens))
            del tokens[len(tokens) - min(count, len(tokens)) :]

    def drop(self):
        if self.rows:
            self.rows.pop(self.random.randrange(len(self.rows)))

    def check(self):
        held = [0] * self.allocator.n_blocks
        for table, tokens in self.rows:
            assert table.length == len(tokens)
            assert 0 <= table.room < self.size
            for index, block in enumerate(table.blocks):
                held[block] += 1
                begin = index * self.size
                written = tokens[begin : begin + self.size]
                assert self.memory[block][: len(written)] == written
        found = [self.allocator.references(b) for b in range(len(held))]
        assert found == held
        assert self.allocator.n_free == held.count(0)


class TestRandomCalls(unittest.TestCase):
    def test_contents_and_counts_hold(self):
        exhausted = copied = 0
        for seed in range(40):
            model = Model(n_blocks=12, block_size=4, seed=seed)
            for _ in range(150):
                names = ("new", "append", "append", "fork", "trim", "drop")
                getattr(model, model.random.choice(names))()
                model.check()
            exhausted += model.exhausted
            copied += model.copied
            model.rows.clear()
            gc.collect()
            self.assertEqual(model.allocator.n_free, 12)
        # Both must have happened for the run to mean anything.
        self.assertGreater(exhausted, 50)
        self.assertGreater(copied, 50)


class TestAllocator(unittest.TestCase):
    def test_says_how_many_are_missing_and_can_be_tried_again(self):
        allocator = BlockAllocator(3)
        held = allocator.allocate(2)
        with self.assertRaisesRegex(PoolExhausted, "2 free blocks .* got 1 of 3"):
            allocator.allocate(2)
        allocator.release(held[:1])
        self.assertEqual(sorted(allocator.allocate(2)), [0, 2])

    def test_asks_to_reclaim_before_it_refuses(self):
        allocator = BlockAllocator(2)
        held = allocator.allocate(2)
        asked = []

        def reclaim(count):
            asked.append(count)
            allocator.release([held.pop()])

        allocator.add_reclaimer(reclaim)
        self.assertEqual(allocator.allocate(1), [1])
        self.assertEqual(asked, [1])

    def test_a_free_block_is_not_released_or_shared(self):
        allocator = BlockAllocator(2)
        for act in (allocator.release, allocator.share):
            with self.assertRaisesRegex(ValueError, "block 0 must be held"):
                act([0])

    def test_grows(self):
        allocator = BlockAllocator(1)
        allocator.allocate(1)
        allocator.grow(2)
        self.assertEqual(allocator.allocate(2), [1, 2])

    def test_needs_a_block(self):
        with self.assertRaisesRegex(ValueError, "at least 1; got 0"):
            BlockAllocator(0)


class TestTables(unittest.TestCase):
    def setUp(self):
        self.allocator = BlockAllocator(8)

    def table(self, length):
        table = BlockTable(self.allocator, 4)
        append_all([table], [length])
        return table

    def test_two_that_share_a_last_block_need_one_copy(self):
        first = self.table(6)
        second = first.fork()
        copies, _ = append_all([first, second], [1, 1])
        self.assertEqual(len(copies), 1)
        self.assertNotEqual(first.blocks[1], second.blocks[1])
        self.assertEqual(first.blocks[0], second.blocks[0])

    def test_a_full_last_block_is_not_copied(self):
        first = self.table(8)
        second = first.fork()
        copies, changed = append_all([second], [1])
        self.assertEqual(copies, [])
        self.assertTrue(changed)
        self.assertEqual(second.blocks[:2], first.blocks)

    def test_common_prefix_counts_whole_blocks(self):
        first = self.table(10)
        self.assertEqual(common_prefix([first, first.fork(), first.fork(9)]), 2)
        self.assertEqual(common_prefix([first, self.table(10)]), 0)
        self.assertEqual(common_prefix([]), 0)

    def test_wrong_lengths_are_refused(self):
        table = self.table(6)
        with self.assertRaisesRegex(ValueError, r"in \[0, 6\]; got 7"):
            table.fork(7)
        with self.assertRaisesRegex(ValueError, "2 for 4 tokens"):
            BlockTable(self.allocator, 4).adopt(table.blocks, 4)


if __name__ == "__main__":
    unittest.main()
