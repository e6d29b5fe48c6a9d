"""Attention over K and V that are not quantized, with the op's own arguments."""

from typing import Any

import mlx.core as mx


def dense_attention(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    mask: mx.array | None = None,
    sinks: mx.array | None = None,
    causal: bool = False,
    window_size: int | None = None,
    left_padding: mx.array | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    force_fused: bool = False,
) -> Any:
    """Attention with the arguments and the meaning that the quantized op gives them.

    Args:
        q (array): ``[B, N_q, T_q, D]``.
        keys (array): ``[B, N_kv, T_kv, D]``.
        values (array): ``[B, N_kv, T_kv, D_v]``.
        force_fused (bool): Has no effect: MLX chooses its own kernel.

    Returns:
        array: ``[B, N_q, T_q, D_v]``; with ``return_lse`` a tuple with the log-sum-exp,
        float32 ``[B, N_q, T_q]``. For that, and with ``softcap``, the scores are in
        memory once.
    """
    shape = q.shape[2], keys.shape[2]
    plain = window_size is None and left_padding is None
    chosen: mx.array | str | None
    if plain and not return_lse and softcap is None and (mask is None or not causal):
        chosen = "causal" if causal and shape[0] > 1 else mask
    else:
        visible = visible_keys(shape, causal, window_size, left_padding)
        chosen = join_masks(mask, visible)
    if return_lse or softcap is not None:
        assert sinks is None, "no model has them with a soft cap"
        out, lse = _with_lse(q, keys, values, scale, chosen, softcap)
        return (out, lse) if return_lse else out
    return mx.fast.scaled_dot_product_attention(
        q, keys, values, scale=scale, mask=chosen, sinks=sinks
    )


def visible_keys(
    shape: tuple[int, int],
    causal: bool,
    window_size: int | None,
    left_padding: mx.array | None,
) -> mx.array | None:
    """Which of ``T_kv`` keys each of the last ``T_q`` positions sees.

    Returns:
        array: bool ``[T_q, T_kv]``, or ``[B, 1, T_q, T_kv]`` with left padding;
        ``None`` where all are seen.
    """
    queries, keys = shape
    key = mx.arange(keys)
    position = mx.arange(keys - queries, keys)[:, None]
    visible = None
    if causal:
        visible = key <= position
        if window_size is not None:
            visible = visible & (key > position - window_size)
    if left_padding is not None:
        real = key >= left_padding[:, None, None, None]
        visible = real if visible is None else visible & real
    return visible


def join_masks(mask: mx.array | None, visible: mx.array | None) -> mx.array | None:
    """A bool or additive mask where also ``visible`` must hold."""
    if mask is None or visible is None:
        return visible if mask is None else mask
    if mask.dtype == mx.bool_:
        return mask & visible
    return mx.where(visible, mask, mx.array(-mx.inf, mask.dtype))


def _with_lse(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: Any,
    softcap: float | None,
) -> tuple[mx.array, mx.array]:
    batch, heads, queries, dim = q.shape
    kv_heads = keys.shape[1]
    grouped = q.reshape(batch, kv_heads, -1, queries, dim)
    scores = (grouped @ keys[:, :, None].swapaxes(-1, -2)).astype(mx.float32) * scale
    scores = scores.reshape(batch, heads, queries, -1)
    if softcap is not None:
        scores = softcap * mx.tanh(scores / softcap)
    if mask is not None:
        added = mx.where(mask, 0.0, -mx.inf) if mask.dtype == mx.bool_ else mask
        scores = scores + added
    lse = mx.logsumexp(scores, axis=-1)
    # A row that sees nothing gives zeros, not NaN.
    weights = mx.exp(scores - mx.where(lse == -mx.inf, 0.0, lse)[..., None])
    weights = weights.astype(q.dtype).reshape(
        batch, kv_heads, -1, queries, keys.shape[2]
    )
    out = weights @ values[:, :, None]
    return out.reshape(batch, heads, queries, -1), lse
