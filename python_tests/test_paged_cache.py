"""The paged cache: the tokens of a lone sequence, whoever shares its blocks."""

import copy
import gc
import itertools
import json
import random
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx_quantized_sdpa as qs
import pytest
from mlx_quantized_sdpa.blocks import (
    BlockAllocator,
    BlockTable,
    append_all,
    shared_prefixes,
)
from mlx_quantized_sdpa.reading import KVView
from mlx_quantized_sdpa.spec import CacheSpec
from mlx_quantized_sdpa.store import attend

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from kv_cache_models import (  # noqa: E402
    FusedTest,
    gemma3_model,
    gpt_oss_model,
    llama_model,
    make_prompts,
    reborn,
)
from mlx_lm.generate import BatchGenerator, batch_generate, generate_step  # noqa: E402
from mlx_lm.models import cache as lm_cache  # noqa: E402
from mlx_lm.models import gpt_oss  # noqa: E402
from mlx_quantized_sdpa import paged  # noqa: E402
from mlx_quantized_sdpa.cache import PackedRotatingKVCache  # noqa: E402
from mlx_quantized_sdpa.paged import (  # noqa: E402
    BatchPagedKVCache,
    PagedKVCache,
    PagedPool,
    PoolExhausted,
)

LENGTHS = (70, 33, 5, 100)


def greedy(model, prompt, cache, count=12, **arguments):
    steps = generate_step(
        mx.array(prompt), model, max_tokens=count, prompt_cache=cache, **arguments
    )
    return [token for token, _ in steps]


def generated(generator):
    """All tokens of every request that the generator has, by its id."""
    found = {}
    while responses := generator.next_generated():
        for response in responses:
            found.setdefault(response.uid, []).append(response.token)
    return found


class PagedTest(FusedTest):
    def alone(self, prompts, spec="q8", count=12):
        """What each prompt gives in a pool of its own."""
        return [
            greedy(
                self.model,
                prompt,
                PagedPool(spec, 1024, 16).make_prompt_cache(self.model),
                count,
            )
            for prompt in prompts
        ]

    def assert_all_free(self, pool):
        gc.collect()
        self.assertEqual(pool.n_free, pool.n_blocks)


class TestOneSequence(PagedTest):
    def test_logits_are_those_of_contiguous_codes(self):
        tokens = mx.array(make_prompts([90]))
        for text, block in (("q8", 16), ("k8v4", 32), ("turbo4", 64), ("rot4", 16)):
            with self.subTest(text=text):
                pool = PagedPool(text, 256, block)
                cache = pool.make_prompt_cache(self.model)
                parts = [self.model(tokens[:, :60], cache=cache)]
                parts += [
                    self.model(tokens[:, i : i + 1], cache=cache) for i in range(60, 90)
                ]
                found = mx.concatenate(parts, axis=1)
                flat = [Contiguous(CacheSpec.parse(text)) for _ in cache]
                wanted = [self.model(tokens[:, :60], cache=flat)]
                wanted += [
                    self.model(tokens[:, i : i + 1], cache=flat) for i in range(60, 90)
                ]
                wanted = mx.concatenate(wanted, axis=1)
                self.assertTrue(mx.allclose(found, wanted, atol=1e-4))

    def test_chunks_and_trims_do_not_change_the_tokens(self):
        (prompt,) = make_prompts([70])
        (wanted,) = self.alone([prompt])
        pool = PagedPool("q8", 1024, 16)
        cache = pool.make_prompt_cache(self.model)
        self.assertEqual(greedy(self.model, prompt, cache, prefill_step_size=7), wanted)
        for layer in cache:
            self.assertEqual(layer.trim(10**6), 70 + 12)
        self.assertEqual(greedy(self.model, prompt, cache), wanted)

    def test_memory_is_flat_after_the_first_token(self):
        pool = PagedPool("q8", 4 * 65536, 64)
        cache = pool.make_prompt_cache(self.model)
        token = mx.array([[1]])
        mx.eval(self.model(token, cache=cache))
        before = pool.nbytes
        mx.reset_peak_memory()
        base = mx.get_active_memory()
        for _ in greedy(self.model, [1] * 100, cache, 100):
            pass
        self.assertEqual(pool.nbytes, before)
        sizes = [
            part.nbytes
            for layer in pool.layers.values()
            for parts in layer.parts
            for part in parts
        ]
        # No array of the pool was ever copied.
        self.assertEqual((len(sizes), sum(sizes)), (12, before))
        self.assertLess(mx.get_peak_memory() - base, min(sizes))

    def test_sinks_and_windows(self):
        pool = paged.BlockPool(
            CacheSpec.parse("q8").formats_for(0, 1), n_blocks=8, block_size=16
        )
        mx.random.seed(3)
        q, sinks = mx.random.normal((1, 8, 9, 64)), mx.random.normal((8,))
        k, v = mx.random.normal((2, 1, 2, 50, 64))
        cache = PagedKVCache(pool)
        cache.update_and_fetch(k[:, :, :41], v[:, :, :41])
        mask = cache.make_mask(9, window_size=12)
        array = cache.make_mask(9, return_array=True, window_size=12)
        keys, values = cache.update_and_fetch(k[:, :, 41:], v[:, :, 41:])
        dense = [mx.dequantize(*mx.quantize(x, bits=8), bits=8) for x in (k, v)]
        wanted = mx.fast.scaled_dot_product_attention(
            q, *dense, scale=0.125, mask=array, sinks=sinks
        )
        for each in (mask, array, mx.where(array, 0.0, -mx.inf)):
            found = gpt_oss.scaled_dot_product_attention(
                q, keys, values, cache=cache, scale=0.125, mask=each, sinks=sinks
            )
            self.assertTrue(mx.allclose(found, wanted, atol=1e-4))


