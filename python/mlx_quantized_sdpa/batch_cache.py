"""Quantized KV caches of batches, for mlx-lm's continuous batching.

Rows of a batch end together and begin where they may: what is before is padding, which
attention is told of in numbers. All of them are known without evaluating anything.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from .cache import (
    LatentMixin,
    PackedCache,
    PackedKVCache,
    PackedLatentKVCache,
    PackedRotatingKVCache,
    PackedRotatingLatentKVCache,
    Spec,
)
from .dense import visible_keys
from .reading import Reading
from .store import QuantizedStore, Tokens, map_tokens, rows_like


class _Batch(PackedCache):
    """Sequences of a batch, and the position of the next token of each.

    Attributes:
        positions (list(int)): Those positions.
        right_padding (list(int), optional): Junk behind the tokens to come.
    """

    def _begin(self, left_padding: Sequence[int]) -> None:
        self.positions = [-int(n) for n in left_padding]
        self.right_padding: list[int] | None = None
        self._known: dict[str, tuple[list[int], mx.array]] = {}

    def _array(self, name: str, numbers: list[int]) -> mx.array:
        """The numbers as an array, made anew only when they change."""
        found = self._known.get(name)
        if found is None or found[0] != numbers:
            found = self._known[name] = list(numbers), mx.array(numbers)
        return found[1]

    @property
    def offset(self) -> Any:
        """int32 ``[B]``: the position of each sequence's next token."""
        return self._array("offset", self.positions)

    @property
    def padding(self) -> list[int]:
        """How many rows of each sequence come before its first token."""
        raise NotImplementedError

    @property
    def left_padding(self) -> mx.array:
        """int32 ``[B]``: :attr:`padding` as an array."""
        return self._array("padding", self.padding)

    def _padding_of_op(self) -> mx.array | None:
        return self.left_padding if any(self.padding) else None

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Say how the tokens to come are padded.

        Args:
            left_padding (list(int), optional): Of an empty cache: tokens before the
              first real ones.
            lengths (list(int), optional): Real tokens of each sequence to come.
            right_padding (list(int), optional): Tokens behind the real ones, which
              :meth:`finalize` takes out.

        Raises:
            ValueError: If the cache is not empty and ``left_padding`` is given.
        """
        if left_padding is not None:
            if not self.empty():
                raise ValueError(
                    f"[{type(self).__name__}] left padding must be given to an empty "
                    f"cache; got one of {self.used} rows."
                )
            self._pad_left([int(n) for n in left_padding])
        if right_padding is not None and max(right_padding) > 0:
            self.right_padding = [int(n) for n in right_padding]

    def _pad_left(self, left: list[int]) -> None:
        self.positions = [a - b for a, b in zip(self.positions, left)]

    def _roll(self, shifts: list[int]) -> None:
        """Turn each sequence's newest rows to its front, where they are padding."""
        if not any(shifts) or not self.store.keys:
            return
        used = self.used
        index = (mx.arange(used) - mx.array(shifts)[:, None]) % used

        def turned(x: mx.array) -> mx.array:
            rolled = mx.take_along_axis(x[:, :, :used], index[:, None, :, None], axis=2)
            return mx.concatenate([rolled, x[:, :, used:]], axis=2)

        self.store.map(turned)
        self.positions = [n - shift for n, shift in zip(self.positions, shifts)]

    def filter(self, batch_indices: Any) -> None:
        """Keep only these sequences, in this order."""
        if isinstance(batch_indices, mx.array):
            batch_indices = batch_indices.tolist()
        self._keep([int(i) for i in batch_indices])

    def _keep(self, rows: list[int]) -> None:
        if self.store.keys:
            chosen = mx.array(rows)
            self.store.map(lambda x: x[chosen])
        self.positions = [self.positions[i] for i in rows]

    def _join(self, parts: "list[_Part]", used: int, rows: int) -> None:
        """Take the tokens of several, whose rows end together."""
        if used:
            self.store = _joined(parts, used, rows)
        self.used = used

    def _part(self) -> "_Part":
        tokens = self.store.slice(0, self.used) if self.store.keys else None
        return self.store, tokens, self.used, len(self.positions)


