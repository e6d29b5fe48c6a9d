"""Fused attention over a quantized KV cache for MLX.

Importing the package adds ``mx.fast.quantized_scaled_dot_product_attention``.
"""

import mlx.core as mx

from ._native import quantized_scaled_dot_product_attention
from ._versions import VERSION as __version__
from .merge import merge_attention
from .turbo import turbo_codebook, turbo_dequantize, turbo_quantize

__all__ = [
    "__version__",
    "install",
    "merge_attention",
    "quantized_scaled_dot_product_attention",
    "turbo_codebook",
    "turbo_dequantize",
    "turbo_quantize",
]


def install() -> None:
    """Add the op to ``mx.fast``; doing it again does no harm."""
    name = quantized_scaled_dot_product_attention.__name__
    setattr(mx.fast, name, quantized_scaled_dot_product_attention)


install()
