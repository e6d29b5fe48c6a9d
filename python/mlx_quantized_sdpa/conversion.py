"""Quantized caches in the place of mlx-lm's dense ones, empty or with tokens."""

import warnings
from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from .batch_cache import (
    BatchPackedKVCache,
    BatchPackedLatentKVCache,
    BatchPackedRotatingKVCache,
    BatchPackedRotatingLatentKVCache,
)
from .cache import (
    PackedCache,
    PackedKVCache,
    PackedLatentKVCache,
    PackedRotatingKVCache,
    PackedRotatingLatentKVCache,
)
from .spec import DENSE, CacheSpec, Format
from .store import Formats, map_tokens

# As mlx-lm keeps them where a model has no say in it.
KEEP = 4


def cache_types() -> tuple[type, ...]:
    """All classes of quantized caches."""
    return (
        PackedKVCache,
        PackedRotatingKVCache,
        PackedLatentKVCache,
        PackedRotatingLatentKVCache,
        BatchPackedKVCache,
        BatchPackedRotatingKVCache,
        BatchPackedLatentKVCache,
        BatchPackedRotatingLatentKVCache,
    )


def to_quantized(
    prompt_cache: list[Any], kv: str | CacheSpec, model: Any = None
) -> list[Any]:
    """The same tokens in quantized caches; those that are quantized stay as they are.

    It switches on the fused attention that reads them, as :func:`.enable` does.

    Args:
        prompt_cache (list): Caches of mlx-lm, one a layer.
        kv (str or CacheSpec): What the new ones store.
        model (Module, optional): Whose caches they are; needed for those of MLA.

    Returns:
        list: Caches, one a layer. What is no KV cache is the same object.

    Raises:
        ImportError: If mlx-lm is not there, or not as this module knows it.
        ValueError: If ``kv`` is no spec, or a format cannot hold the tokens.
    """
    from .hook import switch_on

    switch_on()
    latent = model is not None and has_latents(model)
    return convert(prompt_cache, CacheSpec.parse(kv), latent=latent)


def convert(
    caches: list[Any],
    spec: CacheSpec,
    max_kv_size: int | None = None,
    *,
    latent: bool = False,
    capacity: int | None = None,
) -> list[Any]:
    """:func:`to_quantized`, of MLA's latents or bounded in size where asked for."""
    members = [[each for each in _members(c) if _is_kv(each)] for c in caches]
    if not latent and has_several(caches):
        warnings.warn(
            "[mlx_quantized_sdpa] the caches stay as they are: a layer of this model "
            "has several.",
            stacklevel=3,
        )
        return caches
    if spec.recent:
        _check_recent(spec, max_kv_size, latent, members)
    _warn_of_others(caches)
    layers = sum(map(len, members))
    conversion = _Conversion(spec, max_kv_size, latent, capacity, layers)
    return [conversion.layer(cache) for cache in caches]


def _check_recent(
    spec: CacheSpec, max_kv_size: int | None, latent: bool, members: list[list[Any]]
) -> None:
    """Refuse, or say of some layers, that the newest tokens are quantized too."""
    why = None
    if max_kv_size is not None:
        why = "with max_kv_size each token is written in the place of the oldest one"
    elif latent:
        why = "MLA's latents are K and V in one"
    if why is not None:
        raise ValueError(
            f"[mlx_quantized_sdpa] a spec without recent is required, as {why}; got "
            f"{spec}."
        )
    kinds = [type(cache).__name__ for each in members for cache in each]
    sliding = sum("Rotating" in kind for kind in kinds)
    if sliding and not any(rule.where == "sliding" for rule in spec.rules):
        warnings.warn(
            f"[mlx_quantized_sdpa] recent{spec.recent} does not hold for {sliding} of "
            f"{len(kinds)} layers, whose windows slide; +sliding:dense keeps those "
            "dense.",
            stacklevel=4,
        )


