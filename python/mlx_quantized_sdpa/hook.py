"""Switching on quantized caches and the fused op in mlx-lm's and mlx-vlm's models."""

import importlib
import re
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import mlx.core as mx

from . import persistence
from ._native import quantized_scaled_dot_product_attention
from .cache import has_meta_state
from .capped import attending, capped_layers
from .conversion import (
    cache_types,
    convert,
    has_latents,
    has_several,
    kv_names,
    other_formats,
)
from .layers import ATTENTION, namespaces, needs_arrays
from .paged import PagedKVCache, PagedPool
from .reading import (
    CausalMask,
    KVView,
    LatentView,
    RopeScores,
    attend_latents,
    attend_masked_latents,
    attend_views,
    project,
)
from .spec import CacheSpec

_QUANTIZED = "quantized_scaled_dot_product_attention"
_GENERAL = ATTENTION
_PACKAGES = ("mlx_lm", "mlx_vlm")
# Those before run in the thread that imported them only, on the MLX of this package.
_OLDEST_LM = "0.31.3"
# Before mlx-lm 0.32 these take the K and V of another layer from its cache's `state`.
_READ_STATE = ("mlx_lm.models.afm7", "mlx_lm.models.gemma3n")


def enable(
    model: Any = None,
    kv: str | CacheSpec | PagedPool | None = None,
    *,
    max_kv_size: int | None = None,
    force_fused: bool = False,
) -> None:
    """Give models quantized KV caches, and attention over them that is fused.

    It reaches every model of mlx-lm, and of mlx-vlm where that has been imported,
    loaded already or later. mlx-lm's own quantized caches are read by the fused op too.

    Args:
        model (Module, optional): The model that gets quantized caches wherever one is
          made for it. Default: every model.
        kv (str, CacheSpec or PagedPool, optional): What they store, such as
          ``"k8v4"``; see :meth:`CacheSpec.parse`. With a pool, of one model, its blocks
          hold them. Default: the kinds of cache stay as they are.
        max_kv_size (int, optional): Keep so many tokens where all would be kept, and of
          those the first four; in batches, as mlx-lm has it, the newest alone. Default:
          what the caller asks for.
        force_fused (bool): Raise where the op has no fused kernel, instead of
          computing the same by other ops.

    Raises:
        ImportError: If mlx-lm is not there, or not as this module knows it.
        ValueError: If ``kv`` is no spec.
    """
    if isinstance(model, str | CacheSpec):
        raise ValueError(
            "[mlx_quantized_sdpa.enable] model must be a model; for every model say "
            f"kv={str(model)!r}; got {model!r}."
        )
    wanted = None if kv is None else _wanted(model, kv, max_kv_size)
    global _hook
    if _hook is None:
        hook = _Hook()
        hook.put()
        _hook = hook
    else:
        _hook.put()
    _hook.force_fused = force_fused
    if wanted is None:
        return
    if model is None:
        _hook.everywhere = wanted
    else:
        _hook.put_caches(_language_model(model), wanted)


def switch_on() -> None:
    """:func:`enable` that leaves as it is what has been switched on already."""
    if _hook is None:
        enable()
    else:
        _hook.put()


def disable(model: Any = None) -> None:
    """Undo :func:`enable`, for one model or altogether; again it does nothing.

    Raises:
        RuntimeError: If something else has replaced what was replaced meanwhile.
    """
    global _hook
    if _hook is None:
        return
    if model is not None:
        _hook.remove_caches(_language_model(model))
        return
    _hook.remove()
    for each in list(_hook.models.values()):
        if (found := each()) is not None:
            _hook.remove_caches(found)
    _hook = None


def is_enabled() -> bool:
    """Whether mlx-lm's attention is the fused one: until all is disabled."""
    return _hook is not None


@contextmanager
def enabled(
    model: Any = None,
    kv: str | CacheSpec | PagedPool | None = None,
    *,
    max_kv_size: int | None = None,
    force_fused: bool = False,
) -> Iterator[None]:
    """:func:`enable` for a block; what was before comes back after it."""
    before = None if _hook is None else (_hook.force_fused, _hook.everywhere)
    own = None if model is None else _MakeCache.of(_language_model(model))
    enable(model, kv, max_kv_size=max_kv_size, force_fused=force_fused)
    try:
        yield
    finally:
        if model is not None and _hook is not None:
            _hook.remove_caches(_language_model(model))
            if own is not None:
                _hook.put_caches(_language_model(model), own.wanted)
        if before is None:
            disable()
        elif _hook is not None:
            _hook.force_fused, _hook.everywhere = before


