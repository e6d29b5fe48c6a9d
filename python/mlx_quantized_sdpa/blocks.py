"""Who owns which block of a paged cache: counts and tables only, no arrays.

A pool has a fixed number of blocks of ``block_size`` tokens. A sequence holds them by
a :class:`BlockTable`; several tables may hold one block, which is then only read.
"""

import contextlib
import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


class PoolExhausted(RuntimeError):
    """A pool has fewer free blocks than were wanted; nothing has been changed.

    After other sequences have given blocks back, the same call works: of a cache, and
    of a model. mlx-lm's ``BatchGenerator`` and ``batch_generate`` forget a prompt's
    chunk before they compute it: a request whose prompt was at work must be removed and
    inserted anew. :class:`.PagedBatchGenerator` lets requests wait instead.
    """


class BlockAllocator:
    """Reference counts of the blocks ``0 .. n_blocks - 1``."""

    def __init__(self, n_blocks: int):
        if n_blocks < 1:
            raise ValueError(
                f"[BlockAllocator] n_blocks must be at least 1; got {n_blocks}."
            )
        self._references = [0] * n_blocks
        # The lowest first: neighbours in a sequence are neighbours in memory.
        self._free = list(range(n_blocks))
        self._reclaimers: list[Callable[[int], None]] = []

    @property
    def n_blocks(self) -> int:
        """Blocks in the pool."""
        return len(self._references)

    @property
    def n_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def references(self, block: int) -> int:
        """How many hold ``block``."""
        return self._references[block]

    def add_reclaimer(self, reclaim: Callable[[int], None]) -> None:
        """``reclaim(count)`` is asked to release blocks when that many are missing."""
        self._reclaimers.append(reclaim)

    def allocate(self, count: int) -> list[int]:
        """``count`` blocks, each held once.

        Raises:
            PoolExhausted: If there are fewer, even after reclaiming.
        """
        self.require(count)
        blocks = [heapq.heappop(self._free) for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def require(self, count: int) -> None:
        """Makes sure that ``count`` blocks are free; raises as ``allocate`` does."""
        for reclaim in self._reclaimers:
            if count > self.n_free:
                reclaim(count - self.n_free)
        if count > self.n_free:
            raise PoolExhausted(
                f"[paged cache] {count} free blocks are required; got {self.n_free} "
                f"of {self.n_blocks}. Drop a sequence and try again, or make a larger "
                "pool."
            )

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder of each block."""
        for block in blocks:
            self._check_held(block)
            self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One holder fewer of each block; the last one sets it free."""
        for block in blocks:
            self._check_held(block)
            self._references[block] -= 1
            if self._references[block] == 0:
                heapq.heappush(self._free, block)

    def grow(self, count: int) -> None:
        """``count`` more blocks, all free."""
        self._free.extend(range(self.n_blocks, self.n_blocks + count))
        heapq.heapify(self._free)
        self._references.extend([0] * count)

    def _check_held(self, block: int) -> None:
        if self._references[block] == 0:
            raise ValueError(
                f"[BlockAllocator] block {block} must be held; it is free."
            )


@dataclass(frozen=True)
class BlockCopy:
    """The contents of block ``source`` must be copied to block ``target``."""

    source: int
    target: int


class BlockTable:
    """The blocks of one sequence, in order; they are released with the table."""

    def __init__(self, allocator: BlockAllocator, block_size: int):
        self.allocator = allocator
        self.block_size = block_size
        self.blocks: list[int] = []
        self.length = 0

    def __del__(self) -> None:
        self.allocator.release(self.blocks)

    def fork(self, length: int | None = None) -> "BlockTable":
        """Another table over the same first ``length`` tokens; nothing is copied.

        The tables part ways at the first token that either one appends.
        """
        length = self.length if length is None else length
        if not 0 <= length <= self.length:
            raise ValueError(
                f"[BlockTable] length must be in [0, {self.length}]; got {length}."
            )
        other = BlockTable(self.allocator, self.block_size)
        other.adopt(self.blocks[: blocks_for(length, self.block_size)], length)
        return other

    def adopt(self, blocks: Sequence[int], length: int) -> None:
        """Makes an empty table share ``blocks``, which hold ``length`` tokens."""
        if self.blocks or blocks_for(length, self.block_size) != len(blocks):
            raise ValueError(
                "[BlockTable] an empty table and just the blocks of the tokens are "
                f"required; got {len(self.blocks)} blocks held, and {len(blocks)} for "
                f"{length} tokens."
            )
        self.allocator.share(blocks)
        self.blocks = list(blocks)
        self.length = length

    def trim(self, count: int) -> int:
        """Drops the last ``count`` tokens, at most all; returns how many."""
        count = max(0, min(count, self.length))
        self.length -= count
        kept = blocks_for(self.length, self.block_size)
        self.allocator.release(self.blocks[kept:])
        del self.blocks[kept:]
        return count

    @property
    def room(self) -> int:
        """Tokens that fit in the last block behind those that are there."""
        return len(self.blocks) * self.block_size - self.length


def blocks_for(length: int, block_size: int) -> int:
    """Blocks that ``length`` tokens need."""
    return -(-length // block_size)


def append_all(
    tables: Sequence[BlockTable], counts: Sequence[int]
) -> tuple[list[BlockCopy], bool]:
    """Makes every table longer, table ``i`` by ``counts[i]`` tokens, or none at all.

    The tables belong to one allocator. A last block that others hold too is replaced
    by a new one before it is written.

    Returns:
        tuple(list, bool): The copies to make before the tokens are written, and
        whether any table has other blocks than before.

    Raises:
        PoolExhausted: If the blocks do not suffice. No table has changed then.
    """
    grown = [(table, count) for table, count in zip(tables, counts) if count > 0]
    if grown:
        require(tables, counts, grown[0][0].allocator.require)
    split = _tables_to_split([table for table, _ in grown])
    wanted = [_new_blocks(table, count) for table, count in grown]
    if not split and not any(wanted):
        for table, count in grown:
            table.length += count
        return [], False
    fresh = iter(grown[0][0].allocator.allocate(len(split) + sum(wanted)))
    copies = []
    for table in split:
        source, target = table.blocks[-1], next(fresh)
        copies.append(BlockCopy(source, target))
        table.blocks[-1] = target
        table.allocator.release([source])
    for (table, count), more in zip(grown, wanted):
        table.blocks.extend(next(fresh) for _ in range(more))
        table.length += count
    return copies, True


def require(
    tables: Sequence[BlockTable], counts: Sequence[int], make_free: Callable[[int], Any]
) -> None:
    """Calls ``make_free`` with the blocks that :func:`append_all` will take.

    Raises:
        PoolExhausted: If ``make_free`` does.
    """
    while count := _needed(tables, counts):
        try:
            make_free(count)
            return
        except PoolExhausted:
            # A last block may have lost its other holders meanwhile.
            if _needed(tables, counts) == count:
                raise


def _needed(tables: Sequence[BlockTable], counts: Sequence[int]) -> int:
    grown = [(table, count) for table, count in zip(tables, counts) if count > 0]
    split = _tables_to_split([table for table, _ in grown])
    return len(split) + sum(_new_blocks(*each) for each in grown)


@contextlib.contextmanager
def all_or_nothing(tables: Sequence[BlockTable]) -> Iterator[None]:
    """Gives the tables what they had, should an exception leave this block.

    What is written meanwhile must be written to new blocks or behind the last token.
    """
    before = [(table.blocks.copy(), table.length) for table in tables]
    try:
        yield
    except BaseException:
        # First, so that no block of theirs is free in between.
        for table, (blocks, _) in zip(tables, before):
            table.allocator.share(blocks)
        for table, (blocks, length) in zip(tables, before):
            table.allocator.release(table.blocks)
            table.blocks, table.length = blocks, length
        raise


def _new_blocks(table: BlockTable, count: int) -> int:
    return blocks_for(table.length + count, table.block_size) - len(table.blocks)


def _tables_to_split(tables: Iterable[BlockTable]) -> list[BlockTable]:
    """Tables about to write into a last block that others will still hold."""
    left: dict[int, int] = {}
    split = []
    for table in tables:
        if table.room == 0:
            continue
        last = table.blocks[-1]
        holders = left.get(last, table.allocator.references(last))
        if holders > 1:
            split.append(table)
            left[last] = holders - 1
    return split


def common_prefix(tables: Sequence[BlockTable]) -> int:
    """How many first blocks all tables share, whole blocks only."""
    if not tables:
        return 0
    whole = min(table.length // table.block_size for table in tables)
    first = tables[0].blocks
    for index in range(whole):
        if any(table.blocks[index] != first[index] for table in tables[1:]):
            return index
    return whole


@dataclass(frozen=True)
class SharedPrefix:
    """Sequences whose first ``blocks`` blocks are the same."""

    rows: tuple[int, ...]
    blocks: int

    @property
    def saved(self) -> int:
        """Blocks that need not be read again."""
        return (len(self.rows) - 1) * self.blocks


def shared_prefixes(
    tables: Sequence[BlockTable], least_saved: int = 1
) -> list[SharedPrefix]:
    """Groups of sequences to attend their common first blocks once.

    No sequence is in two groups. Of all such groupings it is one that saves the most
    blocks; groups that save fewer than ``least_saved`` are left out.
    """
    found = _best_groups(tables, tuple(range(len(tables))), 0)
    return [group for group in found if group.saved >= max(1, least_saved)]


def _best_groups(
    tables: Sequence[BlockTable], rows: tuple[int, ...], depth: int
) -> list[SharedPrefix]:
    """The best grouping of ``rows``, which agree in the first ``depth`` blocks."""
    by_next: dict[int, list[int]] = {}
    for row in rows:
        table = tables[row]
        if table.length >= (depth + 1) * table.block_size:
            by_next.setdefault(table.blocks[depth], []).append(row)
    apart = []
    for same in by_next.values():
        if len(same) > 1:
            agreed = common_prefix([tables[row] for row in same])
            apart += _best_groups(tables, tuple(same), agreed)
    together = SharedPrefix(rows, depth)
    if together.saved > sum(group.saved for group in apart):
        return [together]
    return apart
