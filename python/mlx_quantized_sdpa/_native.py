"""Loads the extension, once it is sure that it fits the MLX at hand."""

# First: it loads libmlx and registers the types that the extension takes.
import mlx.core as mx

from ._versions import BUILT_FOR_MLX, VERSION


def _require_mlx(found: str) -> None:
    # MLX's C++ classes change between patch releases: a mismatch may crash.
    if found != BUILT_FOR_MLX:
        raise ImportError(
            f"mlx-quantized-sdpa {VERSION} was built for MLX {BUILT_FOR_MLX}, "
            f"but MLX {found} is installed; install mlx=={BUILT_FOR_MLX} or build "
            "the wheel anew."
        )


# MLX's own stub leaves its version out, ours what is private.
_require_mlx(mx.__version__)  # type: ignore[attr-defined]

from . import _ext  # noqa: E402


def _require_shared_types() -> None:
    # A module of another nanobind ABI loads, but refuses every array.
    try:
        _ext._shares_types_with_mlx(mx.float32)  # type: ignore[attr-defined]
    except TypeError:
        raise ImportError(
            f"mlx-quantized-sdpa {VERSION} was built with a nanobind that does "
            f"not share its types with MLX {BUILT_FOR_MLX}; build the wheel with the "
            "versions in its pyproject.toml."
        ) from None


_require_shared_types()

quantized_scaled_dot_product_attention = _ext.quantized_scaled_dot_product_attention
lloyd_max_levels = _ext._lloyd_max_levels  # type: ignore[attr-defined]
