"""Exact merging of attention over disjoint sets of keys."""

from collections.abc import Sequence

import mlx.core as mx


def merge_attention(
    outputs: Sequence[mx.array], lses: Sequence[mx.array]
) -> tuple[mx.array, mx.array]:
    """Merge attention results over disjoint keys into the result over all of them.

    Each part comes from ``quantized_scaled_dot_product_attention`` with
    ``return_lse=True`` for the same queries, for example one part a shared prefix
    and one the rest. A sink belongs to one part only.

    Args:
        outputs (sequence of array): Floating point results ``[..., D]``, all of one
          shape, such as ``[B, N_q, T_q, D]``.
        lses (sequence of array): The log-sum-exp of each part, ``[...]``, such as
          float32 ``[B, N_q, T_q]``; ``-inf`` where a part has no visible key.

    Returns:
        tuple(array, array): The merged output ``[..., D]`` in the type of the first
        one, and its log-sum-exp ``[...]`` in float32. A row without a visible key
        in any part gives zeros and ``-inf``.

    Raises:
        ValueError: If there is no part or the shapes do not agree.
    """
    _check_parts(outputs, lses)
    logits = mx.stack([lse.astype(mx.float32) for lse in lses])
    highest = logits.max(axis=0)
    # exp(-inf - -inf) is NaN; against any finite base an empty part weighs zero.
    base = mx.where(highest == -mx.inf, 0.0, highest)
    weights = mx.exp(logits - base)
    total = weights.sum(axis=0)
    weights = weights / mx.where(total == 0, 1.0, total)
    weighted = (weight[..., None] * out for weight, out in zip(weights, outputs))
    merged = sum(weighted, start=mx.zeros(()))
    return merged.astype(outputs[0].dtype), base + mx.log(total)


def _check_parts(outputs: Sequence[mx.array], lses: Sequence[mx.array]) -> None:
    if not outputs or len(outputs) != len(lses):
        raise ValueError(
            "[merge_attention] outputs and lses must be as many, and at least one; "
            f"got {len(outputs)} and {len(lses)}."
        )
    shape = outputs[0].shape
    for out, lse in zip(outputs, lses):
        if out.shape != shape or lse.shape != shape[:-1]:
            raise ValueError(
                f"[merge_attention] every part must have shapes {shape} and "
                f"{shape[:-1]}; got {out.shape} and {lse.shape}."
            )
