"""Blocks found again by their tokens, in memory and in files that may be damaged."""

import contextlib
import gc
import os
import shutil
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import mlx.core as mx
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from kv_cache_models import FusedTest, llama_model, make_prompts  # noqa: E402
from mlx_lm.models.cache import KVCache  # noqa: E402
from mlx_quantized_sdpa import persistence  # noqa: E402
from mlx_quantized_sdpa.paged import PagedPool, PoolExhausted  # noqa: E402
from mlx_quantized_sdpa.prefix_cache import (  # noqa: E402
    BlockFileError,
    BlockFiles,
    PrefixCache,
)
from test_paged_cache import greedy  # noqa: E402

BLOCK = 8


class PrefixTest(FusedTest):
    def setUp(self):
        super().setUp()
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)

    def pool(self, n_tokens=512, spec="q8"):
        pool = PagedPool(spec, n_tokens, BLOCK)
        pool.make_prompt_cache(self.model)
        return pool

    def filled(self, pool, tokens):
        cache = pool.make_prompt_cache(self.model)
        self.model(mx.array([tokens]), cache=cache)
        return cache

    def fresh(self, tokens):
        return greedy(self.model, tokens, self.pool().make_prompt_cache(self.model))


class TestInMemory(PrefixTest):
    def test_the_longest_known_beginning_is_found(self):
        pool = self.pool()
        prefixes = PrefixCache(pool)
        (prompt,) = make_prompts([40])
        prefixes.insert_cache("m", prompt, self.filled(pool, prompt))
        self.assertEqual((len(prefixes), pool.n_free), (5, 64 - 5))
        for tokens, known in (
            (prompt, 32),
            (prompt + [1], 40),
            (prompt[:20] + [96] * 9, 16),
            (prompt[1:], 0),
        ):
            cache, rest = prefixes.fetch_nearest_cache("m", tokens)
            self.assertEqual(rest, tokens[known:])
            if known:
                self.assertEqual(cache[0].offset, known)
                self.assertEqual(greedy(self.model, rest, cache), self.fresh(tokens))
            else:
                self.assertIsNone(cache)
        self.assertIsNone(prefixes.fetch_nearest_cache("another", prompt)[0])

    def test_the_same_blocks_are_kept_once(self):
        pool = self.pool()
        prefixes = PrefixCache(pool)
        (prompt,) = make_prompts([40])
        for _ in range(3):
            prefixes.insert_cache("m", prompt, self.filled(pool, prompt))
        gc.collect()
        self.assertEqual(pool.n_free, 64 - 5)
        self.assertEqual(prefixes.nbytes, pool.nbytes // 64 * 5)

    def test_the_pool_takes_back_what_was_used_longest_ago(self):
        pool = self.pool(n_tokens=10 * BLOCK)
        prefixes = PrefixCache(pool)
        prompts = make_prompts([32, 32, 32])
        for prompt in prompts[:2]:
            prefixes.insert_cache("m", prompt, self.filled(pool, prompt))
        prefixes.fetch_nearest_cache("m", [*prompts[0], 1])
        gc.collect()
        self.assertEqual(pool.n_free, 2)
        cache = self.filled(pool, prompts[2] + [1] * 8)
        self.assertEqual(pool.n_free, 0)
        # Three blocks of the second prompt went, its last ones first.
        for prompt, left in zip(prompts, (1, 25)):
            found = prefixes.fetch_nearest_cache("m", [*prompt, 1])
            self.assertEqual(len(found[1]), left)
        self.assertEqual(cache[0].offset, 40)

    def test_blocks_of_living_sequences_stay(self):
        pool = self.pool(n_tokens=5 * BLOCK)
        prefixes = PrefixCache(pool)
        (prompt,) = make_prompts([32])
        living = self.filled(pool, prompt)
        prefixes.insert_cache("m", prompt, living)
        with self.assertRaisesRegex(PoolExhausted, "2 free blocks .* got 1 of 5"):
            self.filled(pool, [1] * 2 * BLOCK)
        self.assertEqual(len(prefixes), 4)
        self.assertEqual(
            greedy(self.model, [5], living, 6), self.fresh(prompt + [5])[:6]
        )

    def test_trimming(self):
        pool = self.pool()
        prefixes = PrefixCache(pool)
        (prompt,) = make_prompts([40])
        prefixes.insert_cache("m", prompt, self.filled(pool, prompt))
        prefixes.trim_to(n_bytes=prefixes.nbytes // 5 * 2)
        self.assertEqual(len(prefixes), 2)
        self.assertEqual(len(prefixes.fetch_nearest_cache("m", prompt)[1]), 24)
        prefixes.trim_to(n_sequences=0)
        gc.collect()
        self.assertEqual((len(prefixes), pool.n_free), (0, 64))
        self.assertEqual(prefixes.stats_by_type()["blocks"]["n_bytes"], 0)

    def test_other_caches_are_refused(self):
        pool = self.pool()
        dense = [KVCache() for _ in self.model.layers]
        for other in (dense, self.filled(self.pool(), [1] * 9), []):
            with self.assertRaisesRegex(ValueError, "a PagedKVCache of one sequence"):
                PrefixCache(pool).insert_cache("m", [1] * 9, other)


class TestFiles(PrefixTest):
    def saved(self, spec="k8v4", length=40):
        """Prompt, its tokens from a fresh cache, and its blocks in the folder."""
        pool = self.pool(spec=spec)
        (prompt,) = make_prompts([length])
        prefixes = PrefixCache(pool, self.folder)
        prefixes.insert_cache("m", prompt, self.filled(pool, prompt))
        prefixes.flush()
        return prompt, sorted(self.folder.iterdir())

    def test_another_process_finds_the_blocks_bit_for_bit(self):
        prompt, files = self.saved()
        self.assertEqual(len(files), 5)
        pool = self.pool(spec="k8v4")
        cache, rest = PrefixCache(pool, self.folder).fetch_nearest_cache("m", prompt)
        self.assertEqual(rest, prompt[32:])
        filled = self.filled(self.pool(spec="k8v4"), prompt[:32])
        for found, wanted in zip(cache, filled):
            for a, b in zip(found.state[:2], wanted.state[:2]):
                self.assertTrue(all(map(mx.array_equal, a, b)))
        self.assertEqual(
            greedy(self.model, rest, cache), greedy(self.model, prompt[32:], filled)
        )

    def test_blocks_are_saved_when_the_pool_needs_their_place(self):
        pool = self.pool(n_tokens=6 * BLOCK)
        prefixes = PrefixCache(pool, self.folder)
        first, second = make_prompts([40, 41])
        prefixes.insert_cache("m", first, self.filled(pool, first))
        gc.collect()
        prefixes.insert_cache("m", second, self.filled(pool, second))
        self.assertEqual(len(list(self.folder.iterdir())), 5)
        gc.collect()
        cache, rest = prefixes.fetch_nearest_cache("m", first)
        self.assertEqual(rest, first[32:])
        self.assertEqual(greedy(self.model, rest, cache, 5), self.fresh(first)[:5])

    def test_drafts_of_processes_that_are_gone_are_removed(self):
        """A newer one may be another process's, which goes on writing."""
        old, new = (self.folder / f".{name}.77.safetensors" for name in "ab")
        other = self.folder / "b.safetensors"
        for path in (old, new, other):
            path.touch()
        for path in (old, other):
            os.utime(path, (1, 1))
        PrefixCache(self.pool(), self.folder)
        self.assertEqual({*self.folder.iterdir()}, {new, other})

    def test_loading_a_block_does_not_drop_one_that_was_found(self):
        """Of two known blocks the first is in memory, and one place is free."""
        pool = self.pool(n_tokens=3 * BLOCK)
        prefixes = PrefixCache(pool, self.folder)
        (prompt,) = make_prompts([16])
        prefixes.insert_cache("m", prompt, self.filled(pool, prompt))
        gc.collect()
        prefixes.flush()
        prefixes.trim_to(n_bytes=prefixes.nbytes // 2)
        living = self.filled(pool, [1] * 2 * BLOCK)
        self.assertEqual((len(prefixes), pool.n_free), (1, 0))
        with self.assertLogs("mlx_quantized_sdpa", "WARNING"):
            cache, rest = prefixes.fetch_nearest_cache("m", [*prompt, 3])
        self.assertEqual((cache[0].offset, rest), (BLOCK, [*prompt[BLOCK:], 3]))
        del cache, living
        gc.collect()
        cache, rest = prefixes.fetch_nearest_cache("m", [*prompt, 3])
        self.assertEqual((cache[0].offset, rest), (2 * BLOCK, [3]))
        found = greedy(self.model, rest, cache, 6)
        self.assertEqual(found, self.fresh([*prompt, 3])[:6])

    def test_damaged_files_are_refused_and_the_rest_is_used(self):
        prompt, files = self.saved()
        pool = self.pool(spec="k8v4")
        keys = list(PrefixCache(pool, self.folder)._keys("m", prompt))
        third = self.folder / f"{keys[2]}.safetensors"
        whole = third.read_bytes()
        for damage in (
            whole[:100],
            whole[: len(whole) // 2],
            b"",
            whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
        ):
            third.write_bytes(damage)
            prefixes = PrefixCache(pool, self.folder)
            with self.assertLogs("mlx_quantized_sdpa", "WARNING") as logs:
                cache, rest = prefixes.fetch_nearest_cache("m", prompt)
            self.assertRegex(logs.output[0], "whole safetensors|file is damaged")
            self.assertEqual(rest, prompt[16:])
            del cache, prefixes
            gc.collect()
            self.assertEqual(pool.n_free, pool.n_blocks)
        third.write_bytes(whole)
        cache, rest = PrefixCache(pool, self.folder).fetch_nearest_cache("m", prompt)
        self.assertEqual(rest, prompt[32:])

    def test_of_another_version_model_or_spec(self):
        prompt, files = self.saved()
        others = (("another", "k8v4", 1), ("m", "q8", 1), ("m", "k8v4", 2))
        for model, spec, version in others:
            with mock.patch("mlx_quantized_sdpa.prefix_cache.FILE_VERSION", version):
                prefixes = PrefixCache(self.pool(spec=spec), self.folder)
                self.assertIsNone(prefixes.fetch_nearest_cache(model, prompt)[0])
                # Even under a name that fits, the file says what it is.
                key, *_ = prefixes._keys(model, prompt)
                shutil.copy(files[0], prefixes.files.path(key))
                with self.assertRaisesRegex(
                    BlockFileError, "must be of .*; got .*k-q8v-q4"
                ):
                    prefixes.files.load(key, prefixes._description(model))

    def test_of_other_weights_under_the_same_name(self):
        prompt, _ = self.saved()
        for layer, known in ((None, 32), (1, 0)):
            model = llama_model()
            if layer is not None:
                model.model.layers[layer].self_attn.k_proj.weight *= 3
            pool = PagedPool("k8v4", 512, BLOCK)
            pool.make_prompt_cache(model)
            found = PrefixCache(pool, self.folder).fetch_nearest_cache("m", prompt)
            self.assertEqual(found[1], prompt[known:])

    def test_weights_are_read_for_files_only_and_once(self):
        (prompt,) = make_prompts([20])
        for folder, count in ((None, 0), (self.folder, 1)):
            pool = self.pool()
            prefixes = PrefixCache(pool, folder)
            self.assertEqual(prefixes.fetch_nearest_cache("m", prompt), (None, prompt))
            with mock.patch.object(
                persistence, "fingerprint", wraps=persistence.fingerprint
            ) as read:
                prefixes = PrefixCache(self.pool(), folder)
                for _ in range(3):
                    prefixes.fetch_nearest_cache("m", prompt)
            self.assertEqual(read.call_count, count)

    def test_files_need_the_model(self):
        pool = self.pool()
        pool.make_prompt_cache(llama_model())
        gc.collect()
        with self.assertRaisesRegex(ValueError, "caches were made for .* got none"):
            PrefixCache(pool, self.folder).fetch_nearest_cache("m", [1] * 20)

    def test_a_write_that_fails_leaves_no_file(self):
        pool = self.pool()
        (prompt,) = make_prompts([16])
        prefixes = PrefixCache(pool, self.folder)
        prefixes.insert_cache("m", prompt, self.filled(pool, prompt))
        with mock.patch.object(os, "replace", side_effect=OSError("disk full")):
            with self.assertRaisesRegex(OSError, "disk full"):
                prefixes.flush()
        self.assertEqual(list(self.folder.iterdir()), [])
        prefixes.flush()
        self.assertEqual(len(list(self.folder.iterdir())), 2)

    def test_a_disk_that_is_full_does_not_stop_a_sequence(self):
        pool = self.pool(n_tokens=4 * BLOCK)
        prefixes = PrefixCache(pool, self.folder)
        (prompt,) = make_prompts([32])
        prefixes.insert_cache("m", prompt, self.filled(pool, prompt))
        gc.collect()
        with contextlib.ExitStack() as stack:
            failing = mock.patch.object(os, "replace", side_effect=OSError("disk full"))
            stack.enter_context(failing)
            stack.enter_context(self.assertLogs("mlx_quantized_sdpa", "WARNING"))
            self.filled(pool, [1] * 32)
        self.assertEqual(len(prefixes), 0)

    def test_the_folder_keeps_to_its_size(self):
        contents = [((mx.zeros((1, 2, 8, 16), mx.uint32),), ())]
        files = BlockFiles(self.folder, max_bytes=3000)
        for index, key in enumerate("abcd"):
            files.save(key, "d", contents)
            os.utime(files.path(key), ns=(index, index))
            if key == "b":
                os.utime(files.path("a"), ns=(10, 10))
        found = sorted(path.stem for path in self.folder.iterdir())
        self.assertEqual(found, ["a", "d"])
        with self.assertRaisesRegex(BlockFileError, "must be a whole safetensors"):
            files.load("b", "d")


if __name__ == "__main__":
    unittest.main()
