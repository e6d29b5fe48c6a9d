"""The Hadamard rotation that spreads outlier channels before quantizing."""

from functools import lru_cache

import mlx.core as mx


def check_rotation(dim: int) -> None:
    """Refuse head dims that there is no Hadamard matrix for.

    ``mx.hadamard_transform`` takes some of them, 36 for one, and writes out of bounds.
    """
    odd = dim & -dim and dim // (dim & -dim)
    if odd not in (1, 3, 5, 7) or (odd > 1 and dim % 4 != 0):
        raise ValueError(
            "[rotate] the head dim must be m * 2**n with m one of 1, 12, 20 and 28; "
            f"got {dim}."
        )


def rotate(x: mx.array, split: int = 0) -> mx.array:
    """Rotate the vectors along the last axis: signs, then a Hadamard matrix.

    The rotation is orthonormal, so that products of two rotated vectors are those of
    the vectors themselves. It is computed in float32.

    Args:
        x (array): ``[..., D]``, where D is ``m * 2**n`` with m one of 1, 12, 20, 28.
        split (int): The first ``split`` values and the others are each such a vector.

    Returns:
        array: ``[..., D]`` in the type of ``x``.

    Raises:
        ValueError: If D is something else.
    """
    if split:
        halves = mx.split(x, [split], axis=-1)
        return mx.concatenate([rotate(half) for half in halves], axis=-1)
    signed = x.astype(mx.float32) * _signs(x.shape[-1])
    return mx.hadamard_transform(signed).astype(x.dtype)


def unrotate(y: mx.array, split: int = 0) -> mx.array:
    """The inverse of :func:`rotate`."""
    if split:
        halves = mx.split(y, [split], axis=-1)
        return mx.concatenate([unrotate(half) for half in halves], axis=-1)
    dim = y.shape[-1]
    values = y.astype(mx.float32)
    if dim & (dim - 1) == 0:
        spread = mx.hadamard_transform(values)
    else:
        # Only matrices of a power of two are their own inverse.
        spread = values @ _matrix(dim).T
    return (spread * _signs(dim)).astype(y.dtype)


@lru_cache
def _signs(dim: int) -> mx.array:
    """+1 where i + 1 is a square modulo a prime, else -1: the same for ever.

    Without signs, a vector of equal values would become one outlier.
    """
    check_rotation(dim)
    prime = 8191
    signs = [1.0 if pow(i + 1, prime // 2, prime) == 1 else -1.0 for i in range(dim)]
    found = mx.array(signs, dtype=mx.float32)
    mx.eval(found)
    return found


@lru_cache
def _matrix(dim: int) -> mx.array:
    found = mx.hadamard_transform(mx.eye(dim))
    mx.eval(found)
    return found
