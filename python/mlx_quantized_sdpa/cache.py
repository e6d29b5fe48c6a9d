"""Quantized KV caches of single sequences, for mlx-lm's cache protocol."""

import json
import sys
import weakref
from collections.abc import Iterable
from copy import copy
from typing import Any

import mlx.core as mx

from .dense import visible_keys
from .reading import CausalMask, Reading, kv_views, latent_views
from .spec import CacheSpec, Format
from .store import Formats, LatentStore, QuantizedStore, Tokens, map_tokens

# Of the state that caches are saved as.
STATE_VERSION = 1

# Dense tokens are quantized so many at a time as they age.
RECENT_BLOCK = 32

Spec = str | CacheSpec | Formats


class PackedCache:
    """What all the quantized caches have in common.

    Attributes:
        store (QuantizedStore): The tokens, in rows.
        used (int): Rows in use.
        step (int): Rows are added by so many.
        beside (ref, optional): Of the pool that other layers of the model have.
    """

    step = 256
    beside: weakref.ref[Any] | None = None
    store_type: type[QuantizedStore] = QuantizedStore

    def __init__(self, spec: Spec):
        formats, _ = as_formats(spec)
        self.store = self.store_type(formats)
        self.used = 0

    @property
    def keys(self) -> Any:
        """Parts of K; ``None`` while empty."""
        return list(self.store.keys) or None

    @keys.setter
    def keys(self, parts: Iterable[mx.array]) -> None:
        self.store.keys = tuple(parts)

    @property
    def values(self) -> Any:
        """Parts of V; ``None`` while empty."""
        return list(self.store.values) or None

    @values.setter
    def values(self, parts: Iterable[mx.array]) -> None:
        self.store.values = tuple(parts)

    @property
    def formats(self) -> Formats:
        """Of K and V, with the group sizes that the first tokens fixed."""
        return self.store.formats

    @property
    def offset(self) -> Any:
        """The position of the next token: an int, or int32 ``[B]`` of a batch."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.store.nbytes

    def empty(self) -> bool:
        return not self.store.keys

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Quantize and append K and V of new tokens, ``[B, N_kv, T, D]``.

        Returns:
            tuple: What stands for K and V of all tokens in attention.

        Raises:
            ValueError: If they do not suit the cache, which is then as before.
        """
        self._check(keys, values)
        self._append(self.store.quantize(keys, values), keys.shape[2])
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Any, Any]:
        """What stands for K and V in attention."""
        return kv_views(self._reading())

    def to_quantized(self, group_size: int = 64, bits: int = 8) -> "PackedCache":
        """The cache itself: it is quantized, as its own spec says."""
        return self

    def _check(self, keys: mx.array, values: mx.array) -> None:
        store = self.store
        if not store.keys:
            return
        batch, heads = store.keys[0].shape[:2]
        wanted = (batch, heads, *store.dims)
        found = (*keys.shape[:2], keys.shape[-1], values.shape[-1])
        if found != wanted:
            raise ValueError(
                f"[{type(self).__name__}] batch, KV heads and head dims of K and V "
                f"must be those of the tokens before, {wanted}; got {found}."
            )

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> Any:
        """The mask of ``N`` new tokens: a word, or an array where it must be one.

        Models ask for it before they write any layer.

        Raises:
            PoolExhausted: If other layers have blocks, and too few for the tokens.
            RuntimeError: If the attention that reads these caches is switched off.
        """
        require_switch()
        self._require_blocks(N)
        return self._mask(N, return_array, window_size)

    def _require_blocks(self, count: int) -> None:
        pool = self.beside() if self.beside is not None else None
        if pool is not None:
            pool.require_for(self._lengths(), count)

    def _lengths(self) -> list[int]:
        """Tokens of each sequence, where those to come are all tokens."""
        return []

    def _mask(self, N: int, return_array: bool, window_size: int | None) -> Any:
        raise NotImplementedError

    def _append(self, tokens: Tokens, count: int) -> None:
        raise NotImplementedError

    def _reading(self) -> Reading:
        raise NotImplementedError

    # Before mlx-lm 0.32 there are arrays in `state` and text in `meta_state`.
    @property
    def state(self) -> Any:
        arrays = [*self.store.keys, *self.store.values, *self._more_arrays()]
        return arrays if has_meta_state() else [self._text(), *arrays]

    @state.setter
    def state(self, state: Any) -> None:
        if has_meta_state() and not (state and isinstance(state[0], str)):
            self._arrays = list(state or ())
        else:
            self._restore(state[0], list(state[1:]))

    @property
    def meta_state(self) -> str:
        return self._text()

    @meta_state.setter
    def meta_state(self, text: str) -> None:
        self._restore(text, self.__dict__.pop("_arrays", []))

    @classmethod
    def from_state(cls, state: Any, meta_state: str | None = None) -> "PackedCache":
        """A cache as :attr:`state` gave it.

        Raises:
            ValueError: If the state is of another version or class, or not whole.
        """
        made = cls.__new__(cls)
        if meta_state is None:
            made.state = state
        else:
            arrays = [x for x in state or () if not isinstance(x, str)]
            made._restore(meta_state, arrays)
        return made

    @classmethod
    def merge(cls, caches: list[Any]) -> Any:
        """One cache of a batch from those of single sequences."""
        from . import batch_cache

        return batch_cache.batch_type(cls).merge(caches)

    def used_arrays(self) -> list[mx.array]:
        """The arrays of :attr:`state` without the rows that are not in use."""
        keys, values = self.store.slice(0, self._rows_in_store())
        return [*keys, *values, *self._more_arrays()]

    def _more_arrays(self) -> list[mx.array]:
        return []

    def _numbers(self) -> dict[str, Any]:
        """What the state has beside arrays; ``_set`` sets each."""
        return {"used": self.used}

    def _text(self) -> str:
        store = self.store
        return json.dumps(
            {
                "version": STATE_VERSION,
                "class": type(self).__name__,
                "formats": [vars(each) for each in store.formats],
                "dtype": _dtype_name(store.dtype),
                "dtype_v": _dtype_name(store.dtype_v),
                "dims": store.dims,
                "parts": [len(store.keys), len(store.values)],
                **self._numbers(),
            }
        )

    def _restore(self, text: str, arrays: list[mx.array]) -> None:
        name = type(self).__name__
        numbers = _parse_state(name, text)
        keys, values = numbers.pop("parts")
        k, v = (Format(**each) for each in numbers.pop("formats"))
        store = self.store_type((k, v))
        store.formats = k, v
        dtype = numbers.pop("dtype")
        # V's was K's before it was written beside it.
        store.dtype_v = _dtype(numbers.pop("dtype_v", dtype))
        store.dtype = _dtype(dtype)
        store.dims = tuple(numbers.pop("dims"))
        if len(arrays) < keys + values:
            raise ValueError(
                f"[{name}] the state must have {keys + values} arrays; got "
                f"{len(arrays)}."
            )
        # Copies: arrays that are written in place must be no one else's.
        arrays = list(map(copy, arrays))
        store.keys = tuple(arrays[:keys])
        store.values = tuple(arrays[keys : keys + values])
        self.store = store
        self._set(numbers, arrays[keys + values :])
        check_store(name, store, self._rows_in_store())

    def _rows_in_store(self) -> int:
        return self.used

    def _set(self, numbers: dict[str, Any], more: list[mx.array]) -> None:
        self.used = numbers["used"]