def make_prompt_cache(
    model: Any,
    kv: str | CacheSpec | PagedPool,
    max_kv_size: int | None = None,
    capacity: int | None = None,
) -> list[Any]:
    """A quantized KV cache for each layer of a model, for ``prompt_cache=``.

    It switches on the fused attention that reads them, as :func:`enable` does.

    Args:
        model (Module): A model of mlx-lm or mlx-vlm.
        kv (str, CacheSpec or PagedPool): What the caches store, such as ``"k8v4"``, or
          the pool whose blocks hold it.
        max_kv_size (int, optional): Keep so many tokens, and of those the first four,
          where all would be kept.
        capacity (int, optional): Allocate so many tokens at once and never more, where
          all are kept. Default: as they come.

    Returns:
        list: Caches, as mlx-lm's own ``make_prompt_cache`` gives them.

    Raises:
        ImportError: If mlx-lm is not there, or not as this module knows it.
        ValueError: If ``kv`` is no spec, or a pool with a size.
    """
    if isinstance(kv, PagedPool):
        _check_no_size(max_kv_size=max_kv_size, capacity=capacity)
        return kv.make_prompt_cache(model)
    parsed = CacheSpec.parse(kv)
    switch_on()
    model = _language_model(model)
    stock, latent = _stock_caches(model), has_latents(model)
    if (why := _why_not(model, stock, latent)) is not None:
        warnings.warn(
            f"[mlx_quantized_sdpa] the caches stay as they are: this model {why}.",
            stacklevel=2,
        )
        return stock
    return convert(stock, parsed, max_kv_size, latent=latent, capacity=capacity)


@dataclass(frozen=True)
class _Wanted:
    """What the caches of a model are to be."""

    spec: CacheSpec
    max_kv_size: int | None

    def make(self, model: Any, max_kv_size: int | None = None) -> list[Any]:
        return make_prompt_cache(model, self.spec, max_kv_size or self.max_kv_size)


@dataclass(frozen=True)
class _WantedBlocks:
    """The caches of a model are to be in a pool."""

    pool: PagedPool

    def make(self, model: Any, max_kv_size: int | None = None) -> list[Any]:
        return make_prompt_cache(model, self.pool, max_kv_size)


