"""The op itself."""

import mlx.core as mx
from cases import FORMATS
from rivals.mlx_common import prepared, quantized_cache
from rivals.prepared import Absent

OP = "quantized_scaled_dot_product_attention"
TOLERANCE = {"float32": 1e-10, "float16": 1e-6, "bfloat16": 1e-5}


def keywords(side, operand):
    words = {f"{side}_mode": operand.mode}
    if not operand.mode.startswith("turbo"):
        words[f"{side}_bits"] = operand.bits
        words[f"{side}_group_size"] = operand.group_size
    return words


def call_of(shape, fmt):
    op = getattr(mx.fast, OP, None)
    if op is None:
        raise Absent(f"mx.fast.{OP}: `make wheel`, then install dist/*.whl")
    options = {
        **keywords("k", fmt.k),
        **keywords("v", fmt.v),
        "mask": "causal" if shape.causal else None,
        "scale": shape.scale,
        "force_fused": True,
    }
    return lambda q, k, v: op(q, *k, *v, **options)


def prepare(entry, inputs, threads, cold):
    fmt = FORMATS[entry.format]
    call = call_of(entry.shape, fmt)
    q, copies, kv_bytes, values = quantized_cache(entry, inputs, fmt, cold)
    tolerance = TOLERANCE[entry.shape.dtype]
    return prepared(call, q, copies, kv_bytes, values, tolerance)


RIVALS = {"fused": prepare}
