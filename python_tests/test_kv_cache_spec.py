"""The texts that say what a KV cache stores, the rotation, and the quantized store."""

import unittest

import mlx.core as mx
import numpy as np
from mlx_quantized_sdpa.rotation import check_rotation, rotate, unrotate
from mlx_quantized_sdpa.spec import DENSE, CacheSpec, Format
from mlx_quantized_sdpa.store import QuantizedStore, attend

SPECS = ("q8", "q3", "k8v4", "mxfp8", "k-mxfp4v-nvfp4", "turbo4", "k8v-turbo3", "rot4")


class TestSpec(unittest.TestCase):
    def test_formats(self):
        for text, k, v in (
            ("q8", Format("affine", 8), None),
            ("k8v4", Format("affine", 8), Format("affine", 4)),
            ("K8v4", Format("affine", 8), Format("affine", 4)),
            ("q4g32", Format("affine", 4, 32), None),
            (
                "k8g128v-turbo3",
                Format("affine", 8, 128),
                Format("turbo3", 3, None, True),
            ),
            ("rot4", Format("affine", 4, None, True), None),
            ("k-rot4v-nvfp4", Format("affine", 4, None, True), Format("nvfp4", 4, 16)),
            ("mxfp8", Format("mxfp8", 8, 32), None),
        ):
            with self.subTest(text):
                spec = CacheSpec.parse(text)
                self.assertEqual((spec.k, spec.v), (k, v or k))
                self.assertEqual(CacheSpec.parse(str(spec)), spec)
                self.assertIs(CacheSpec.parse(spec), spec)

    def test_options(self):
        text = "q4+recent64+first2:k8v4+last1:dense+sliding:q8g32"
        spec = CacheSpec.parse(text)
        self.assertEqual(spec.recent, 64)
        self.assertEqual(CacheSpec.parse(str(spec)), spec)
        q4, q8 = Format("affine", 4), Format("affine", 8)
        self.assertEqual(spec.formats_for(0, 8), (q8, q4))
        self.assertEqual(spec.formats_for(1, 8), (q8, q4))
        self.assertEqual(spec.formats_for(2, 8), (q4, q4))
        self.assertEqual(spec.formats_for(7, 8), (DENSE, DENSE))
        sliding = Format("affine", 8, 32)
        self.assertEqual(spec.formats_for(3, 8, sliding=True), (sliding, sliding))

    def test_what_is_no_spec_is_refused(self):
        for text, words in (
            ("", r"must begin with a format such as .*; got ''"),
            ("8", r"must begin with .*; got '8'"),
            ("k8", r"must begin with .*; got 'k8'"),
            ("q7", r"'q7' .* a format that MLX has; got: .* bits 7"),
            ("k8v7", r"'7' in 'k8v7' must be a format that MLX has"),
            ("turbo5", r"'turbo5' .* bits must be 2, 3 or 4"),
            ("q4g33", r"'q4g33' .* group size 33"),
            ("mxfp5", r"'mxfp5' .* mode 'mxfp5'"),
            ("q8+slow", r"must be recentN, .*; got 'slow' in 'q8\+slow'"),
            ("q8+first0:q4", r"must be recentN, .*; got 'first0:q4'"),
            ("q8+last2:q77", r"'q77' in 'q8\+last2:q77'"),
            (None, r"must be a text or a CacheSpec; got None"),
        ):
            with self.subTest(text):
                with self.assertRaisesRegex(ValueError, rf"^\[CacheSpec\] .*{words}"):
                    CacheSpec.parse(text)

    def test_groups_follow_the_head_dim(self):
        q8 = Format("affine", 8)
        self.assertEqual(q8.for_head_dim(128).group_size, 64)
        self.assertEqual(q8.for_head_dim(96).group_size, 32)
        for made, dim, words in (
            (
                q8,
                80,
                "a group of 32 must divide .* for q8; got .* 80. .* nvfp4, turbo4",
            ),
            (q8, 12, r"for q8; got a head dim of 12\.$"),
            (Format("affine", 4, 64), 96, "group size of q4g64 must divide .* 96"),
            (Format("mxfp4", 4, 32), 80, "group size of mxfp4 must divide .* 80"),
            (Format("turbo3", 3), 80, "bits of turbo3 must be a multiple of 32; .* 80"),
            (Format("affine", 4, 32, True), 352, r"m \* 2\*\*n .*; got 352"),
        ):
            with self.assertRaisesRegex(ValueError, words):
                made.for_head_dim(dim)