class Contiguous:
    """The same codes in one piece, through the op without block tables."""

    def __init__(self, spec):
        self.formats = tuple(x.for_head_dim(64) for x in (spec.k, spec.v))
        self.parts = None
        self.offset = 0

    def update_and_fetch(self, keys, values):
        new = [f.quantize(x) for f, x in zip(self.formats, (keys, values))]
        if self.parts is not None:
            new = [
                tuple(mx.concatenate(pair, axis=2) for pair in zip(old, x))
                for old, x in zip(self.parts, new)
            ]
        self.parts = new
        self.offset += keys.shape[2]
        return KVView(self, 0), KVView(self, 1)

    def attend(self, queries, scale, mask, sinks, force_fused):
        return attend(queries, *self.parts, self.formats, scale=scale, causal=True)


class TestBatches(PagedTest):
    def test_each_row_has_the_tokens_it_has_alone(self):
        prompts = make_prompts(LENGTHS)
        wanted = self.alone(prompts)
        pool = PagedPool("q8", 1024, 16)
        generator = BatchGenerator(
            self.model, max_tokens=12, prefill_step_size=16, prefill_batch_size=3
        )
        caches = [pool.make_prompt_cache(self.model) for _ in prompts]
        uids = generator.insert(prompts, caches=caches)
        found = generated(generator)
        self.assertEqual([found[uid] for uid in uids], wanted)
        del caches
        self.assert_all_free(pool)

    def test_batch_generate_continues_caches_and_leaves_them(self):
        first, second = make_prompts((40, 21)), make_prompts((3, 8), prefix=(9, 8))
        pool = PagedPool("k8v4", 1024, 16)
        caches = [pool.make_prompt_cache(self.model) for _ in first]
        for prompt, cache in zip(first, caches):
            self.model(mx.array([prompt]), cache=cache)
        tokenizer = mock.Mock(eos_token_ids=[], decode=str)
        answers = []
        for _ in range(2):
            found = batch_generate(
                self.model,
                tokenizer,
                second,
                prompt_caches=caches,
                max_tokens=9,
                return_prompt_caches=True,
            )
            answers.append(list(map(json.loads, found.texts)))
        self.assertEqual(*answers)
        self.assertEqual([cache[0].offset for cache in caches], [40, 21])
        self.assertEqual([c[0].offset for c in found.caches], [40 + 14, 21 + 19])
        whole = [a + b for a, b in zip(first, second)]
        self.assertEqual(answers[0], self.alone(whole, "k8v4", 9))

    def test_left_padding_is_never_stored(self):
        prompts = make_prompts((12, 30))
        tokens = mx.array([[0] * 18 + prompts[0], prompts[1]])
        pool = PagedPool("q8", 256, 16)
        batch = [
            BatchPagedKVCache.merge(
                [PagedKVCache(pool.layer(i, layer.pool.formats))] * 2
            )
            for i, layer in enumerate(pool.make_prompt_cache(self.model))
        ]
        for layer in batch:
            layer.prepare(left_padding=[18, 0])
        self.assertEqual(batch[0].offset.tolist(), [-18, 0])
        logits = [
            self.model(tokens[:, i : i + 7], cache=batch) for i in range(0, 30, 7)
        ]
        self.assertEqual(batch[0].offset.tolist(), [12, 30])
        found = mx.concatenate(logits, axis=1)
        for row, prompt in enumerate(prompts):
            lone = PagedPool("q8", 256, 16).make_prompt_cache(self.model)
            wanted = self.model(mx.array([prompt]), cache=lone)
            got = found[row : row + 1, -len(prompt) :]
            self.assertTrue(mx.allclose(got, wanted, atol=1e-4))

    def test_a_random_life_of_a_batch(self):
        """Rows come, go, fork and are cut; each keeps the logits of its own tokens."""
        rng = random.Random(5)
        pool = PagedPool("q8", 2048, 8)
        batch, rows = None, []
        for step in range(60):
            act = rng.choice(("add", "step", "step", "step", "drop", "fork", "trim"))
            if act == "add" or not rows:
                new = [pool.make_prompt_cache(self.model)]
                tokens = [rng.randrange(97) for _ in range(rng.randint(1, 20))]
                self.model(mx.array([tokens]), cache=new[0])
                merged = [x.merge([x]) for x in new[0]]
                batch = extend(batch, merged)
                rows.append(tokens)
            elif act == "drop" and len(rows) > 1:
                keep = rng.sample(range(len(rows)), rng.randint(1, len(rows) - 1))
                for layer in batch:
                    layer.filter(keep)
                rows = [rows[i] for i in keep]
            elif act == "fork" and len(rows) < 5:
                row = rng.randrange(len(rows))
                copies = [layer.extract(row) for layer in batch]
                batch = extend(batch, [x.merge([x]) for x in copies])
                rows.append(list(rows[row]))
            elif act == "trim" and min(map(len, rows)) > 3:
                for layer in batch:
                    layer.trim(2)
                rows = [row[:-2] for row in rows]
            next_tokens = [rng.randrange(97) for _ in rows]
            logits = self.model(mx.array(next_tokens)[:, None], cache=batch)
            rows = [[*row, token] for row, token in zip(rows, next_tokens)]
            if step % 6 == 0:
                self.check_logits(rows, logits)
        self.check_logits(rows, logits)
        batch = None
        new = merged = copies = layer = None  # noqa: F841
        self.assert_all_free(pool)

    def check_logits(self, rows, logits):
        for row, found in zip(rows, logits):
            lone = PagedPool("q8", 256, 8).make_prompt_cache(self.model)
            wanted = self.model(mx.array([row]), cache=lone)[0, -1:]
            # One code that rounds the other way moves a logit by about 1e-3; a wrong
            # token by more than 0.1.
            self.assertTrue(mx.allclose(found, wanted, atol=1e-2))


