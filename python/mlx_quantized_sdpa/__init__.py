"""Fused attention over a quantized KV cache for MLX.

Importing the package adds ``mx.fast.quantized_scaled_dot_product_attention``.
:func:`enable` gives the models of mlx-lm and mlx-vlm quantized KV caches.
"""

from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ._native import quantized_scaled_dot_product_attention
from ._versions import VERSION as __version__
from .blocks import PoolExhausted
from .conversion import to_quantized
from .hook import disable, enable, enabled, is_enabled, make_prompt_cache
from .merge import merge_attention
from .paged import PagedPool
from .persistence import load_prompt_cache, save_prompt_cache
from .spec import CacheSpec
from .turbo import turbo_codebook, turbo_dequantize, turbo_quantize

if TYPE_CHECKING:
    from .serving import PagedBatchGenerator

__all__ = [
    "CacheSpec",
    "PagedBatchGenerator",
    "PagedPool",
    "PoolExhausted",
    "__version__",
    "disable",
    "enable",
    "enabled",
    "install",
    "is_enabled",
    "load_prompt_cache",
    "make_prompt_cache",
    "merge_attention",
    "quantized_scaled_dot_product_attention",
    "save_prompt_cache",
    "to_quantized",
    "turbo_codebook",
    "turbo_dequantize",
    "turbo_quantize",
]


def __getattr__(name: str) -> Any:
    """What needs mlx-lm is imported where it is asked for."""
    if name == "PagedBatchGenerator":
        from .serving import PagedBatchGenerator

        return PagedBatchGenerator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def install() -> None:
    """Add the op to ``mx.fast``; doing it again does no harm."""
    name = quantized_scaled_dot_product_attention.__name__
    setattr(mx.fast, name, quantized_scaled_dot_product_attention)


install()
