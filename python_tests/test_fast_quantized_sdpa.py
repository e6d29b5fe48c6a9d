import os
import unittest
from dataclasses import replace
from itertools import product

import mlx.core as mx
import numpy as np
from quantized_sdpa_reference import (
    AFFINE,
    FORMATS,
    LAYOUTS,
    MXFP4,
    MXFP8,
    NVFP4,
    ROW_LAYOUTS,
    TURBO2,
    TURBO3,
    TURBO4,
    affine,
    check_lse,
    check_output,
    encode,
    in_longer_cache,
    make_case,
    nmse,
    random_mask,
    to_numpy,
    to_pages,
)

try:
    from mlx_tests import MLXTestCase, MLXTestRunner
except ImportError:
    MLXTestCase, MLXTestRunner = unittest.TestCase, unittest.main

HALVES = (mx.float16, mx.bfloat16)
DTYPES = (mx.float32, *HALVES)
FORCE_FALLBACK = "MLX_QUANTIZED_SDPA_FORCE_FALLBACK"
GPU_HEAD_DIMS = {64, 96, 128, 256, 512}


def equal(a, b):
    return a.dtype == b.dtype and mx.array_equal(a, b).item()


def as_text(axes):
    return {name: str(value) for name, value in axes.items()}


def not_finite(x):
    """Scales or biases like x that are NaN, or in e8m0 and e4m3 inf and NaN."""
    if x.dtype == mx.uint32:
        return x
    return mx.full(x.shape, 255 if x.dtype == mx.uint8 else mx.nan, x.dtype)


class QuantizedSDPATestCase(MLXTestCase):
    fused = True

    def setUp(self):
        super().setUp()
        os.environ.pop(FORCE_FALLBACK, None)
        if not self.fused:
            os.environ[FORCE_FALLBACK] = "1"
            self.addCleanup(os.environ.pop, FORCE_FALLBACK)

    def must_fuse(self, case):
        on_cpu = mx.default_device().type == mx.cpu
        return self.fused and (on_cpu or GPU_HEAD_DIMS.issuperset(case.head_dims))

    def run_op(self, case, **changes):
        return case.run(force_fused=self.must_fuse(case), **changes)

    def check(self, case, **axes):
        with self.subTest(**as_text(axes)):
            check_output(self.run_op(case), case.reference()[0], case.q.dtype)

    def check_with_lse(self, case, **axes):
        with self.subTest(**as_text(axes)):
            out, lse = self.run_op(case, return_lse=True)
            expected, expected_lse = case.reference()
            check_output(out, expected, case.q.dtype)
            check_lse(lse, expected_lse, case.q.dtype)


