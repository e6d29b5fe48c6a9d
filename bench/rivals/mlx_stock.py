"""What MLX and mlx-lm offer without the op."""

import mlx.core as mx
from cases import FORMATS
from rivals.mlx_common import (
    dequantize,
    make_copies,
    prepared,
    quantized_cache,
    to_mlx,
    to_numpy,
)
from rivals.prepared import Absent, Prepared

# Stock half-precision paths accumulate in that precision: their own error on these
# inputs is 1e-3 to 1e-2, where a wrong head or a zero result has an NMSE above 0.9.
TOLERANCE = {"float32": 1e-8, "float16": 5e-2, "bfloat16": 5e-2}


def mask_of(shape):
    return "causal" if shape.causal else None


def dense_sdpa(entry, inputs, threads, cold):
    shape = entry.shape
    q, k, v = (to_mlx(x, shape.dtype) for x in (inputs.q, inputs.k, inputs.v))
    copies, kv_bytes = make_copies(((k,), (v,)), cold)

    def call(q, k, v):
        return mx.fast.scaled_dot_product_attention(
            q, *k, *v, scale=shape.scale, mask=mask_of(shape)
        )

    def values():
        return to_numpy(q), to_numpy(k), to_numpy(v)

    return prepared(call, q, copies, kv_bytes, values, TOLERANCE[shape.dtype])


def mlx_lm_function():
    try:
        from mlx_lm.models import base
    except ImportError as error:
        raise Absent(f"mlx-lm: {error}") from error
    function = base.quantized_scaled_dot_product_attention
    if function.__module__ != base.__name__:
        raise Absent("mlx-lm's own function: a hook has replaced it")
    return function


def mlx_lm_quantized(entry, inputs, threads, cold):
    shape, fmt = entry.shape, FORMATS[entry.format]
    function = mlx_lm_function()
    q, copies, kv_bytes, values = quantized_cache(entry, inputs, fmt, cold)

    def call(q, k, v):
        return function(
            mx.array(q),  # it scales its argument in place
            k,
            v,
            scale=shape.scale,
            mask=mask_of(shape),
            group_size=fmt.k.group_size,
            bits=fmt.k.bits,
        )

    return prepared(call, q, copies, kv_bytes, values, TOLERANCE[shape.dtype])


def product(x, packed, operand, transpose):
    codes, scales, biases = (p if p is None else p[:, :, None] for p in packed)
    return mx.quantized_matmul(
        x,
        codes,
        scales,
        biases,
        transpose=transpose,
        group_size=operand.group_size,
        bits=operand.bits,
        mode=operand.mode,
    )


def quantized_matmul(entry, inputs, threads, cold):
    """mlx-lm's two products for the formats that its function does not take."""
    shape, fmt = entry.shape, FORMATS[entry.format]
    if shape.causal:
        raise Absent("no causal mask here: mlx-lm's function covers those shapes")
    q, copies, kv_bytes, values = quantized_cache(entry, inputs, fmt, cold)
    grouped = (1, shape.kv_heads, shape.repeats, shape.q_len, shape.head_dim)

    def call(q, k, v):
        scores = product((q * shape.scale).reshape(grouped), k, fmt.k, True)
        weights = mx.softmax(scores, axis=-1, precise=True)
        return product(weights, v, fmt.v, False).reshape(q.shape)

    return prepared(call, q, copies, kv_bytes, values, TOLERANCE[shape.dtype])


def dequantize_sdpa(entry, inputs, threads, cold):
    shape, fmt = entry.shape, FORMATS[entry.format]
    q, copies, kv_bytes, values = quantized_cache(entry, inputs, fmt, cold)

    def call(q, k, v):
        return mx.fast.scaled_dot_product_attention(
            q,
            dequantize(k, fmt.k, q.dtype),
            dequantize(v, fmt.v, q.dtype),
            scale=shape.scale,
            mask=mask_of(shape),
        )

    return prepared(call, q, copies, kv_bytes, values, TOLERANCE[shape.dtype])


def smallest_op(entry, inputs, threads, cold):
    """One addition: what evaluating anything at all costs."""
    x = mx.zeros(1)

    def run(calls):
        mx.eval([x + x for _ in range(calls)])

    return Prepared(run, None, None, kv_bytes=0)


RIVALS = {
    "mlx_add": smallest_op,
    "mlx_sdpa": dense_sdpa,
    "mlx_lm_quantized": mlx_lm_quantized,
    "mlx_quantized_matmul": quantized_matmul,
    "mlx_dequantize_sdpa": dequantize_sdpa,
}