def _warn_of_others(caches: list[Any]) -> None:
    """Say which caches of keys and values stay dense."""
    every = [each for cache in caches for each in _members(cache)]
    kinds = [type(each) for each in every if hasattr(each, "update_and_fetch")]
    own = __name__.partition(".")[0]
    others = [
        kind.__name__
        for kind in kinds
        if kind.__name__ not in _Conversion.KINDS
        and kind.__module__.partition(".")[0] != own
    ]
    if others:
        warnings.warn(
            f"[mlx_quantized_sdpa] {len(others)} of {len(kinds)} caches stay as they "
            f"are: {', '.join(sorted(set(others)))} has no quantized form.",
            stacklevel=4,
        )


def has_latents(model: Any) -> bool:
    """Whether the KV caches of a model hold MLA's latents, and nothing else does."""
    modules = model.modules() if hasattr(model, "modules") else []
    found = [m for m in modules if hasattr(m, "embed_q") and hasattr(m, "unembed_out")]
    return bool(found) and not any(hasattr(m, "indexer") for m in found)


def other_formats(caches: list[Any], spec: CacheSpec) -> list[str]:
    """What KV caches of a model store where a spec says something else."""
    members = [each for cache in caches for each in _members(cache)]
    kinds = [c for c in members if _is_kv(c) or isinstance(c, PackedCache)]
    found = set()
    for layer, cache in enumerate(kinds):
        sliding = "Rotating" in type(cache).__name__
        wanted = spec.formats_for(layer, len(kinds), sliding)
        stored = (DENSE, DENSE)
        if isinstance(cache, PackedCache):
            stored = cache.formats
        elif type(cache).__name__ == "QuantizedKVCache":
            stored = (Format("affine", cache.bits, cache.group_size),) * 2
        if not all(map(_is_as_wanted, stored, wanted)):
            pair = dict.fromkeys(map(str, stored))
            found.add(" and ".join(pair))
    return sorted(found)


def _is_as_wanted(stored: Format, wanted: Format) -> bool:
    alike = [(f.mode, f.bits, f.rotated) for f in (stored, wanted)]
    return alike[0] == alike[1] and wanted.group_size in (None, stored.group_size)


def kv_names(caches: list[Any]) -> tuple[list[str], list[str]]:
    """The kinds of cache that have a quantized form, and those that have none."""
    kinds = {type(each).__name__ for cache in caches for each in _members(cache)}
    return sorted(kinds & {*_Conversion.KINDS}), sorted(kinds - {*_Conversion.KINDS})


def has_several(caches: list[Any]) -> bool:
    """Whether a layer has several KV caches.

    A second one is for an index or the like, which reads its arrays.
    """
    return any(sum(map(_is_kv, _members(cache))) > 1 for cache in caches)


def _members(cache: Any) -> Iterator[Any]:
    if type(cache).__name__ == "CacheList":
        for each in cache.caches:
            yield from _members(each)
    else:
        yield cache


def _is_kv(cache: Any) -> bool:
    return type(cache).__name__ in _Conversion.KINDS