class BatchPackedKVCache(_Batch, PackedKVCache):
    """:class:`PackedKVCache` of a batch.

    Args:
        spec (str, CacheSpec or tuple(Format, Format)): What it stores.
        left_padding (list(int)): Tokens before the first real one, of each sequence.
    """

    single_type: type[PackedKVCache] = PackedKVCache

    def __init__(self, spec: Spec, left_padding: Sequence[int]):
        PackedKVCache.__init__(self, spec)
        self._begin(left_padding)
        self.padded = [int(n) for n in left_padding]

    @property
    def padding(self) -> list[int]:
        return self.padded

    @property
    def _idx(self) -> int:
        """By this name mlx-vlm asks for the columns so far."""
        return self.used

    def _lengths(self) -> list[int]:
        return [] if self.right_padding is not None else self.positions

    def _pad_left(self, left: list[int]) -> None:
        super()._pad_left(left)
        self.padded = [a + b for a, b in zip(self.padded, left)]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        views = super().update_and_fetch(keys, values)
        self.positions = [n + keys.shape[2] for n in self.positions]
        return views

    def finalize(self) -> None:
        """Turn what is behind each sequence's last token to its front."""
        if self.right_padding is not None:
            self._quantize_tail()
            self._roll(self.right_padding)
            self.padded = [a + b for a, b in zip(self.padded, self.right_padding)]
            self.right_padding = None

    def _reading(self) -> Reading:
        reading = super()._reading()
        reading.left_padding = self._padding_of_op()
        return reading

    def _mask(self, N: int, return_array: bool, window_size: int | None) -> Any:
        if return_array:
            shape = N, self.used + N
            return visible_keys(shape, True, window_size, self._padding_of_op())
        return super()._mask(N, False, window_size)

    def trim(self, n: int) -> int:
        n = super().trim(n)
        self.positions = [position - n for position in self.positions]
        return n

    def _keep(self, rows: list[int]) -> None:
        super()._keep(rows)
        self.padded = [self.padded[i] for i in rows]
        if self.tail is not None:
            keys, values = self.tail
            self.tail = keys[mx.array(rows)], values[mx.array(rows)]
        # Rows that are padding in every sequence go.
        spare = min(*self.padded, self._rows_in_store()) if rows else 0
        if spare > 0:
            self.store.map(lambda x: x[:, :, spare:])
            self.padded = [n - spare for n in self.padded]
            self.used -= spare

    def extend(self, other: "BatchPackedKVCache") -> None:
        """Add the sequences of another cache.

        Raises:
            ValueError: If it does not store the same formats.
        """
        _require_alike(type(self), [self, other], "recent")
        for each in (self, other):
            each._quantize_tail()
        used = max(self.used, other.used)
        padded = [n + used - each.used for each in (self, other) for n in each.padded]
        self._join([self._part(), other._part()], used, self._rows_for(used))
        self.padded = padded
        self.positions = self.positions + other.positions

    def _rows_for(self, used: int) -> int:
        """Room for the next token too, so that it does not copy all again."""
        return (used // self.step + 1) * self.step

    def extract(self, idx: int) -> PackedKVCache:
        """The cache of one sequence by itself."""
        self._quantize_tail()
        made = self.single_type(self.store.formats)
        made.recent, made.beside = self.recent, self.beside
        made.used = max(0, self.used - self.padded[idx])
        if made.used:
            made.store = _one(self.store, idx, self.used - made.used, self.used)
        return made

    @classmethod
    def merge(cls, caches: list[Any]) -> "BatchPackedKVCache":
        """One cache of a batch from those of single sequences.

        Raises:
            ValueError: If they do not store the same formats.
        """
        _require_alike(cls, caches, "recent")
        for each in caches:
            each._quantize_tail()
        made = cls(caches[0].formats, [0] * len(caches))
        made.recent, made.beside = caches[0].recent, caches[0].beside
        used = max(each.used for each in caches)
        parts = [
            (c.store, c.store.slice(0, c.used) if c.used else None, c.used, 1)
            for c in caches
        ]
        made._join(parts, used, made._rows_for(used))
        made.padded = [used - c.used for c in caches]
        made.positions = [c.used for c in caches]
        return made

    def _numbers(self) -> dict[str, Any]:
        return {
            **super()._numbers(),
            "padded": self.padded,
            "positions": self.positions,
        }

    def _set(self, numbers: dict[str, Any], more: list[mx.array]) -> None:
        super()._set(numbers, more)
        self._begin([])
        self.padded, self.positions = numbers["padded"], numbers["positions"]


class BatchPackedRotatingKVCache(_Batch, PackedRotatingKVCache):
    """:class:`PackedRotatingKVCache` of a batch; as in mlx-lm, without ``keep``.

    Args:
        spec (str, CacheSpec or tuple(Format, Format)): What it stores.
        max_size (int): Tokens to keep of each sequence.
        left_padding (list(int)): Tokens before the first real one, of each sequence.
    """

    single_type: type[PackedRotatingKVCache] = PackedRotatingKVCache

    def __init__(self, spec: Spec, max_size: int, left_padding: Sequence[int]):
        PackedCache.__init__(self, spec)
        self._begin(left_padding)
        self.max_size, self.keep = max_size, 0
        self.next = 0
        # Rows written so far, evicted ones too.
        self.written = 0
        # How many of the newest rows are tokens; below 0: padding is to come.
        self.valid = list(self.positions)

    @property
    def padding(self) -> list[int]:
        return [max(0, self.used - n) for n in self.valid]

    @property
    def _offset(self) -> int:
        """By this name mlx-vlm asks for the columns so far."""
        return self.written

    def _pad_left(self, left: list[int]) -> None:
        super()._pad_left(left)
        self.valid = [a - b for a, b in zip(self.valid, left)]

    def prepare(self, **padding: Any) -> None:
        super().prepare(**padding)
        if self.right_padding is not None:
            # Where each sequence will end.
            lengths = padding["lengths"]
            self._ends = [p + int(n) for p, n in zip(self.positions, lengths)]

    def finalize(self) -> None:
        """Turn what is behind each sequence's last token to its front."""
        if self.right_padding is not None:
            self._turn_junk()
            self.right_padding = None

    def _turn_junk(self) -> None:
        """Junk goes to the front, where it is the first to be evicted."""
        shifts = [max(0, p - end) for p, end in zip(self.positions, self._ends)]
        self._settle()
        self._roll(shifts)
        self.valid = [n - shift for n, shift in zip(self.valid, shifts)]

    def _append(self, tokens: Tokens, count: int) -> None:
        if self.right_padding is not None:
            self._turn_junk()
        kept = min(self.used, self.max_size - 1)
        if count == 1 and self.right_padding is None:
            self._append_one(tokens)
        else:
            self._append_many(tokens)
        self.written += count
        self.valid = [min(n, kept) + count for n in self.valid]
        self.positions = [n + count for n in self.positions]

    def _settle(self) -> None:
        """Bring the rows in order."""
        if not self.in_order:
            self.store.keys, self.store.values = self.tokens_in_order()
            self.next = self.used

    def _reading(self) -> Reading:
        reading = super()._reading()
        if self.in_order:
            reading.left_padding = self._padding_of_op()
        elif any(self.padding):
            age = (mx.arange(self.used) - self.next) % self.used
            reading.visible = age >= self.left_padding[:, None, None, None]
        return reading

    def _mask(self, N: int, return_array: bool, window_size: int | None) -> Any:
        mask = super()._mask(N, return_array, window_size)
        if isinstance(mask, mx.array) and N > 1 and any(self.padding):
            before = min(self.max_size - 1, self.used)
            begin = self.left_padding - (self.used - before)
            mask = mask & (mx.arange(before + N) >= begin[:, None, None, None])
        return mask

    def is_trimmable(self) -> bool:
        return self.written < self.max_size

    def trim(self, n: int) -> int:
        n = min(self.written, n)
        self.written -= n
        self.used -= n
        self.next -= n
        self.valid = [count - n for count in self.valid]
        self.positions = [position - n for position in self.positions]
        return n

    def size(self) -> int:
        return min(self.written, self.max_size)

    def _keep(self, rows: list[int]) -> None:
        super()._keep(rows)
        self.valid = [self.valid[i] for i in rows]

    def extend(self, other: "BatchPackedRotatingKVCache") -> None:
        """Add the sequences of another cache.

        Raises:
            ValueError: If it does not store the same formats or as many tokens.
        """
        _require_alike(type(self), [self, other], "max_size")
        for each in (self, other):
            each._settle()
        used = max(self.used, other.used)
        self._join([self._part(), other._part()], used, used)
        self.next = used
        self.written = max(self.written, other.written)
        self.valid = self.valid + other.valid
        self.positions = self.positions + other.positions

    def extract(self, idx: int) -> PackedRotatingKVCache:
        """The cache of one sequence by itself."""
        self._settle()
        made = self.single_type(self.store.formats, self.max_size)
        made.used = made.next = max(0, self.valid[idx])
        made.seen = max(0, self.positions[idx])
        if made.used:
            made.store = _one(self.store, idx, self.used - made.used, self.used)
        return made

    @classmethod
    def merge(cls, caches: list[Any]) -> "BatchPackedRotatingKVCache":
        """One cache of a batch from those of single sequences.

        Raises:
            ValueError: If they do not store the same formats or as many tokens.
        """
        _require_alike(cls, caches, "max_size")
        made = cls(caches[0].formats, caches[0].max_size, [0] * len(caches))
        sizes = [min(c.used, c.max_size) for c in caches]
        used = max(sizes)
        parts: list[_Part] = []
        for c, size in zip(caches, sizes):
            tokens = None
            if size:
                rows = c.tokens_in_order()
                tokens = map_tokens(partial(_newest, size), rows)
            parts.append((c.store, tokens, size, 1))
        made._join(parts, used, used)
        made.next = made.written = used
        made.valid = sizes
        made.positions = [c.offset for c in caches]
        return made

    def _numbers(self) -> dict[str, Any]:
        names = ("used", "next", "max_size", "keep", "written", "valid", "positions")
        return {name: getattr(self, name) for name in names}

    def _set(self, numbers: dict[str, Any], more: list[mx.array]) -> None:
        self._begin([])
        super()._set(numbers, more)


class BatchPackedLatentKVCache(LatentMixin, BatchPackedKVCache):
    """:class:`BatchPackedKVCache` of MLA's latents."""

    single_type = PackedLatentKVCache


class BatchPackedRotatingLatentKVCache(LatentMixin, BatchPackedRotatingKVCache):
    """:class:`BatchPackedRotatingKVCache` of MLA's latents."""

    single_type = PackedRotatingLatentKVCache


_BATCH_TYPES: dict[type, Any] = {
    kind.single_type: kind
    for kind in (
        BatchPackedKVCache,
        BatchPackedRotatingKVCache,
        BatchPackedLatentKVCache,
        BatchPackedRotatingLatentKVCache,
    )
}


def batch_type(single: type) -> Any:
    """The class of a batch of caches of this class."""
    return _BATCH_TYPES[single]


_Part = tuple[QuantizedStore, Tokens | None, int, int]


def _joined(parts: list[_Part], used: int, rows: int) -> QuantizedStore:
    """One store of several, whose rows end together at ``used``.

    Each is a store, its tokens in order or ``None``, how many, and how many sequences.
    """
    model, like = next((s, t) for s, t, _, _ in parts if t is not None)
    made = model.emptied()

    def aligned(count: int, x: mx.array) -> mx.array:
        return mx.pad(x, [(0, 0), (0, 0), (used - count, rows - used), (0, 0)])

    def empty(sequences: int, x: mx.array) -> mx.array:
        zeros = rows_like(x[:1], rows)
        return mx.broadcast_to(zeros, (sequences, *zeros.shape[1:]))

    stores = [
        (
            map_tokens(partial(empty, sequences), like)
            if tokens is None
            else map_tokens(partial(aligned, count), tokens)
        )
        for _, tokens, count, sequences in parts
    ]
    keys, values = zip(*stores)
    made.keys = tuple(mx.concatenate(list(each), axis=0) for each in zip(*keys))
    made.values = tuple(mx.concatenate(list(each), axis=0) for each in zip(*values))
    return made


def _newest(count: int, x: mx.array) -> mx.array:
    return x[:, :, -count:]


def _one(store: QuantizedStore, idx: int, begin: int, end: int) -> QuantizedStore:
    """A copy of some rows of one sequence."""
    made = store.emptied()
    made.keys, made.values = map_tokens(
        lambda x: mx.contiguous(x[idx : idx + 1, :, begin:end]),
        (store.keys, store.values),
    )
    return made


def _require_alike(cls: type, caches: list[Any], attribute: str) -> None:
    def alike(cache: Any) -> Any:
        if not isinstance(cache, PackedCache):
            return type(cache).__name__
        # An empty cache has no group sizes yet.
        formats = [(made.mode, made.bits, made.rotated) for made in cache.formats]
        return formats, getattr(cache, attribute)

    found = [alike(each) for each in caches]
    if any(each != found[0] for each in found):
        raise ValueError(
            f"[{cls.__name__}] the caches must have the same formats and {attribute}; "
            f"got {found}."
        )
