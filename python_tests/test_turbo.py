"""The wheel's helpers for the turbo formats."""

import unittest
from itertools import product

import mlx.core as mx
import numpy as np
from mlx_quantized_sdpa import turbo_codebook, turbo_dequantize, turbo_quantize
from quantized_sdpa_reference import (
    TURBO2,
    TURBO3,
    TURBO4,
    Case,
    check_output,
    decode,
    lloyd_max,
    pack,
    to_numpy,
    unpack,
)

FORMATS = {2: TURBO2, 3: TURBO3, 4: TURBO4}
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
# Mean squared error of the best scalar quantizers of N(0, 1).
OPTIMAL_MSE = {2: 0.11748, 3: 0.034548, 4: 0.009501}


def normal(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape).astype(np.float32)


class TestCodebook(unittest.TestCase):
    def test_levels(self):
        for bits in FORMATS:
            levels = turbo_codebook(bits)
            self.assertEqual((levels.dtype, levels.shape), (mx.float32, (2**bits,)))
            np.testing.assert_allclose(np.array(levels), lloyd_max(bits), rtol=1e-6)

    def test_published_levels(self):
        upper = np.array(turbo_codebook(3))[4:]
        published = [0.24509, 0.75601, 1.34391, 2.15195]
        np.testing.assert_allclose(upper, published, rtol=1e-4)

    def test_is_the_default_of_the_op(self):
        """One visible key gives V's levels back."""
        for bits, fmt in FORMATS.items():
            codes = np.arange(64, dtype=np.uint8) % 2**bits
            parts = mx.array(pack(codes[None, None, None], bits)), mx.ones((1, 1, 1, 1))
            keywords = {"scale": 1.0, **fmt.keywords("k"), **fmt.keywords("v")}
            case = Case(
                mx.zeros((1, 1, 1, 64)), (*parts, None), (*parts, None), keywords
            )
            expected = turbo_codebook(bits)[mx.array(codes)]
            self.assertTrue(mx.array_equal(case.run()[0, 0, 0], expected).item())

    def test_other_bits(self):
        for bits in (0, 1, 5, 8):
            with self.assertRaisesRegex(ValueError, "bits must be 2, 3 or 4; got"):
                turbo_codebook(bits)


