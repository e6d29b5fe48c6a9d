"""The quantized K and V of one layer, and attention over them."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ._native import quantized_scaled_dot_product_attention
from .rotation import rotate, unrotate
from .spec import Format, Parts


def attend(
    q: mx.array,
    keys: Parts,
    values: Parts,
    formats: tuple[Format, Format],
    **arguments: Any,
) -> Any:
    """Attention over quantized K and V; rotations are done and undone here alone.

    Args:
        q (array): ``[B, N_q, T_q, D]``.
        keys (tuple): Codes, scales and perhaps biases of K, ``[B, N_kv, T_kv, ...]``,
          or a pool of blocks with ``block_table``.
        values (tuple): The same of V.
        formats (tuple(Format, Format)): Of K and of V.
        **arguments: As ``mx.fast.quantized_scaled_dot_product_attention`` takes them.

    Returns:
        array: ``[B, N_q, T_q, D_v]`` in the type of ``q``; with ``return_lse`` a tuple
        with the log-sum-exp.
    """
    k, v = formats
    if k.rotated:
        q = rotate(q)
    out = quantized_scaled_dot_product_attention(
        q,
        *_with_biases(keys),
        *_with_biases(values),
        **_format_arguments("k", k),
        **_format_arguments("v", v),
        **arguments,
    )
    if not v.rotated:
        return out
    if isinstance(out, tuple):
        return unrotate(out[0]), out[1]
    return unrotate(out)


def _with_biases(parts: Parts) -> tuple[mx.array | None, ...]:
    return (*parts, None) if len(parts) < 3 else parts


def _format_arguments(operand: str, made: Format) -> dict[str, Any]:
    arguments: dict[str, Any] = {f"{operand}_mode": made.mode}
    if not made.is_turbo:
        arguments[f"{operand}_bits"] = made.bits
        arguments[f"{operand}_group_size"] = made.group_size
    return arguments


class QuantizedStore:
    """K and V of one layer, each in its own format, quantized as they are written.

    Every part of K and of V is one array ``[B, N_kv, rows, ...]`` that is written in
    place. What lies beyond the rows in use is stale and never read.

    Attributes:
        formats (tuple(Format, Format)): Of K and V; group sizes are chosen with the
          first tokens.
        keys (tuple): Codes, scales and perhaps biases of K; ``None`` while empty.
        values (tuple): The same of V.
        dtype (Dtype): That of the tokens; ``None`` while empty.
    """

    def __init__(self, formats: tuple[Format, Format]):
        self.formats = formats
        self.keys: Parts | None = None
        self.values: Parts | None = None
        self.dtype: mx.Dtype | None = None

    def quantize(self, keys: mx.array, values: mx.array) -> tuple[Parts, Parts]:
        """K and V ``[B, N_kv, T, D]`` in this store's formats.

        Raises:
            ValueError: If a format cannot hold them; nothing has changed then.
        """
        k, v = self.formats
        formats = k.for_head_dim(keys.shape[-1]), v.for_head_dim(values.shape[-1])
        self.formats, self.dtype = formats, keys.dtype
        return formats[0].quantize(keys), formats[1].quantize(values)

    @property
    def rows(self) -> int:
        """How many tokens there is room for."""
        return 0 if self.keys is None else self.keys[0].shape[2]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (*(self.keys or ()), *(self.values or ())))

    def reserve(self, rows: int, like: tuple[Parts, Parts]) -> None:
        """Make room for ``rows`` tokens of the shape and types of ``like``."""
        missing = rows - self.rows
        if missing <= 0:
            return
        if self.keys is None:
            self.keys, self.values = (
                tuple(_rows_like(part, missing) for part in parts) for parts in like
            )
        else:
            self.map(lambda x: mx.concatenate([x, _rows_like(x, missing)], axis=2))

    def write(self, begin: int, tokens: tuple[Parts, Parts]) -> None:
        """Put quantized tokens at rows ``begin`` and on, in place."""
        assert self.keys is not None and self.values is not None
        _finish_readers(self.nbytes)
        end = begin + tokens[0][0].shape[2]
        for parts, new in zip((self.keys, self.values), tokens):
            for part, x in zip(parts, new):
                part[:, :, begin:end] = x

    def read(self, begin: int, end: int) -> tuple[Parts, Parts]:
        """Views of the rows ``[begin, end)``."""
        assert self.keys is not None and self.values is not None
        return tuple(
            tuple(part[:, :, begin:end] for part in parts)
            for parts in (self.keys, self.values)
        )  # type: ignore[return-value]

    def map(self, change: Callable[[mx.array], mx.array]) -> None:
        """Replace every part by what ``change`` makes of it."""
        assert self.keys is not None and self.values is not None
        self.keys = tuple(map(change, self.keys))
        self.values = tuple(map(change, self.values))

    def dequantize(self, tokens: tuple[Parts, Parts]) -> tuple[mx.array, mx.array]:
        """K and V ``[B, N_kv, T, D]`` of quantized tokens, in the tokens' own type."""
        assert self.dtype is not None
        k, v = self.formats
        return (
            k.dequantize(tokens[0], self.dtype),
            v.dequantize(tokens[1], self.dtype),
        )


def _finish_readers(nbytes: int) -> None:
    """Let attention that still runs finish before what it reads is written.

    MLX copies the whole array otherwise, each time that a step is begun before the
    last one has ended, as mlx-lm does. A small copy costs less than waiting.
    """
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    if nbytes > (1 << 20 if on_cpu else 1 << 24):
        mx.synchronize()


def _rows_like(part: mx.array, rows: int) -> mx.array:
    batch, heads, _, *rest = part.shape
    return mx.zeros((batch, heads, rows, *rest), dtype=part.dtype)
