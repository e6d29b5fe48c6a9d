"""NaN and infinity: whom they reach, and that hidden keys may hold anything.

Also run on the emulated GPU, by cuda/test_quantized_sdpa_nonfinite_emulated.py, and on
the stand-in for Metal, by `make test-metal`.
"""

import math
from dataclasses import replace
from itertools import product

import mlx.core as mx
import numpy as np
from quantized_sdpa_reference import (
    LSE_BOUND,
    MXFP8,
    TURBO4,
    affine,
    check_lse,
    check_output,
    make_case,
    to_numpy,
    visible_keys,
)
from test_fast_quantized_sdpa import (
    MLXTestRunner,
    QuantizedSDPATestCase,
    as_text,
    not_finite,
)

# NaN in every lane of a word of fp8 codes; of the other formats just codes.
NAN_CODES = 0x7F7F7F7F


def spoilt(parts, where):
    """One operand with what is not finite at the keys `where` [B, 1, T_kv, 1]."""

    def change(x):
        bad = mx.full(x.shape, NAN_CODES, x.dtype) if x.dtype == mx.uint32 else None
        return mx.where(where, not_finite(x) if bad is None else bad, x)

    return tuple(None if x is None else change(x) for x in parts)


def key_at(case, key):
    return mx.arange(case.keys)[None, None, :, None] == key


def seen(case):
    """Which keys each row of the output sees, [B, N_q, T_q, T_kv]."""
    B, N, T_q, _ = case.q.shape
    _, visible = visible_keys(B, T_q, case.keys, case.kwargs)
    visible = np.broadcast_to(visible[:, None], (B, N, T_q, case.keys))
    mask = to_numpy(case.kwargs.get("mask"))
    return visible if mask is None else visible & (mask if mask.dtype == bool else True)


class TestNotFinite(QuantizedSDPATestCase):
    windows = (None, 7, 20)
    # One shape for each CPU kernel: few rows, integers, tiles.
    shapes = (
        {"T_q": 1, "k": affine(4), "dtype": mx.float32},
        {"T_q": 3, "k": MXFP8, "dtype": mx.float32},
        {"T_q": 5, "k": affine(8), "dtype": mx.float16},
        {"T_q": 12, "k": TURBO4, "dtype": mx.bfloat16},
        {"T_q": 40, "k": affine(4), "dtype": mx.float32},
    )

    def cases(self, **kwargs):
        for shape in self.shapes:
            yield make_case(T_kv=150, layout=None, **shape, **kwargs)

    def check_rows(self, case, original, reached):
        """NaN in the rows `reached`, the others as of the original call."""
        shape = {"T_q": case.q.shape[2], "dtype": case.q.dtype, **case.kwargs}
        with self.subTest(**as_text(shape)):
            self.check_each(case, original, reached)

    def check_each(self, case, original, reached):
        out, lse = self.run_op(case, return_lse=True)
        expected, expected_lse = original.reference()
        found = to_numpy(out)
        self.assertTrue(np.isnan(found[reached]).all(), "NaN was lost")
        found[reached] = expected[reached]
        check_output(mx.array(found), expected, case.q.dtype)
        found = to_numpy(lse)
        self.assertTrue(np.isnan(found[reached]).all(), "NaN was lost from lse")
        found[reached] = expected_lse[reached]
        bound = LSE_BOUND[case.q.dtype] * np.maximum(1, np.abs(expected_lse))
        self.assertTrue(np.all(np.abs(found - expected_lse) <= bound))

    def test_keys_that_no_query_sees_may_hold_anything(self):
        options = (
            {},
            {"lengths": mx.array([90, 150])},
            {"lengths": mx.array([64, 129]), "left_padding": mx.array([5, 70])},
        )
        for more, window in product(options, self.windows):
            for case in self.cases(B=2, causal=True, window_size=window, **more):
                hidden = mx.array(~seen(case).any((1, 2)))[:, None, :, None]
                for side in ("k", "v"):
                    parts = spoilt(getattr(case, side), hidden)
                    self.check_rows(
                        replace(case, **{side: parts}),
                        case,
                        np.zeros(case.q.shape[:3], bool),
                    )

    def test_nan_in_a_key_reaches_the_rows_that_see_it(self):
        masks = (None, mx.arange(150) != 147)
        for mask, window, key in product(masks, (None, 30), (118, 147)):
            for case in self.cases(causal=True, window_size=window, mask=mask):
                changed = replace(case, k=spoilt(case.k, key_at(case, key)))
                self.check_rows(changed, case, seen(case)[..., key])

    def test_nan_in_a_query_reaches_its_row(self):
        for case in self.cases():
            q = np.array(case.q.astype(mx.float32))
            q[0, 1, -1, 3] = math.nan
            changed = replace(case, q=mx.array(q).astype(case.q.dtype))
            reached = np.zeros(q.shape[:3], bool)
            reached[0, 1, -1] = True
            self.check_rows(changed, case, reached)

    def test_nan_and_infinity_in_a_mask_reach_its_row(self):
        for value in (math.nan, math.inf):
            for case in self.cases():
                T_q = case.q.shape[2]
                mask = np.zeros((1, case.q.shape[1], T_q, case.keys), np.float32)
                mask[:, :, :, 3] = -np.inf
                original = case.having(mask=mx.array(mask))
                mask[0, 2, -1, 100] = value
                reached = np.zeros(case.q.shape[:3], bool)
                reached[0, 2, -1] = True
                self.check_rows(case.having(mask=mx.array(mask)), original, reached)

    def test_nan_in_a_value(self):
        """Reaches the rows that see it, perhaps others of its head, never lse."""
        for case in self.cases(B=2, causal=True):
            where = key_at(case, 140) & (mx.arange(2)[:, None, None, None] == 1)
            head = mx.arange(2)[None, :, None, None] == 0
            changed = replace(case, v=spoilt(case.v, where & head))
            out, lse = self.run_op(changed, return_lse=True)
            plain = self.run_op(case)
            check_lse(lse, case.reference()[1], case.q.dtype)
            reached = seen(case)[..., 140].copy()
            reached[0] = reached[:, 2:] = False
            self.assertTrue(np.isnan(to_numpy(out)[reached]).all())
            self.assertTrue(mx.array_equal(out[0], plain[0]).item())
            self.assertTrue(mx.array_equal(out[1, 2:], plain[1, 2:]).item())


class TestNotFiniteFallback(TestNotFinite):
    fused = False


if __name__ == "__main__":
    MLXTestRunner()
