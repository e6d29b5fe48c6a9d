"""Small calls of the op that together reach every line of the Metal kernels."""

from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np
from quantized_sdpa_reference import (
    MXFP4,
    MXFP8,
    NVFP4,
    ROW_LAYOUTS,
    TURBO3,
    TURBO4,
    affine,
    check_lse,
    check_output,
    encode,
    make_case,
    random_mask,
    strided_columns,
    to_pages,
    token_major,
)


def mask(kind, shape, dtype=mx.float32, seed=7):
    return random_mask(np.random.default_rng(seed), kind, shape, dtype)


def paged(block, **shape):
    return to_pages(make_case(layout=None, **shape), block)


def int_array(*values):
    return mx.array(values, mx.int32)


def with_codebook(side, **shape):
    """A table of another size of steps than the default's."""
    case = make_case(k=TURBO3, v=TURBO4, **shape)
    levels = {"k": 8, "v": 16}[side]
    table = mx.array(np.linspace(-2.1, 2.4, levels).astype(np.float32))
    return case.having(**{f"{side}_codebook": table})


def empty_rows(**shape):
    """Rows that see no key, among others that do."""
    keep = np.random.default_rng(3).random((shape["T_q"], shape["T_kv"])) < 0.5
    keep[::2] = False
    return make_case(mask=mx.array(keep), **shape)


def own_layouts(**shape):
    """Codes, scales and biases of K and V, each in another layout."""
    layouts = iter(ROW_LAYOUTS * 2)
    return make_case(layout=None, **shape).map_kv(lambda x: next(layouts)(x))


def large_equal_keys(T_q, T_kv=900):
    """Values whose sum is too large for float16 before it is divided."""
    case = make_case(N_kv=1, N_q=2, T_q=T_q, T_kv=T_kv, dtype=HALF, layout=None)
    k, v = (
        encode(np.full((1, 1, T_kv, 64), size), affine(4), HALF)
        for size in (30.0, 224.0)
    )
    return replace(case, q=mx.full(case.q.shape, 3.0, HALF), k=k, v=v)


HALF, BFLOAT = mx.float16, mx.bfloat16

