"""Quantized caches of batches: generation in batches gives what each gives alone."""

import copy
import unittest

import mlx.core as mx
import mlx_quantized_sdpa as qs
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

import kv_cache_models as models  # noqa: E402
from kv_cache_models import greedy, in_batches, prompt  # noqa: E402
from mlx_lm.generate import BatchGenerator  # noqa: E402
from mlx_lm.models import cache as lm_cache  # noqa: E402
from mlx_quantized_sdpa.batch_cache import (  # noqa: E402
    BatchPackedKVCache,
    BatchPackedRotatingKVCache,
)
from mlx_quantized_sdpa.cache import (  # noqa: E402
    PackedKVCache,
    PackedRotatingKVCache,
)

LENGTHS = (3, 41, 17, 1, 30, 64, 16)
MODELS = (
    models.llama_model,
    models.gemma3_model,
    models.gpt_oss_model,
    models.deepseek_model,
)


class TestGeneration(unittest.TestCase):
    def setUp(self):
        self.addCleanup(qs.disable)
        self.prompts = [prompt(n, seed) for seed, n in enumerate(LENGTHS)]
        self.counts = [40, 9, 25, 33, 4, 12, 28]

    def check(self, model, kv, **arguments):
        with qs.enabled(model, kv, force_fused=True, **arguments):
            alone = [
                greedy(model, None, tokens, count)[0]
                for tokens, count in zip(self.prompts, self.counts)
            ]
            self.assertEqual(in_batches(model, self.prompts, self.counts), alone)
            found = in_batches(model, self.prompts, self.counts, prefill_step_size=16)
            self.assertEqual(found, alone)

    def test_every_kind_of_model(self):
        for make in MODELS:
            with self.subTest(make.__name__):
                self.check(make(), "q8")

    def test_at_most_so_many_tokens(self):
        """More than any prompt has: batches keep no first tokens of those evicted."""
        for make in (models.llama_model, models.deepseek_model):
            with self.subTest(make.__name__):
                self.check(make(), "q8", max_kv_size=200)

    def test_formats(self):
        for kv in ("k8v4", "q4+first1:dense", "mxfp8", "k-rot4v-turbo3"):
            with self.subTest(kv):
                self.check(models.gpt_oss_model(), kv)

    def test_what_a_generator_bounds(self):
        model = models.llama_model()
        kinds = {}
        for kv in (None, "q8"):
            with qs.enabled(model, kv):
                generator = BatchGenerator(model, max_kv_size=24)
                (uid,) = generator.insert([prompt(40)], [3])
                generator.next()
                cache, _ = generator.extract_cache([uid])[uid]
                kinds[kv] = type(cache[0]).__name__
                generator.close()
        self.assertEqual(kinds["q8"], "PackedRotatingKVCache")
        self.assertIn(kinds[None], ("KVCache", "RotatingKVCache"))

    def test_prompts_that_share_a_history(self):
        model = models.gemma3_model()
        with qs.enabled(model, "q8"):
            caches = []
            for length in (40, 7, 22):
                cache = lm_cache.make_prompt_cache(model)
                greedy(model, cache, prompt(length), 1)
                caches.append(cache)
            alone = [
                greedy(model, copy.deepcopy(cache), prompt(5, 3), 30)[0]
                for cache in caches
            ]
            generator = BatchGenerator(model)
            uids = generator.insert([prompt(5, 3)] * 3, [30] * 3, caches=caches)
            found = {uid: [] for uid in uids}
            while responses := generator.next_generated():
                for response in responses:
                    found[response.uid].append(response.token)
            generator.close()
        self.assertEqual([found[uid] for uid in uids], alone)


def tokens_of(cache):
    """Dense K of a cache's tokens, in order."""
    if isinstance(cache, PackedRotatingKVCache):
        return cache.store.dequantize(cache.tokens_in_order())[0]
    return cache.store.dequantize(cache.store.read(0, cache.used))[0]


