"""The quantized K and V of one layer, and attention over them."""

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from math import gcd
from typing import Any

import mlx.core as mx

from ._native import quantized_scaled_dot_product_attention
from .dense import dense_attention
from .rotation import rotate, unrotate
from .spec import Format, Parts

Formats = tuple[Format, Format]
Tokens = tuple[Parts, Parts]


def attend(
    q: mx.array, keys: Parts, values: Parts, formats: Formats, **arguments: Any
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
    if k.is_dense:
        return dense_attention(q, *keys, *values, **arguments)
    if k.rotated:
        q = rotate(q, k.split)
    # Its overloads know no unpacked arguments.
    op: Any = quantized_scaled_dot_product_attention
    out = op(
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
        keys (tuple): Codes, scales and perhaps biases of K; empty at first.
        values (tuple): The same of V.
        dtype (Dtype): That of K; ``None`` at first.
        dtype_v (Dtype): That of V.
        dims (tuple(int, int)): Head dims of K and of V.
    """

    def __init__(self, formats: Formats):
        self.formats = formats
        self.keys: Parts = ()
        self.values: Parts = ()
        self.dtype: mx.Dtype | None = None
        self.dtype_v: mx.Dtype | None = None
        self.dims = (0, 0)

    def fit(self, keys: mx.array, values: mx.array) -> None:
        """Choose group sizes for K and V ``[B, N_kv, T, D]``.

        Raises:
            ValueError: If a format cannot hold them; nothing has changed then.
        """
        k, v = self.formats
        self.formats = k.for_head_dim(keys.shape[-1]), v.for_head_dim(values.shape[-1])
        self.dtype, self.dtype_v = keys.dtype, values.dtype
        self.dims = keys.shape[-1], values.shape[-1]

    def quantize(self, keys: mx.array, values: mx.array) -> Tokens:
        """K and V ``[B, N_kv, T, D]`` in this store's formats.

        Raises:
            ValueError: If a format cannot hold them; nothing has changed then.
        """
        self.fit(keys, values)
        return self.formats[0].quantize(keys), self.formats[1].quantize(values)

    def __deepcopy__(self, memo: Any) -> "QuantizedStore":
        # Not by the default, which cannot copy a Dtype.
        made = copy(self)
        made.map(copy)
        return made

    def emptied(self) -> "QuantizedStore":
        """A store without tokens, of the same formats, type and dims."""
        made = copy(self)
        made.keys = made.values = ()
        return made

    @property
    def rows(self) -> int:
        """How many tokens there is room for."""
        return self.keys[0].shape[2] if self.keys else 0

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (*self.keys, *self.values))

    def reserve(self, rows: int, like: Tokens) -> None:
        """Make room for ``rows`` tokens of the shape and types of ``like``."""
        missing = rows - self.rows
        if missing <= 0:
            return
        if self.keys:
            self.map(lambda x: mx.concatenate([x, rows_like(x, missing)], axis=2))
        else:
            self.keys, self.values = map_tokens(lambda x: rows_like(x, missing), like)

    def write(self, begin: int, tokens: Tokens) -> None:
        """Put quantized tokens at rows ``begin`` and on, in place."""
        finish_readers(self.nbytes)
        end = begin + tokens[0][0].shape[2]
        for parts, new in zip((self.keys, self.values), tokens):
            for part, x in zip(parts, new):
                part[:, :, begin:end] = x

    def slice(self, begin: int, end: int) -> Tokens:
        """Views of what the rows ``[begin, end)`` hold."""
        return map_tokens(lambda x: x[:, :, begin:end], (self.keys, self.values))

    def read(self, begin: int, end: int) -> Tokens:
        """Views of the rows ``[begin, end)`` as attention takes them."""
        return self.slice(begin, end)

    def map(self, change: Callable[[mx.array], mx.array]) -> None:
        """Replace every part by what ``change`` makes of it."""
        self.keys, self.values = map_tokens(change, (self.keys, self.values))

    def attend(self, q: mx.array, tokens: Tokens, **arguments: Any) -> Any:
        """:func:`attend` over some of the tokens."""
        return attend(q, *tokens, self.formats, **arguments)

    def dequantize(self, tokens: Tokens) -> tuple[mx.array, mx.array]:
        """K and V ``[B, N_kv, T, D]`` of quantized tokens, in their own types."""
        assert self.dtype is not None and self.dtype_v is not None
        (k, v), (keys, values) = self.formats, tokens
        return k.dequantize(keys, self.dtype), v.dequantize(values, self.dtype_v)


class LatentStore(QuantizedStore):
    """The latents of multi-head latent attention (MLA) and their rotary parts.

    A row is a latent and its rotary part, both of which K is made of; V is the latent
    alone, hence the first columns of K. Both have K's format; ``dims`` are the sizes of
    a latent and of a rotary part.
    """

    def __init__(self, formats: Formats):
        super().__init__((formats[0], formats[0]))

    def quantize(self, keys: mx.array, values: mx.array) -> Tokens:
        """Latents ``[B, 1, T, D]`` and their rotary parts ``[B, 1, T, D_r]``."""
        latent, rope = keys.shape[-1], values.shape[-1]
        row = replace(self.formats[0], split=0)
        if not row.is_dense:
            # Whole groups and words of codes, so that V can be the first columns.
            row = row.for_head_dim(gcd(latent, rope))
        both = replace(row, split=latent) if row.rotated else row
        tokens = both.quantize(mx.concatenate([keys, values], axis=-1)), ()
        self.formats, self.dims = (both, row), (latent, rope)
        self.dtype, self.dtype_v = keys.dtype, values.dtype
        return tokens

    def read(self, begin: int, end: int) -> Tokens:
        keys, _ = self.slice(begin, end)
        return keys, self.latents(keys)

    def latents(self, keys: Parts) -> Parts:
        """V, and K without its rotary part."""
        dim, row = self.dims[0], self.formats[0]
        if row.is_dense:
            return (keys[0][..., :dim],)
        codes, *scales = keys
        codes = codes[..., : dim * row.bits // 32]
        if row.group_size is not None:
            scales = [x[..., : dim // row.group_size] for x in scales]
        return codes, *scales

    def dequantize(self, tokens: Tokens) -> tuple[mx.array, mx.array]:
        """The latents and their rotary parts."""
        assert self.dtype is not None
        rows = self.formats[0].dequantize(tokens[0], self.dtype)
        latents, rope = mx.split(rows, [self.dims[0]], axis=-1)
        return latents, rope


def map_tokens(change: Callable[[mx.array], mx.array], tokens: Tokens) -> Tokens:
    """``change`` of every part of K and V."""
    return tuple(map(change, tokens[0])), tuple(map(change, tokens[1]))


def rows_like(part: mx.array, rows: int) -> mx.array:
    """Zeros ``[B, N_kv, rows, ...]`` that continue ``part``."""
    batch, heads, _, *rest = part.shape
    return mx.zeros((batch, heads, rows, *rest), dtype=part.dtype)


def finish_readers(nbytes: int) -> None:
    """Let attention that still runs finish before what it reads is written.

    MLX copies the whole array otherwise, each time that a step is begun before the
    last one has ended, as mlx-lm does. A small copy costs less than waiting.
    """
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    if nbytes > (1 << 20 if on_cpu else 1 << 24):
        mx.synchronize()
