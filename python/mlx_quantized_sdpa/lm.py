"""Makes mlx-lm's attention over a quantized KV cache use the fused op.

For every model of mlx-lm, loaded already or later::

    from mlx_quantized_sdpa import lm

    lm.enable()  # until lm.disable()

    with lm.fused():  # or for a block only
        ...

Attention sinks, which mlx-lm refuses with a quantized cache, work too.
"""

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import mlx.core as mx

from ._native import quantized_scaled_dot_product_attention
from .paged import PagedKVCache

_BASE = "mlx_lm.models.base"
_QUANTIZED = "quantized_scaled_dot_product_attention"
_GENERAL = "scaled_dot_product_attention"


def enable(force_fused: bool = False) -> None:
    """Use the fused op in every mlx-lm model; again to change ``force_fused``.

    Args:
        force_fused (bool): Raise where the op has no fused kernel, instead of
            computing the same by other ops.

    Raises:
        ImportError: If mlx-lm is not there, or not as this module knows it.
    """
    global _hook
    if _hook is None:
        hook = _Hook(_base_module(), force_fused)
        # Where mlx-lm looks for the classes of caches in files.
        importlib.import_module("mlx_lm.models.cache").PagedKVCache = PagedKVCache
        hook.put()
        _hook = hook
    _hook.force_fused = force_fused


def disable() -> None:
    """Give mlx-lm its own attention back; without ``enable`` it does nothing.

    Raises:
        RuntimeError: If something else has replaced mlx-lm's attention meanwhile.
    """
    global _hook
    if _hook is not None:
        _hook.remove()
        _hook = None


def is_enabled() -> bool:
    """Whether mlx-lm's models use the fused op now."""
    return _hook is not None


@contextmanager
def fused(force_fused: bool = False) -> Iterator[None]:
    """``enable`` for a block; what was before comes back after it."""
    before = None if _hook is None else _hook.force_fused
    enable(force_fused)
    try:
        yield
    finally:
        if before is None:
            disable()
        else:
            enable(before)


@dataclass
class _Hook:
    """The two functions of mlx-lm that are replaced, and their replacements."""

    base: ModuleType
    force_fused: bool

    def __post_init__(self) -> None:
        self.replaced = {
            name: getattr(self.base, name) for name in (_QUANTIZED, _GENERAL)
        }
        self.ours = {_QUANTIZED: self._quantized, _GENERAL: self._general}

    def put(self) -> None:
        for name, ours in self.ours.items():
            _rebind(name, self.replaced[name], ours)

    def remove(self) -> None:
        for name, ours in self.ours.items():
            if getattr(self.base, name) is not ours:
                raise RuntimeError(
                    f"[mlx_quantized_sdpa.lm.disable] {_BASE}.{name} has been replaced "
                    "since enable(); undo that first."
                )
        for name, ours in self.ours.items():
            _rebind(name, ours, self.replaced[name])

    def _quantized(
        self,
        queries: mx.array,
        q_keys: Sequence[mx.array],
        q_values: Sequence[mx.array],
        scale: float,
        mask: Any = None,
        group_size: int = 64,
        bits: int = 8,
        sinks: mx.array | None = None,
    ) -> Any:
        return quantized_scaled_dot_product_attention(
            queries,
            *q_keys,
            *q_values,
            scale=scale,
            mask=mask,
            sinks=sinks,
            group_size=group_size,
            bits=bits,
            force_fused=self.force_fused,
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
    ) -> Any:
        if hasattr(type(cache), "attend"):
            return cache.attend(
                queries, scale, mask, sinks, force_fused=self.force_fused
            )
        if sinks is None or not hasattr(cache, "bits"):
            general = self.replaced[_GENERAL]
            return general(queries, keys, values, cache, scale, mask, sinks)
        return self._quantized(
            queries, keys, values, scale, mask, cache.group_size, cache.bits, sinks
        )


_hook: _Hook | None = None


def _base_module() -> ModuleType:
    try:
        base = importlib.import_module(_BASE)
    except ImportError as error:
        raise ImportError(
            "[mlx_quantized_sdpa.lm.enable] mlx-lm must be installed: "
            "pip install mlx-lm."
        ) from error
    for name in (_QUANTIZED, _GENERAL):
        if not callable(getattr(base, name, None)):
            raise ImportError(
                f"[mlx_quantized_sdpa.lm.enable] {_BASE} must have {name}; the mlx-lm "
                "that is installed has not."
            )
    return base


def _rebind(name: str, old: Any, new: Any) -> None:
    """Puts ``new`` wherever a module of mlx-lm's models holds ``old`` by this name.

    A model imported later takes its name from the base module, so it gets ``new``.
    """
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("mlx_lm.models.") and module is not None:
            if vars(module).get(name) is old:
                setattr(module, name, new)