# Few rows: the vector kernel.
VECTOR = {
    "plain": partial(make_case, T_kv=33),
    "groups of 3 heads": partial(make_case, N_q=6, T_kv=140, D=128, dtype=HALF),
    "one row": partial(make_case, N_q=2, T_kv=65, k=affine(5), dtype=BFLOAT),
    "splits": partial(make_case, T_kv=900, k=affine(4, 32), v=affine(3)),
    "splits with sinks": partial(
        make_case, T_kv=600, k=MXFP4, sinks=mx.array([0.5, 3.0, -1.0, 2.0])
    ),
    "causal window": partial(
        make_case, N_q=2, T_q=2, T_kv=70, causal=True, window_size=20, k=affine(6)
    ),
    "causal, softcap": partial(
        make_case, N_q=2, T_q=3, T_kv=67, causal=True, softcap=5.0, k=affine(8)
    ),
    "bool mask": lambda: make_case(
        B=2, T_kv=65, mask=mask("bool", (2, 4, 1, 65)), k=MXFP8, v=NVFP4
    ),
    "float mask": lambda: make_case(T_kv=65, mask=mask("additive", (4, 1, 65))),
    "half mask": lambda: make_case(T_kv=65, dtype=HALF, mask=mask("bias", (65,), HALF)),
    "bfloat mask": lambda: make_case(
        T_kv=65, dtype=BFLOAT, mask=mask("bias", (1, 65), BFLOAT)
    ),
    "mask with strides": lambda: make_case(
        T_kv=65, T_q=1, mask=mask("bool", (65, 4, 1)).transpose(1, 2, 0)
    ),
    "lengths and padding": lambda: make_case(
        B=3,
        T_kv=80,
        lengths=int_array(80, 33, 0),
        left_padding=int_array(5, 0, 7),
    ),
    "pages": partial(paged, 16, B=2, T_kv=77, k=affine(2, 32), v=affine(8, 32)),
    "codes with gaps": partial(make_case, T_kv=40, layout=strided_columns),
    "token-major": partial(
        make_case, B=2, N_q=2, T_kv=40, layout=token_major, k=affine(3)
    ),
    "each array in its own layout": partial(own_layouts, B=2, T_kv=40),
    "scales of another type": partial(
        make_case, T_kv=40, dtype=HALF, scale_dtype=mx.float32
    ),
    "splits of large equal keys": partial(large_equal_keys, T_q=1),
    "shared words": partial(
        make_case, N_q=8, T_kv=37, D=96, k=affine(3, 32), v=affine(5, 32)
    ),
    "shared words of 8 rows": partial(
        make_case, N_q=16, T_kv=37, k=affine(6), v=affine(1), dtype=HALF
    ),
    "shared words of dim 512": partial(
        make_case, N_q=3, N_kv=1, D=512, T_kv=33, k=affine(5), v=TURBO3, dtype=HALF
    ),
    "codebook of K": partial(with_codebook, "k", T_kv=50),
    "codebook of V": partial(with_codebook, "v", T_kv=50, dtype=HALF),
    "dim 80": partial(make_case, D=80, T_kv=40, k=NVFP4),
    "dim 512": partial(make_case, D=512, T_kv=40, N_q=2, k=affine(4)),
    "other dims of V": partial(make_case, D=192, D_v=128, T_kv=40, k=affine(8)),
    "no keys": partial(make_case, T_kv=0, layout=None),
    "empty rows": partial(empty_rows, N_q=2, T_q=2, T_kv=40),
    "large scores": partial(make_case, T_kv=300, dtype=HALF, sharpness=60.0),
}
# Many rows: the kernel of simdgroup matrices.
STEEL = {
    "plain": partial(make_case, T_q=9, T_kv=33),
    "ragged rows": partial(make_case, N_q=6, T_q=11, T_kv=70, D=128, dtype=HALF),
    "many rows": partial(make_case, N_q=4, T_q=40, T_kv=70, causal=True, dtype=BFLOAT),
    "splits": partial(make_case, T_q=9, T_kv=700, k=affine(8), v=MXFP4),
    "splits with sinks": partial(
        make_case, T_q=8, T_kv=600, sinks=mx.array([0.5, 3.0, -1.0, 2.0])
    ),
    "causal window": partial(
        make_case, T_q=20, T_kv=90, causal=True, window_size=13, k=affine(6)
    ),
    "softcap, sinks": lambda: make_case(
        T_q=10, T_kv=65, softcap=4.0, k=affine(5), sinks=mx.array([1.0, 2.0, 3.0, 4.0])
    ),
    "bool mask": lambda: make_case(
        B=2, T_q=9, T_kv=65, mask=mask("bool", (2, 4, 9, 65)), k=MXFP8, v=NVFP4
    ),
    "half mask": lambda: make_case(
        T_q=9, T_kv=65, dtype=HALF, mask=mask("additive", (9, 65), HALF)
    ),
    "lengths and padding": lambda: make_case(
        B=3,
        T_q=9,
        T_kv=80,
        causal=True,
        lengths=int_array(80, 33, 0),
        left_padding=int_array(5, 0, 7),
    ),
    "pages": partial(paged, 16, B=2, T_q=9, T_kv=77, k=affine(2, 32), v=affine(3, 32)),
    "codes with gaps": partial(make_case, T_q=9, T_kv=40, layout=strided_columns),
    "token-major": partial(
        make_case, B=2, T_q=9, T_kv=40, layout=token_major, k=affine(4, 32)
    ),
    "splits of large equal keys": partial(large_equal_keys, T_q=9),
    "half precision": partial(
        make_case, T_q=9, T_kv=50, dtype=HALF, scale_dtype=mx.float32
    ),
    "codebook of K": partial(with_codebook, "k", T_q=9, T_kv=50),
    "codebook of V": partial(with_codebook, "v", T_q=9, T_kv=50, dtype=HALF),
    "dim 80": partial(make_case, D=80, T_q=9, T_kv=40, k=NVFP4),
    "dim 256": partial(make_case, D=256, T_q=9, T_kv=40),
    "empty rows": partial(empty_rows, T_q=9, T_kv=40),
    "large scores": partial(make_case, T_q=9, T_kv=80, dtype=HALF, sharpness=60.0),
}


def all_cases():
    yield from ((f"vector, {name}", make) for name, make in VECTOR.items())
    yield from ((f"steel, {name}", make) for name, make in STEEL.items())


def check(make):
    """Runs a case on Metal, result and log-sum-exp against float64."""
    case = make()
    # Inputs are whole before the kernels get them.
    mx.eval([x for x in (case.q, *case.k, *case.v) if x is not None])
    out, lse = case.run(force_fused=True, return_lse=True)
    mx.eval(out, lse)
    mx.synchronize()
    expected, expected_lse = case.reference()
    check_output(out, expected, case.q.dtype)
    check_lse(lse, expected_lse, case.q.dtype)
