"""Quantized caches of single sequences in models of mlx-lm."""

import copy
import unittest

import mlx.core as mx
import mlx_quantized_sdpa as qs
import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

import kv_cache_models as models  # noqa: E402
from kv_cache_models import greedy, prompt, rounded_caches  # noqa: E402
from mlx_lm.models import base  # noqa: E402
from mlx_lm.models import cache as lm_cache  # noqa: E402
from mlx_quantized_sdpa.cache import (  # noqa: E402
    PackedKVCache,
    PackedLatentKVCache,
    PackedRotatingKVCache,
)

SPECS = ("q8", "k8v4", "q3", "mxfp8", "nvfp4", "turbo4", "k8v-turbo3", "rot4")


class CacheTest(unittest.TestCase):
    def setUp(self):
        self.addCleanup(qs.disable)

    def assert_same(self, found, wanted, atol=1e-3, message=None):
        """Tokens and log-probabilities of two runs."""
        self.assertEqual(found[0], wanted[0], message)
        difference = float(mx.abs(found[1] - wanted[1]).max())
        self.assertLess(difference, atol, message)

    def assert_equal_arrays(self, found, wanted):
        self.assertEqual(len(found), len(wanted))
        for a, b in zip(found, wanted):
            self.assertEqual(a.dtype, b.dtype)
            self.assertTrue(mx.array_equal(a, b))


class TestGrowing(CacheTest):
    def test_tokens_are_those_of_the_rounded_cache(self):
        model = models.llama_model()
        for kv in SPECS:
            with self.subTest(kv):
                wanted = greedy(model, rounded_caches(model, kv), prompt(70))
                cache = qs.make_prompt_cache(model, kv)
                found = greedy(model, cache, prompt(70), prefill_step_size=32)
                self.assert_same(found, wanted)
                self.assertEqual([c.offset for c in cache], [82] * 2)

    def test_head_dims_and_bits_that_mlx_lm_fails_on(self):
        for dim in (96, 128, 256):
            model = models.llama_model(layers=1, head_dim=dim)
            for kv in ("q3", "q5", "q6"):
                with self.subTest(dim=dim, kv=kv):
                    wanted = greedy(model, rounded_caches(model, kv), prompt(20), 4)
                    found = greedy(
                        model, qs.make_prompt_cache(model, kv), prompt(20), 4
                    )
                    self.assert_same(found, wanted)

    def test_layers_that_differ(self):
        model = models.llama_model(layers=4)
        cache = qs.make_prompt_cache(model, "q4+first1:q8+last1:dense")
        wanted = rounded_caches(model, "q4")
        wanted[0].__class__ = models.rounded(lm_cache.KVCache, "q8")
        wanted[3].__class__ = lm_cache.KVCache
        self.assert_same(
            greedy(model, cache, prompt(40)), greedy(model, wanted, prompt(40))
        )
        sizes = [c.nbytes for c in cache]
        self.assertTrue(sizes[3] > sizes[0] > sizes[1] == sizes[2])

    def test_allocated_at_once(self):
        model = models.llama_model()
        cache = qs.make_prompt_cache(model, "q8", capacity=50)
        greedy(model, cache, prompt(30), 10)
        self.assertEqual([c.store.rows for c in cache], [50, 50])
        before = [mx.array(x) for x in cache[0].store.keys]
        token = mx.zeros((1, 2, 12, 64))
        with self.assertRaisesRegex(
            ValueError,
            r"^\[PackedKVCache\] the cache has room for 50 tokens; got 52\.$",
        ):
            cache[0].update_and_fetch(token, token)
        self.assertEqual(cache[0].offset, 40)
        self.assert_equal_arrays(cache[0].store.keys, before)

    def test_tokens_that_do_not_fit_are_refused(self):
        cache = PackedKVCache("q8")
        token = mx.zeros((1, 2, 1, 64))
        cache.update_and_fetch(token, token)
        for shape in ((2, 2, 1, 64), (1, 3, 1, 64), (1, 2, 1, 128)):
            with self.assertRaisesRegex(ValueError, r"must be .*\(1, 2, 64, 64\); got"):
                cache.update_and_fetch(mx.zeros(shape), mx.zeros(shape))
        with self.assertRaisesRegex(ValueError, "must divide the head dim .* 80"):
            PackedKVCache("q8").update_and_fetch(*mx.zeros((2, 1, 2, 1, 80)))
        self.assertEqual(cache.offset, 1)

    def test_trimmed_tokens_are_forgotten(self):
        model = models.llama_model()
        for kv in ("k8v4", "k8v4+recent64"):
            wanted = greedy(model, qs.make_prompt_cache(model, kv), prompt(40))
            cache = qs.make_prompt_cache(model, kv)
            model(mx.array([prompt(40)[:35] + [1] * 20]), cache=cache)
            self.assertEqual(lm_cache.trim_prompt_cache(cache, 20), 20)
            found = greedy(model, cache, prompt(40)[35:])
            self.assertEqual(cache[0].offset, 52)
            self.assert_same(found, wanted, 0.5)

    def test_no_dense_copy_is_ever_made(self):
        """Memory grows by what is kept, however long the prompt."""
        model = models.llama_model(layers=4, heads=4, kv_heads=4)
        cache = qs.make_prompt_cache(model, "q4", capacity=4096)
        grown = []
        for begin in range(0, 4096, 512):
            mx.clear_cache()
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            chunk = mx.array([prompt(512, begin)])
            model(chunk, cache=cache)
            mx.eval([c.state for c in cache])
            del chunk
            grown.append(mx.get_peak_memory() - before)
        self.assertLess(max(grown[1:]), 1.1 * min(grown[1:]))
        dense = 4096 * 4 * 64 * 2 * 4 * 4
        self.assertLess(sum(c.nbytes for c in cache), 0.16 * dense)