class TestTurboQuantize(unittest.TestCase):
    def test_many_tokens_get_the_codes_that_each_gets(self):
        x = mx.array(normal(1200, 64))
        for bits in FORMATS:
            whole = turbo_quantize(x, bits)
            pieces = [turbo_quantize(x[i : i + 100], bits) for i in range(0, 1200, 100)]
            for part, found in zip(whole, zip(*pieces)):
                self.assertTrue(mx.array_equal(mx.concatenate(found), part))

    def test_shapes_and_dtypes(self):
        for bits, dtype, shape in product(
            FORMATS, DTYPES, ((64,), (5, 128), (2, 3, 7, 96))
        ):
            x = mx.array(normal(*shape)).astype(dtype)
            codes, scales = turbo_quantize(x, bits)
            self.assertEqual(codes.dtype, mx.uint32)
            self.assertEqual(codes.shape, (*shape[:-1], shape[-1] * bits // 32))
            self.assertEqual(scales.dtype, dtype)
            self.assertEqual(scales.shape, (*shape[:-1], 1))
            back = turbo_dequantize(codes, scales, bits, dtype=mx.float32)
            self.assertEqual((back.dtype, back.shape), (mx.float32, x.shape))
            self.assertEqual(turbo_dequantize(codes, scales, bits).dtype, dtype)

    def test_error_is_near_the_optimum(self):
        x = normal(2048, 1024)
        for bits, dtype in product(FORMATS, DTYPES):
            codes, scales = turbo_quantize(mx.array(x).astype(dtype), bits)
            back = turbo_dequantize(codes, scales, bits, dtype=mx.float32)
            mse = np.mean((np.array(back) - x) ** 2)
            with self.subTest(bits=bits, dtype=str(dtype)):
                self.assertLessEqual(mse, 1.01 * OPTIMAL_MSE[bits])
                self.assertGreaterEqual(mse, 0.99 * OPTIMAL_MSE[bits])

    def test_codes_are_of_the_nearest_levels(self):
        x = normal(50, 96, seed=1)
        levels = np.sort(normal(16, seed=2))
        for bits, given in product(FORMATS, (False, True)):
            book = levels[: 2**bits] if given else np.array(turbo_codebook(bits))
            codes, scales = turbo_quantize(
                mx.array(x), bits, mx.array(book) if given else None
            )
            scales = np.array(scales)
            np.testing.assert_allclose(
                scales[:, 0], np.linalg.norm(x, axis=-1) / 96**0.5, rtol=1e-6
            )
            distance = np.abs((x / scales)[..., None] - book)
            got = unpack(np.array(codes), bits)
            chosen = np.take_along_axis(distance, got[..., None].astype(int), -1)[
                ..., 0
            ]
            with self.subTest(bits=bits, given=given):
                self.assertEqual(len(np.unique(got)), 2**bits)
                self.assertTrue(np.all(chosen <= distance.min(-1) + 1e-6))

    def test_dequantize_equals_the_oracle(self):
        rng = np.random.default_rng(3)
        for bits, given in product(FORMATS, (False, True)):
            codes = rng.integers(0, 2**32, (3, 5, 2 * bits), np.uint32)
            scales = normal(3, 5, 1, seed=4)
            book = np.sort(normal(2**bits, seed=5)) if given else None
            args = mx.array(codes), mx.array(scales), bits
            got = turbo_dequantize(*args, None if book is None else mx.array(book))
            expected = decode(FORMATS[bits], codes, scales, None, book)
            np.testing.assert_allclose(np.array(got), expected, rtol=1e-6)
            flat = turbo_dequantize(
                args[0], args[1][..., 0], bits, None if book is None else mx.array(book)
            )
            self.assertTrue(mx.array_equal(flat, got).item())

    def test_unusual_vectors(self):
        rows = np.zeros((5, 64), np.float32)
        rows[1] = normal(64) * 1e30
        rows[2] = normal(64) * 1e-30
        rows[3, 7] = 1.0
        rows[4] = 3.0
        wide = rows.astype(np.float64)
        for bits in FORMATS:
            codes, scales = turbo_quantize(mx.array(rows), bits)
            back = np.array(turbo_dequantize(codes, scales, bits))
            with self.subTest(bits=bits):
                self.assertTrue(np.isfinite(back).all())
                self.assertFalse(back[0].any())
                for i in (1, 2):
                    error = np.linalg.norm(back[i] - wide[i])
                    self.assertLess(error, 0.5 * np.linalg.norm(wide[i]))
                self.assertEqual(np.argmax(back[3]), 7)
                self.assertEqual(len(np.unique(back[4])), 1)

    def test_largest_half(self):
        x = mx.full((2, 128), 65504.0, mx.float16)
        for bits in FORMATS:
            codes, scales = turbo_quantize(x, bits)
            self.assertTrue(mx.all(mx.isfinite(scales)).item())
            self.assertEqual(scales[0, 0].item(), 65504.0)

    def test_views(self):
        x = mx.array(normal(6, 128, 3)).swapaxes(1, 2)
        for bits in FORMATS:
            for a, b in zip(
                turbo_quantize(x, bits),
                turbo_quantize(mx.contiguous(x), bits),
                strict=True,
            ):
                self.assertTrue(mx.array_equal(a, b).item())

    def test_bad_input(self):
        x = mx.array(normal(4, 64))
        codes, scales = turbo_quantize(x, 4)
        for call, words in (
            (lambda: turbo_quantize(x, 5), "bits must be 2, 3 or 4; got 5"),
            (lambda: turbo_quantize(x[:, :63], 4), "multiple of 32; got 63"),
            (lambda: turbo_quantize(x[:, :0], 4), "multiple of 32; got 0"),
            (lambda: turbo_quantize(x.astype(mx.int32), 4), "must be floating point"),
            (lambda: turbo_quantize(mx.array(1.0), 4), "at least one axis"),
            (
                lambda: turbo_quantize(x, 4, mx.arange(8.0)),
                "codebook must have the shape",
            ),
            (
                lambda: turbo_dequantize(codes, scales, 1),
                "bits must be 2, 3 or 4; got 1",
            ),
            (lambda: turbo_dequantize(x, scales, 4), "codes must be uint32"),
            (
                lambda: turbo_dequantize(codes, scales[:2], 4),
                "scales must have the shape",
            ),
            (lambda: turbo_dequantize(codes[:, :1], scales, 3), "whole 3-bit codes"),
        ):
            with self.subTest(words=words), self.assertRaisesRegex(ValueError, words):
                call()


class TestTurboInTheOp(unittest.TestCase):
    def test_attention_over_quantized_vectors(self):
        for bits, dtype, T_q in product(FORMATS, DTYPES, (1, 9)):
            q, k, v = (
                mx.array(normal(2, heads, T, 128, seed=seed)).astype(dtype)
                for seed, (heads, T) in enumerate(((4, T_q), (2, 70), (2, 70)))
            )
            k, v = ((*turbo_quantize(x, bits), None) for x in (k, v))
            fmt = FORMATS[bits]
            keywords = {"scale": 0.1, **fmt.keywords("k"), **fmt.keywords("v")}
            case = Case(q, k, v, keywords)
            with self.subTest(bits=bits, dtype=str(dtype), T_q=T_q):
                check_output(case.run(force_fused=True), case.reference()[0])
                k, v = (
                    turbo_dequantize(*x[:2], bits, dtype=mx.float32) for x in (k, v)
                )
                plain = mx.fast.scaled_dot_product_attention(
                    q.astype(mx.float32), k, v, scale=0.1
                )
                check_output(plain, to_numpy(case.reference()[0]))


if __name__ == "__main__":
    unittest.main()