def extend(batch, more):
    if batch is None:
        return more
    for ours, theirs in zip(batch, more):
        ours.extend(theirs)
    return batch


class TestSharedPrefixes(PagedTest):
    def batch_of(self, pool, prefix, tails):
        first = pool.make_prompt_cache(self.model)
        self.model(mx.array([prefix]), cache=first)
        caches = []
        for tail in tails:
            cache = copy.deepcopy(first)
            self.model(mx.array([tail]), cache=cache)
            caches.append(cache)
        return [layers[0].merge(layers) for layers in zip(*caches)]

    def test_are_read_once_and_merged_exactly(self):
        prefix, tails = make_prompts([300])[0], make_prompts((3, 20, 9))
        for spec, groups in (("q8", 1), ("k8v-turbo3", 1)):
            pool = PagedPool(spec, 4096, 16)
            batch = self.batch_of(pool, prefix, tails)
            alone = PagedPool(spec, 512, 16).make_prompt_cache(self.model)
            self.model(mx.array([[5] * 30]), cache=alone)
            batch = extend(batch, [layer.merge([layer]) for layer in alone])
            for layer in batch:
                layer.filter([0, 3, 1, 2])
            token = mx.array([[11], [12], [13], [14]])
            with self.subTest(spec=spec):
                calls = []
                with mock.patch.object(paged, "attend", recording(calls)):
                    found = self.model(token, cache=batch)
                # Two calls a layer: the prefix for three rows at once, then the rest.
                shapes = [q.shape for q, _ in calls]
                self.assertEqual(
                    shapes, [(4, 8, 1, 64), (1, 8, 3, 64)] * len(self.model.layers)
                )
                self.assertEqual(len(batch[0]._layout.groups), groups)
                for layer in batch:
                    layer.trim(1)
                with mock.patch.object(paged, "_LEAST_SHARED_KEYS", 10**9):
                    wanted = self.model(token, cache=batch)
                self.assertEqual(batch[0]._layout.groups, [])
                self.assertTrue(mx.allclose(found, wanted, atol=1e-4))

    def test_sinks_count_once(self):
        mx.random.seed(3)
        formats = CacheSpec.parse("q8").formats_for(0, 1)
        cache = PagedKVCache(paged.BlockPool(formats, 80, 16))
        k, v = mx.random.normal((2, 1, 2, 610, 64))
        cache.update_and_fetch(k, v)
        batch = cache.merge([cache, cache])
        new = mx.random.normal((2, 2, 2, 3, 64))
        batch.update_and_fetch(*new)
        q, sinks = mx.random.normal((2, 8, 3, 64)), mx.random.normal((8,)) + 5
        found = batch.attend(q, 0.125, "causal", sinks)
        self.assertEqual([g.blocks for g in batch._layout.groups], [38])
        with mock.patch.object(paged, "_LEAST_SHARED_KEYS", 10**9):
            batch._layout = None
            wanted = batch.attend(q, 0.125, "causal", sinks)
        self.assertTrue(mx.allclose(found, wanted, atol=1e-5))

    def test_the_grouping_that_saves_most(self):
        allocator = BlockAllocator(200)

        def grown(table, blocks):
            append_all([table], [4 * blocks])
            return table

        root = grown(BlockTable(allocator, 4), 2)
        deep = grown(root.fork(), 10)
        rows = [grown(root.fork(), 1), deep.fork(), grown(BlockTable(allocator, 4), 5)]
        rows += [grown(deep.fork(), 1), rows[2].fork()]
        found = {(g.rows, g.blocks) for g in shared_prefixes(rows)}
        # Rows 0, 1 and 3 share two blocks, but 1 and 3 alone share twelve.
        self.assertEqual(found, {((1, 3), 12), ((2, 4), 5)})
        self.assertEqual(len(shared_prefixes(rows, 6)), 1)
        self.assertEqual(shared_prefixes([]), [])


