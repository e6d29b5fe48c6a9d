"""The oracle and its checks: right by themselves, and able to fail."""

import unittest
from itertools import product

import mlx.core as mx
import numpy as np
from quantized_sdpa_reference import (
    E2M1,
    E4M3,
    E8M0,
    FORMATS,
    MXFP4,
    MXFP8,
    NMSE_BOUND,
    NVFP4,
    affine,
    check_lse,
    check_output,
    decode,
    make_case,
    pack,
    random_mask,
    to_numpy,
    unpack,
    visible_keys,
)
from test_fast_quantized_sdpa import DTYPES, MLXTestRunner
from test_kv_codec import dequantize, every_code, with_scales


class TestChecksCanFail(unittest.TestCase):
    """The checks reject the faults that attention kernels have."""

    def test_faulty_outputs(self):
        for dtype, T_q in product(DTYPES, (1, 9)):
            case = make_case(N_q=8, T_q=T_q, T_kv=1025, D=128, k=affine(8), dtype=dtype)
            expected, expected_lse = case.reference()
            shorter = case.map_kv(lambda x: x[:, :, :-32])
            faults = {
                "zero": (np.zeros_like(expected), expected_lse * 0),
                "last tile dropped": shorter.reference(),
                "last key dropped": case.reference(lengths=mx.array([1024])),
                "first key dropped": case.reference(left_padding=mx.array([1])),
                "heads swapped": (expected[:, ::-1], expected_lse[:, ::-1]),
                "key heads swapped": case.map_kv(lambda x: x[:, ::-1]).reference(),
                "scale off by 1 %": case.reference(scale=1.01 * 128**-0.5),
            }
            check_output(mx.array(expected.astype(np.float32)), expected, dtype)
            for fault, (out, lse) in faults.items():
                with self.subTest(fault=fault, dtype=str(dtype), T_q=T_q):
                    self.assert_rejected(check_output, out, expected, dtype)
                    # One key of 1025 moves it by less than rounding a half q.
                    if dtype == mx.float32 or "key dropped" not in fault:
                        self.assert_rejected(check_lse, lse, expected_lse, dtype)

    def assert_rejected(self, check, wrong, expected, dtype):
        with self.assertRaises(AssertionError):
            check(mx.array(wrong.astype(np.float32)), expected, dtype)

    def test_faulty_rows(self):
        case = make_case(T_q=9, T_kv=20, lengths=mx.array([5]), causal=True)
        expected, expected_lse = case.reference()
        good = mx.array(expected.astype(np.float32))
        check_output(good, expected)
        check_lse(mx.array(expected_lse.astype(np.float32)), expected_lse)
        empty = mx.array(expected_lse == -np.inf)
        self.assertTrue(mx.any(empty).item())
        for wrong in (
            mx.where(empty[..., None], 1e-6, good),
            mx.where(empty[..., None], mx.nan, good),
            mx.where(good == good[0, 3, 8], 0.0, good),
        ):
            with self.assertRaises(AssertionError):
                check_output(wrong, expected)
        with self.assertRaises(AssertionError):
            check_lse(mx.full(empty.shape, -1e9), expected_lse)

    def test_rounding_alone_is_right(self):
        """A value just below the middle between two bfloat16 numbers, everywhere."""
        expected = np.full((1, 4, 9, 64), 1 + 0.99 / 256)
        exact = mx.array(expected.astype(np.float32))
        check_output(exact.astype(mx.bfloat16), expected)
        self.assert_rejected(check_output, expected + 1 / 128, expected, mx.bfloat16)

    def test_terms_that_cancel_leave_an_error(self):
        """One key beside a sink, its score small beside its terms."""
        case = make_case(
            N_q=9,
            N_kv=3,
            T_q=33,
            T_kv=1,
            D=512,
            k=affine(1),
            sharpness=5.0,
            sinks=mx.zeros((9,)),
        )
        expected, _ = case.reference()
        check_output(case.run(), expected, mx.float32, case.score_nmse)
        near, off = (
            mx.array((expected * (1 + times * case.score_nmse() ** 0.5)), mx.float32)
            for times in (0.9, 1.1)
        )
        check_output(near, expected, mx.float32, case.score_nmse)
        with self.assertRaises(AssertionError):
            check_output(near, expected)
        with self.assertRaises(AssertionError):
            check_output(off, expected, mx.float32, case.score_nmse)

    def test_terms_that_cancel_leave_an_error_of_the_lse(self):
        """One key, whose score is the log-sum-exp; found by fuzzing."""
        case = make_case(T_q=64, T_kv=1, D=128, k=affine(1, 128), sharpness=5.0)
        _, expected = case.reference()
        _, lse = case.run(return_lse=True)
        check_lse(lse, expected, mx.float32, case.score_nmse)
        error = case.score_nmse() ** 0.5
        small = np.zeros_like(expected)
        near, off = (mx.array(small + x * error, mx.float32) for x in (0.9, 1.1))
        check_lse(near, small, mx.float32, case.score_nmse)
        with self.assertRaises(AssertionError):
            check_lse(near, small)
        with self.assertRaises(AssertionError):
            check_lse(off, small, mx.float32, case.score_nmse)

    def test_few_terms_leave_no_error_above_the_bound(self):
        for D in (64, 128):
            self.assertLess(make_case(D=D).score_nmse(), NMSE_BOUND[mx.float32])

    def test_oracle_equals_stock_attention(self):
        rng = np.random.default_rng(8)
        sinks = mx.array([1.5, -2.0, 4.0, 0.0])
        mask = random_mask(rng, "additive", (2, 1, 9, 70))
        for fmt, kwargs in product(
            (affine(4), affine(3, 32), affine(1), MXFP4, MXFP8, NVFP4),
            ({}, {"mask": "causal"}, {"mask": mask}, {"sinks": sinks}),
        ):
            case = make_case(B=2, T_q=9, T_kv=70, k=fmt, **kwargs)
            k, v = (
                mx.dequantize(
                    *parts,
                    group_size=fmt.group_size,
                    bits=fmt.bits,
                    mode=fmt.mode,
                    dtype=mx.float32,
                )
                for parts in (case.k, case.v)
            )
            stock = mx.fast.scaled_dot_product_attention(
                case.q, k, v, scale=64**-0.5, **kwargs
            )
            with self.subTest(format=str(fmt), given=list(kwargs)):
                check_output(stock, case.reference()[0])