class TestRecent(CacheTest):
    def test_the_keys_can_hang_on_another_array(self):
        """As mlx-lm's pipelines put the sending of their results into the graph."""
        x = mx.random.normal((1, 2, 80, 64))
        cache = PackedKVCache("q8+recent16")
        self.assertIsNone(cache.keys)
        for begin, end in ((0, 5), (5, 80)):
            new = x[:, :, begin:end]
            keys, _ = cache.update_and_fetch(new, new)
            cache.keys = mx.depends(cache.keys, mx.zeros((1,)))
            found = cache.keys_and_values()[0][:]
            self.assertTrue(mx.array_equal(found, keys[:]))

    def test_the_newest_tokens_are_dense(self):
        """Over all steps, attention is that over old rounded and new exact tokens."""
        qs.enable()
        keys, values = mx.random.normal((2, 2, 2, 200, 64))
        made = qs.CacheSpec.parse("q4").k
        for chunks in ((200,), (1,) * 120, (90, 1, 1, 7, 30, 1, 64)):
            cache = PackedKVCache("q4+recent40")
            end = 0
            for count in chunks:
                begin, end = end, end + count
                q = mx.random.normal((2, 8, count, 64))
                views = cache.update_and_fetch(
                    keys[:, :, begin:end], values[:, :, begin:end]
                )
                dense = cache.tail[0].shape[2]
                self.assertTrue(min(end, 40) <= dense < 40 + 32 or dense == end)
                exact = [x[:, :, end - dense : end] for x in (keys, values)]
                old = [
                    (
                        models.round_trip(made, x[:, :, : end - dense])
                        if end > dense
                        else x[:, :, :0]
                    )
                    for x in (keys, values)
                ]
                both = [mx.concatenate(each, axis=2) for each in zip(old, exact)]
                for a, b in zip(both, views):
                    self.assertEqual(a.shape, b.shape)
                    self.assertTrue(mx.allclose(a, b[:], atol=1e-5))
                sinks = mx.random.normal((8,))
                for mask in ("causal", cache.make_mask(count, window_size=50)):
                    window = getattr(mask, "window_size", None)
                    array = base.create_causal_mask(count, end - count, window)
                    wanted = mx.fast.scaled_dot_product_attention(
                        q, *both, scale=0.2, mask=array, sinks=sinks
                    )
                    found = views[0].reading.attend(q, 0.2, mask, sinks)
                    self.assertTrue(mx.allclose(found, wanted, atol=1e-5), chunks)
                    found = views[0].reading.attend(q, 0.2, array, sinks)
                    self.assertTrue(mx.allclose(found, wanted, atol=1e-5), chunks)

    def test_they_help(self):
        model = models.llama_model()
        exact = greedy(model, None, prompt(100), 1)[1]
        errors = []
        for kv in ("q3", "q3+recent64"):
            found = greedy(model, qs.make_prompt_cache(model, kv), prompt(100), 1)[1]
            errors.append(float(mx.square(found - exact).mean()))
        self.assertLess(errors[1], errors[0])

    def test_tokens(self):
        model = models.llama_model()
        wanted = greedy(model, None, prompt(50), 40)
        found = greedy(
            model, qs.make_prompt_cache(model, "q8+recent16"), prompt(50), 40
        )
        self.assert_same(found, wanted, 0.2)


