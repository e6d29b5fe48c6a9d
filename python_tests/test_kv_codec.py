"""Every code of every format, decoded by the kernels of the op, against mx.dequantize.

One visible key makes the output of the op V's row, and its log-sum-exp scale * q . k.
"""

from itertools import product

import mlx.core as mx
import numpy as np
from quantized_sdpa_reference import (
    FORMATS,
    Case,
    lloyd_max,
    pack,
    to_numpy,
    unpack,
)
from test_fast_quantized_sdpa import DTYPES, MLXTestRunner, QuantizedSDPATestCase

TINY = np.finfo(np.float32).tiny


def every_code(fmt):
    """Packed rows [n, 1, 1, words] that hold each code at each place of a row."""
    n, dim = 2**fmt.bits, max(64, fmt.group_size)
    codes = (np.arange(n)[:, None] + np.arange(dim)) % n
    return pack(codes, fmt.bits)[:, None, None]


def with_scales(fmt, codes, seed=0):
    """(codes, scales, biases) with scales so short that s * c + b rounds once."""
    rng = np.random.default_rng(seed)
    groups = codes.shape[-1] * 32 // fmt.bits // fmt.group_size if fmt.group_size else 1
    shape = (*codes.shape[:-1], groups)

    def short_float():
        magnitude = 2.0 ** rng.integers(-6, 3, shape)
        x = magnitude * (1 + rng.integers(0, 64, shape) / 64)
        return mx.array(x.astype(np.float32))

    codes = mx.array(codes)
    if fmt.mode == "affine":
        return codes, short_float(), -short_float()
    if fmt.is_turbo:
        return codes, short_float(), None
    middle = 127 if fmt.group_size == 32 else 0x38
    scales = middle + rng.integers(-6, 3, shape)
    return codes, mx.array(scales.astype(np.uint8)), None


def dequantize(fmt, parts):
    """Float32 values as MLX decodes them; codebooks, which it does not know, here."""
    if fmt.is_turbo:
        codes = unpack(to_numpy(parts[0]), fmt.bits)
        return lloyd_max(fmt.bits).astype(np.float32)[codes] * np.array(parts[1])
    x = mx.dequantize(
        *parts,
        group_size=fmt.group_size,
        bits=fmt.bits,
        mode=fmt.mode,
        dtype=mx.float32,
    )
    return np.array(x)


def read_v(fmt, parts, T_q, dtype=mx.float32, **kwargs):
    """V's rows, as the op decodes them, once for each query."""
    rows, dim = parts[0].shape[0], parts[0].shape[-1] * 32 // fmt.bits
    q = mx.zeros((rows, 1, T_q, dim), dtype)
    zeros = [None if x is None else mx.zeros_like(x) for x in parts]
    keywords = {"scale": 1.0, **fmt.keywords("k"), **fmt.keywords("v")}
    return Case(q, tuple(zeros), parts, keywords).run(**kwargs)


def read_k(fmt, parts, as_heads, dtype, **kwargs):
    """K's rows from the scores of one-hot queries: query heads or query positions."""
    rows, dim = parts[0].shape[0], parts[0].shape[-1] * 32 // fmt.bits
    shape = (rows, dim, 1, dim) if as_heads else (rows, 1, dim, dim)
    q = mx.broadcast_to(mx.eye(dim, dtype=dtype).reshape(1, *shape[1:]), shape)
    keywords = {"scale": 1.0, **fmt.keywords("k"), **fmt.keywords("v")}
    _, lse = Case(q, parts, parts, keywords).run(return_lse=True, **kwargs)
    return to_numpy(lse).reshape(rows, 1, 1, dim)


def without_nan_codes(fmt, codes):
    """MLX's CPU reads the codes 0x7f and 0xff as NaN, its Metal kernels as 480."""
    if fmt.mode != "mxfp8":
        return codes
    values = unpack(codes, 8)
    return pack(np.where(values % 128 == 127, 1, values), 8)