def recording(calls):
    def wrapped(q, *rest, **arguments):
        calls.append((q, arguments))
        return attend(q, *rest, **arguments)

    return wrapped


class TestExhausted(PagedTest):
    def test_a_step_that_fails_changes_nothing_and_can_be_retried(self):
        prompts = make_prompts((30, 30))
        wanted = self.alone(prompts, count=20)
        pool = PagedPool("q8", 128, 8)
        caches = [pool.make_prompt_cache(self.model) for _ in prompts]
        other = pool.make_prompt_cache(self.model)
        self.model(mx.array([[3] * 40]), cache=other)
        generator = BatchGenerator(self.model, max_tokens=20)
        uids = generator.insert(prompts, caches=caches)
        caches.clear()
        found = {uid: [] for uid in uids}
        failures = 0
        while len(found[uids[0]]) < 20:
            try:
                responses = generator.next_generated()
            except PoolExhausted as error:
                self.assertRegex(str(error), "2 free blocks are required; got 1 of 16")
                failures += 1
                self.assertLess(failures, 2)
                other.clear()
                continue
            for response in responses:
                found[response.uid].append(response.token)
        self.assertEqual(failures, 1)
        self.assertEqual([found[uid] for uid in uids], wanted)

    def test_a_prompt_refused_in_mlx_lms_generator_is_inserted_anew(self):
        """The generator has dropped the chunk that was not computed."""
        (prompt,) = make_prompts((40,))
        wanted = self.alone([prompt])
        pool = PagedPool("q8", 64, 8)
        other = pool.make_prompt_cache(self.model)
        self.model(mx.array([[3] * 40]), cache=other)
        generator = BatchGenerator(self.model, max_tokens=12, prefill_step_size=16)
        with qs.enabled(self.model, pool):
            refused = generator.insert([prompt])
            with self.assertRaises(PoolExhausted):
                generator.next_generated()
            generator.remove(refused)
            other.clear()
            generator.insert([prompt])
        self.assertEqual([*generated(generator).values()], wanted)

    def test_a_prompt_that_does_not_fit_takes_nothing(self):
        pool = PagedPool("q8", 64, 8)
        cache = pool.make_prompt_cache(self.model)
        with self.assertRaisesRegex(PoolExhausted, "9 free blocks .* got 8 of 8"):
            self.model(mx.array([[1] * 65]), cache=cache)
        self.assertEqual((cache[0].offset, pool.n_free), (0, 8))
        self.model(mx.array([[1] * 64]), cache=cache)
        self.assertEqual(pool.n_free, 0)

    def test_a_refused_step_changes_no_layer_beside_the_pool_either(self):
        """The layers with a sliding window come before the paged one."""
        model = gemma3_model()
        prompt, more = make_prompts((10, 12))
        wanted = PagedPool("q8", 512, 8).make_prompt_cache(model)
        model(mx.array([prompt]), cache=wanted)
        wanted = model(mx.array([more]), cache=wanted)
        pool = PagedPool("q8", 24, 8)
        cache = pool.make_prompt_cache(model)
        model(mx.array([prompt]), cache=cache)
        batch = [layer.merge([layer]) for layer in copy.deepcopy(cache)]
        other = pool.make_prompt_cache(model)
        model(mx.array([[1]]), cache=other)
        kinds = {type(layer) for layer in cache}
        self.assertEqual(kinds, {PackedRotatingKVCache, PagedKVCache})
        for each in (cache, batch):
            before = [layer.size() for layer in each]
            with self.assertRaises(PoolExhausted):
                model(mx.array([more]), cache=each)
            self.assertEqual([layer.size() for layer in each], before)
        batch.clear()
        other.clear()
        gc.collect()
        found = model(mx.array([more]), cache=cache)
        self.assertTrue(mx.array_equal(found, wanted))

    def test_a_refused_step_does_not_change_a_dense_layer_before_the_paged_ones(self):
        """Models ask the first layer for the mask, and no other."""
        model = llama_model(layers=3)
        prompt, more = make_prompts((20, 20))
        wanted = PagedPool("q8+first1:dense", 512, 8).make_prompt_cache(model)
        model(mx.array([prompt]), cache=wanted)
        wanted = model(mx.array([more[:4]]), cache=wanted)
        pool = PagedPool("q8+first1:dense", 32, 8)
        cache = pool.make_prompt_cache(model)
        self.assertEqual([type(c) is PagedKVCache for c in cache], [False, True, True])
        with self.assertRaises(PoolExhausted):
            model(mx.array([prompt + more]), cache=cache)
        self.assertEqual([c.size() for c in cache], [0, 0, 0])
        model(mx.array([prompt]), cache=cache)
        batch = [layer.merge([layer]) for layer in copy.deepcopy(cache)]
        single = [layer.extract(0) for layer in batch]
        for each in (cache, batch, single):
            with self.assertRaises(PoolExhausted):
                model(mx.array([more]), cache=each)
            self.assertEqual([c.size() for c in each], [20, 20, 20])
        batch.clear()
        single.clear()
        each = None
        gc.collect()
        found = model(mx.array([more[:4]]), cache=cache)
        self.assertTrue(mx.array_equal(found, wanted))

    def test_the_layers_are_asked_for_blocks_before_any_is_written(self):
        pool = PagedPool("q8", 24, 8)
        cache = pool.make_prompt_cache(self.model)
        last = pool.layers[len(cache) - 1].allocator
        held = last.allocate(2)
        with self.assertRaisesRegex(PoolExhausted, "2 free blocks .* got 1 of 3"):
            self.model(mx.array([[1] * 9]), cache=cache)
        self.assertEqual([layer.offset for layer in cache], [0, 0])
        last.release(held)
        self.model(mx.array([[1] * 9]), cache=cache)
        self.assertEqual([layer.offset for layer in cache], [9, 9])

    def test_the_keys_can_hang_on_another_array(self):
        """As mlx-lm's pipelines put the sending of their results into the graph."""
        (prompt,) = make_prompts((20,))
        wanted = greedy(
            self.model, prompt, PagedPool("q8", 64).make_prompt_cache(self.model)
        )
        for batched in (False, True):
            cache = PagedPool("q8", 64, 8).make_prompt_cache(self.model)
            if batched:
                cache = [layer.merge([layer]) for layer in cache]
            self.assertIsNone(cache[-1].keys)
            found, tokens = [], mx.array([prompt])
            for _ in wanted:
                h = self.model(tokens, cache=cache)
                cache[-1].keys = mx.depends(cache[-1].keys, h)
                tokens = mx.argmax(h[:, -1:], axis=-1)
                found.append(tokens.item())
            self.assertEqual(found, wanted)