def _check_no_size(**sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is not None:
            raise ValueError(
                "[mlx_quantized_sdpa.make_prompt_cache] caches in a pool must be made "
                f"without {name}; got {size}."
            )


def _wanted(
    model: Any, kv: str | CacheSpec | PagedPool, max_kv_size: int | None
) -> "_Wanted | _WantedBlocks":
    if not isinstance(kv, PagedPool):
        return _Wanted(CacheSpec.parse(kv), max_kv_size)
    if model is None or max_kv_size is not None:
        raise ValueError(
            "[mlx_quantized_sdpa.enable] a pool must come with its model and without "
            f"max_kv_size; got {type(model).__name__} and {max_kv_size}."
        )
    return _WantedBlocks(kv)


class _MakeCache:
    """Takes the place of a model's ``make_cache``, as an attribute of its own."""

    def __init__(self, model: Any, wanted: _Wanted | _WantedBlocks):
        # The model holds this object: the other way round it would never go.
        self.model = weakref.ref(model)
        self.wanted = wanted

    def __call__(self) -> list[Any]:
        model = self.model()
        if model is None:
            raise RuntimeError(
                "[mlx_quantized_sdpa] the model that was enabled must still be there; "
                "got a copy that shares its make_cache: enable() the copy."
            )
        return self.wanted.make(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_MakeCache":
        """Of the model's copy, where that is what is being made."""
        copied = memo.get(id(self.model()))
        if copied is None:
            return self
        if _hook is not None:
            _hook.remember(copied)
        return type(self)(copied, self.wanted)

    @classmethod
    def put(cls, model: Any, wanted: _Wanted | _WantedBlocks) -> None:
        model.make_cache = cls(model, wanted)

    @classmethod
    def of(cls, model: Any) -> "_MakeCache | None":
        found = vars(model).get("make_cache")
        return found if isinstance(found, cls) else None

    @classmethod
    def remove(cls, model: Any) -> None:
        if cls.of(model) is not None:
            del model.make_cache


def _stock_caches(model: Any) -> list[Any]:
    """The caches that the model has by itself."""
    if hasattr(type(model), "make_cache"):
        own: list[Any] = type(model).make_cache(model)
        return own
    package = type(model).__module__.partition(".")[0]
    if package not in _PACKAGES:
        package = _PACKAGES[0]
    cache = importlib.import_module(f"{package}.models.cache")
    return [cache.KVCache() for _ in model.layers]


def _why_not(model: Any, caches: list[Any], latent: bool) -> str | None:
    """Why a model cannot have quantized caches, if it cannot."""
    assert _hook is not None
    modules = model.modules() if hasattr(model, "modules") else [model]
    kinds = {type(each) for each in modules}
    reached = _hook.reach(kinds)
    quantizable, others = kv_names(caches)
    if not quantizable:
        return f"has no KV cache that can be quantized, only {', '.join(others)}"
    users = {type(each).__name__ for each in modules if _hook.needs_arrays(each)}
    where = f", in {', '.join(sorted(users))}" if users else ""
    if not reached:
        return f"has attention of its own{where}"
    if has_meta_state() and any(kind.__module__ in _READ_STATE for kind in kinds):
        return "needs mlx-lm 0.32 for others"
    # What stands for latents is an array.
    if users and not latent and not has_several(caches):
        return f"works on K and V by itself{where}"
    return None


def _language_model(model: Any) -> Any:
    """Of a model of mlx-vlm, the part that has KV caches."""
    if type(model).__module__.startswith("mlx_vlm"):
        return getattr(model, "language_model", model)
    return model


@dataclass
class _Hook:
    """What is replaced in mlx-lm and mlx-vlm while any model is enabled."""

    force_fused: bool = False
    everywhere: _Wanted | _WantedBlocks | None = None
    # Weak references by id: models have no hash.
    models: dict[int, Any] = field(default_factory=dict)
    packages: dict[str, "_Package"] = field(default_factory=dict)

    def put(self) -> None:
        """Reach each package that is there and has not been reached yet."""
        found = []
        for name in _PACKAGES:
            wanted = name == _PACKAGES[0] or f"{name}.models" in sys.modules
            if wanted and name not in self.packages and _is_there(name):
                found.append(_Package(name, self))
        # All are known to be as they must be: nothing is left half done.
        for package in found:
            package.put()
            self.packages[package.name] = package

    def put_caches(self, model: Any, wanted: _Wanted | _WantedBlocks) -> None:
        """Let a model make its caches so."""
        self.remember(model)
        _MakeCache.put(model, wanted)

    def remember(self, model: Any) -> None:
        """That the caches of a model are to be its own again in the end."""
        models, key = self.models, id(model)
        models[key] = weakref.ref(model, lambda _: models.pop(key, None))

    def remove_caches(self, model: Any) -> None:
        """Let a model make its own caches again."""
        self.models.pop(id(model), None)
        _MakeCache.remove(model)

    def wanted(self, model: Any) -> _Wanted | _WantedBlocks | None:
        """What the caches of a model are to be, where they are to be others."""
        own = _MakeCache.of(_language_model(model))
        return self.everywhere if own is None else own.wanted

    def reach(self, kinds: set[type]) -> bool:
        """Whether some of these layers call the attention that is replaced."""
        packages = list(self.packages.values())
        return any([package.reach(kind) for package in packages for kind in kinds])

    def needs_arrays(self, layer: Any) -> bool:
        """Whether a layer, as it is called now, needs K or V to be an array."""
        if any(type(layer) in each.capped for each in self.packages.values()):
            return False
        return needs_arrays(layer)

    def remove(self) -> None:
        for package in self.packages.values():
            package.check()
        for package in self.packages.values():
            package.remove()


class _Package:
    """The functions of mlx-lm or mlx-vlm that are replaced, and their replacements."""

    def __init__(self, name: str, hook: _Hook):
        if name == "mlx_lm":
            _check_version(importlib.import_module(name).__version__)
        self.name = name
        self.hook = hook
        self.base = importlib.import_module(f"{name}.models.base")
        self.cache = importlib.import_module(f"{name}.models.cache")
        ours: dict[tuple[ModuleType, str], Callable[..., Any]] = {
            (self.base, _QUANTIZED): self._quantized,
            (self.base, _GENERAL): self._general,
            (self.cache, "make_prompt_cache"): self._make_prompt_cache,
        }
        for each in ("save_prompt_cache", "load_prompt_cache"):
            if hasattr(self.cache, each):
                ours[self.cache, each] = getattr(self, f"_{each}")
        for module, function in ours:
            if not callable(getattr(module, function, None)):
                raise ImportError(
                    f"[mlx_quantized_sdpa.enable] {module.__name__} must have "
                    f"{function}; the {name} that is installed has not."
                )
        self.ours = ours
        self.replaced = {key: getattr(*key) for key in ours}
        # Layers whose whole call is replaced: they call no attention.
        self.capped = capped_layers(name)
        self.methods = _projections(name) | self._batches() | self._capped()
        # Code of layers that holds the attention by some name, in whatever module.
        self.users: dict[tuple[int, str], dict[str, Any]] = {}

    def put(self) -> None:
        for (module, name), ours in self.ours.items():
            self._rebind(name, self.replaced[module, name], ours)
        for (kind, name), (_, method) in self.methods.items():
            setattr(kind, name, method)
        # mlx-lm looks up the classes of a saved cache there.
        for kind in _saved_types():
            setattr(self.cache, kind.__name__, kind)

    def reach(self, kind: type) -> bool:
        """Put the attention into the code of a layer of any module, if it has it."""
        old, new = (each[self.base, _GENERAL] for each in (self.replaced, self.ours))
        reached = False
        for namespace in namespaces(kind):
            for name, value in list(namespace.items()):
                if value is old or self._is_ours(value):
                    namespace[name] = new
                    self.users[id(namespace), name] = namespace
                    reached = True
        return reached or kind in self.capped

    def _is_ours(self, value: Any) -> bool:
        """Also what an earlier enable() put, where code was loaded meanwhile."""
        owner = getattr(value, "__self__", None)
        return isinstance(owner, _Package) and (owner.name, value.__name__) == (
            self.name,
            _Package._general.__name__,
        )

    def check(self) -> None:
        for (module, name), ours in self.ours.items():
            if getattr(module, name) is not ours:
                raise RuntimeError(
                    f"[mlx_quantized_sdpa.disable] {module.__name__}.{name} has been "
                    "replaced since enable(); undo that first."
                )

    def remove(self) -> None:
        for (module, name), ours in self.ours.items():
            self._rebind(name, ours, self.replaced[module, name])
        for (_, name), namespace in self.users.items():
            if namespace.get(name) is self.ours[self.base, _GENERAL]:
                namespace[name] = self.replaced[self.base, _GENERAL]
        for (kind, name), (original, _) in self.methods.items():
            setattr(kind, name, original)
        for kind in _saved_types():
            delattr(self.cache, kind.__name__)

    def _rebind(self, name: str, old: Any, new: Any) -> None:
        """Puts ``new`` wherever a module of the package holds ``old`` by this name.

        A module imported later takes its name from where it is defined.
        """
        for module_name, module in list(sys.modules.items()):
            if module_name.startswith(f"{self.name}.") and module is not None:
                if vars(module).get(name) is old:
                    setattr(module, name, new)

    def _quantized(
        self,
        queries: mx.array,
        q_keys: Any,
        q_values: Any,
        scale: float,
        mask: Any = None,
        group_size: int = 64,
        bits: int = 8,
        sinks: mx.array | None = None,
        **others: Any,
    ) -> Any:
        if others or len(q_keys) != 3:
            # A mode of mlx-vlm's own.
            original = self.replaced[self.base, _QUANTIZED]
            return original(
                queries, q_keys, q_values, scale, mask, group_size, bits, **others
            )
        return quantized_scaled_dot_product_attention(
            queries,
            *q_keys,
            *q_values,
            scale=scale,
            mask=mask,
            sinks=sinks,
            group_size=group_size,
            bits=bits,
            force_fused=self.hook.force_fused,
        )

    def _general(
        self,
        queries: mx.array,
        keys: Any,
        values: Any,
        cache: Any,
        scale: float,
        mask: Any,
        sinks: mx.array | None = None,
        **others: Any,
    ) -> Any:
        fused = self.hook.force_fused
        if isinstance(keys, KVView) and keys.goes_with(values):
            return keys.reading.attend(queries, scale, mask, sinks, fused)
        if isinstance(keys, KVView) or isinstance(values, KVView):
            return attend_views(queries, keys, values, scale, mask, sinks)
        if isinstance(mask, RopeScores):
            return attend_latents(queries, keys, values, scale, mask, fused)
        if isinstance(keys, LatentView):
            return attend_masked_latents(queries, keys, scale, mask, fused)
        if sinks is not None and _is_stock_quantized(cache, keys):
            return self._quantized(
                queries, keys, values, scale, mask, cache.group_size, cache.bits, sinks
            )
        general = self.replaced[self.base, _GENERAL]
        if isinstance(mask, CausalMask) and isinstance(keys, mx.array):
            mask = mask.of_dense(queries.shape[2], keys.shape[2])
        return general(queries, keys, values, cache, scale, mask, sinks, **others)

    def _make_prompt_cache(
        self, model: Any, max_kv_size: int | None = None, **others: Any
    ) -> list[Any]:
        wanted = self.hook.wanted(model)
        if wanted is None:
            stock = self.replaced[self.cache, "make_prompt_cache"]
            caches: list[Any] = stock(model, max_kv_size, **others)
            return caches
        return wanted.make(model, max_kv_size)

    def _batches(self) -> "_Methods":
        """Before mlx-lm 0.32 a batch bounds only mlx-lm's own caches."""
        module = sys.modules.get("mlx_lm.generate")
        kind: Any = getattr(module, "BatchGenerator", None)
        original = getattr(kind, "_make_new_cache", None)
        if self.name != "mlx_lm" or original is None:
            return {}

        def make_new_cache(batch: Any) -> list[Any]:
            wanted = self.hook.wanted(batch.model)
            if wanted is not None:
                return wanted.make(batch.model, batch.max_kv_size)
            stock: list[Any] = original(batch)
            return stock

        return {(kind, "_make_new_cache"): (original, make_new_cache)}

    def _capped(self) -> "_Methods":
        def put(original: Any) -> Any:
            return attending(original, lambda: self.hook.force_fused)

        calls = [(kind, kind.__call__) for kind in self.capped]
        return {(kind, "__call__"): (call, put(call)) for kind, call in calls}

    def _save_prompt_cache(
        self, file_name: str, cache: list[Any], metadata: Any = None
    ) -> None:
        if any(isinstance(each, cache_types()) for each in cache):
            persistence.save_prompt_cache(file_name, cache, metadata)
        else:
            stock = self.replaced[self.cache, "save_prompt_cache"]
            stock(file_name, cache, metadata or {})

    def _load_prompt_cache(self, file_name: str, return_metadata: bool = False) -> Any:
        load = self.replaced[self.cache, "load_prompt_cache"]
        if persistence.is_ours(file_name):
            load = persistence.load_prompt_cache
        loaded = load(file_name, return_metadata)
        if isinstance(self.hook.everywhere, _Wanted):
            caches = loaded[0] if return_metadata else loaded
            _warn_of_other_formats(file_name, caches, self.hook.everywhere.spec)
        return loaded


_hook: _Hook | None = None


def _check_version(found: str) -> None:
    numbers = [
        [int(number) for number in re.findall(r"\d+", version)[:3]]
        for version in (found, _OLDEST_LM)
    ]
    if numbers[0] < numbers[1]:
        raise ImportError(
            f"[mlx_quantized_sdpa.enable] mlx-lm must be {_OLDEST_LM} or newer; got "
            f"{found}."
        )


def _warn_of_other_formats(file_name: str, caches: list[Any], spec: CacheSpec) -> None:
    """Say that loaded caches hold something else than is wanted of new ones."""
    if found := other_formats(caches, spec):
        warnings.warn(
            f"[mlx_quantized_sdpa] the caches of {file_name} stay as they are, "
            f"{', '.join(found)}, where {spec} is wanted; to_quantized() converts "
            "dense ones.",
            stacklevel=3,
        )


def _saved_types() -> tuple[type, ...]:
    return (*cache_types(), PagedKVCache)


def _is_there(name: str) -> bool:
    try:
        importlib.import_module(f"{name}.models.base")
    except ImportError as error:
        if name != _PACKAGES[0] or f"{_PACKAGES[1]}.models" in sys.modules:
            return False
        what = f"able to import what it needs; got {error}"
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            what = "installed: pip install mlx-lm"
        raise ImportError(
            f"[mlx_quantized_sdpa.enable] mlx-lm must be {what}."
        ) from error
    return True


def _is_stock_quantized(cache: Any, keys: Any) -> bool:
    return hasattr(cache, "bits") and isinstance(keys, tuple | list) and len(keys) == 3


# Methods by class and name: what was there, and what takes its place.
_Methods = dict[tuple[Any, str], tuple[Callable[..., Any], Callable[..., Any]]]


def _projections(package: str) -> _Methods:
    """How the layers are called that project MLA's latents to heads."""
    try:
        mla = importlib.import_module(f"{package}.models.mla")
    except ImportError:
        return {}
    names = ("MultiLinear", "QuantizedMultiLinear")
    kinds = [getattr(mla, name) for name in names if hasattr(mla, name)]
    return {(k, "__call__"): (k.__call__, _projecting(k.__call__)) for k in kinds}


def _projecting(original: Any) -> Any:
    def call(self: Any, x: mx.array, *arguments: Any, **keywords: Any) -> mx.array:
        projected: mx.array = original(self, x, *arguments, **keywords)
        if isinstance(x, LatentView):
            return project(self, x, projected)
        return projected

    return call