class TestKVCodec(QuantizedSDPATestCase):
    def assert_same_values(self, out, expected):
        out, expected = np.array(out.astype(mx.float32)), np.array(expected)
        out = np.where(np.abs(out) < TINY, 0, out)
        # GPUs may flush subnormal values to zero.
        expected = np.where(np.abs(expected) < TINY, 0, expected)
        np.testing.assert_array_equal(out, np.broadcast_to(expected, out.shape))

    def assert_near(self, values, expected, eps):
        """To eps of the largest value of each row."""
        expected = expected.astype(np.float64)
        bound = eps * np.abs(expected).max(-1, keepdims=True)
        self.assertTrue(np.all(np.abs(values - expected) <= bound))

    def test_v_of_every_code(self):
        for fmt, T_q in product(FORMATS, (1, 3, 40)):
            parts = with_scales(fmt, without_nan_codes(fmt, every_code(fmt)))
            with self.subTest(format=str(fmt), T_q=T_q):
                out = read_v(fmt, parts, T_q, force_fused=self.fused)
                self.assert_same_values(out, dequantize(fmt, parts))

    def test_v_in_half_precision(self):
        for fmt, dtype, T_q in product(FORMATS, DTYPES[1:], (1, 3, 40)):
            parts = with_scales(fmt, without_nan_codes(fmt, every_code(fmt)))
            with self.subTest(format=str(fmt), dtype=str(dtype), T_q=T_q):
                out = read_v(fmt, parts, T_q, dtype, force_fused=self.fused)
                expected = dequantize(fmt, parts)
                if T_q == 1:
                    rounded = mx.array(expected).astype(dtype)
                    self.assert_same_values(out, rounded.astype(mx.float32))
                # Kernels for more rows may work in integers and rescale.
                self.assert_near(to_numpy(out), expected, mx.finfo(dtype).eps)

    def test_k_of_every_code(self):
        for fmt, dtype, as_heads in product(FORMATS, DTYPES, (True, False)):
            parts = with_scales(fmt, without_nan_codes(fmt, every_code(fmt)))
            with self.subTest(format=str(fmt), dtype=str(dtype), as_heads=as_heads):
                keys = read_k(fmt, parts, as_heads, dtype, force_fused=self.fused)
                # The log-sum-exp may be kept in base 2: a few roundings.
                self.assert_near(keys, dequantize(fmt, parts), 1e-6)

    def test_every_scale_byte(self):
        for fmt in FORMATS:
            if fmt.is_turbo or fmt.mode == "affine":
                continue
            # The last e8m0 scale is infinite; two e4m3 scales are as without_nan_codes.
            skipped = {0x7F, 0xFF} if fmt.mode == "nvfp4" else {0xFF}
            scales = np.array(sorted(set(range(256)) - skipped), np.uint8)
            codes = without_nan_codes(fmt, every_code(fmt)[3])
            groups = codes.shape[-1] * 32 // fmt.bits // fmt.group_size
            codes = np.broadcast_to(codes, (len(scales), *codes.shape))
            scales = np.repeat(scales[:, None, None, None], groups, -1)
            parts = mx.array(codes), mx.array(scales), None
            for T_q in (1, 40):
                with self.subTest(format=str(fmt), T_q=T_q):
                    out = read_v(fmt, parts, T_q, force_fused=self.fused)
                    self.assert_same_values(out, dequantize(fmt, parts))

    def test_scales_of_whole_tiles(self):
        """Keys with scales of their own, one of which a mask shows to each query."""
        rng = np.random.default_rng(1)
        T, dim = 250, 128
        for fmt in FORMATS:
            codes = pack(rng.integers(0, 2**fmt.bits, (1, 1, T, dim)), fmt.bits)
            codes, scales, biases = with_scales(fmt, without_nan_codes(fmt, codes))
            if scales.dtype == mx.uint8:
                # Beyond, an e8m0 scale times a code is infinite.
                places = np.arange(T)[:, None] + 31 * np.arange(scales.shape[-1])
                places %= 240
                places[places == 0x7F] = 0
                scales = mx.array(places.astype(np.uint8))[None, None]
            parts = codes, scales, biases
            zeros = tuple(None if x is None else mx.zeros_like(x) for x in parts)
            keywords = {"scale": 1.0, **fmt.keywords("k"), **fmt.keywords("v")}
            case = Case(mx.zeros((1, 1, T, dim)), zeros, parts, keywords)
            with self.subTest(format=str(fmt)):
                mask = mx.eye(T, dtype=mx.bool_)[None, None]
                out = case.run(mask=mask, force_fused=self.fused)
                self.assert_same_values(out, dequantize(fmt, parts))


class TestKVCodecFallback(TestKVCodec):
    fused = False


if __name__ == "__main__":
    MLXTestRunner()
