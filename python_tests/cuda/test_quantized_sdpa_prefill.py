"""The CUDA prefill kernels on an emulated GPU, against float64.

Run by scripts/emulate_cuda.sh. The emulation does matrix products at once and one
thread at a time, so it cannot notice a missing wait. MLX's arrays on the CPU start at
8 bytes, so codes that the wgmma kernel reads by 16 go to mma.sync here.
"""

import mlx.core as mx
import pytest
from quantized_sdpa_reference import affine, make_case
from test_quantized_sdpa_emulated import check

WGMMA = dict(k=affine(6), v=affine(3), dtype=mx.bfloat16, D=64)
MMA = dict(k=affine(4), v=affine(8), dtype=mx.bfloat16, D=64)


@pytest.mark.parametrize("formats", (WGMMA, MMA), ids=("wgmma", "mma"))
def test_causal(formats):
    check(make_case(T_q=40, T_kv=150, causal=True, **formats))


def test_split_keys():
    check(make_case(T_q=34, T_kv=1000, N_q=1, N_kv=1, causal=True, **MMA))


def test_scores_that_rise_above_the_level():
    check(make_case(T_q=40, T_kv=150, sharpness=5.0, **MMA))