class TestRotating(CacheTest):
    def test_sliding_layers(self):
        """Through the prompt, in chunks of all sizes, and past the wrap."""
        for make in (models.gemma3_model, models.gpt_oss_model):
            model = make()
            for kv, length, step in (
                ("q8", 5, 64),
                ("k8v4", 40, 64),
                ("turbo4", 40, 7),
                ("q8", 16, 16),
                ("q8", 17, 16),
            ):
                with self.subTest(make=make.__name__, kv=kv, length=length):
                    wanted = greedy(
                        model,
                        rounded_caches(model, kv),
                        prompt(length),
                        40,
                        prefill_step_size=step,
                    )
                    cache = qs.make_prompt_cache(model, kv)
                    found = greedy(
                        model, cache, prompt(length), 40, prefill_step_size=step
                    )
                    self.assert_same(found, wanted, 0.02)
                    self.assertIsInstance(cache[0], PackedRotatingKVCache)
                    self.assertEqual(cache[0].store.rows, models.WINDOW)

    def test_sliding_layers_may_stay_dense(self):
        model = models.gpt_oss_model()
        cache = qs.make_prompt_cache(model, "q8+sliding:dense")
        wanted = rounded_caches(model, "q8")
        wanted[0].__class__ = lm_cache.RotatingKVCache
        self.assertTrue(cache[0].formats[0].is_dense)
        self.assertFalse(cache[1].formats[0].is_dense)
        self.assert_same(
            greedy(model, cache, prompt(40), 30), greedy(model, wanted, prompt(40), 30)
        )

    def test_a_bound_on_all_layers_far_past_the_wrap(self):
        for make in (models.qwen3_model, models.llama_model):
            model = make()
            for length in (20, 60):
                with self.subTest(make=make.__name__, length=length):
                    stock = [lm_cache.RotatingKVCache(32, 4) for _ in model.layers]
                    for each in stock:
                        each.__class__ = models.rounded(
                            lm_cache.RotatingKVCache, "k8v4"
                        )
                    wanted = greedy(model, stock, prompt(length), 140)
                    cache = qs.make_prompt_cache(model, "k8v4", max_kv_size=32)
                    found = greedy(model, cache, prompt(length), 140)
                    self.assert_same(found, wanted)
                    self.assertEqual([c.store.rows for c in cache], [32, 32])
                    self.assertEqual(cache[0].keep, 4)

    def test_rows_hold_the_tokens_that_mlx_lms_do(self):
        qs.enable()
        rng = np.random.default_rng(0)
        for keep in (0, 4):
            ours = PackedRotatingKVCache("q8", 24, keep)
            stock = models.rounded(lm_cache.RotatingKVCache, "q8")(24, keep)
            for count in (5, 1, 1, 3, 20, 1, 30, *[1] * 60, 2, 1, 1):
                keys, values = mx.array(rng.normal(size=(2, 1, 2, count, 64)))
                keys, values = keys.astype(mx.float32), values.astype(mx.float32)
                # mlx-lm's own mask for one token forgets what is kept.
                for window in (None, 8, 24) if keep == 0 or count > 1 else ():
                    a = ours.make_mask(count, True, window)
                    b = stock.make_mask(count, window, True)
                    if a is not None and b is not None:
                        self.assertTrue(mx.array_equal(a, b), (count, window))
                views = ours.update_and_fetch(keys, values)
                for a, b in zip(views, stock.update_and_fetch(keys, values)):
                    self.assertTrue(mx.allclose(a[:], b, atol=1e-6))
                self.assertEqual(ours.offset, stock.offset)
                self.assertEqual(ours.is_trimmable(), stock.is_trimmable())
                self.assertEqual(ours.size(), stock.size())

    def test_trimming(self):
        for length, trimmed in ((10, 4), (10, 20), (3, 1)):
            ours, stock = PackedRotatingKVCache("q8", 24), lm_cache.RotatingKVCache(24)
            stock.__class__ = models.rounded(lm_cache.RotatingKVCache, "q8")
            for cache in (ours, stock):
                cache.update_and_fetch(*mx.ones((2, 1, 1, length, 64)))
            self.assertEqual(ours.trim(trimmed), stock.trim(trimmed))
            for step in range(40):
                x = mx.full((1, 1, 1, 64), float(step))
                for a, b in zip(*(c.update_and_fetch(x, x) for c in (ours, stock))):
                    self.assertTrue(mx.array_equal(a[:], b))

    def test_sizes_are_checked(self):
        with self.assertRaisesRegex(ValueError, "below max_size; got 8 and 8"):
            PackedRotatingKVCache("q8", 8, 8)