class TestQuantizedSDPA(QuantizedSDPATestCase):
    """Every feature against the oracle, with a fused kernel."""

    formats = FORMATS
    dtypes = DTYPES
    T_qs = (1, 2, 7, 8, 9, 32, 33, 512)
    T_kvs = (1, 31, 32, 33, 63, 64, 65, 127, 128, 129)
    long_T_kvs = (511, 512, 513, 1023, 1024, 1025)

    def test_formats(self):
        for fmt, dtype, T_q in product(self.formats, self.dtypes, (1, 2, 9)):
            case = make_case(
                k=fmt, D=128, T_q=T_q, T_kv=129, dtype=dtype, causal=T_q > 1
            )
            self.check(case, format=fmt, dtype=dtype, T_q=T_q)

    def test_different_formats_of_k_and_v(self):
        pairs = (
            (affine(8), affine(4)),
            (affine(4, 32), affine(3)),
            (affine(8, 128), TURBO3),
            (MXFP8, MXFP4),
            (MXFP4, NVFP4),
            (NVFP4, affine(6)),
            (TURBO4, affine(2, 32)),
            (TURBO4, TURBO2),
            (affine(1), MXFP8),
            (affine(5, 32), affine(8, 32)),
        )
        for (k, v), T_q in product(pairs, (1, 9)):
            case = make_case(k=k, v=v, D=128, T_q=T_q, T_kv=70)
            self.check(case, k=k, v=v, T_q=T_q)

    def test_head_dims(self):
        dims = [(D, D) for D in (64, 80, 96, 128, 192, 256, 512)]
        dims += [(192, 128), (576, 512)]
        formats = (affine(4, 32), affine(8), MXFP8, NVFP4, TURBO4, TURBO3)
        for (D, D_v), fmt, T_q in product(dims, formats, (1, 9)):
            if fmt.fits(D) and fmt.fits(D_v):
                case = make_case(k=fmt, D=D, D_v=D_v, T_q=T_q, T_kv=67)
                self.check(case, D=D, D_v=D_v, format=fmt, T_q=T_q)

    def test_odd_numbers_of_groups(self):
        for D, T_q in product((16, 48, 80), (1, 9)):
            case = make_case(N_kv=1, T_kv=23, T_q=T_q, k=NVFP4, D=D, layout=None)
            self.check(case, D=D, T_q=T_q)

    def test_head_dims_without_a_kernel(self):
        for D, T_q in product((24, 72, 1032), (1, 9)):
            case = make_case(D=D, T_q=T_q, k=TURBO4, T_kv=67)
            with self.subTest(D=D, T_q=T_q):
                check_output(case.run(), case.reference()[0])

    def test_head_groups(self):
        for group, T_q in product((1, 3, 4, 7, 8, 16), (1, 2, 4, 33)):
            case = make_case(N_q=2 * group, T_q=T_q, T_kv=97, causal=True)
            self.check(case, group=group, T_q=T_q)

    def test_query_lengths(self):
        for T_q, causal in product(self.T_qs, (False, True)):
            case = make_case(T_q=T_q, T_kv=545, causal=causal)
            self.check(case, T_q=T_q, causal=causal)
        for T_q, dtype in product(self.T_qs[:-1:2], HALVES):
            case = make_case(T_q=T_q, T_kv=130, causal=True, dtype=dtype)
            self.check(case, T_q=T_q, dtype=dtype)

    def test_key_lengths(self):
        for T_kv, T_q in product(self.T_kvs + self.long_T_kvs, (1, 9)):
            case = make_case(T_q=T_q, T_kv=T_kv)
            self.check(case, T_kv=T_kv, T_q=T_q)
        for T_kv, dtype in product(self.long_T_kvs, HALVES):
            case = make_case(N_q=8, T_kv=T_kv, k=affine(8), dtype=dtype)
            self.check(case, T_kv=T_kv, dtype=dtype)

    def test_more_queries_than_keys(self):
        for T_q, T_kv, causal in product((9, 40), (1, 8, 33), (False, True)):
            case = make_case(T_q=T_q, T_kv=T_kv, causal=causal)
            self.check_with_lse(case, T_q=T_q, T_kv=T_kv, causal=causal)

    def test_no_keys(self):
        sinks = mx.array([0.5, -1.0, 2.0, 0.0])
        for T_q, given in product((1, 9), (None, sinks)):
            case = make_case(T_q=T_q, T_kv=0, sinks=given, layout=None)
            self.check_with_lse(case, T_q=T_q, sinks=given is not None)

    def test_no_queries(self):
        for shape in ({"B": 0}, {"T_q": 0}, {"N_q": 0}):
            case = make_case(**shape, layout=None)
            with self.subTest(**shape):
                out, lse = self.run_op(case, return_lse=True)
                self.assertEqual(out.shape, case.q.shape)
                self.assertEqual(lse.shape, case.q.shape[:3])
                self.assertEqual(np.array(out).size, 0)

    def test_sharp_and_flat_softmax(self):
        for sharpness, dtype in product((0.0, 1e-3, 30.0), self.dtypes):
            case = make_case(sharpness=sharpness, T_kv=300, dtype=dtype)
            self.check(case, sharpness=sharpness, dtype=dtype)

    def test_outlier_channels(self):
        formats = (affine(4), affine(8), affine(8, 128), MXFP4, NVFP4)
        sizes = ((10, 10), (1, 100))
        for fmt, dtype, T_q, size in product(formats, self.dtypes, (1, 9), sizes):
            case = make_case(
                k=fmt,
                D=128,
                T_q=T_q,
                T_kv=300,
                dtype=dtype,
                sharpness=1,
                q_outliers=size[0],
                k_outliers=size[1],
            )
            self.check_with_lse(case, format=fmt, dtype=dtype, T_q=T_q, size=size)

    def test_outliers_of_q_where_keys_are_zero(self):
        """The other channels of q are small beside them, and make the scores."""
        for fmt, dtype, T_q in product((affine(8), MXFP4), HALVES, (1, 9)):
            case = make_case(
                k=fmt, D=128, T_q=T_q, T_kv=300, dtype=dtype, q_outliers=1000
            )
            keys = np.random.default_rng(2).standard_normal((1, 2, 300, 128))
            keys[..., 3::61] = 0
            case = replace(case, k=encode(keys.astype(np.float32), fmt, dtype))
            self.check_with_lse(case, format=fmt, dtype=dtype, T_q=T_q)

    def test_roundings_of_q_that_add_up(self):
        """Half of q's largest value in many channels, by whose sign keys differ.

        Every score is 0, and what moves them is what tells the values apart.
        """
        fmt = affine(4, 32)
        sign = np.random.default_rng(3).choice([-1.0, 1.0], (1, 2, 300, 1))
        values = np.broadcast_to(1 + sign, (1, 2, 300, 128))
        q = np.repeat([4.0, 2.0], 64)
        for dtype, T_q, size in product(HALVES, (1, 9), (8.0, 34.0, 60.0)):
            case = make_case(k=fmt, D=128, T_q=T_q, T_kv=300, dtype=dtype)
            keys = sign * np.where(q == 4, -size / 4, size / 2)
            k, v = (encode(x.astype(np.float32), fmt, dtype) for x in (keys, values))
            q_rows = mx.broadcast_to(mx.array(q, dtype), case.q.shape)
            case = replace(case, q=q_rows, k=k, v=v)
            self.check_with_lse(case, dtype=dtype, T_q=T_q, size=size)

    def test_batch(self):
        rng = np.random.default_rng(1)
        for (B, N_kv), T_q in product(((2, 2), (2, 1), (3, 3), (4, 4)), (1, 9)):
            for shape in ((B, 1, T_q, 40), (B, 1, 1, 40), (1, 12, T_q, 40)):
                mask = random_mask(rng, "bool", shape)
                case = make_case(B=B, N_q=12, N_kv=N_kv, T_q=T_q, T_kv=40, mask=mask)
                self.check(case, B=B, N_kv=N_kv, mask=shape)

    def test_masks(self):
        rng = np.random.default_rng(2)
        B, N, T = 2, 4, 71
        for T_q, kind, causal in product(
            (1, 9), ("bool", "additive", "bias"), (False, True)
        ):
            shapes = ((T,), (1,), (T_q, T), (T_q, 1), (N, 1, T), (N, T_q, T))
            shapes += ((B, 1, 1, T), (1, N, 1, T), (B, 1, T_q, T), (B, N, T_q, T))
            for shape in shapes:
                mask = random_mask(rng, kind, shape)
                case = make_case(B=B, T_q=T_q, T_kv=T, mask=mask, causal=causal)
                self.check_with_lse(case, mask=shape, kind=kind, T_q=T_q, causal=causal)

    def test_mask_of_half_precision(self):
        rng = np.random.default_rng(3)
        for dtype, T_q in product(HALVES, (1, 9)):
            mask = random_mask(rng, "additive", (T_q, 71), dtype)
            lowest = mx.array(mx.finfo(dtype).min, dtype)
            for low in (mask, mx.where(mask == -mx.inf, lowest, mask)):
                case = make_case(T_q=T_q, T_kv=71, mask=low, dtype=dtype)
                self.check(case, dtype=dtype, T_q=T_q)

    def test_rows_masked_by_the_lowest_number(self):
        for dtype, T_q in product((mx.float32, mx.bfloat16), (1, 9)):
            mask = mx.zeros((T_q, 65), dtype)
            mask[-1] = mx.finfo(dtype).min
            case = make_case(T_q=T_q, mask=mask, dtype=dtype)
            self.check(case, dtype=dtype, T_q=T_q)

    def test_mask_layouts(self):
        rng = np.random.default_rng(4)
        B, N, T_q, T = 2, 4, 9, 71
        for kind in ("bool", "additive"):
            mask = random_mask(rng, kind, (B, N, T_q, T))
            views = {
                "columns first": mx.contiguous(mask.swapaxes(2, 3)).swapaxes(2, 3),
                "middle columns": mx.pad(mask, [(0, 0)] * 3 + [(5, 6)])[..., 5:-6],
                "every second": mx.repeat(mask, 2, -1)[..., ::2],
                "broadcast": mx.broadcast_to(mask[:1, :1], mask.shape),
            }
            for name, view in views.items():
                case = make_case(B=B, T_q=T_q, T_kv=T, mask=view)
                self.check(case, kind=kind, layout=name)

    def test_causal_spellings(self):
        for T_q in (1, 9, 40):
            case = make_case(T_q=T_q, T_kv=65)
            by_flag = self.run_op(case, causal=True)
            for other in ({"mask": "causal"}, {"mask": "causal", "causal": True}):
                self.assertTrue(equal(by_flag, self.run_op(case, **other)))
            check_output(by_flag, case.reference(causal=True)[0])

    def test_window(self):
        for window, T_q in product((1, 2, 31, 32, 64, 1000), (1, 9, 40)):
            for N_q in (2, 8):
                case = make_case(
                    N_q=N_q, T_q=T_q, T_kv=131, window_size=window, causal=True
                )
                self.check_with_lse(case, window=window, T_q=T_q, N_q=N_q)
        lengths, padding = mx.array([100, 131, 7]), mx.array([90, 3, 0])
        for T_q in (1, 9):
            case = make_case(
                B=3,
                T_q=T_q,
                T_kv=131,
                mask="causal",
                window_size=20,
                lengths=lengths,
                left_padding=padding,
            )
            self.check_with_lse(case, T_q=T_q, lengths=lengths)

    def test_softcap(self):
        rng = np.random.default_rng(5)
        for cap, T_q, dtype in product((1e-39, 0.5, 5.0, 1e4), (1, 9), self.dtypes):
            mask = random_mask(rng, "additive", (T_q, 65), dtype)
            case = make_case(T_q=T_q, softcap=cap, mask=mask, dtype=dtype)
            self.check_with_lse(case, softcap=cap, T_q=T_q, dtype=dtype)

    def test_sinks(self):
        sinks = mx.array([1.5, -2.0, 6.0, 0.0])
        for dtype, T_q, T_kv in product(self.dtypes, (1, 9), (1, 65, 300)):
            case = make_case(
                T_q=T_q,
                T_kv=T_kv,
                sinks=sinks.astype(dtype),
                causal=True,
                dtype=dtype,
            )
            self.check_with_lse(case, dtype=dtype, T_q=T_q, T_kv=T_kv)

    def test_sinks_that_take_nothing(self):
        sinks = mx.array([-mx.inf, 1.0, -mx.inf, -1e4])
        for T_q, T_kv in product((1, 9), (0, 1, 65)):
            case = make_case(T_q=T_q, T_kv=T_kv, sinks=sinks, layout=None)
            self.check_with_lse(case, T_q=T_q, T_kv=T_kv)

    def test_lengths_and_left_padding(self):
        lengths, padding = mx.array([70, 33, 1, 0]), mx.array([0, 32, 1, 0])
        given = {"lengths": lengths, "left_padding": padding}
        for names in (["lengths"], ["left_padding"], ["lengths", "left_padding"]):
            for T_q, causal, fmt in product((1, 9), (False, True), (affine(4), MXFP4)):
                case = make_case(
                    B=4,
                    T_q=T_q,
                    T_kv=70,
                    k=fmt,
                    causal=causal,
                    **{n: given[n] for n in names},
                )
                self.check_with_lse(case, given=names, T_q=T_q, causal=causal)

    def test_absent_keys_may_hold_nan(self):
        lengths, padding = mx.array([50, 3]), mx.array([7, 0])
        for T_q, dtype, fmt in product((1, 9), self.dtypes, (affine(4), MXFP8)):
            case = make_case(
                B=2,
                T_q=T_q,
                k=fmt,
                dtype=dtype,
                lengths=lengths,
                left_padding=padding,
                layout=None,
            )
            key = mx.arange(case.keys)[:, None]
            absent = (key < padding[:, None, None, None]) | (
                key >= lengths[:, None, None, None]
            )
            spoilt = case.map_kv(
                lambda x, absent=absent: mx.where(absent, not_finite(x), x)
            )
            with self.subTest(T_q=T_q, dtype=str(dtype), format=str(fmt)):
                check_output(self.run_op(spoilt), case.reference()[0])

    def test_paged_cache(self):
        lengths, padding = mx.array([130, 65, 1]), mx.array([3, 0, 0])
        formats = (affine(4), affine(3, 32), MXFP8, NVFP4, TURBO4)
        for block, T_q, fmt in product((8, 16, 64), (1, 9), formats):
            case = make_case(
                B=3,
                T_q=T_q,
                T_kv=130,
                k=fmt,
                causal=True,
                lengths=lengths,
                left_padding=padding,
                layout=None,
            )
            pages = to_pages(case, block)
            self.check_with_lse(pages, block=block, T_q=T_q, format=fmt)

    def test_paged_cache_of_large_blocks(self):
        """Which the fallback reads in parts: 601 keys as 301 and 300."""
        lengths = mx.array([1700, 650])
        for fmt in (affine(3, 32), MXFP8, TURBO4):
            case = make_case(
                B=2,
                T_q=64,
                T_kv=1700,
                k=fmt,
                causal=True,
                lengths=lengths,
                layout=None,
            )
            self.check_with_lse(to_pages(case, 601), format=fmt)

    def test_paged_cache_with_everything(self):
        rng = np.random.default_rng(6)
        for T_q, dtype in product((1, 9), self.dtypes):
            case = make_case(
                B=2,
                N_q=8,
                T_q=T_q,
                T_kv=128,
                k=affine(8),
                v=TURBO3,
                dtype=dtype,
                mask=random_mask(rng, "additive", (2, 1, T_q, 128), dtype),
                sinks=mx.arange(8).astype(dtype),
                lengths=mx.array([128, 90]),
                left_padding=mx.array([50, 1]),
                causal=True,
                window_size=64,
                softcap=20.0,
                layout=None,
            )
            pages = to_pages(case, 32).map_kv(in_longer_cache)
            self.check_with_lse(pages, T_q=T_q, dtype=dtype)

    def test_lse_leaves_the_output_alone(self):
        for T_q, T_kv, dtype in product((1, 9, 40), (65, 600), self.dtypes):
            case = make_case(T_q=T_q, T_kv=T_kv, dtype=dtype)
            with self.subTest(T_q=T_q, T_kv=T_kv, dtype=str(dtype)):
                out, lse = self.run_op(case, return_lse=True)
                self.assertTrue(equal(out, self.run_op(case)))
                check_lse(lse, case.reference()[1], dtype)

    def test_parts_merge_by_lse(self):
        for T_q, cut in product((1, 9), (1, 64, 150)):
            case = make_case(T_q=T_q, T_kv=200)
            parts = [
                self.run_op(case.map_kv(lambda x, s=s: x[:, :, s]), return_lse=True)
                for s in (slice(cut), slice(cut, None))
            ]
            total = mx.logaddexp(parts[0][1], parts[1][1])
            merged = sum(out * mx.exp(lse - total)[..., None] for out, lse in parts)
            with self.subTest(T_q=T_q, cut=cut):
                expected, expected_lse = case.reference()
                check_output(merged, expected)
                check_lse(total, expected_lse)

    def test_rows_without_keys(self):
        T = 65
        for T_q, dtype, kind in product((1, 9), self.dtypes, ("bool", "additive")):
            keep = np.ones((2, 1, T_q, T), bool)
            keep[1, :, -1] = False
            mask = mx.array(keep)
            if kind == "additive":
                mask = mx.where(mask, 0.0, -mx.inf).astype(dtype)
            for sinks in (None, mx.array([1.0, -3.0, 0.0, 9.0], dtype)):
                case = make_case(
                    B=2, T_q=T_q, T_kv=T, mask=mask, sinks=sinks, dtype=dtype
                )
                self.check_with_lse(
                    case, T_q=T_q, dtype=dtype, kind=kind, sinks=sinks is not None
                )

    def test_scale_dtypes(self):
        for dtypes, T_q in product(product(DTYPES, repeat=3), (1, 9)):
            q, k, v = dtypes
            case = make_case(T_q=T_q, dtype=q, scale_dtype=k)
            case = replace(case, v=(case.v[0], *(x.astype(v) for x in case.v[1:])))
            self.check(case, q=q, k_scales=k, v_scales=v, T_q=T_q)

    def test_subnormal_scales(self):
        for T_q in (1, 9):
            case = make_case(T_q=T_q, T_kv=65, scale_dtype=mx.float16)
            tiny = tuple((x * 1e-5).astype(mx.float16) for x in case.v[1:])
            self.assertTrue(mx.all(mx.abs(tiny[0]) < 6e-5).item())
            self.check(replace(case, v=(case.v[0], *tiny)), T_q=T_q)

    def test_layouts_equal_contiguous(self):
        formats = (affine(4), affine(3, 32), NVFP4, TURBO4)
        for layout, fmt, T_q in product(LAYOUTS, formats, (1, 9, 40)):
            case = make_case(
                B=2, N_q=8, T_q=T_q, T_kv=129, k=fmt, causal=True, layout=None
            )
            with self.subTest(layout=layout.__name__, format=str(fmt), T_q=T_q):
                out = self.run_op(case)
                check_output(out, case.reference()[0])
                self.assertTrue(equal(out, self.run_op(case.map_kv(layout))))

    def test_every_array_in_its_own_layout(self):
        for shift, T_q in product(range(len(ROW_LAYOUTS)), (1, 9)):
            case = make_case(B=2, T_q=T_q, T_kv=129, layout=None)
            layouts = iter(ROW_LAYOUTS[shift:] + ROW_LAYOUTS * 2)
            mixed = case.map_kv(lambda x, each=layouts: next(each)(x))
            with self.subTest(shift=shift, T_q=T_q):
                out = self.run_op(case)
                check_output(out, case.reference()[0])
                self.assertTrue(equal(out, self.run_op(mixed)))

    def test_broadcast_keys(self):
        for T_q in (1, 9):
            shared = make_case(B=3, N_kv=2, T_q=T_q, layout=None)
            one = make_case(B=1, N_kv=1, T_q=T_q, layout=None)
            one = one.map_kv(lambda x: mx.broadcast_to(x, (3, 2, *x.shape[2:])))
            self.check(replace(shared, k=one.k, v=one.v), T_q=T_q)

    def test_query_layouts(self):
        layouts = {
            "token major": lambda q: mx.contiguous(q.swapaxes(1, 2)).swapaxes(1, 2),
            "part of a fused projection": lambda q: mx.concatenate([q, q, q], -1)[
                ..., : q.shape[-1]
            ],
            "columns first": lambda q: mx.contiguous(q.swapaxes(2, 3)).swapaxes(2, 3),
            "every second": lambda q: mx.repeat(q, 2, -1)[..., ::2],
        }
        for (name, view), T_q in product(layouts.items(), (1, 9, 40)):
            case = make_case(B=2, T_q=T_q, causal=True)
            with self.subTest(layout=name, T_q=T_q):
                out = self.run_op(case)
                check_output(out, case.reference()[0])
                viewed = replace(case, q=view(case.q))
                self.assertTrue(equal(out, self.run_op(viewed)))

    def test_rank_3_turbo_scales(self):
        for T_q in (1, 9):
            case = make_case(B=2, T_q=T_q, k=TURBO4, v=TURBO3, layout=None)
            out = self.run_op(case)
            check_output(out, case.reference()[0])
            flat = case.map_kv(lambda x: x[..., 0] if x.dtype == mx.float32 else x)
            for layout in (lambda x: x, *ROW_LAYOUTS[:3]):
                self.assertTrue(equal(out, self.run_op(flat.map_kv(layout))))

    def test_codebooks(self):
        rng = np.random.default_rng(7)
        for bits, T_q in product((2, 3, 4), (1, 9)):
            k, v = np.sort(rng.standard_normal((2, 2**bits)), -1).astype(np.float32)
            fmt = (TURBO2, TURBO3, TURBO4)[bits - 2]
            for given in ({"k": k}, {"v": v}, {"k": k, "v": v}):
                given = {f"{n}_codebook": mx.array(x) for n, x in given.items()}
                case = make_case(T_q=T_q, k=fmt, **given)
                self.check(case, bits=bits, T_q=T_q, given=list(given))

    def test_same_call_twice(self):
        for T_q, T_kv, dtype in product((1, 8, 40), (129, 1025), self.dtypes):
            case = make_case(B=2, N_q=8, T_q=T_q, T_kv=T_kv, dtype=dtype)
            with self.subTest(T_q=T_q, T_kv=T_kv, dtype=str(dtype)):
                first = self.run_op(case)
                self.assertTrue(np.any(to_numpy(first)))
                self.assertTrue(equal(first, self.run_op(case)))

    def test_nothing_stays_from_another_call(self):
        for T_q, fmt, dtype in product((1, 4, 9), (affine(4), MXFP4), self.dtypes):
            case = make_case(B=8, T_q=T_q, T_kv=64, k=fmt, dtype=dtype)
            spoilt = replace(case, q=case.q * mx.nan).map_kv(not_finite)
            for T_kv in (1, 5, 33):
                case = make_case(B=8, T_q=T_q, T_kv=T_kv, k=fmt, dtype=dtype)
                self.check(case, T_q=T_q, format=fmt, dtype=dtype, T_kv=T_kv)
                before = self.run_op(case)
                mx.eval(before, spoilt.run())
                with self.subTest(T_q=T_q, format=str(fmt), T_kv=T_kv):
                    self.assertTrue(equal(before, self.run_op(case)))

    def test_batch_row_alone(self):
        ragged = {
            "lengths": mx.array([1025, 400, 64]),
            "left_padding": mx.array([0, 10, 63]),
        }
        for T_q, T_kv, kwargs in product((1, 9), (129, 1025), ({}, ragged)):
            case = make_case(B=3, N_q=8, T_q=T_q, T_kv=T_kv, causal=True, **kwargs)
            with self.subTest(T_q=T_q, T_kv=T_kv, ragged=bool(kwargs)):
                whole = self.run_op(case)
                check_output(whole, case.reference()[0])
                for b in range(3):
                    alone = self.run_op(case.row(b))
                    self.assertTrue(equal(whole[b : b + 1], alone))

    def test_large_equal_keys(self):
        for T_kv, fmt, dtype in product((1025, 5000), (affine(8), MXFP8), HALVES):
            case = make_case(T_kv=T_kv, k=fmt, dtype=dtype, layout=None)
            q = mx.full(case.q.shape, 30.0, dtype)
            k, v = (
                encode(np.full((1, 2, T_kv, 64), size), fmt, dtype)
                for size in (30.0, 224.0)
            )
            case = replace(case, q=q, k=k, v=v)
            self.check_with_lse(case, T_kv=T_kv, format=fmt, dtype=dtype)

    def test_error_of_the_plain_path(self):
        """At most twice that of dequantize + SDPA in the same dtype, and rounding."""
        for fmt, dtype, T_q in product((affine(4), affine(8), MXFP8), DTYPES, (1, 9)):
            case = make_case(k=fmt, T_q=T_q, T_kv=257, dtype=dtype, causal=True)
            k, v = (
                mx.dequantize(
                    *parts,
                    group_size=fmt.group_size,
                    bits=fmt.bits,
                    mode=fmt.mode,
                    dtype=dtype,
                )
                for parts in (case.k, case.v)
            )
            plain = mx.fast.scaled_dot_product_attention(
                case.q, k, v, scale=case.kwargs["scale"], mask="causal"
            )
            expected = case.reference()[0]
            errors = [
                nmse(to_numpy(x), expected) ** 0.5 for x in (self.run_op(case), plain)
            ]
            with self.subTest(format=str(fmt), dtype=str(dtype), T_q=T_q):
                self.assertLessEqual(errors[0], 2 * errors[1] + mx.finfo(dtype).eps)


