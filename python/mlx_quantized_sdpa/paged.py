"""KV caches in fixed blocks of one pool, shared by sequences through block tables.

Sequences with the same beginning hold the same blocks, and batching, splitting and
dropping sequences moves no data::

    pool = PagedPool("k8v4", n_tokens=65536)
    prompt_cache = pool.make_prompt_cache(model)
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .block_pool import BlockPool, PagedPool
from .blocks import (
    BlockTable,
    PoolExhausted,
    SharedPrefix,
    blocks_for,
    shared_prefixes,
)
from .cache import has_meta_state, require_switch
from .merge import merge_attention
from .reading import CausalMask, KVView
from .spec import CacheSpec
from .store import attend

__all__ = [
    "BatchPagedKVCache",
    "BlockPool",
    "PagedKVCache",
    "PagedPool",
    "PoolExhausted",
]

# Fewer keys than this, read once instead of by every sequence, do not pay for the
# two calls and the merge.
_LEAST_SHARED_KEYS = 512


class _Paged:
    """Rows of sequences in one layer's pool, and attention over them."""

    def __init__(self, pool: BlockPool, tables: Sequence[BlockTable]):
        self.pool = pool
        self.tables = list(tables)
        # Where each row would end if no token of the newest chunk were padding.
        self._ends: list[int] = []
        self._layout: _Layout | None = None

    def _append(
        self,
        firsts: Sequence[int],
        counts: Sequence[int],
        keys: mx.array,
        values: mx.array,
    ) -> None:
        if self.pool.append(self.tables, firsts, counts, keys, values):
            self._layout = None

    def keys_and_values(self) -> tuple["PagedView", "PagedView"]:
        """What stands for K and V in attention."""
        return PagedView(self, 0), PagedView(self, 1)

    def dequantize(self) -> tuple[mx.array, mx.array]:
        """Dense K and V ``[B, N_kv, T, D]``; shorter rows end with what lies there."""
        pool = self.pool
        width = blocks_for(self.size(), pool.block_size)
        rows = [[*t.blocks, *[0] * (width - len(t.blocks))] for t in self.tables]
        dense = []
        parts = pool.read([block for row in rows for block in row])
        for made, operand in zip(pool.formats, parts):
            x = made.dequantize(operand, pool.dtype or mx.float32)
            x = mx.unflatten(x, 0, (len(rows), width)).swapaxes(1, 2).flatten(2, 3)
            dense.append(x[:, :, : self.size()])
        return dense[0], dense[1]

    def attend(
        self,
        queries: mx.array,
        scale: float,
        mask: Any = None,
        sinks: mx.array | None = None,
        force_fused: bool = False,
        softcap: float | None = None,
    ) -> mx.array:
        """Attention of the tokens just written over all that their rows hold.

        Args:
            queries (array): ``[B, N_q, T, D]``.
            scale (float): Of the scores.
            mask (optional): What ``make_mask`` gave, or an array
              ``[.., T, T_kv]`` over the rows' own tokens.
            sinks (array, optional): ``[N_q]``.
            force_fused (bool): Raise where the op has no fused kernel.
            softcap (float, optional): Of the scores.

        Returns:
            array: ``[B, N_q, T, D_v]``.
        """
        width = blocks_for(max(self._ends), self.pool.block_size)
        if self._layout is None or self._layout.width < width:
            self._layout = _Layout.of(self.tables, width)
        call = _Call(self.pool, scale, sinks, force_fused, softcap)
        if isinstance(mask, mx.array):
            missing = self._layout.width * self.pool.block_size - mask.shape[-1]
            hidden = False if mask.dtype == mx.bool_ else -mx.inf
            widths = [(0, 0)] * (mask.ndim - 1) + [(0, max(0, missing))]
            mask = mx.pad(mask, widths, constant_values=hidden)
            return call.whole(queries, self._layout, self._ends, mask=mask)
        window = getattr(mask, "window_size", None)
        if window is not None or not self._layout.groups:
            return call.whole(
                queries, self._layout, self._ends, causal=True, window_size=window
            )
        return call.split(queries, self._layout, self._ends)

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> Any:
        """``"causal"`` with the window in it, an array only where it is asked for.

        Models ask for it before any layer is written: where the blocks do not suffice
        for ``N`` tokens, the step ends here, with every layer as it was.

        Raises:
            PoolExhausted: If they do not, in some layer of the pool.
            RuntimeError: If the attention that reads these caches is switched off.
        """
        require_switch()
        # Of a cache without rows, one is all that is sure to come.
        tables = self.tables or [self.pool.new_table()]
        self.pool.require(tables, self._counts(N) or [N])
        if return_array:
            offsets = self._offsets() or [0]
            seen = mx.arange(N) + mx.array(offsets, dtype=mx.int32)[:, None]
            keys = mx.arange(max(offsets) + N)
            mask = keys <= seen[..., None]
            if window_size is not None:
                mask = mask & (keys > seen[..., None] - window_size)
            return mask[:, None]
        if N == 1 and window_size is None:
            return None
        return CausalMask(window_size)

    def _offsets(self) -> list[int]:
        return [table.length for table in self.tables]

    def _counts(self, width: int) -> list[int]:
        """Tokens of each row in the next ``width`` columns."""
        return [width] * len(self.tables)

    @property
    def keys(self) -> list[mx.array] | None:
        """The arrays of K of the whole pool: a pipeline's sends hang on them."""
        return None if self.pool.parts is None else list(self.pool.parts[0])

    @keys.setter
    def keys(self, parts: Iterable[mx.array]) -> None:
        assert self.pool.parts is not None
        self.pool.parts = tuple(parts), self.pool.parts[1]

    def is_trimmable(self) -> bool:
        return True

    def empty(self) -> bool:
        return all(table.length == 0 for table in self.tables)

    def size(self) -> int:
        return max((table.length for table in self.tables), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks that the rows hold; a block of several rows once."""
        blocks = {block for table in self.tables for block in table.blocks}
        return len(blocks) * self.pool.nbytes // self.pool.allocator.n_blocks

    def _trim_all(self, count: int) -> int:
        trimmed = [table.trim(count) for table in self.tables]
        self._layout = None
        return max(trimmed, default=0)


class PagedView(KVView):
    """Stands for K or V of a paged cache; used as an array, it is dequantized."""

    __slots__ = ()

    def __init__(self, cache: Any, operand: int, cast: mx.Dtype | None = None):
        # The cache itself is what attention reads.
        super().__init__(cache, operand, cast)

    @property
    def shape(self) -> tuple[int, ...]:
        cache: Any = self.reading
        heads, dim = cache.pool.heads, cache.pool.dims[self.operand]
        return len(cache.tables), heads, cache.size(), dim

    @property
    def dtype(self) -> mx.Dtype:
        cache: Any = self.reading
        found: mx.Dtype = self.cast or cache.pool.dtype
        return found


@dataclass
class _Layout:
    """Block tables as arrays, until a row has other blocks.

    ``order`` sorts the rows of all groups, one after the other, and then those without
    a group back into the batch.
    """

    width: int
    table: mx.array
    groups: list[SharedPrefix]
    prefixes: list[mx.array]
    suffix: mx.array
    shared: list[int]
    order: mx.array | None

    @classmethod
    def of(cls, tables: Sequence[BlockTable], width: int) -> "_Layout":
        rows = [table.blocks for table in tables]
        width = max(width, *map(len, rows))
        groups: list[SharedPrefix] = []
        if len(tables) > 1:
            least = blocks_for(_LEAST_SHARED_KEYS, tables[0].block_size)
            groups = shared_prefixes(tables, least)
        shared = [0] * len(rows)
        for group in groups:
            for row in group.rows:
                shared[row] = group.blocks
        prefixes = [rows[group.rows[0]][: group.blocks] for group in groups]
        gathered = [row for group in groups for row in group.rows]
        gathered += [row for row in range(len(rows)) if not shared[row]]
        sorted_already = gathered == list(range(len(rows)))
        back = sorted(range(len(rows)), key=gathered.__getitem__)
        return cls(
            width,
            _padded(rows, width),
            groups,
            [mx.array([blocks], dtype=mx.int32) for blocks in prefixes],
            _padded([r[skip:] for r, skip in zip(rows, shared)], width),
            shared,
            None if sorted_already else mx.array(back),
        )


def _padded(rows: Sequence[Sequence[int]], width: int) -> mx.array:
    # Block 0 stands where there is none: `lengths` keeps it from being seen.
    return mx.array([[*row, *[0] * (width - len(row))] for row in rows], dtype=mx.int32)


@dataclass
class _Call:
    """One call of the op, whole or split into shared prefixes and the rest."""

    pool: BlockPool
    scale: float
    sinks: mx.array | None
    force_fused: bool
    softcap: float | None

    def whole(
        self, q: mx.array, layout: _Layout, ends: list[int], **mask: Any
    ) -> mx.array:
        out: mx.array = self._attend(q, layout.table, ends, sinks=self.sinks, **mask)
        return out

    def split(self, q: mx.array, layout: _Layout, ends: list[int]) -> mx.array:
        """Every shared prefix once for all its rows, merged with what is their own."""
        size = self.pool.block_size
        own_ends = [end - size * skip for end, skip in zip(ends, layout.shared)]
        own = self._attend(
            q,
            layout.suffix,
            own_ends,
            sinks=self.sinks,
            causal=True,
            return_lse=True,
        )
        parts = [
            self._prefix(q[mx.array(group.rows)], table, group.blocks * size)
            for group, table in zip(layout.groups, layout.prefixes)
        ]
        alone = q.shape[0] - sum(len(group.rows) for group in layout.groups)
        if alone:
            out, lse = own
            zeros = mx.zeros((alone, *out.shape[1:]), out.dtype)
            parts.append((zeros, mx.full((alone, *lse.shape[1:]), -mx.inf)))
        out, lse = (mx.concatenate(list(part)) for part in zip(*parts))
        if layout.order is not None:
            out, lse = out[layout.order], lse[layout.order]
        return merge_attention([out, own[0]], [lse, own[1]])[0]

    def _prefix(
        self, q: mx.array, table: mx.array, length: int
    ) -> tuple[mx.array, mx.array]:
        """Queries of several rows as those of one: the keys are read once."""
        rows, heads, tokens, _ = q.shape
        q = q.swapaxes(0, 1).flatten(1, 2)[None]
        out, lse = self._attend(q, table, [length], return_lse=True)
        out, lse = (mx.unflatten(x[0], 1, (rows, tokens)) for x in (out, lse))
        return out.swapaxes(0, 1), lse.swapaxes(0, 1)

    def _attend(
        self, q: mx.array, table: mx.array, ends: list[int], **arguments: Any
    ) -> Any:
        assert self.pool.parts is not None
        return attend(
            q,
            *self.pool.parts,
            self.pool.formats,
            scale=self.scale,
            block_table=table,
            lengths=mx.array(ends, dtype=mx.int32),
            force_fused=self.force_fused,
            softcap=self.softcap,
            **arguments,
        )


class PagedKVCache(_Paged):
    """One layer's cache of one sequence, or of several of one length.

    Args:
        pool (BlockPool): The layer's blocks.
    """

    def __init__(self, pool: BlockPool, tables: Sequence[BlockTable] = ()):
        super().__init__(pool, tables)

    @property
    def offset(self) -> int:
        """Tokens in the cache."""
        return self.tables[0].length if self.tables else 0

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple["PagedView", "PagedView"]:
        """Append tokens ``[B, N_kv, T, D]``; all of them or, at an error, none."""
        batch, _, count, _ = keys.shape
        if not self.tables:
            self.tables = [self.pool.new_table() for _ in range(batch)]
        self._append([0] * batch, self._counts(count), keys, values)
        self._ends = [table.length for table in self.tables]
        return self.keys_and_values()

    def trim(self, n: int) -> int:
        return self._trim_all(n)

    def move_to(self, pool: BlockPool) -> None:
        """Have the tokens in blocks of another pool.

        Raises:
            PoolExhausted: If there are too few. Nothing has changed then.
            ValueError: If that pool has other formats.
        """
        self.tables = _moved(self, pool)
        self.pool, self._layout = pool, None

    def __deepcopy__(self, memo: Any) -> "PagedKVCache":
        """Another cache over the same blocks, until one of the two is written."""
        return PagedKVCache(self.pool, [table.fork() for table in self.tables])

    def copy(self) -> "PagedKVCache":
        """As ``copy.deepcopy`` does it."""
        return self.__deepcopy__(None)

    @classmethod
    def merge(cls, caches: Sequence["PagedKVCache"]) -> "BatchPagedKVCache":
        """A batch over the blocks of single sequences, each as long as it is."""
        return BatchPagedKVCache.merge(caches)

    @property
    def state(self) -> tuple[Any, ...]:
        """Contents of the blocks, tokens, sequences, and what they are stored as.

        Before mlx-lm 0.32 the contents alone; the rest is in :attr:`meta_state`.
        """
        blocks = [block for table in self.tables for block in table.blocks]
        contents = self.pool.read(blocks) if blocks else ((), ())
        return contents if has_meta_state() else (*contents, *self._numbers())

    @state.setter
    def state(self, state: tuple[Any, ...]) -> None:
        # The contents alone; what they are follows.
        if len(state) <= 2:
            self._contents = state or ((), ())
        else:
            self._restore(*state)

    @property
    def meta_state(self) -> str:
        return json.dumps(self._numbers())

    @meta_state.setter
    def meta_state(self, text: str) -> None:
        self._restore(*self.__dict__.pop("_contents"), *json.loads(text))

    def _numbers(self) -> tuple[Any, ...]:
        spec = CacheSpec(*self.pool.formats)
        return self.offset, len(self.tables), str(spec), self.pool.block_size

    def _restore(
        self, k: Any, v: Any, length: int, rows: int, text: str, block_size: int
    ) -> None:
        spec = CacheSpec.parse(text)
        each = blocks_for(length, block_size)
        pool = BlockPool((spec.k, spec.v), max(1, each * rows), block_size, True)
        tables = []
        for row in range(rows if length else 0):
            where = slice(row * each, (row + 1) * each)
            contents = tuple(tuple(x[where] for x in parts) for parts in (k, v))
            tables.append(pool.fill(contents, length))  # type: ignore[arg-type]
        _Paged.__init__(self, pool, tables)

    @classmethod
    def from_state(
        cls, state: tuple[Any, ...], meta_state: str | None = None
    ) -> "PagedKVCache":
        cache = cls.__new__(cls)
        cache.state = state
        if meta_state is not None:
            cache.meta_state = meta_state
        return cache


class BatchPagedKVCache(_Paged):
    """One layer's cache of a batch, each sequence of its own length."""

    def __init__(self, pool: BlockPool, tables: Sequence[BlockTable]):
        super().__init__(pool, tables)
        self._skip = [0] * len(self.tables)
        self._left: list[int] | None = None

    @property
    def offset(self) -> mx.array:
        """Tokens in each row, int32 ``[B]``; below 0 where padding is still to come."""
        return mx.array(self._offsets(), dtype=mx.int32)

    def _offsets(self) -> list[int]:
        return [t.length - skip for t, skip in zip(self.tables, self._skip)]

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Say which of the tokens to come are padding, which is never stored.

        Args:
            left_padding (sequence of int, optional): Leading tokens of each row.
            lengths (sequence of int, optional): Tokens of each row before the
              ``right_padding`` begins.
            right_padding (sequence of int, optional): Trailing tokens of each row.
        """
        if left_padding is not None:
            self._skip = [a + int(b) for a, b in zip(self._skip, left_padding)]
        if lengths is not None and right_padding is not None and max(right_padding) > 0:
            self._left = [int(length) for length in lengths]

    def finalize(self) -> None:
        """The padded prompts are all in."""
        self._left = None

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple["PagedView", "PagedView"]:
        """Append tokens ``[B, N_kv, T, D]``; all of them or, at an error, none."""
        width = keys.shape[2]
        ends = [offset + width for offset in self._offsets()]
        firsts, counts = self._firsts(width), self._counts(width)
        self._append(firsts, counts, keys, values)
        self._ends = ends
        self._skip = [skip - first for skip, first in zip(self._skip, firsts)]
        if self._left is not None:
            self._left = [left - count for left, count in zip(self._left, counts)]
        return self.keys_and_values()

    def _firsts(self, width: int) -> list[int]:
        return [min(skip, width) for skip in self._skip]

    def _counts(self, width: int) -> list[int]:
        counts = [width - first for first in self._firsts(width)]
        if self._left is not None:
            counts = [min(*pair) for pair in zip(counts, self._left)]
        return counts

    def trim(self, n: int) -> int:
        return self._trim_all(n)

    def filter(self, batch_indices: Any) -> None:
        """Keep these rows, in this order; the others' blocks are given back."""
        if isinstance(batch_indices, mx.array):
            batch_indices = batch_indices.tolist()
        self.tables = [self.tables[i] for i in batch_indices]
        self._skip = [self._skip[i] for i in batch_indices]
        if self._left is not None:
            self._left = [self._left[i] for i in batch_indices]
        self._layout = None

    def extend(self, other: "BatchPagedKVCache") -> None:
        """Add the rows of another batch."""
        self.tables += [table.fork() for table in _moved(other, self.pool)]
        self._skip += other._skip
        self._layout = None

    def extract(self, idx: int) -> PagedKVCache:
        """The cache of one row, over the same blocks."""
        return PagedKVCache(self.pool, [self.tables[idx].fork()])

    @classmethod
    def merge(cls, caches: Sequence[PagedKVCache]) -> "BatchPagedKVCache":
        """A batch over the blocks of single sequences; those are left as they are.

        Caches that were loaded from files are brought into the pool of the others.
        """
        pool = next((c.pool for c in caches if not c.pool.growable), caches[0].pool)
        tables = []
        for cache in caches:
            if len(cache.tables) > 1:
                raise ValueError(
                    "[paged cache] a cache of one sequence is required; got one of "
                    f"{len(cache.tables)}."
                )
            tables += _moved(cache.copy(), pool) or [pool.new_table()]
        return cls(pool, tables)

    def __deepcopy__(self, memo: Any) -> "BatchPagedKVCache":
        other = BatchPagedKVCache(self.pool, [table.fork() for table in self.tables])
        other._skip = list(self._skip)
        other._left = None if self._left is None else list(self._left)
        return other

    @property
    def state(self) -> Any:
        """The pool's arrays: what must be computed for the rows to be there."""
        return self.pool.parts or ()


def _moved(cache: _Paged, pool: BlockPool) -> list[BlockTable]:
    """The tables of ``cache``, in ``pool``: as they are, or over copies."""
    theirs = cache.pool
    if theirs is pool:
        return cache.tables
    tables = []
    for table in cache.tables:
        if table.length == 0:
            tables.append(pool.new_table())
            continue
        pool.take_formats(theirs)
        tables.append(pool.fill(theirs.read(table.blocks), table.length))
    return tables
