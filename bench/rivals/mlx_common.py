"""Caches as MLX holds them, and how a batch of MLX calls is timed."""

from functools import lru_cache
from itertools import cycle

import mlx.core as mx
import numpy as np
from oracle import keys_values
from rivals.prepared import Absent, Prepared, copies_for


def to_mlx(array, dtype):
    return mx.array(array)[None].astype(getattr(mx, dtype))


def to_numpy(array):
    return np.array(array[0].astype(mx.float32))


def is_turbo(operand):
    return operand.mode.startswith("turbo")


def turbo():
    try:
        import mlx_quantized_sdpa
    except ImportError as error:
        raise Absent(f"mlx_quantized_sdpa: {error}") from error
    return mlx_quantized_sdpa


def quantize(dense, operand):
    """(codes, scales, biases or None)."""
    if is_turbo(operand):
        packed = turbo().turbo_quantize(dense, operand.bits)
    else:
        packed = mx.quantize(dense, operand.group_size, operand.bits, operand.mode)
    return (*packed, None)[:3]


@lru_cache(maxsize=16)
def quantized_side(side, operand, dtype, *size):
    """K (side 0) or V packed; kept, for many rivals share it and it takes seconds."""
    return quantize(to_mlx(keys_values(*size)[side], dtype), operand)


def dequantize(packed, operand, dtype):
    if is_turbo(operand):
        return turbo().turbo_dequantize(*packed[:2], operand.bits, dtype=dtype)
    return mx.dequantize(
        *packed, operand.group_size, operand.bits, operand.mode, dtype=dtype
    )


def exact_values(packed, operand):
    """What the codes stand for, without rounding to the scales' dtype."""
    if packed[2] is not None:
        packed = (packed[0], *(x.astype(mx.float32) for x in packed[1:]))
    return to_numpy(dequantize(packed, operand, mx.float32))


def arrays_of(cache):
    return [x for operand in cache for x in operand if x is not None]


def clone(cache):
    copy = tuple(tuple(x if x is None else x + 0 for x in part) for part in cache)
    mx.eval(arrays_of(copy))
    return copy


def make_copies(cache, cold):
    """The cache and as many copies of it as it takes to defeat the CPU's caches."""
    mx.eval(arrays_of(cache))
    kv_bytes = sum(x.nbytes for x in arrays_of(cache))
    extra = copies_for(kv_bytes, cold) - 1
    return [cache] + [clone(cache) for _ in range(extra)], kv_bytes


def prepared(call, q, copies, kv_bytes, values, tolerance):
    """Time ``calls`` independent results of one ``mx.eval``: evaluating any op
    alone costs a wake-up of MLX's threads, which a model pays once a token."""
    turn = cycle(copies)

    def run(calls):
        mx.eval([call(q, *next(turn)) for _ in range(calls)])

    def output():
        return to_numpy(call(q, *copies[0]))

    return Prepared(run, output, values, kv_bytes, tolerance)


def storage_dtype(operand, dtype):
    """Affine and turbo scales have a float type; for codes of small floats it makes
    no difference, and MLX packs them fastest from float32."""
    keeps_dtype = operand.mode == "affine" or is_turbo(operand)
    return dtype if keeps_dtype else "float32"


def quantized_cache(entry, inputs, fmt, cold):
    """q, the packed copies of the cache, their bytes and their exact values."""
    shape = entry.shape
    q = to_mlx(inputs.q, shape.dtype)
    size = shape.kv_heads, shape.kv_len, shape.head_dim
    cache = tuple(
        quantized_side(side, operand, storage_dtype(operand, shape.dtype), *size)
        for side, operand in enumerate((fmt.k, fmt.v))
    )
    copies, kv_bytes = make_copies(cache, cold)

    def values():
        k, v = copies[0]
        return to_numpy(q), exact_values(k, fmt.k), exact_values(v, fmt.v)

    return q, copies, kv_bytes, values