class TestLatents(CacheTest):
    def test_tokens_are_near_those_of_the_dense_cache(self):
        for quantized in (False, True):
            model = models.deepseek_model(quantized)
            wanted = greedy(model, None, prompt(60), 20)
            for kv, atol in (("q8", 0.1), ("rot8", 0.1), ("mxfp8", 1)):
                cache = qs.make_prompt_cache(model, kv)
                found = greedy(model, cache, prompt(60), 20, prefill_step_size=25)
                self.assertIsInstance(cache[0], PackedLatentKVCache)
                difference = float(mx.abs(found[1][0] - wanted[1][0]).max())
                self.assertLess(difference, atol, kv)
                if kv == "q8":
                    self.assertEqual(found[0], wanted[0])

    def test_attention_is_that_over_the_rounded_latents(self):
        """Through the model's own code, which takes the rounded values as they are."""
        model = models.deepseek_model()

        class RoundedLatents(lm_cache.KVCache):
            def update_and_fetch(self, keys, values):
                made = qs.CacheSpec.parse(kv).k.for_head_dim(32)
                rows = mx.concatenate([keys, values], axis=-1)
                rows = models.round_trip(made, rows)
                return super().update_and_fetch(*mx.split(rows, [64], axis=-1))

        for kv in ("q8", "q4", "mxfp4", "nvfp4"):
            wanted = greedy(model, [RoundedLatents() for _ in model.layers], prompt(60))
            found = greedy(model, qs.make_prompt_cache(model, kv), prompt(60))
            self.assert_same(found, wanted, 1e-2, kv)

    def test_latents_are_stored_once(self):
        model = models.deepseek_model()
        cache = qs.make_prompt_cache(model, "q8g32")
        greedy(model, cache, prompt(60))
        codes, scales, biases = cache[0].store.keys
        self.assertEqual((codes.shape[-1], scales.shape[-1]), (96 // 4, 3))
        self.assertEqual(cache[0].store.values, ())

    def test_bounded(self):
        model = models.deepseek_model()
        stock = [lm_cache.RotatingKVCache(32, 4) for _ in model.layers]
        wanted = greedy(model, stock, prompt(20), 60)
        cache = qs.make_prompt_cache(model, "q8", max_kv_size=32)
        found = greedy(model, cache, prompt(20), 60)
        self.assertEqual(cache[0].store.rows, 32)
        self.assertEqual(found[0][:20], wanted[0][:20])

    def test_what_asks_for_values_gets_them(self):
        cache = PackedLatentKVCache("q8")
        x, rope = mx.random.normal((1, 1, 9, 64)), mx.random.normal((1, 1, 9, 32))
        latents, ropes = cache.update_and_fetch(x, rope)
        self.assertTrue(mx.allclose(latents + 0, x, atol=0.05))
        self.assertTrue(mx.allclose(mx.concatenate([ropes]), rope, atol=0.05))


class TestConversion(CacheTest):
    def caches(self):
        """Dense caches of each kind, empty, short, and long past their windows."""
        for make in (models.llama_model, models.gemma3_model, models.deepseek_model):
            model = make()
            for length in (0, 5, 50):
                cache = lm_cache.make_prompt_cache(model)
                if length:
                    greedy(model, cache, prompt(length), 3)
                yield model, cache

    def test_gives_the_tokens_of_the_dense_cache(self):
        for model, cache in self.caches():
            qs.disable()
            made = qs.to_quantized(cache, "q8", model)
            self.assertEqual([c.offset for c in made], [c.offset for c in cache])
            wanted = models.forced(model, cache, prompt(30, 1))
            found = models.forced(model, made, prompt(30, 1))
            self.assertLess(float(mx.abs(found - wanted).mean()), 0.05)

    def test_again_changes_nothing(self):
        for model, cache in self.caches():
            made = qs.to_quantized(cache, "q8", model)
            for each, again in zip(made, qs.to_quantized(made, "q8", model)):
                self.assertIs(each, again)
                self.assertIs(each, each.to_quantized(group_size=64, bits=4))

    def test_under_mlx_lms_own_flag(self):
        model = models.gemma3_model()
        cache = qs.make_prompt_cache(model, "q8")
        wanted = greedy(model, qs.make_prompt_cache(model, "q8"), prompt(40), 20)
        found = greedy(model, cache, prompt(40), 20, kv_bits=8, quantized_kv_start=0)
        self.assert_same(found, wanted)

    def test_of_mlx_lms_quantized_cache(self):
        model = models.llama_model()
        cache = [lm_cache.QuantizedKVCache(64, 8) for _ in model.layers]
        qs.enable()
        greedy(model, cache, prompt(30), 3)
        made = qs.to_quantized(cache, "q8")
        for part, own in zip(made[0].store.slice(0, 32)[0], cache[0].keys):
            self.assertTrue(mx.allclose(part, own[:, :, :32], atol=1e-6))

    def test_of_caches_whose_tokens_are_all_forgotten(self):
        kinds = (
            lm_cache.KVCache,
            lm_cache.QuantizedKVCache,
            lambda: lm_cache.RotatingKVCache(8),
            lambda: lm_cache.BatchKVCache([0]),
            lambda: lm_cache.BatchRotatingKVCache(8, [0]),
        )
        x = mx.random.normal((1, 2, 5, 64))
        for kv in ("q8", "rot4", "mxfp8"):
            for make in kinds:
                cache = make()
                with self.subTest(kv, kind=type(cache).__name__):
                    cache.update_and_fetch(x, x)
                    cache.trim(5)
                    (made,) = qs.to_quantized([cache], kv)
                    self.assertTrue(made.empty())
                    keys, _ = made.update_and_fetch(x, x)
                    self.assertEqual(keys.shape, x.shape)


class TestProtocol(CacheTest):
    def test_copies_are_independent(self):
        model = models.llama_model()
        for kv in ("k8v4", "q4+recent16"):
            cache = qs.make_prompt_cache(model, kv)
            greedy(model, cache, prompt(40), 4)
            copied = copy.deepcopy(cache)
            state = [np.array(x) for x in copied[0].used_arrays()]
            wanted = greedy(model, cache, prompt(9, 1), 9)
            for a, b in zip(state, copied[0].used_arrays()):
                np.testing.assert_array_equal(a, np.array(b))
            self.assert_same(greedy(model, copied, prompt(9, 1), 9), wanted)

    def test_state_makes_the_same_cache(self):
        for make in (models.gemma3_model, models.deepseek_model, models.llama_model):
            model = make()
            kv = "q4+recent16" if make is models.llama_model else "rot4"
            for length in (0, 40):
                cache = qs.make_prompt_cache(model, kv)
                if length:
                    greedy(model, cache, prompt(length), 4)
                made = [models.reborn(c) for c in cache]
                self.assertEqual(
                    [c.meta_state for c in made], [c.meta_state for c in cache]
                )
                wanted = greedy(model, cache, prompt(5), 20)
                self.assert_same(greedy(model, made, prompt(5), 20), wanted, 1e-6)

    def test_speculative_decoding(self):
        from mlx_lm.generate import speculative_generate_step

        model, draft = models.llama_model(), models.llama_model(layers=1)
        tokens = mx.array(prompt(40))
        for kv in ("q8", "q8+recent16"):
            wanted = greedy(model, qs.make_prompt_cache(model, kv), prompt(40), 30)[0]
            cache = qs.make_prompt_cache(model, kv) + qs.make_prompt_cache(draft, kv)
            steps = speculative_generate_step(
                tokens, model, draft, max_tokens=30, prompt_cache=cache
            )
            self.assertEqual([token for token, *_ in steps], wanted)

    def test_a_view_used_as_an_array_is_one(self):
        cache = PackedKVCache("q8")
        x = mx.random.normal((1, 2, 9, 64))
        keys, _ = cache.update_and_fetch(x, x)
        self.assertEqual((keys.shape, keys.dtype, keys.ndim), (x.shape, x.dtype, 4))
        self.assertTrue(mx.allclose(keys.swapaxes(1, 2), x.swapaxes(1, 2), atol=0.05))
        self.assertTrue(mx.allclose(keys[..., 3:, :], x[..., 3:, :], atol=0.05))

    def test_per_head_masks_with_grouped_heads(self):
        cache = PackedKVCache("q8")
        k, v = mx.random.normal((2, 2, 2, 9, 64))
        keys, values = cache.update_and_fetch(k, v)
        q = mx.random.normal((2, 8, 3, 64))
        for shape in ((2, 8, 3, 9), (1, 8, 3, 9), (8, 3, 9), (2, 1, 1, 9)):
            mask = mx.random.uniform(shape=shape) < 0.7
            for each in (mask, mx.where(mask, 0.0, -1e9)):
                wanted = mx.fast.scaled_dot_product_attention(
                    q, keys[:], values[:], scale=0.2, mask=each
                )
                found = keys.reading.attend(q, 0.2, each)
                self.assertTrue(mx.allclose(found, wanted, atol=1e-5))


if __name__ == "__main__":
    unittest.main()