class TestFiles(PagedTest):
    def test_saved_and_loaded_bit_for_bit_in_any_pool(self):
        (prompt,) = make_prompts([50])
        files = (lm_cache, qs)
        for spec, file in itertools.product(("k8v4", "turbo3", "mxfp8"), files):
            pool = PagedPool(spec, 512, 16)
            hole = pool.make_prompt_cache(self.model)
            self.model(mx.array([prompt[:20]]), cache=hole)
            cache = pool.make_prompt_cache(self.model)
            self.model(mx.array([prompt[:30]]), cache=cache)
            hole.clear()
            self.model(mx.array([prompt[30:]]), cache=cache)
            with (
                self.subTest(spec=spec, file=file.__name__),
                tempfile.TemporaryDirectory() as folder,
            ):
                path = str(Path(folder) / "cache.safetensors")
                file.save_prompt_cache(path, cache, {"of": "a test"})
                loaded, metadata = file.load_prompt_cache(path, return_metadata=True)
                self.assertEqual(metadata, {"of": "a test"})
                for ours, theirs in zip(cache, loaded):
                    for a, b in zip(ours.state[:2], theirs.state[:2]):
                        self.assertTrue(all(map(mx.array_equal, a, b)))
                wanted = greedy(self.model, [7], copy.deepcopy(cache))
                self.assertEqual(greedy(self.model, [7], copy.deepcopy(loaded)), wanted)
                brought = [x.merge([y, x]) for x, y in zip(cache, loaded)]
                self.assertIs(brought[0].pool, cache[0].pool)
                logits = self.model(mx.array([[7], [7]]), cache=brought)
                self.assertTrue(mx.array_equal(logits[0], logits[1]))

    def test_another_format_is_not_merged(self):
        eight, four = (
            PagedPool(spec, 64, 16).make_prompt_cache(self.model)
            for spec in ("q8", "q4")
        )
        self.model(mx.array([[1, 2]]), cache=four)
        self.model(mx.array([[1, 2]]), cache=eight)
        with self.assertRaisesRegex(ValueError, "one format and block size .* q4g64"):
            eight[0].merge([eight[0], four[0]])

    def test_an_empty_cache_too(self):
        cache, *_ = PagedPool("q8", 64, 16).make_prompt_cache(self.model)
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "cache.safetensors")
            qs.save_prompt_cache(path, [cache])
            (loaded,) = qs.load_prompt_cache(path)
        for again in (reborn(cache), loaded):
            self.assertTrue(again.empty())
            k = mx.zeros((1, 2, 3, 64))
            again.update_and_fetch(k, k)
            self.assertEqual(again.offset, 3)

    def test_beside_sliding_windows(self):
        """Where one layer of a model is not paged."""
        model = gemma3_model()
        pool = PagedPool("q8", 512, 16)
        cache = pool.make_prompt_cache(model)
        self.assertGreater(len({type(c) for c in cache}), 1)
        model(mx.array([list(range(1, 40))]), cache=cache)
        with (
            tempfile.TemporaryDirectory() as folder,
            qs.enabled(model, pool),
        ):
            path = str(Path(folder) / "cache.safetensors")
            lm_cache.save_prompt_cache(path, cache)
            loaded = lm_cache.load_prompt_cache(path)
        wanted = model(mx.array([[7]]), cache=cache)
        self.assertTrue(mx.array_equal(model(mx.array([[7]]), cache=loaded), wanted))