class TestProtocol(unittest.TestCase):
    def singles(self, kind, lengths):
        """Caches whose tokens are numbered, and what they hold."""
        caches = []
        for row, length in enumerate(lengths):
            cache = kind()
            numbers = 100 * row + mx.arange(length).astype(mx.float32)
            x = mx.broadcast_to(numbers[None, None, :, None], (1, 2, length, 32))
            for begin in range(0, length, 9):
                part = x[:, :, begin : begin + 9]
                cache.update_and_fetch(part, part)
            caches.append(cache)
        return caches

    def numbers(self, cache):
        return [round(x) for x in tokens_of(cache)[0, 0, :, 0].tolist()]

    def kinds(self):
        return (
            (lambda: PackedKVCache("q8"), BatchPackedKVCache),
            (lambda: PackedRotatingKVCache("q8", 12), BatchPackedRotatingKVCache),
        )

    def test_what_is_merged_can_be_extracted(self):
        for kind, batch in self.kinds():
            singles = self.singles(kind, (5, 30, 0, 12, 1))
            merged = kind().merge(copy.deepcopy(singles))
            self.assertIsInstance(merged, batch)
            self.assertEqual(merged.offset.tolist(), [5, 30, 0, 12, 1])
            for row, single in enumerate(singles):
                found = merged.extract(row)
                self.assertEqual(found.offset, single.offset)
                if single.used:
                    wanted = self.numbers(single)[
                        -12 if batch is not BatchPackedKVCache else 0 :
                    ]
                    self.assertEqual(self.numbers(found), wanted)

    def test_filter_extend_and_write(self):
        for kind, batch in self.kinds():
            merged = kind().merge(self.singles(kind, (5, 30, 0, 12)))
            other = kind().merge(self.singles(kind, (3, 20)))
            merged.filter([3, 0])
            merged.extend(other)
            x = mx.full((4, 2, 1, 32), 777.0)
            for _ in range(3):
                merged.update_and_fetch(x, x)
            self.assertEqual(merged.offset.tolist(), [15, 8, 6, 23])
            limit = 10**6 if batch is BatchPackedKVCache else 12
            for row, old in enumerate(
                (
                    [300 + i for i in range(12)],
                    list(range(5)),
                    list(range(3)),
                    [100 + i for i in range(20)],
                )
            ):
                wanted = (old + [777] * 3)[-limit:]
                self.assertEqual(self.numbers(merged.extract(row)), wanted)

    def test_right_padding_goes_to_the_front(self):
        for kind, batch in self.kinds():
            merged = kind().merge([kind() for _ in range(3)])
            merged.prepare(lengths=[4, 30, 11], right_padding=[26, 0, 19])
            for begin in range(0, 30, 10):
                numbers = mx.arange(begin, begin + 10).astype(mx.float32)
                x = mx.broadcast_to(numbers[None, None, :, None], (3, 2, 10, 32))
                merged.update_and_fetch(x, x)
            merged.finalize()
            self.assertEqual(merged.offset.tolist(), [4, 30, 11])
            limit = 10**6 if batch is BatchPackedKVCache else 12
            for row, length in enumerate((4, 30, 11)):
                found = self.numbers(merged.extract(row))
                self.assertEqual(found[-limit:], list(range(length))[-limit:])

    def test_left_padding_of_an_empty_cache(self):
        for kind, _ in self.kinds():
            merged = kind().merge([kind(), kind()])
            merged.prepare(left_padding=[2, 0])
            x = mx.random.normal((2, 2, 5, 32))
            merged.update_and_fetch(x, x)
            self.assertEqual(merged.left_padding.tolist(), [2, 0])
            self.assertEqual(merged.offset.tolist(), [3, 5])
            with self.assertRaisesRegex(ValueError, "must be given to an empty cache"):
                merged.prepare(left_padding=[1, 1])

    def test_caches_of_other_formats_are_not_merged(self):
        for others in (
            [PackedKVCache("q8"), PackedKVCache("q4")],
            [PackedKVCache("q8"), PackedKVCache("q8+recent9")],
            [PackedRotatingKVCache("q8", 9), PackedRotatingKVCache("q8", 8)],
        ):
            with self.assertRaisesRegex(ValueError, "must have the same formats and"):
                others[0].merge(others)
            batches = [each.merge([each]) for each in others]
            with self.assertRaisesRegex(ValueError, "must have the same formats and"):
                batches[0].extend(batches[1])

    def test_a_batch_of_another_kind_is_not_added(self):
        batch = PackedKVCache.merge([PackedKVCache("q8")])
        with self.assertRaisesRegex(ValueError, r"got \[.*'BatchKVCache'\]"):
            batch.extend(lm_cache.BatchKVCache([0]))

    def test_recent_tokens_of_a_batch(self):
        """Quantized when sequences join, dense from then on; nothing is lost."""
        x = mx.random.normal((2, 2, 100, 64))
        merged = PackedKVCache.merge([PackedKVCache("q8+recent16") for _ in range(2)])
        for i in range(100):
            merged.update_and_fetch(x[:, :, i : i + 1], x[:, :, i : i + 1])
        self.assertTrue(16 <= merged.tail[0].shape[2] < 48)
        self.assertTrue(mx.allclose(merged.keys_and_values()[0][:], x, atol=0.05))
        merged.filter([1])
        self.assertTrue(mx.allclose(merged.keys_and_values()[0][:], x[1:], atol=0.05))
        found = merged.extract(0)
        self.assertEqual((found.recent, found.offset), (16, 100))
        self.assertTrue(mx.allclose(tokens_of(found), x[1:], atol=0.05))

    def test_state_makes_the_same_batch(self):
        for kind, _ in self.kinds():
            merged = kind().merge(self.singles(kind, (5, 30, 0)))
            made = models.reborn(merged)
            self.assertEqual(made.meta_state, merged.meta_state)
            x = mx.random.normal((3, 2, 1, 32))
            q = mx.random.normal((3, 2, 1, 32))
            for _ in range(15):
                found, wanted = (
                    c.update_and_fetch(x, x)[0].reading.attend(q, 1.0, None)
                    for c in (made, merged)
                )
                self.assertTrue(mx.array_equal(found, wanted))


if __name__ == "__main__":
    unittest.main()
