"""The CUDA prefill kernels on an emulated GPU, against float64.

Run by scripts/emulate_cuda.sh.
"""

import mlx.core as mx
import pytest
from quantized_sdpa_reference import (
    LAYOUTS,
    MXFP4,
    MXFP8,
    NVFP4,
    TURBO3,
    affine,
    check_output,
    make_case,
    to_pages,
)
from test_quantized_sdpa_emulated import check

WGMMA = dict(k=affine(6), v=affine(3), dtype=mx.bfloat16, D=64)
# V's own head dim.
MMA = dict(k=affine(4), v=affine(8), dtype=mx.bfloat16, D=64, D_v=128)


@pytest.mark.parametrize(
    "formats, T_kv", ((WGMMA, 400), (MMA, 150)), ids=("wgmma", "mma")
)
def test_causal(formats, T_kv):
    """With tiles enough that each stage is filled again."""
    check(make_case(T_q=40, T_kv=T_kv, causal=True, **formats))


@pytest.mark.parametrize("k, v", ((MXFP4, NVFP4), (MXFP8, TURBO3)), ids=str)
def test_formats(k, v):
    check(make_case(T_q=40, T_kv=150, k=k, v=v, dtype=mx.bfloat16, D=64))


def test_paged():
    for formats in (WGMMA, MMA):
        case = make_case(
            T_q=40, T_kv=150, lengths=mx.array([150]), layout=None, **formats
        )
        check(to_pages(case, 8))


def test_split_keys():
    check(make_case(T_q=34, T_kv=1000, N_q=1, N_kv=1, causal=True, **MMA))


def test_scores_that_rise_above_the_level():
    check(make_case(T_q=40, T_kv=150, sharpness=5.0, **MMA))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: x.__name__)
def test_layouts(layout):
    for formats in (WGMMA, MMA):
        check(make_case(T_q=40, T_kv=66, layout=layout, **formats))


@pytest.mark.parametrize("dtype", (mx.float32, mx.bfloat16), ids=str)
def test_rows_masked_by_the_lowest_number(dtype):
    mask = mx.zeros((40, 150), dtype)
    mask[-1] = mx.finfo(dtype).min
    mask[7, 5:] = mx.finfo(dtype).min
    for formats in (WGMMA, MMA):
        case = make_case(T_q=40, T_kv=150, mask=mask, **formats)
        out, lse = case.run(force_fused=True, return_lse=True)
        check_output(out, case.reference()[0])
        assert mx.all(mx.isfinite(lse)).item()


@pytest.mark.parametrize("cap", (5.0, 1e5))
def test_softcap(cap):
    """Also far above all scores, which then keep their precision."""
    check(make_case(T_q=40, T_kv=150, softcap=cap))
    check(make_case(T_q=40, T_kv=150, softcap=cap, **WGMMA))