class TestMlxLm(PagedTest):
    def test_least_recently_used_prompts_share_blocks(self):
        pool = PagedPool("q8", 512, 16)
        prompt = make_prompts([70])[0]
        cache = pool.make_prompt_cache(self.model)
        self.model(mx.array([prompt[:64]]), cache=cache)
        prompts = lm_cache.LRUPromptCache(max_size=4)
        prompts.insert_cache("model", prompt[:64], cache)
        free = pool.n_free
        found, rest = prompts.fetch_nearest_cache("model", prompt)
        self.assertEqual(rest, prompt[64:])
        self.assertEqual(pool.n_free, free)
        (wanted,) = self.alone([prompt])
        self.assertEqual(greedy(self.model, rest, found), wanted)
        found, rest = prompts.fetch_nearest_cache("model", prompt[:20] + [1, 2])
        self.assertEqual((found[0].offset, rest), (20, [1, 2]))

    def test_sliding_layers_and_sinks(self):
        for make in (gemma3_model, gpt_oss_model):
            model = make()
            pool = PagedPool("q8", 512, 16)
            kinds = {type(x) for x in pool.make_prompt_cache(model)}
            self.assertEqual(kinds, {PackedRotatingKVCache, PagedKVCache})
            prompts = make_prompts((40, 9, 23))
            wanted = [
                greedy(model, prompt, qs.make_prompt_cache(model, "q8"))
                for prompt in prompts
            ]
            with self.subTest(make=make), qs.enabled(model, pool, force_fused=True):
                generator = BatchGenerator(model, max_tokens=12, prefill_step_size=16)
                uids = generator.insert(prompts)
                found = generated(generator)
                self.assertEqual([found[uid] for uid in uids], wanted)
                self.assertGreater(pool.nbytes, 0)

    def test_one_line_switches_a_model_to_a_pool(self):
        pool = PagedPool("q8", 512, 16)
        with qs.enabled(self.model, pool):
            cache, _ = lm_cache.make_prompt_cache(self.model)
            self.assertIs(cache.pool, pool.layers[0])
        cache, _ = lm_cache.make_prompt_cache(self.model)
        self.assertIs(type(cache), lm_cache.KVCache)
        for arguments in ((None, pool), (self.model, pool, 64)):
            with self.assertRaisesRegex(ValueError, "with its model and without"):
                qs.enable(*arguments[:2], max_kv_size=(*arguments, None)[2])

    def test_used_as_arrays_they_are_dense(self):
        pool = PagedPool("rot4", 64, 16)
        cache = pool.make_prompt_cache(self.model)[0]
        k, v = mx.random.normal((2, 1, 2, 20, 64))
        keys, values = cache.update_and_fetch(k, v)
        self.assertEqual((keys.shape, keys.dtype), ((1, 2, 20, 64), mx.float32))
        for view, x in ((keys, k), (values, v)):
            error = mx.square(view[:] - x).mean() / mx.square(x).mean()
            self.assertLess(error.item(), 0.02)

    def test_bad_pools(self):
        with self.assertRaisesRegex(ValueError, "at least 1; got 0 and 64"):
            PagedPool("q8", 0)
        with self.assertRaisesRegex(ValueError, "newest .* got q8.recent64"):
            PagedPool("q8+recent64", 64)


if __name__ == "__main__":
    unittest.main()