class PackedKVCache(PackedCache):
    """A cache that grows, every token quantized as it is written.

    Args:
        spec (str, CacheSpec or tuple(Format, Format)): What it stores. Of a spec with
          ``recent`` the newest tokens are dense, and are quantized in blocks.
        capacity (int, optional): Allocate so many rows at once and never more.
          Default: as many as are needed, in steps.
    """

    def __init__(self, spec: Spec, capacity: int | None = None):
        super().__init__(spec)
        _, self.recent = as_formats(spec)
        self.capacity = capacity
        # Dense K and V of the newest tokens, [B, N_kv, T, D].
        self.tail: tuple[mx.array, mx.array] | None = None

    @property
    def keys(self) -> Any:
        """Parts of K; K of the newest tokens where none is quantized yet."""
        if self.store.keys or self.tail is None:
            return super().keys
        return [self.tail[0]]

    @keys.setter
    def keys(self, parts: Iterable[mx.array]) -> None:
        if self.store.keys or self.tail is None:
            self.store.keys = tuple(parts)
        else:
            (newest,) = parts
            self.tail = newest, self.tail[1]

    @property
    def offset(self) -> Any:
        return self.used

    def size(self) -> int:
        return self.used

    def _lengths(self) -> list[int]:
        parts = self.store.keys or self.tail
        return [self.used] * (parts[0].shape[0] if parts else 1)

    @property
    def nbytes(self) -> int:
        return self.store.nbytes + sum(x.nbytes for x in self.tail or ())

    def empty(self) -> bool:
        return super().empty() and self.tail is None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        count = keys.shape[2]
        if self.capacity is not None and self.used + count > self.capacity:
            raise ValueError(
                f"[{type(self).__name__}] the cache has room for {self.capacity} "
                f"tokens; got {self.used + count}."
            )
        if not self.recent:
            return super().update_and_fetch(keys, values)
        self._check(keys, values)
        self.store.fit(keys, values)
        before = self.tail, self.used
        if self.tail is not None:
            old_keys, old_values = self.tail
            keys = mx.concatenate([old_keys, keys], axis=2)
            values = mx.concatenate([old_values, values], axis=2)
        self.tail, self.used = (keys, values), self.used + count
        aged = max(0, keys.shape[2] - self.recent) // RECENT_BLOCK * RECENT_BLOCK
        try:
            self._quantize_tail(aged)
        except BaseException:
            self.tail, self.used = before
            raise
        return self.keys_and_values()

    def _quantize_tail(self, count: int | None = None) -> None:
        """Quantize the oldest ``count`` dense tokens; all of them by default."""
        if self.tail is None or count == 0:
            return
        keys, values = self.tail
        count = keys.shape[2] if count is None else count
        begin = self.used - keys.shape[2]
        tokens = self.store.quantize(keys[:, :, :count], values[:, :, :count])
        self._write(begin, tokens, count)
        rest = keys[:, :, count:], values[:, :, count:]
        # Copies: a view would keep the chunk of a long prompt alive.
        old, new = map(mx.contiguous, rest)
        self.tail = (old, new) if old.shape[2] else None

    def _append(self, tokens: Tokens, count: int) -> None:
        self._write(self.used, tokens, count)
        self.used += count

    def _write(self, begin: int, tokens: Tokens, count: int) -> None:
        wanted = self.capacity or -(-(begin + count) // self.step) * self.step
        if begin + count > self.store.rows:
            self.store.reserve(wanted, tokens)
        self.store.write(begin, tokens)

    def _rows_in_store(self) -> int:
        return self.used - (self.tail[0].shape[2] if self.tail else 0)

    def _reading(self) -> Reading:
        rows = self._rows_in_store()
        tokens = self.store.read(0, rows) if rows else ((), ())
        return Reading(self.store, tokens, recent=self.tail)

    def _mask(self, N: int, return_array: bool, window_size: int | None) -> Any:
        if return_array:
            return visible_keys((N, self.used + N), True, window_size, None)
        return None if N == 1 and window_size is None else CausalMask(window_size)

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        """Forget the newest ``n`` tokens; returns how many there were."""
        n = min(self.used, n)
        self.used -= n
        if self.tail is not None:
            left = self.tail[0].shape[2] - n
            keys, values = self.tail
            self.tail = (keys[:, :, :left], values[:, :, :left]) if left > 0 else None
        return n

    def _more_arrays(self) -> list[mx.array]:
        return list(self.tail or ())

    def _numbers(self) -> dict[str, Any]:
        return {"used": self.used, "recent": self.recent, "capacity": self.capacity}

    def _set(self, numbers: dict[str, Any], more: list[mx.array]) -> None:
        super()._set(numbers, more)
        self.recent, self.capacity = numbers["recent"], numbers["capacity"]
        self.tail = (more[0], more[1]) if more else None


class PackedRotatingKVCache(PackedCache):
    """A cache of the newest ``max_size`` tokens and of the first ``keep``.

    One new token takes the place of the oldest; several are put in order behind those
    before, as in mlx-lm's ``RotatingKVCache``.

    Args:
        spec (str, CacheSpec or tuple(Format, Format)): What it stores.
        max_size (int): Tokens to keep.
        keep (int): Of these, how many are the first of all.
    """

    def __init__(self, spec: Spec, max_size: int, keep: int = 0):
        super().__init__(spec)
        if not 0 <= keep < max_size:
            raise ValueError(
                f"[{type(self).__name__}] keep must be at least 0 and below max_size; "
                f"got {keep} and {max_size}."
            )
        self.max_size = max_size
        self.keep = keep
        # Tokens so far, evicted ones too.
        self.seen = 0
        # The row that the next token is written to, at first that behind the last.
        self.next = 0

    @property
    def offset(self) -> Any:
        return self.seen

    def size(self) -> int:
        return min(self.seen, self.max_size)

    @property
    def in_order(self) -> bool:
        """Whether the rows are in the tokens' order."""
        return self.next == self.used

    def tokens_in_order(self) -> Tokens:
        """What the rows hold, the oldest first."""
        tokens = self.store.slice(0, self.used)
        if self.in_order:
            return tokens
        keep, begin = self.keep, self.next
        return map_tokens(
            lambda x: mx.concatenate(
                [x[:, :, :keep], x[:, :, begin:], x[:, :, keep:begin]], axis=2
            ),
            (self.store.keys, self.store.values),
        )

    def _append(self, tokens: Tokens, count: int) -> None:
        if count == 1:
            self._append_one(tokens)
        else:
            self._append_many(tokens)
        self.seen += count

    def _append_many(self, tokens: Tokens) -> None:
        if self.store.keys:
            # Each query has max_size tokens: it and those before.
            drop = self.used - self.max_size + 1
            tokens = _behind(self.tokens_in_order(), tokens, self.keep, max(0, drop))
        self.store.keys, self.store.values = tokens
        self.used = self.next = self.store.rows

    def _append_one(self, tokens: Tokens) -> None:
        if self.used > self.max_size:
            drop, keep = self.used - self.max_size, self.keep
            none = map_tokens(lambda x: x[:, :, :0], tokens)
            # Rows are in order here: only several tokens make so many.
            kept = _behind(self.store.slice(0, self.used), none, keep, drop)
            self.store.keys, self.store.values = kept
            self.used = self.next = self.max_size
        if self.next == self.max_size:
            self.next = self.keep
        if self.next >= self.store.rows:
            rows = min(self.store.rows + self.step, self.max_size)
            self.store.reserve(rows, tokens)
        self.store.write(self.next, tokens)
        self.next += 1
        self.used = max(self.used, self.next)

    def _reading(self) -> Reading:
        tokens = self.store.read(0, self.used)
        return Reading(self.store, tokens, window_size=self.max_size)

    def _mask(self, N: int, return_array: bool, window_size: int | None) -> Any:
        window = min(window_size or self.max_size, self.max_size)
        before = min(self.max_size - 1, self.used)
        if N == 1 and not return_array and window == self.max_size:
            return None
        if N == 1:
            return self._visible_to_next(window)
        if return_array:
            return visible_keys((N, before + N), True, window, None)
        return CausalMask(window)

    def _visible_to_next(self, window: int) -> mx.array:
        """Which rows the next token sees, once it is in its row."""
        rows = min(self.used + 1, self.max_size)
        newest = self.keep if self.next >= self.max_size else self.next
        return mx.roll(mx.arange(rows) >= rows - window, newest + 1)

    def is_trimmable(self) -> bool:
        return self.seen < self.max_size

    def trim(self, n: int) -> int:
        """Forget the newest ``n`` tokens; only before the first has been evicted."""
        n = min(self.seen, n)
        self.seen -= n
        self.used -= n
        self.next -= n
        return n

    def _numbers(self) -> dict[str, Any]:
        names = ("used", "seen", "next", "max_size", "keep")
        return {name: getattr(self, name) for name in names}

    def _set(self, numbers: dict[str, Any], more: list[mx.array]) -> None:
        for name, value in numbers.items():
            setattr(self, name, value)


class LatentMixin(PackedCache):
    """Makes a cache one of MLA's latents and rotary parts."""

    store_type = LatentStore

    def keys_and_values(self) -> tuple[Any, Any]:
        return latent_views(self._reading())

    def _mask(self, N: int, return_array: bool, window_size: int | None) -> Any:
        # Models that ask for an array add it to scores that they compute; attention
        # on the latents makes its own of numbers.
        if return_array:
            return None
        # Others put several into dense attention, which knows no padding in numbers.
        padded = N > 1 and any(getattr(self, "padding", ()))
        return super()._mask(N, padded, window_size)


class PackedLatentKVCache(LatentMixin, PackedKVCache):
    """:class:`PackedKVCache` of MLA's latents; every token is quantized."""

    def __init__(self, spec: Spec, capacity: int | None = None):
        super().__init__(as_formats(spec)[0], capacity)


class PackedRotatingLatentKVCache(LatentMixin, PackedRotatingKVCache):
    """:class:`PackedRotatingKVCache` of MLA's latents."""


def as_formats(spec: Spec) -> tuple[Formats, int]:
    """K's and V's format and how many tokens stay dense, of what a cache is given."""
    if isinstance(spec, tuple):
        return spec, 0
    parsed = CacheSpec.parse(spec)
    return (parsed.k, parsed.v), parsed.recent


def check_store(name: str, store: QuantizedStore, rows: int) -> None:
    """Refuse arrays that are not what a store of these formats and dims has."""
    parts = [*store.keys, *store.values]
    found = [(part.shape, _dtype_name(part.dtype)) for part in parts]
    if not parts:
        wanted: Any = []
        whole = rows == 0
    else:
        batch, heads, room = parts[0].shape[:3] if parts[0].ndim == 4 else (0, 0, 0)
        # One token: without any, formats have no shapes.
        types = store.dtype, store.dtype_v
        tokens = [mx.zeros((1, 1, 1, n), each) for n, each in zip(store.dims, types)]
        made = type(store)(store.formats).quantize(tokens[0], tokens[1])
        wanted = [
            ((batch, heads, room, *x.shape[3:]), _dtype_name(x.dtype))
            for x in (*made[0], *made[1])
        ]
        whole = found == wanted and 0 <= rows <= room
    if not whole:
        raise ValueError(
            f"[{name}] the arrays of the state must hold {rows} tokens in the shapes "
            f"and types {wanted}; got {found}."
        )


def _dtype_name(dtype: mx.Dtype | None) -> str:
    return str(dtype).rpartition(".")[2]


def _dtype(name: str) -> mx.Dtype | None:
    return None if name == "None" else getattr(mx, name)


def require_switch() -> None:
    """Refuse a model whose attention would take what stands for K and V for arrays.

    Raises:
        RuntimeError: If the attention that reads quantized caches is switched off.
    """
    from .hook import is_enabled

    if not is_enabled():
        raise RuntimeError(
            "[mlx_quantized_sdpa] the attention that reads quantized caches must be "
            "switched on, by mlx_quantized_sdpa.enable(); got a model called with such "
            "caches while it is off."
        )


def _behind(before: Tokens, tokens: Tokens, keep: int, drop: int) -> Tokens:
    """``tokens`` behind others, of which ``drop`` from the row ``keep`` on are left."""

    def put(x: mx.array, new: mx.array) -> mx.array:
        kept = [x[:, :, :keep], x[:, :, keep + drop :]] if drop else [x]
        return mx.concatenate([*kept, new], axis=2)

    keys, values = (tuple(map(put, old, new)) for old, new in zip(before, tokens))
    return keys, values


def _parse_state(name: str, text: Any) -> dict[str, Any]:
    try:
        numbers: dict[str, Any] = json.loads(text)
        version, made_by = numbers.pop("version"), numbers.pop("class")
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(
            f"[{name}] the state must begin with what describes it; got {text!r:.60}."
        ) from None
    if version != STATE_VERSION:
        raise ValueError(
            f"[{name}] the state must be of version {STATE_VERSION}; got {version}."
        )
    if made_by != name:
        raise ValueError(f"[{name}] the state must be one of {name}; got {made_by}.")
    return numbers


def has_meta_state() -> bool:
    """Whether the package that keeps the caches has text in ``meta_state``."""
    for package in ("mlx_lm", "mlx_vlm"):
        if (module := sys.modules.get(f"{package}.models.cache")) is not None:
            return hasattr(module._BaseCache, "meta_state")
    return False