class TestOracleVisibility(unittest.TestCase):
    def test_causal_window_of_a_ragged_row(self):
        given = {
            "lengths": mx.array([5, 2, 9]),
            "left_padding": mx.array([1, 0, 7]),
            "causal": True,
            "window_size": 2,
        }
        exists, visible = visible_keys(3, 3, 6, given)
        drawn = (
            (".####.", (".##...", "..##..", "...##.")),
            ("##....", ("......", "#.....", "##....")),
            ("......", ("......", "......", "......")),
        )
        for b, (row, rows) in enumerate(drawn):
            self.assertEqual(draw(exists[b]), row)
            self.assertEqual(tuple(map(draw, visible[b])), rows)

    def test_causal_is_aligned_to_the_end(self):
        _, visible = visible_keys(1, 4, 3, {"mask": "causal"})
        drawn = ("...", "#..", "##.", "###")
        self.assertEqual(tuple(map(draw, visible[0])), drawn)

    def test_softcap_comes_before_the_mask(self):
        mask = mx.array([[0.0, 50.0]])
        case = make_case(N_q=1, N_kv=1, T_kv=2, sharpness=100, mask=mask, softcap=1.0)
        _, lse = case.reference()
        self.assertAlmostEqual(lse.item(), 50, delta=1.01)


def draw(keys):
    return "".join(".#"[int(key)] for key in keys)


class TestOracleDecode(unittest.TestCase):
    """The oracle's own tables, so that it cannot share a fault with the op."""

    def test_pack_round_trip(self):
        rng = np.random.default_rng(0)
        for bits in (1, 2, 3, 4, 5, 6, 8):
            codes = rng.integers(0, 2**bits, (3, 64)).astype(np.uint8)
            words = pack(codes, bits)
            self.assertEqual(words.shape, (3, 2 * bits))
            np.testing.assert_array_equal(unpack(words, bits), codes)
            number = sum(int(c) << (bits * i) for i, c in enumerate(codes[0]))
            expected = [number >> (32 * i) & 0xFFFFFFFF for i in range(2 * bits)]
            self.assertEqual(words[0].tolist(), expected)

    def test_small_floats(self):
        np.testing.assert_array_equal(E2M1[:8], [0, 0.5, 1, 1.5, 2, 3, 4, 6])
        np.testing.assert_array_equal(E2M1[8:], -E2M1[:8])
        self.assertEqual(
            E4M3[[1, 0x08, 0x38, 0x7E, 0xFE]].tolist(), [2**-9, 2**-6, 1, 448, -448]
        )
        self.assertEqual(E8M0[[0, 127, 254]].tolist(), [2.0**-127, 1, 2.0**127])

    def test_equals_mx_dequantize(self):
        for fmt in FORMATS:
            parts = with_scales(fmt, every_code(fmt))
            with self.subTest(format=str(fmt)):
                values = decode(fmt, *map(to_numpy, parts)).astype(np.float32)
                np.testing.assert_array_equal(values, dequantize(fmt, parts))


if __name__ == "__main__":
    MLXTestRunner()