class TestRotation(unittest.TestCase):
    def test_keeps_products_and_can_be_undone(self):
        for dim in (32, 64, 80, 96, 128, 192, 224, 256, 512):
            q, k = mx.random.normal((2, 3, 7, dim))
            self.assertTrue(mx.allclose(unrotate(rotate(k)), k, atol=1e-5))
            products = rotate(q) @ rotate(k).swapaxes(-1, -2)
            self.assertTrue(mx.allclose(products, q @ k.swapaxes(-1, -2), atol=1e-4))

    def test_a_head_dim_without_a_matrix_is_refused(self):
        for dim in (1, 2, 12, 20, 28, 64, 576 // 9, 7 * 64):
            check_rotation(dim)
            mx.eval(mx.hadamard_transform(mx.ones((dim,))))
        for dim in (3, 6, 11 * 32, 36, 576):
            with self.assertRaisesRegex(ValueError, rf"got {dim}\."):
                rotate(mx.ones((dim,)))

    def error(self, x, spec):
        """NMSE of attention scores against K stored by ``spec``."""
        made = CacheSpec.parse(spec).k.for_head_dim(x.shape[-1])
        found = made.dequantize(made.quantize(x), mx.float32)
        q = mx.random.normal((64, x.shape[-1]), key=mx.random.key(3))
        wanted = q @ x.T
        return float(mx.square(q @ found.T - wanted).mean() / mx.var(wanted))

    def test_gains_with_outlier_channels_and_does_no_harm_without(self):
        x = mx.random.normal((512, 128), key=mx.random.key(1))
        outlier = mx.arange(128) % 29 == 3
        for wild, gain in ((mx.where(outlier, 12 * x, x), 3), (x + 8 * outlier, 1.5)):
            self.assertLess(gain * self.error(wild, "rot4"), self.error(wild, "q4"))
        self.assertLess(self.error(x, "rot4"), 1.1 * self.error(x, "q4"))


class TestStore(unittest.TestCase):
    def filled(self, spec, shape=(2, 2, 40), dim=64, dtype=mx.float32):
        parsed = CacheSpec.parse(spec)
        store = QuantizedStore((parsed.k, parsed.v))
        keys, values = mx.random.normal((2, *shape, dim)).astype(dtype)
        tokens = store.quantize(keys, values)
        store.reserve(shape[2] + 8, tokens)
        store.write(0, tokens)
        return store, keys, values

    def test_attention_is_that_over_the_stored_values(self):
        for spec in SPECS:
            for dim in (64, 96, 256):
                with self.subTest(spec=spec, dim=dim):
                    store, *_ = self.filled(spec, dim=dim)
                    q = mx.random.normal((2, 8, 3, dim))
                    tokens = store.read(5, 40)
                    found = attend(q, *tokens, store.formats, scale=0.1, causal=True)
                    wanted = mx.fast.scaled_dot_product_attention(
                        q, *store.dequantize(tokens), scale=0.1, mask="causal"
                    )
                    self.assertTrue(mx.allclose(found, wanted, atol=1e-5))

    def test_rows_are_those_of_the_whole(self):
        """A token's codes do not depend on how many are written at once."""
        for spec in SPECS:
            parsed = CacheSpec.parse(spec)
            store, keys, values = self.filled(spec)
            other = QuantizedStore((parsed.k, parsed.v))
            for begin, end in ((0, 1), (1, 17), (17, 40)):
                tokens = other.quantize(keys[:, :, begin:end], values[:, :, begin:end])
                other.reserve(end, tokens)
                other.write(begin, tokens)
            for found, wanted in zip(other.read(0, 40), store.read(0, 40)):
                for a, b in zip(found, wanted):
                    np.testing.assert_array_equal(np.array(a), np.array(b), spec)

    def test_writing_is_in_place_even_while_the_last_step_runs(self):
        store, *_ = self.filled("k8v4", (1, 8, 4096), dim=128, dtype=mx.float16)
        mx.eval(store.keys, store.values)
        self.assertGreater(store.nbytes, 4 << 20)
        before, token = mx.get_active_memory(), mx.zeros((1, 8, 1, 128), mx.float16)
        mx.reset_peak_memory()
        last = mx.zeros((1, 8, 1, 128), mx.float16)
        for step in range(20):
            store.write(4000 + step, store.quantize(token + last, token))
            tokens = store.read(0, 4001 + step)
            last = attend(
                mx.ones((1, 8, 1, 128), mx.float16), *tokens, store.formats, scale=1
            )
            mx.async_eval(last)
        mx.eval(last)
        self.assertLess(mx.get_peak_memory() - before, store.nbytes / 16)

    def test_a_refused_token_changes_nothing(self):
        parsed = CacheSpec.parse("k8v4")
        store = QuantizedStore((parsed.k, parsed.v))
        token = mx.zeros((1, 1, 1, 72))
        with self.assertRaisesRegex(ValueError, "got a head dim of 72"):
            store.quantize(token, token)
        self.assertEqual((store.rows, store.nbytes, store.dtype), (0, 0, None))


if __name__ == "__main__":
    unittest.main()
