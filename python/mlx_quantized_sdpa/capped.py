"""Layers that cap their scores, and so call no attention of MLX's, over such caches.

They do what mlx-lm's do, but hand K and V as they are to the op, which caps scores too.
"""

import importlib
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from .cache import PackedCache
from .layers import ATTENTION
from .paged import BatchPagedKVCache, PagedKVCache

_QUANTIZED = (PackedCache, PagedKVCache, BatchPagedKVCache)


def capped_layers(package: str) -> list[type]:
    """Those of a package whose soft cap is known: Gemma 2's of mlx-lm."""
    if package != "mlx_lm":
        return []
    gemma2 = importlib.import_module("mlx_lm.models.gemma2")
    return [] if hasattr(gemma2, ATTENTION) else [gemma2.Attention]


def attending(original: Any, is_fused_forced: Callable[[], bool]) -> Any:
    """What takes the place of such a layer's call."""

    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if not isinstance(cache, _QUANTIZED):
            dense: mx.array = original(self, x, mask, cache)
            return dense
        q = _heads(self.q_proj(x), self.n_heads)
        k, v = (_heads(to(x), self.n_kv_heads) for to in (self.k_proj, self.v_proj))
        q, k = (self.rope(each, offset=cache.offset) for each in (q, k))
        keys, _ = cache.update_and_fetch(k, v)
        out = keys.reading.attend(
            q,
            self.scale,
            mask,
            force_fused=is_fused_forced(),
            softcap=self.attn_logit_softcapping,
        )
        projected: mx.array = self.o_proj(out.swapaxes(1, 2).flatten(2))
        return projected

    return call


def _heads(x: mx.array, count: int) -> mx.array:
    """``[B, T, count * D]`` as ``[B, count, T, D]``."""
    return mx.unflatten(x, 2, (count, -1)).swapaxes(1, 2)
