"""The arrays of a paged cache: the blocks of each layer, and of a whole model."""

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from . import persistence
from .blocks import (
    BlockAllocator,
    BlockTable,
    all_or_nothing,
    append_all,
    blocks_for,
    require,
)
from .cache import PackedKVCache
from .spec import CacheSpec, Format, Parts
from .store import finish_readers


class BlockPool:
    """The blocks of one layer: arrays ``[n_blocks, N_kv, block_size, ...]``.

    Args:
        formats (tuple(Format, Format)): Of K and V; group sizes are chosen with the
          first tokens.
        n_blocks (int): Blocks.
        block_size (int): Tokens a block.
        growable (bool): Whether blocks are added when they run out.
    """

    def __init__(
        self,
        formats: tuple[Format, Format],
        n_blocks: int,
        block_size: int,
        growable: bool = False,
    ):
        self.formats = formats
        self.block_size = block_size
        self.growable = growable
        self.allocator = BlockAllocator(n_blocks)
        # Which this is a layer of, if any; it must not be kept alive by a layer.
        self.model_pool: weakref.ref[PagedPool] | None = None
        self.parts: tuple[Parts, Parts] | None = None
        self.dtype: mx.Dtype | None = None
        self.heads, self.dims = 0, (0, 0)
        if growable:
            self.allocator.add_reclaimer(self._grow)

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks, in use or not; 0 before the first token."""
        return sum(part.nbytes for parts in self.parts or () for part in parts)

    def new_table(self) -> BlockTable:
        """The table of a sequence without tokens."""
        return BlockTable(self.allocator, self.block_size)

    def require(self, tables: Sequence[BlockTable], counts: Sequence[int]) -> None:
        """Make sure that every layer has the blocks that this one will take.

        Args:
            tables (sequence of BlockTable): Of each row.
            counts (sequence of int): Tokens to append to each row.

        Raises:
            PoolExhausted: If some layer has not.
        """
        everywhere = None if self.model_pool is None else self.model_pool()
        require(tables, counts, (everywhere or self.allocator).require)

    def append(
        self,
        tables: Sequence[BlockTable],
        firsts: Sequence[int],
        counts: Sequence[int],
        keys: mx.array,
        values: mx.array,
    ) -> bool:
        """Write tokens ``firsts[b] .. firsts[b] + counts[b] - 1`` of row b of K and V.

        Args:
            tables (sequence of BlockTable): Of each row.
            firsts (sequence of int): Tokens of a row to leave out before.
            counts (sequence of int): Tokens of a row to append.
            keys (array): ``[B, N_kv, T, D]``.
            values (array): ``[B, N_kv, T, D_v]``.

        Returns:
            bool: Whether any table has other blocks than before.

        Raises:
            PoolExhausted: If the blocks do not suffice. Nothing has changed then.
            ValueError: If a format cannot hold K or V, or they are not of the type and
              heads that the pool has.
        """
        k, v = self.formats
        formats = k.for_head_dim(keys.shape[-1]), v.for_head_dim(values.shape[-1])
        new = formats[0].quantize(keys), formats[1].quantize(values)
        self._check(new)
        with all_or_nothing(tables):
            copies, changed = append_all(tables, counts)
            if self.parts is None:
                self.parts = self._zeros_like(new, self.allocator.n_blocks)
            if copies:
                self._copy([c.source for c in copies], [c.target for c in copies])
            self._write(tables, firsts, counts, new)
        self.formats, self.dtype = formats, keys.dtype
        self.heads, self.dims = keys.shape[1], (keys.shape[-1], values.shape[-1])
        return changed

    def _write(
        self,
        tables: Sequence[BlockTable],
        firsts: Sequence[int],
        counts: Sequence[int],
        new: tuple[Parts, Parts],
    ) -> None:
        blocks, slots, rows, columns = self._places(tables, firsts, counts)
        if not blocks:
            return
        places = mx.array(blocks), mx.array(slots)
        everything = len(blocks) == len(tables) * new[0][0].shape[2]
        finish_readers(self.nbytes)
        for parts, written in zip(self.parts or (), new):
            for part, x in zip(parts, written):
                x = x.swapaxes(1, 2)
                x = x.flatten(0, 1) if everything else x[mx.array(rows), columns]
                part[places[0], :, places[1]] = x

    def read(self, blocks: Sequence[int]) -> tuple[Parts, Parts]:
        """The contents of blocks, ``[len(blocks), N_kv, block_size, ...]``."""
        assert self.parts is not None
        first = blocks[0] if blocks else 0
        if list(blocks) == list(range(first, first + len(blocks))):
            where: Any = slice(first, first + len(blocks))
        else:
            where = mx.array(list(blocks))
        k, v = (tuple(part[where] for part in parts) for parts in self.parts)
        return k, v

    def fill(self, contents: tuple[Parts, Parts], length: int) -> BlockTable:
        """A table over new blocks with the contents that :meth:`read` gave.

        Args:
            contents (tuple): Parts of K and of V, ``[n, N_kv, block_size, ...]``.
            length (int): Tokens in the blocks.

        Raises:
            PoolExhausted: If the blocks do not suffice. Nothing has changed then.
            ValueError: If they are of another pool's shapes or types.
        """
        k, v = contents
        self._check((k, v))
        table = self.new_table()
        append_all([table], [length])
        if self.parts is None:
            self.parts = self._zeros_like((k, v), self.allocator.n_blocks)
        for parts, written in zip(self.parts, (k, v)):
            for part, x in zip(parts, written):
                part[mx.array(table.blocks)] = x
        return table

    def take_formats(self, other: "BlockPool") -> None:
        """Be of the formats of ``other``, whose blocks are to be copied here.

        Raises:
            ValueError: If this pool has other formats or blocks of another size.
        """
        fits = all(
            replace(ours, group_size=ours.group_size or theirs.group_size) == theirs
            for ours, theirs in zip(self.formats, other.formats)
        )
        if not fits or self.block_size != other.block_size:
            raise ValueError(
                "[paged cache] caches of one format and block size are required; got "
                f"{CacheSpec(*other.formats)} in blocks of {other.block_size} for a "
                f"pool of {CacheSpec(*self.formats)} in blocks of {self.block_size}."
            )
        self.formats = other.formats

    def _places(
        self,
        tables: Sequence[BlockTable],
        firsts: Sequence[int],
        counts: Sequence[int],
    ) -> tuple[list[int], list[int], list[int], mx.array]:
        """Block, slot, row and column of every token that was just appended."""
        blocks: list[int] = []
        slots: list[int] = []
        rows: list[int] = []
        columns: list[int] = []
        for row, (table, first, count) in enumerate(zip(tables, firsts, counts)):
            for index in range(table.length - count, table.length):
                block, slot = divmod(index, self.block_size)
                blocks.append(table.blocks[block])
                slots.append(slot)
            rows += [row] * count
            columns += range(first, first + count)
        return blocks, slots, rows, mx.array(columns, dtype=mx.int32)

    def _copy(self, sources: list[int], targets: list[int]) -> None:
        contents = self.read(sources)
        # Read before the pool is written: else it would be copied whole.
        mx.eval(contents)
        for parts, old in zip(self.parts or (), contents):
            for part, x in zip(parts, old):
                part[mx.array(targets)] = x

    def _check(self, new: tuple[Parts, Parts]) -> None:
        if self.parts is None:
            return
        for parts, x in zip(self.parts, new):
            ours = [(p.shape[1], *p.shape[3:], p.dtype) for p in parts]
            theirs = [(p.shape[1], *p.shape[3:], p.dtype) for p in x]
            if ours != theirs:
                raise ValueError(
                    "[paged cache] heads, width and type of each part must be "
                    f"{ours}; got {theirs}."
                )

    def _zeros_like(self, new: tuple[Parts, Parts], n: int) -> tuple[Parts, Parts]:
        k, v = (
            tuple(
                mx.zeros((n, x.shape[1], self.block_size, *x.shape[3:]), x.dtype)
                for x in parts
            )
            for parts in new
        )
        return k, v

    def _grow(self, missing: int) -> None:
        more = max(missing, self.allocator.n_blocks // 2)
        if self.parts is not None:
            extra = self._zeros_like(self.parts, more)
            k, v = (
                tuple(mx.concatenate(list(pair)) for pair in zip(old, new))
                for old, new in zip(self.parts, extra)
            )
            self.parts = k, v
        self.allocator.grow(more)


class PagedPool:
    """The blocks of every layer of one model.

    Args:
        spec (str or CacheSpec): What is stored, such as ``"k8v4"``.
        n_tokens (int): Tokens that fit, of all sequences together.
        block_size (int): Tokens a block.

    Raises:
        ValueError: If the spec says something that a paged cache has not.
    """

    def __init__(self, spec: str | CacheSpec, n_tokens: int, block_size: int = 64):
        self.spec = CacheSpec.parse(spec)
        if self.spec.recent:
            raise ValueError(
                "[PagedPool] a spec whose newest tokens are quantized too is required; "
                f"got {self.spec}."
            )
        if n_tokens < 1 or block_size < 1:
            raise ValueError(
                "[PagedPool] n_tokens and block_size must be at least 1; got "
                f"{n_tokens} and {block_size}."
            )
        self.block_size = block_size
        self.n_blocks = blocks_for(n_tokens, block_size)
        self.layers: dict[int, BlockPool] = {}
        # Whose caches these are, and what tells its weights from others'.
        self._model: weakref.ref[Any] | None = None
        self._fingerprint: str | None = None

    def make_prompt_cache(self, model: Any) -> list[Any]:
        """A cache for each layer of a model of mlx-lm, for one sequence.

        Layers with a sliding window or with MLA's latents, and layers that the spec
        keeps dense, have the caches that they have without a pool.
        """
        from . import hook
        from .paged import PagedKVCache

        caches = hook.make_prompt_cache(model, self.spec)
        if self._model is None or self._model() is not model:
            self._model, self._fingerprint = weakref.ref(model), None
        for layer, cache in enumerate(caches):
            if type(cache) is not PackedKVCache:
                continue
            if cache.formats[0].is_dense:
                cache.beside = weakref.ref(self)
            else:
                caches[layer] = PagedKVCache(self.layer(layer, cache.formats))
        return caches

    def fingerprint(self) -> str:
        """Of the weights of the model that caches were made for; it is kept.

        Raises:
            ValueError: If there is no such model, or no longer.
        """
        if self._fingerprint is None:
            model = None if self._model is None else self._model()
            if model is None:
                raise ValueError(
                    "[PagedPool] the model that caches were made for is required; "
                    "got none."
                )
            self._fingerprint = persistence.fingerprint(model)
        return self._fingerprint

    def layer(self, index: int, formats: tuple[Format, Format]) -> BlockPool:
        """The blocks of one layer."""
        if index not in self.layers:
            made = BlockPool(formats, self.n_blocks, self.block_size)
            made.model_pool = weakref.ref(self)
            self.layers[index] = made
        return self.layers[index]

    def require(self, count: int) -> None:
        """Make sure that ``count`` blocks are free in every layer.

        Raises:
            PoolExhausted: If they are not, even after unused ones were given back.
        """
        for layer in self.layers.values():
            layer.allocator.require(count)

    def require_for(self, lengths: Sequence[int], count: int) -> None:
        """:meth:`require` of the blocks for ``count`` more tokens of each sequence.

        Args:
            lengths (sequence of int): Tokens of each; below 0: padding is to come.
            count (int): Tokens, padding included.
        """
        before, after = (
            sum(blocks_for(max(0, n + more), self.block_size) for n in lengths)
            for more in (0, count)
        )
        self.require(after - before)

    @property
    def n_free(self) -> int:
        """Blocks that are free in every layer."""
        free = (layer.allocator.n_free for layer in self.layers.values())
        return min(free, default=self.n_blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks of all layers, in use or not."""
        return sum(layer.nbytes for layer in self.layers.values())