class _Conversion:
    """One conversion; layers are counted as they come."""

    def __init__(
        self,
        spec: CacheSpec,
        max_kv_size: int | None,
        latent: bool,
        capacity: int | None,
        layers: int,
    ):
        self.spec = spec
        self.max_kv_size = max_kv_size
        self.latent = latent
        self.capacity = capacity
        self.layers = layers
        self.count = 0

    def layer(self, cache: Any) -> Any:
        if type(cache).__name__ == "CacheList":
            return type(cache)(*map(self.layer, cache.caches))
        if not _is_kv(cache):
            return cache
        kind = type(cache).__name__
        formats = self.spec.formats_for(self.count, self.layers, "Rotating" in kind)
        self.count += 1
        made: PackedCache = self.KINDS[kind](self, cache, formats)
        return made

    def _with_recent(self, formats: Formats) -> CacheSpec:
        """Of a layer whose newest tokens stay dense where the spec says so."""
        recent = 0 if formats[0].is_dense else self.spec.recent
        return CacheSpec(*formats, recent=recent)

    @property
    def _rotating_type(self) -> type[PackedRotatingKVCache]:
        return PackedRotatingLatentKVCache if self.latent else PackedRotatingKVCache

    def _growing(self, cache: Any, formats: Formats) -> PackedCache:
        if self.max_kv_size is not None and cache.empty():
            return self._rotating_type(formats, self.max_kv_size, KEEP)
        kind = PackedLatentKVCache if self.latent else PackedKVCache
        made = kind(self._with_recent(formats), self.capacity)
        if not cache.empty() and cache.offset:
            end = cache.offset
            _fill(made, cache.keys[:, :, :end], cache.values[:, :, :end])
        return made

    def _rotating(self, cache: Any, formats: Formats) -> PackedCache:
        size = min(cache.max_size, self.max_kv_size or cache.max_size)
        if not cache.empty():
            size = cache.max_size
        made = self._rotating_type(formats, size, cache.keep)
        if not cache.empty() and cache.offset:
            rows = min(cache.keys.shape[2], cache.offset)
            keys, values = (x[:, :, :rows] for x in (cache.keys, cache.values))
            _put(made, keys, values)
            made.used, made.next, made.seen = rows, cache._idx, cache.offset
        return made

    def _batch(self, cache: Any, formats: Formats) -> PackedCache:
        kind = BatchPackedLatentKVCache if self.latent else BatchPackedKVCache
        made = kind(self._with_recent(formats), cache.left_padding.tolist())
        made.positions = cache.offset.tolist()
        if not cache.empty() and cache._idx:
            end = cache._idx
            _put(made, cache.keys[:, :, :end], cache.values[:, :, :end])
            made.used = end
        return made

    def _batch_rotating(self, cache: Any, formats: Formats) -> PackedCache:
        kind = BatchPackedRotatingKVCache
        if self.latent:
            kind = BatchPackedRotatingLatentKVCache
        padding = cache.left_padding.tolist()
        made = kind(formats, cache.max_size, padding)
        made.positions = cache.offset.tolist()
        if not cache.empty() and cache._offset:
            rows = min(cache.keys.shape[2], cache._offset)
            _put(made, cache.keys[:, :, :rows], cache.values[:, :, :rows])
            made.used, made.next, made.written = rows, cache._idx, cache._offset
            made.valid = [min(rows, rows - n) for n in padding]
        return made

    def _quantized(self, cache: Any, formats: Formats) -> PackedCache:
        """Of mlx-lm's own quantized cache."""
        made = PackedKVCache(self._with_recent(formats))
        if cache.empty() or not cache.offset:
            return made
        end, own = cache.offset, Format("affine", cache.bits, cache.group_size)
        parts = map_tokens(lambda x: x[:, :, :end], (cache.keys, cache.values))
        keys, values = (own.dequantize(each, each[1].dtype) for each in parts)
        fitted = [each.for_head_dim(keys.shape[-1]) for each in formats]
        if fitted == [own, own] and not made.recent:
            # Its codes as they are: quantizing again would round again.
            made.store.quantize(keys[:, :, :0], values[:, :, :0])
            made.store.keys, made.store.values = parts
            made.used = end
        else:
            _fill(made, keys, values)
        return made

    KINDS = {
        "KVCache": _growing,
        "RotatingKVCache": _rotating,
        "BatchKVCache": _batch,
        "BatchRotatingKVCache": _batch_rotating,
        "QuantizedKVCache": _quantized,
    }


def _fill(made: PackedCache, keys: mx.array, values: mx.array) -> None:
    """Let the cache take all tokens, and free nothing of theirs before it has."""
    made.update_and_fetch(keys, values)
    mx.eval(made.store.keys, made.store.values)


def _put(made: PackedCache, keys: mx.array, values: mx.array) -> None:
    """Set the rows of the cache, in the order that they have."""
    tokens = made.store.quantize(keys, values)
    made.store.keys, made.store.values = tokens
    mx.eval(tokens)