class TestQuantizedSDPAFallback(TestQuantizedSDPA):
    """The same through the graph of ordinary ops, on fewer and smaller shapes."""

    fused = False
    formats = (*AFFINE[1::3], MXFP4, MXFP8, NVFP4, TURBO2, TURBO3, TURBO4)
    dtypes = DTYPES
    T_qs = (1, 9, 33, 130)
    T_kvs = (1, 32, 65)
    long_T_kvs = (513, 1025)


class TestCallForms(QuantizedSDPATestCase):
    """Every spelling of one call gives the same bits."""

    def setUp(self):
        super().setUp()
        self.q = mx.random.normal((1, 4, 3, 128), key=mx.random.key(0))
        k, v = mx.random.normal((2, 1, 2, 40, 128), key=mx.random.key(1))
        self.k, self.v = k, v

    def expect_equal(self, explicit, *calls):
        op = mx.fast.quantized_scaled_dot_product_attention
        expected = op(*explicit[0], scale=0.1, **explicit[1])
        self.assertTrue(mx.any(expected != 0).item())
        for args, kwargs in calls:
            with self.subTest(args=len(args), **as_text(kwargs)):
                out = op(*args, scale=0.1, force_fused=True, **kwargs)
                self.assertTrue(equal(out, expected))

    def explicit(self, k_fmt, v_fmt=None):
        v_fmt = v_fmt or k_fmt
        k, v = (
            (*mx.quantize(x, f.group_size, f.bits, f.mode), None)[:3]
            for x, f in ((self.k, k_fmt), (self.v, v_fmt))
        )
        return (self.q, *k, *v), {**k_fmt.keywords("k"), **v_fmt.keywords("v")}

    def test_affine(self):
        args, kwargs = self.explicit(affine(4))
        q, k, k_scales, k_biases, v, v_scales, v_biases = args
        five = (q, k, k_scales, v, v_scales)
        biases = {"k_biases": k_biases, "v_biases": v_biases}
        self.expect_equal(
            (args, kwargs),
            (args, {}),
            (args, {"mode": "affine"}),
            (args, {"bits": 4, "group_size": 64}),
            (args, {"bits": 8, "k_bits": 4, "v_bits": 4}),
            (args, {"group_size": 32, "k_group_size": 64, "v_group_size": 64}),
            (five, biases),
            (five, {**biases, "mode": "affine"}),
        )

    def test_affine_of_other_bits_and_groups(self):
        args, kwargs = self.explicit(affine(8, 32))
        self.expect_equal(
            (args, kwargs),
            (args, {"bits": 8, "group_size": 32}),
            (args, {"k_bits": 8, "v_bits": 8, "group_size": 32}),
        )
        args, kwargs = self.explicit(affine(8), affine(4))
        self.expect_equal(
            (args, kwargs),
            (args, {"k_bits": 8}),
            (args, {"bits": 8, "v_bits": 4}),
        )

    def test_modes_without_biases(self):
        for fmt, spelt in (
            (MXFP4, ({}, {"mode": "mxfp4"}, {"bits": 4, "group_size": 32})),
            (MXFP8, ({"mode": "mxfp8"}, {"k_mode": "mxfp8", "v_mode": "mxfp8"})),
            (NVFP4, ({"mode": "nvfp4"}, {"mode": "nvfp4", "bits": 4})),
        ):
            args, kwargs = self.explicit(fmt)
            q, k, k_scales, _, v, v_scales, _ = args
            five = (q, k, k_scales, v, v_scales)
            calls = [(form, s) for form in (args, five) for s in spelt]
            self.expect_equal((args, kwargs), *calls)

    def test_turbo_modes(self):
        case = make_case(k=TURBO3, D=128)
        explicit = (case.args, {"k_mode": "turbo3", "v_mode": "turbo3"})
        self.expect_equal(
            explicit,
            (case.args, {"mode": "turbo3"}),
            (case.args, {"mode": "turbo3", "bits": 3}),
            (case.args, {"mode": "turbo3", "group_size": 128}),
        )

    def test_each_operand_has_its_own_default_mode(self):
        args, kwargs = self.explicit(affine(4), MXFP4)
        self.expect_equal((args, kwargs), (args, {}), (args, {"v_mode": "mxfp4"}))
        args, kwargs = self.explicit(MXFP4, affine(4))
        self.expect_equal((args, kwargs), (args, {}), (args, {"k_mode": "mxfp4"}))


if __name__ == "__main__":
    MLXTestRunner()
