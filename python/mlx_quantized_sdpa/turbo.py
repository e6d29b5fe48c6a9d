"""The turbo formats: a code a value in a table for N(0, 1), and a scale a token."""

import mlx.core as mx

from ._native import lloyd_max_levels


def turbo_codebook(bits: int) -> mx.array:
    """The default table: the Lloyd-Max levels for a standard normal variable.

    These levels minimize the mean squared error of quantizing N(0, 1) to ``2**bits``
    levels (S. Lloyd, 1957, 1982; J. Max, 1960).

    Args:
        bits (int): Bits a value: 2, 3 or 4.

    Returns:
        array: Float32 ``[2**bits]``, ascending.

    Raises:
        ValueError: If ``bits`` is none of these.
    """
    _check_bits("turbo_codebook", bits)
    return mx.array(lloyd_max_levels(bits), dtype=mx.float32)


def turbo_quantize(
    x: mx.array, bits: int, codebook: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Quantize each vector along the last axis to codes and one scale.

    A value is the level nearest to ``x / scale`` with ``scale = norm(x) / sqrt(D)``.
    The levels suit vectors whose values look normal, such as those that a random
    rotation has mixed.

    Args:
        x (array): Float16, bfloat16 or float32 ``[..., D]``, where ``D * bits`` is a
          multiple of 32.
        bits (int): Bits a value: 2, 3 or 4.
        codebook (array, optional): Ascending levels ``[2**bits]``. Default:
          :func:`turbo_codebook`.

    Returns:
        tuple(array, array): Codes, uint32 ``[..., D * bits / 32]``, packed as
        ``mx.quantize`` packs them, and scales ``[..., 1]`` in the type of ``x``.

    Raises:
        ValueError: If an argument is not as above.
    """
    name = "turbo_quantize"
    levels = _levels(name, bits, codebook)
    if x.ndim == 0 or not mx.issubdtype(x.dtype, mx.floating):
        raise ValueError(
            f"[{name}] x must be floating point with at least one axis; got "
            f"{x.dtype} {x.shape}."
        )
    if x.shape[-1] == 0 or x.shape[-1] * bits % 32 != 0:
        raise ValueError(
            f"[{name}] the last axis of x times {bits} bits must be a multiple of 32; "
            f"got {x.shape[-1]}."
        )
    values = x.astype(mx.float32)
    scales = _root_mean_square(values).astype(x.dtype)
    # Codes fit the scale as stored, and a zero vector divides by one.
    values = values / mx.where(scales == 0, 1, scales).astype(mx.float32)
    return _pack(_codes(values, (levels[1:] + levels[:-1]) / 2), bits), scales


def turbo_dequantize(
    codes: mx.array,
    scales: mx.array,
    bits: int,
    codebook: mx.array | None = None,
    dtype: mx.Dtype | None = None,
) -> mx.array:
    """The values that :func:`turbo_quantize` stored: ``codebook[code] * scale``.

    Args:
        codes (array): uint32 ``[..., D * bits / 32]``.
        scales (array): One a vector, ``[..., 1]`` or ``[...]``.
        bits (int): Bits a value: 2, 3 or 4.
        codebook (array, optional): Levels ``[2**bits]``. Default:
          :func:`turbo_codebook`.
        dtype (Dtype, optional): Type of the result. Default: that of ``scales``.

    Returns:
        array: ``[..., D]``.

    Raises:
        ValueError: If an argument is not as above.
    """
    name = "turbo_dequantize"
    levels = _levels(name, bits, codebook)
    if codes.ndim == 0 or codes.dtype != mx.uint32:
        raise ValueError(
            f"[{name}] codes must be uint32 with at least one axis; got "
            f"{codes.dtype} {codes.shape}."
        )
    if codes.shape[-1] == 0 or codes.shape[-1] * 32 % bits != 0:
        raise ValueError(
            f"[{name}] the last axis of codes must hold whole {bits}-bit codes; got "
            f"{codes.shape[-1]} words."
        )
    tokens = codes.shape[:-1]
    if scales.shape not in (tokens, (*tokens, 1)):
        raise ValueError(
            f"[{name}] scales must have the shape {tokens} or {(*tokens, 1)}; got "
            f"{scales.shape}."
        )
    scale = scales.reshape(*tokens, 1).astype(mx.float32)
    values = levels[_unpack(codes, bits)] * scale
    return values.astype(scales.dtype if dtype is None else dtype)


def _codes(values: mx.array, borders: mx.array) -> mx.array:
    """How many borders each value is above."""
    if values.size < 1 << 16:
        # Few operations for a few tokens; many tokens would take much memory.
        return (values[..., None] > borders).astype(mx.uint32).sum(axis=-1)
    return sum((values > border for border in borders), start=mx.zeros((), mx.uint32))


def _check_bits(name: str, bits: int) -> None:
    if bits not in (2, 3, 4):
        raise ValueError(f"[{name}] bits must be 2, 3 or 4; got {bits}.")


def _levels(name: str, bits: int, codebook: mx.array | None) -> mx.array:
    _check_bits(name, bits)
    if codebook is None:
        return turbo_codebook(bits)
    if codebook.shape != (2**bits,):
        raise ValueError(
            f"[{name}] codebook must have the shape {(2**bits,)}; got "
            f"{codebook.shape}."
        )
    return codebook.astype(mx.float32)


def _root_mean_square(values: mx.array) -> mx.array:
    # Relative to the largest value, so that no square leaves float32's range.
    largest = mx.abs(values).max(axis=-1, keepdims=True)
    relative = values / mx.where(largest == 0, 1, largest)
    return largest * mx.sqrt(mx.square(relative).mean(axis=-1, keepdims=True))


def _pack(codes: mx.array, bits: int) -> mx.array:
    """Eight codes make one word of ``8 * bits`` used bits, hence ``bits`` bytes."""
    shifted = codes.reshape(*codes.shape[:-1], -1, 8) << _shifts(bits)
    filled = shifted.sum(axis=-1, keepdims=True).view(mx.uint8)
    dense = filled[..., :bits].reshape(*codes.shape[:-1], -1)
    return dense.view(mx.uint32)


def _unpack(words: mx.array, bits: int) -> mx.array:
    """The inverse of :func:`_pack`."""
    dense = words.view(mx.uint8).reshape(*words.shape[:-1], -1, bits)
    padding = [(0, 0)] * (dense.ndim - 1) + [(0, 4 - bits)]
    filled = mx.pad(dense, padding).view(mx.uint32)
    codes: mx.array = (filled >> _shifts(bits)) & (2**bits - 1)
    return codes.reshape(*words.shape[:-1], -1)


def _shifts(bits: int) -> mx.array:
    return mx.arange(0, 8 * bits, bits, dtype=mx.uint32)
