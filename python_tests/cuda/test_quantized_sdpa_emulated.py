"""The CUDA launch and kernels on an emulated GPU, against float64.

Run by scripts/emulate_cuda.sh, which builds the extension for it. Cases are small:
a lane is a fiber of the CPU.
"""

import os
from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from quantized_sdpa_reference import (
    FORMATS,
    LAYOUTS,
    MXFP4,
    MXFP8,
    NVFP4,
    TURBO2,
    TURBO3,
    TURBO4,
    affine,
    check_lse,
    check_output,
    make_case,
    random_mask,
    to_pages,
)

HALVES = (mx.float16, mx.bfloat16)


def check(case):
    out, lse = case.run(force_fused=True, return_lse=True)
    expected, expected_lse = case.reference()
    check_output(out, expected, case.q.dtype)
    check_lse(lse, expected_lse, case.q.dtype)


def test_kernels_are_emulated():
    check(make_case(T_kv=5))
    assert os.listdir(os.environ["QUANTIZED_SDPA_EMULATOR_FOLDER"])


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_formats(fmt):
    check(make_case(k=fmt, D=128, N_q=8, T_kv=129, dtype=mx.bfloat16))


@pytest.mark.parametrize("fmt", (affine(4), MXFP8, NVFP4, TURBO3), ids=str)
def test_float32(fmt):
    check(make_case(k=fmt, D=64, T_kv=70))


@pytest.mark.parametrize(
    "k, v",
    ((affine(8), affine(4)), (MXFP4, NVFP4), (TURBO4, affine(2, 32)), (MXFP8, TURBO2)),
    ids=str,
)
def test_different_formats_of_k_and_v(k, v):
    check(make_case(k=k, v=v, D=64, T_kv=70, dtype=mx.float16))


@pytest.mark.parametrize("dims", ((96, 96), (80, 80), (256, 256), (192, 128)), ids=str)
def test_head_dims(dims):
    fmt = TURBO4 if dims[0] == 80 else affine(8, 32)
    check(make_case(k=fmt, D=dims[0], D_v=dims[1], T_kv=40, dtype=mx.bfloat16))


def test_wide_rows_of_odd_codes():
    """Lanes read 24 bytes of a row of 192: what they swap is whole copies still."""
    check(make_case(k=affine(3), D=512, N_q=1, N_kv=1, T_kv=40, dtype=mx.bfloat16))


@pytest.mark.parametrize("group, T_q", ((1, 1), (3, 5), (16, 1), (4, 9)))
def test_rows(group, T_q):
    check(
        make_case(
            N_q=2 * group,
            T_q=T_q,
            T_kv=97,
            causal=True,
            k=affine(8),
            dtype=mx.bfloat16,
        )
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: x.__name__)
def test_layouts(layout):
    for fmt in (affine(4), NVFP4):
        case = make_case(B=2, T_kv=66, k=fmt, dtype=mx.bfloat16, layout=None)
        out = case.run(force_fused=True)
        view = case.map_kv(layout).run(force_fused=True)
        assert mx.array_equal(out, view)
        check(case)


@pytest.mark.parametrize("kind", ("bool", "additive"))
def test_masks_and_softcap(kind):
    mask = random_mask(np.random.default_rng(0), kind, (2, 1, 3, 71))
    for cap in (None, 5.0):
        check(make_case(B=2, T_q=3, T_kv=71, mask=mask, softcap=cap))


def test_window_sinks_and_lengths():
    check(
        make_case(
            B=3,
            T_q=2,
            T_kv=131,
            causal=True,
            window_size=20,
            sinks=mx.array([1.5, -mx.inf, 6.0, 0.0]),
            lengths=mx.array([100, 131, 0]),
            left_padding=mx.array([90, 3, 0]),
        )
    )


@pytest.mark.parametrize(
    "kib, formats",
    (
        (99, dict(k=affine(1), v=affine(8), D=128, dtype=mx.float16)),
        (99, dict(k=TURBO2, v=TURBO4, D=64)),
        (163, dict(k=affine(2), v=affine(8), D=64, D_v=256, dtype=mx.float16)),
    ),
    ids=("affine1", "turbo2", "affine2"),
)
def test_small_tiles_of_short_rows(kib, formats, monkeypatch):
    """Of GPUs with less shared memory: 16 keys a tile, whose rows are one copy."""
    monkeypatch.setenv("QUANTIZED_SDPA_EMULATED_SHARED_KIB", str(kib))
    check(make_case(T_kv=70, layout=None, **formats))


def test_devices_without_a_kernel(monkeypatch):
    """As where a function was exported on another one."""
    monkeypatch.setenv("QUANTIZED_SDPA_EMULATED_SHARED_KIB", "99")
    case = make_case(T_kv=70, k=TURBO4, v=TURBO4, D=64)
    with pytest.raises(RuntimeError, match="a kernel for the device is required; got"):
        mx.eval(case.run())


def test_no_keys():
    check(make_case(T_kv=0, layout=None))


@pytest.mark.parametrize("alignment", (0, 8))
@pytest.mark.parametrize("block", (8, 64))
def test_paged(block, alignment, monkeypatch):
    monkeypatch.setenv("QUANTIZED_SDPA_EMULATED_ALIGNMENT", str(alignment))
    case = make_case(
        B=2,
        T_kv=130,
        k=MXFP8,
        dtype=mx.bfloat16,
        lengths=mx.array([130, 65]),
        layout=None,
    )
    check(to_pages(case, block))


@pytest.mark.parametrize("n", (1, 3))
def test_blocks_that_share_all_tiles(n, monkeypatch):
    """More groups than multiprocessors: parts of a group lie in several blocks."""
    monkeypatch.setenv("QUANTIZED_SDPA_EMULATED_MULTIPROCESSORS", str(n))
    for lengths in (None, mx.array([0, 300, 7, 129])):
        check(make_case(B=4, T_kv=300, dtype=mx.bfloat16, lengths=lengths))


def test_more_blocks_than_tiles(monkeypatch):
    """Long arrays of short sequences: some blocks have nothing to do."""
    monkeypatch.setenv("QUANTIZED_SDPA_EMULATED_MULTIPROCESSORS", "37")
    check(make_case(B=4, T_kv=1300, lengths=mx.array([40, 64, 7, 33])))


def test_scores_that_rise_above_the_level():
    for dtype in (mx.float32, mx.float16):
        check(make_case(T_kv=300, sharpness=5.0, dtype=dtype))


def test_sums_over_many_keys(monkeypatch):
    """Addends have both signs, so that what tensor cores cut off stays small."""
    monkeypatch.setenv("QUANTIZED_SDPA_EMULATED_MULTIPROCESSORS", "1")
    check(make_case(N_q=1, N_kv=1, T_kv=16384, k=affine(8), sharpness=0.0))


def test_parts_of_one_group():
    for dtype, T_kv in product(HALVES, (257, 1025)):
        check(make_case(T_kv=T_kv, k=affine(8), dtype=dtype))
