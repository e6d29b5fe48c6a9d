"""Requests that share one pool of blocks: all are answered, however small it is."""

import contextlib
import gc
import io
import json
import shutil
import tempfile
import threading
import unittest
import urllib.error
import urllib.request
import weakref
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx_quantized_sdpa as qs
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from kv_cache_models import (  # noqa: E402
    FusedTest,
    as_served,
    deepseek_model,
    gemma3_model,
    llama_model,
    make_prompts,
    reborn,
    stopping,
    write_small_model,
)
from mlx_lm import load, server, stream_generate  # noqa: E402
from mlx_lm.generate import generate_step  # noqa: E402
from mlx_quantized_sdpa import __main__ as command  # noqa: E402
from mlx_quantized_sdpa import serving as requests  # noqa: E402
from mlx_quantized_sdpa.blocks import (  # noqa: E402
    BlockAllocator,
    BlockTable,
    PoolExhausted,
    append_all,
)
from mlx_quantized_sdpa.cache import PackedKVCache  # noqa: E402
from mlx_quantized_sdpa.paged import PagedKVCache, PagedPool  # noqa: E402
from mlx_quantized_sdpa.prefix_cache import PrefixCache  # noqa: E402
from mlx_quantized_sdpa.serving import (  # noqa: E402
    KnownPrompts,
    PagedBatchGenerator,
    _Server,
    growing_server,
    paged_server,
)
from test_kv_cache_models import falcon  # noqa: E402


class TestGenerator(FusedTest):
    def alone(self, prompt, count):
        cache = qs.make_prompt_cache(self.model, "q8")
        steps = generate_step(
            mx.array(prompt), self.model, max_tokens=count, prompt_cache=cache
        )
        return [token for token, _ in steps]

    def run_all(self, generator, uids):
        """Tokens and the last reason of each request, and how many ran at most."""
        found = {uid: [] for uid in uids}
        reasons, most = {}, 0
        while len(reasons) < len(uids):
            for response in generator.next_generated():
                found[response.uid].append(response.token)
                if response.finish_reason:
                    reasons[response.uid] = response.finish_reason
            most = max(most, len(generator._generation_batch))
        return found, reasons, most

    def generator(self, n_tokens, **arguments):
        pool = PagedPool("q8", n_tokens, 8)
        arguments = {"prefill_step_size": 16, "max_tokens": 30} | arguments
        return PagedBatchGenerator(self.model, pool=pool, **arguments)

    def test_all_are_answered_as_alone_by_pools_of_any_size(self):
        prompts = make_prompts((40, 9, 61, 17, 3, 30, 55, 24))
        wanted = [self.alone(prompt, 30) for prompt in prompts]
        preempted = []
        for n_tokens in (96, 160, 240, 1024):
            generator = self.generator(n_tokens)
            with self.subTest(n_tokens=n_tokens), counting(generator, preempted):
                uids = generator.insert(prompts)
                found, reasons, most = self.run_all(generator, uids)
                self.assertEqual([found[uid] for uid in uids], wanted)
                self.assertEqual(set(reasons.values()), {"length"})
                self.assertGreater(most, 0 if n_tokens == 96 else 1)
                gc.collect()
                self.assertEqual(generator.pool.n_free, generator.pool.n_blocks)
        self.assertGreater(len(preempted), 4)

    def test_of_a_request_that_is_removed_while_it_waits_nothing_is_kept(self):
        generator = self.generator(64)
        generator.insert(make_prompts((20, 20)))
        while not generator._stopping:
            generator.next()
        generator.remove([each[0] for each in generator._unprocessed_sequences])
        self.assertEqual(generator._stopping, {})

    def test_newer_requests_do_not_hold_up_an_older_one(self):
        """It has most of the blocks, and they come while it is at work."""
        first, *others = make_prompts((400, *[20] * 9))
        took = []
        for newer in ([], others):
            generator, preempted = self.generator(512), []
            (oldest,) = generator.insert([first], max_tokens=[4])
            tokens, steps = [], 0
            with counting(generator, preempted):
                while len(tokens) < 4 and steps < 200:
                    if newer and steps % 3 == 0:
                        generator.insert([newer.pop()], max_tokens=[60])
                    _, responses = generator.next()
                    tokens += [r.token for r in responses if r.uid == oldest]
                    waiting = [each[0] for each in generator._unprocessed_sequences]
                    self.assertNotIn(oldest, waiting)
                    steps += 1
            self.assertEqual(tokens, self.alone(first, 4))
            took.append(steps)
        self.assertEqual(*took)
        self.assertGreater(len(preempted), 0)

    def test_a_stop_sequence_is_seen_across_a_pause(self):
        prompts = make_prompts((30, 31))
        texts = [self.alone(prompt, 30) for prompt in prompts]
        # Of three tokens, so that a pause may fall between them.
        stops = [text[k : k + 3] for text, k in zip(texts, (20, 9))]
        ends = [first_end(t, t[k : k + 3]) for t, k in zip(texts, (20, 9))]
        for n_tokens in range(64, 120, 8):
            generator = self.generator(n_tokens)
            uids = generator.insert(prompts, **stopping(stops))
            found, reasons, _ = self.run_all(generator, uids)
            self.assertEqual(set(reasons.values()), {"stop"})
            for uid, text, end in zip(uids, texts, ends):
                self.assertEqual(found[uid], text[:end])

    def test_one_that_fills_the_pool_ends_there(self):
        generator = self.generator(64, max_tokens=100)
        (prompt,) = make_prompts((40,))
        uids = generator.insert([prompt])
        found, reasons, _ = self.run_all(generator, uids)
        self.assertEqual(reasons[uids[0]], "length")
        self.assertEqual(found[uids[0]], self.alone(prompt, 25))
        uids = generator.insert([prompt], **stopping([self.alone(prompt, 25)]))
        found, reasons, _ = self.run_all(generator, uids)
        self.assertEqual((len(found[uids[0]]), reasons[uids[0]]), (25, "stop"))
        uids = generator.insert([prompt[:10]], max_tokens=[5])
        found, _, _ = self.run_all(generator, uids)
        self.assertEqual(found[uids[0]], self.alone(prompt[:10], 5))

    def test_what_never_fits_is_refused_at_once(self):
        generator = self.generator(64)
        with self.assertRaisesRegex(PoolExhausted, "at most 63 tokens .* got 64"):
            generator.insert([[1] * 64])
        self.assertEqual(len(generator._unprocessed_sequences), 0)

    def test_is_one_of_the_packages_names(self):
        self.assertIs(qs.PagedBatchGenerator, PagedBatchGenerator)
        self.assertFalse(hasattr(qs, "BatchGenerator"))

    def test_known_prompts_give_way(self):
        generator = self.generator(160)
        pool = generator.pool
        prefixes = PrefixCache(pool)
        for prompt in make_prompts((60, 61)):
            cache = pool.make_prompt_cache(self.model)
            self.model(mx.array([prompt]), cache=cache)
            prefixes.insert_cache("m", prompt, cache)
        cache, rest = prefixes.fetch_nearest_cache("m", make_prompts((60,))[0])
        self.assertEqual(len(rest), 4)
        others = make_prompts((60, 61, 50))
        uids = generator.insert(
            [rest, *others[1:]],
            caches=[cache, None, None],
            all_tokens=[others[0][:56], [], []],
        )
        cache = None
        found, _, _ = self.run_all(generator, uids)
        wanted = [self.alone(prompt, 30) for prompt in others]
        self.assertEqual([found[uid] for uid in uids], wanted)

    def test_the_only_one_that_runs_is_not_ended_for_those_that_wait(self):
        """What waits has known beginnings, of other blocks than it writes itself."""
        one = {"completion_batch_size": 1, "prefill_batch_size": 1}
        generator = self.generator(128, **one)
        prefixes = PrefixCache(generator.pool)
        first, *others = make_prompts((30, 41, 42))
        for prompt in others:
            cache = generator.pool.make_prompt_cache(self.model)
            self.model(mx.array([prompt]), cache=cache)
            prefixes.insert_cache("m", prompt, cache)
        cache = None
        known = [prefixes.fetch_nearest_cache("m", prompt) for prompt in others]
        uids = generator.insert([first], max_tokens=[60])
        generator.next()
        uids += generator.insert(
            [rest for _, rest in known],
            max_tokens=[20, 20],
            caches=[cache for cache, _ in known],
            all_tokens=[p[:40] for p in others],
        )
        known = None
        found, _, _ = self.run_all(generator, uids)
        self.assertEqual(found[uids[0]], self.alone(first, 60))
        for uid, prompt in zip(uids[1:], others):
            self.assertEqual(found[uid], self.alone(prompt, 20))

    def test_tokens_that_are_not_named_are_refused(self):
        """They would be missing where a sequence is computed anew."""
        generator = self.generator(160)
        cache = generator.pool.make_prompt_cache(self.model)
        self.model(mx.array(make_prompts((16,))), cache=cache)
        for known, got in ((None, 0), ([[1] * 15], 15)):
            with self.assertRaisesRegex(ValueError, f"all_tokens .* got {got} for 16"):
                generator.insert([[7, 8, 9]], caches=[cache], all_tokens=known)
        self.assertEqual(len(generator._unprocessed_sequences), 0)

    def test_caches_from_files_are_brought_into_the_pool(self):
        prompts = make_prompts((40, 30, 20))
        generator = self.generator(112)
        cache = PagedPool("q8", 64, 8).make_prompt_cache(self.model)
        self.model(mx.array([prompts[0][:30]]), cache=cache)
        wanted = [self.alone(prompt, 30) for prompt in prompts]
        uids = generator.insert(
            [prompts[0][30:]],
            caches=[[reborn(layer) for layer in cache]],
            all_tokens=[prompts[0][:30]],
        )
        generator.next()
        batch = generator._prompt_batch.prompt_cache
        self.assertEqual([c.pool for c in batch], [*generator.pool.layers.values()])
        uids += generator.insert(prompts[1:])
        found, _, _ = self.run_all(generator, uids)
        self.assertEqual([found[uid] for uid in uids], wanted)
        gc.collect()
        self.assertEqual(generator.pool.n_free, generator.pool.n_blocks)
        other = PagedPool("q4", 64, 8).make_prompt_cache(self.model)
        self.model(mx.array([prompts[0][:30]]), cache=other)
        with self.assertRaisesRegex(ValueError, "one format .* got q4g64 .* of q8g64"):
            generator.insert([[1]], caches=[other], all_tokens=[prompts[0][:30]])

    def test_models_without_blocks_are_not_bound_by_the_pool(self):
        """One holds latents, one has a state space beside the attention."""
        for make in (deepseek_model, falcon):
            model = make()
            pool = PagedPool("q8", 64, 8)
            generator = PagedBatchGenerator(model, pool=pool, max_tokens=4)
            self.assertEqual(pool.layers, {})
            (prompt,) = make_prompts((90,))
            cache = pool.make_prompt_cache(model)
            model(mx.array([prompt[:80]]), cache=cache)
            uids = generator.insert([prompt])
            uids += generator.insert(
                [prompt[80:]], caches=[cache], all_tokens=[prompt[:80]]
            )
            found, reasons, _ = self.run_all(generator, uids)
            self.assertEqual(set(reasons.values()), {"length"})
            self.assertEqual(*found.values())

    def test_a_server_gives_its_caches_away(self):
        state = serving_state("q8", 64, 8)
        generator = state.make_generator(self.model, prefill_step_size=16)
        (prompt,) = make_prompts((30,))
        cache = state.make_prompt_cache(self.model)
        self.model(mx.array([prompt]), cache=cache)
        state.insert_cache("m", prompt, cache)
        self.assertEqual([layer.offset for layer in cache], [0, 0])
        found, rest = state.fetch_nearest_cache("m", prompt)
        self.assertEqual((found[0].offset, rest), (24, prompt[24:]))
        uids = generator.insert_segments(
            [[rest]], max_tokens=[9], caches=[found], all_tokens=[prompt[:24]]
        )
        self.assertEqual([layer.offset for layer in found], [0, 0])
        tokens, _, _ = self.run_all(generator, uids)
        self.assertEqual(tokens[uids[0]], self.alone(prompt, 9))


class TestServerCaches(FusedTest):
    """What the server asks of its prompt cache, without the server."""

    def filled(self, state, model, tokens):
        cache = state.make_prompt_cache(model)
        model(mx.array([tokens]), cache=cache)
        return cache

    def test_the_model_before_and_its_pool_are_gone_when_another_is_loaded(self):
        state = serving_state("q8", 64, 8)
        model = llama_model()
        (prompt,) = make_prompts((20,))
        state.insert_cache("m", prompt, self.filled(state, model, prompt))
        self.assertEqual(len(state), 2)
        model, pool = weakref.ref(model), weakref.ref(state.pool)
        there = []

        def load(provider, path):
            gc.collect()
            there.append((path, model(), pool()))

        none = mock.Mock(model=None, draft_model=None)
        state.load(load)(none, "another")
        self.assertEqual(there, [("another", None, None)])
        self.assertEqual((len(state), state.nbytes), (0, 0))
        self.assertEqual(state.fetch_nearest_cache("m", prompt), (None, prompt))

    def test_caches_beside_the_pool_are_known_as_a_whole(self):
        model = gemma3_model()
        state = serving_state("q8", 64, 8)
        prompt, *others = make_prompts((12, 30, 31))
        cache = self.filled(state, model, prompt)
        state.insert_cache("m", prompt, cache)
        self.assertEqual({c.offset for c in cache if type(c) is PagedKVCache}, {0})
        self.assertEqual((len(state), state.pool.n_free), (1, 6))
        self.assertEqual(state.stats_by_type()["assistant"]["n_sequences"], 1)
        found, rest = state.fetch_nearest_cache("m", [*prompt, 5, 6])
        self.assertEqual((rest, found[0].offset), ([5, 6], 12))
        logits = model(mx.array([rest]), cache=found)
        whole = qs.make_prompt_cache(model, "q8")
        model(mx.array([prompt]), cache=whole)
        self.assertTrue(mx.allclose(logits, model(mx.array([rest]), cache=whole)))
        # Blocks are asked for: what is known gives way, the longest unused first.
        found = None
        state.insert_cache("m", others[0], self.filled(state, model, others[0]))
        self.assertEqual((len(state), state.pool.n_free), (2, 2))
        living = self.filled(state, model, others[1])
        self.assertEqual((len(state), state.pool.n_free), (1, 0))
        self.assertIsNone(state.fetch_nearest_cache("m", [*prompt, 5])[0])
        self.assertIsNotNone(state.fetch_nearest_cache("m", [*others[0], 5])[0])
        del living

    def test_a_last_block_is_not_copied_for_a_cache_that_gave_way(self):
        """The pool has just the blocks of the sequence that goes on."""
        model = gemma3_model()
        state = serving_state("q8", 32, 8)
        (prompt,) = make_prompts((29,))
        state.insert_cache("m", prompt, self.filled(state, model, prompt))
        found, rest = state.fetch_nearest_cache("m", [*prompt, 5])
        self.assertEqual((rest, state.pool.n_free), ([5], 0))
        generator = state.make_generator(model, max_tokens=2)
        uids = generator.insert([rest], caches=[found], all_tokens=[prompt])
        tokens, reasons = [], []
        while not any(reasons):
            for response in generator.next_generated():
                tokens.append(response.token)
                reasons.append(response.finish_reason)
        self.assertEqual((len(tokens), len(state), len(uids)), (2, 0, 1))

    def test_a_draft_has_caches_beside_the_pool_and_prompts_are_known(self):
        model, draft = llama_model(), llama_model(layers=1)
        state = serving_state("q8", 64, 8)
        (prompt,) = make_prompts((20,))
        cache = self.filled(state, model, prompt)
        pool = state.pool
        beside = state.make_prompt_cache(draft)
        self.assertIs(state.pool, pool)
        self.assertEqual([type(c) for c in beside], [PackedKVCache])
        draft(mx.array([prompt[:19]]), cache=beside)
        state.insert_cache("m", [*prompt, 3], cache + beside)
        self.assertEqual(len(state.prefixes), 0)
        found, rest = state.fetch_nearest_cache("m", [*prompt, 3, 4])
        # As many as both hold.
        self.assertEqual([c.offset for c in found], [19, 19, 19])
        self.assertEqual(rest, [prompt[19], 3, 4])


def serving_state(spec, n_tokens, block_size):
    return _Server(lambda: PagedPool(spec, n_tokens, block_size), None)


def first_end(text, stop):
    """Where the first ``stop`` in ``text`` ends."""
    for end in range(len(stop), len(text) + 1):
        if text[end - len(stop) : end] == stop:
            return end
    raise AssertionError("the text has no such part")


def counting(generator, preempted):
    own = generator._preempt

    def counted():
        preempted.append(1)
        own()

    return mock.patch.object(generator, "_preempt", counted)


class TestNeed(unittest.TestCase):
    def test_is_what_appending_takes(self):
        """Also of a last block that is shared, which a token would be copied from."""
        for length, count, shared in (
            (0, 1, False),
            (5, 3, False),
            (5, 4, False),
            (5, 1, True),
            (5, 4, True),
            (8, 1, True),
        ):
            pool = PagedPool("q8", 64, 8)
            table = BlockTable(BlockAllocator(8), 8)
            append_all([table], [length])
            other = table.fork() if shared else None
            with self.subTest(length=length, count=count, shared=shared):
                needed = requests._needed(table, count, pool)
                free = table.allocator.n_free
                append_all([table], [count])
                self.assertEqual(needed, free - table.allocator.n_free)
            del other


class TestCommand(unittest.TestCase):
    def run_command(self, *arguments):
        """What the command has put into mlx-lm's server while that runs."""
        found = []

        def main():
            found.append(server.make_prompt_cache(llama_model()))
            found.append(server.LRUPromptCache(10))

        printed = io.StringIO()
        with (
            mock.patch.object(server, "main", main),
            contextlib.redirect_stderr(printed),
        ):
            rc = command.main(["server", *arguments])
        return rc, found, printed.getvalue()

    def test_a_pool_is_one_option(self):
        own = server.BatchGenerator, server.make_prompt_cache
        with tempfile.TemporaryDirectory() as folder:
            options = ["--kv", "k8v4", "--pool-tokens", "500", "--pool-folder", folder]
            options += ["--pool-folder-bytes", "4096"]
            rc, (cache, state), _ = self.run_command(*options)
        prefixes = state.prefixes
        self.assertEqual((rc, str(state.pool.spec)), (0, "k-q8v-q4"))
        self.assertEqual(cache[0].pool.allocator.n_blocks, 8)
        self.assertEqual(str(prefixes.files.folder), folder)
        self.assertEqual(prefixes.files.max_bytes, 4096)
        self.assertEqual((server.BatchGenerator, server.make_prompt_cache), own)
        rc, (cache, known), _ = self.run_command("--kv", "k8v4")
        self.assertNotIsInstance(cache[0], PagedKVCache)
        self.assertIsInstance(known, KnownPrompts)

    def test_what_is_no_pool_is_refused(self):
        for options, message in (
            (["--pool-tokens", "0"], "at least 1; got 0"),
            (["--pool-tokens", "64", "--kv", "q8+recent32"], "newest tokens"),
            (["--pool-folder", "there"], "needs --pool-tokens.* got .* there alone"),
            (["--pool-tokens", "64", "--pool-folder-bytes", "9"], "got 9 with None"),
        ):
            rc, found, printed = self.run_command(*options)
            self.assertEqual((rc, found), (2, []))
            self.assertRegex(printed, message)


class TestKnownPrompts(unittest.TestCase):
    """mlx-lm's generator refuses a prompt of which nothing is left, and ends."""

    def known(self, **arguments):
        model = llama_model()
        cache = qs.make_prompt_cache(model, "q8", **arguments)
        self.addCleanup(qs.disable)
        model(mx.array(make_prompts((20,))), cache=cache)
        known = KnownPrompts(10)
        known.insert_cache("m", make_prompts((20,))[0], cache)
        return known

    def test_one_token_is_left(self):
        known, (prompt,) = self.known(), make_prompts((20,))
        for _ in range(2):
            cache, rest = known.fetch_nearest_cache("m", prompt)
            self.assertEqual((rest, cache[0].offset), (prompt[-1:], 19))
        cache, rest = known.fetch_nearest_cache("m", [*prompt, 1, 2])
        self.assertEqual((rest, cache[0].offset), ([1, 2], 20))
        self.assertEqual(known.fetch_nearest_cache("m", [9]), (None, [9]))

    def test_layers_that_hold_fewer_tokens_than_are_named(self):
        """As speculative decoding leaves them; the next request has the rest."""
        model, (prompt,) = llama_model(), make_prompts((20,))
        cache = qs.make_prompt_cache(model, "q8")
        self.addCleanup(qs.disable)
        model(mx.array([prompt[:18]]), cache=cache)
        cache[1].trim(1)
        known = KnownPrompts(10)
        known.insert_cache("m", prompt, cache)
        cache, rest = known.fetch_nearest_cache("m", [*prompt, 5])
        self.assertEqual([layer.offset for layer in cache], [17, 17])
        self.assertEqual(rest, [*prompt[17:], 5])
        bounded = qs.make_prompt_cache(model, "q8", max_kv_size=16)
        model(mx.array([prompt[:18]]), cache=bounded)
        bounded[1].seen -= 1
        known.insert_cache("m", [1] * 18, bounded)
        self.assertEqual(len(known), 1)

    def test_all_are_where_the_cache_cannot_be_trimmed(self):
        (prompt,) = make_prompts((20,))
        known = self.known(max_kv_size=16)
        self.assertEqual(known.fetch_nearest_cache("m", prompt), (None, prompt))


class TestServer(unittest.TestCase):
    def setUp(self):
        qs.enable(force_fused=True)
        self.addCleanup(qs.disable)
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        write_small_model(self.folder)
        self.pools = []

    def make_pool(self):
        self.pools.append(PagedPool("q8", 1024, 16))
        return self.pools[-1]

    def make_small_pool(self):
        self.pools.append(PagedPool("q8", 64, 16))
        return self.pools[-1]

    def alone(self, asked):
        """Texts of the requests without a server."""
        model, tokenizer = load(str(self.folder))
        with qs.enabled(model, "q8"):
            return [
                as_served(
                    "".join(
                        step.text
                        for step in stream_generate(
                            model, tokenizer, text, max_tokens=count
                        )
                    )
                )
                for text, count in asked
            ]

    def test_concurrent_requests_with_a_common_beginning(self):
        """More prompts than the pool holds at once; each has its text from alone."""
        source = Path(unittest.__file__).read_text()
        asked = [
            (source[:300] + source[700 + 60 * i :][: (37 * i) % 90 + 1], 5 + i % 7)
            for i in range(16)
        ]
        wanted = self.alone(asked)
        with serving(self.folder, paged_server(self.make_pool)) as ask:
            with ThreadPoolExecutor(8) as threads:
                found = list(threads.map(lambda each: ask(*each), asked))
            self.assertEqual(found, wanted)
            with self.assertRaisesRegex(RuntimeError, "at most 1023 tokens"):
                ask(source[:1500], 4)
            self.assertEqual([ask(*each) for each in asked], wanted)
        (pool,) = self.pools
        self.assertGreater(pool.nbytes, 0)

    def test_many_requests_of_mixed_length(self):
        """Half of them begin alike; all together are more than the pool holds."""
        source = Path(unittest.__file__).read_text()
        asked = [
            (source[(i % 2) * 100 * i :][: 2 + (53 * i) % 170], 1 + (7 * i) % 13)
            for i in range(32)
        ]
        wanted = self.alone(asked)
        with qs.enabled(kv="q8", force_fused=True):
            for patches in (growing_server(), paged_server(self.make_pool)):
                with serving(self.folder, patches) as ask:
                    for _ in range(2):
                        with ThreadPoolExecutor(32) as threads:
                            found = list(threads.map(lambda each: ask(*each), asked))
                        self.assertEqual(found, wanted)
        (pool,) = self.pools
        self.assertGreater(sum(len(text) for text, _ in asked), 2 * 1024)
        self.assertGreater(pool.nbytes, 0)

    def test_a_layer_with_a_window_beside_one_in_blocks(self):
        """Texts go on where others ended; what is known gives way to what runs."""
        kinds = ["sliding_attention", "full_attention"]
        write_small_model(self.folder, layer_types=kinds, sliding_window=64)
        source = Path(unittest.__file__).read_text()
        asked = [(source[50 * i :][: 20 + (31 * i) % 90], 5 + i % 7) for i in range(8)]
        longer = [(text + source[:9], count) for text, count in asked]
        wanted = self.alone(asked), self.alone(longer)

        def make_pool():
            self.pools.append(PagedPool("q8", 256, 16))
            return self.pools[-1]

        with serving(self.folder, paged_server(make_pool)) as ask:
            self.assertEqual(ask(*asked[0]), wanted[0][0])
            known = ask.__self__.generator.prompt_cache
            lent = []
            with mock.patch.object(known, "_lend", lambda c: lent.append(c) or c):
                self.assertEqual(ask(*longer[0]), wanted[1][0])
            self.assertEqual(len(lent), 1)
            with ThreadPoolExecutor(8) as threads:
                for each, texts in zip((asked, longer), wanted):
                    found = list(threads.map(lambda each: ask(*each), each))
                    self.assertEqual(found, texts)
            self.assertGreater(len(known.whole), 0)
            self.assertEqual(len(known.prefixes), 0)
        (pool,) = self.pools
        self.assertEqual(list(pool.layers), [1])

    def test_requests_that_are_not_batched(self):
        """With a seed; each fills the pool to its end and leaves nothing behind."""
        source = Path(unittest.__file__).read_text()
        asked = [(source[60 * i :][:40], 300) for i in range(3)]
        # One byte is one token.
        wanted = self.alone([(text, 64 - 40) for text, _ in asked])
        with serving(self.folder, paged_server(self.make_small_pool)) as ask:
            for _ in range(2):
                found = [ask(*each, seed=3) for each in asked]
                self.assertEqual(found, wanted)
            with self.assertRaisesRegex(RuntimeError, "at most 63 tokens"):
                ask(source[:64], 4, seed=3)
            self.assertEqual([ask(source[:20], 5)], self.alone([(source[:20], 5)]))
        self.assertEqual(len(self.pools), 1)

    def test_an_answer_that_ends_in_an_error_holds_no_blocks(self):
        """The error, which is still there, would keep those of its own request."""
        source = Path(unittest.__file__).read_text()
        wanted = self.alone([(source[:40], 24)])
        failing = RuntimeError("no more of it")
        own = PagedKVCache.update_and_fetch

        def update(cache, keys, values):
            if cache.offset >= 40:
                raise failing
            return own(cache, keys, values)

        with serving(self.folder, paged_server(self.make_small_pool)) as ask:
            with mock.patch.object(PagedKVCache, "update_and_fetch", update):
                with contextlib.suppress(Exception):
                    ask(source[:40], 5, seed=3)
            self.assertIsNotNone(failing.__traceback__)
            self.assertEqual([ask(source[:40], 24, seed=3)], wanted)

    def test_a_model_that_the_format_cannot_hold_is_refused_before_any_request(self):
        """In a request the error would end the thread that answers all of them."""
        other = self.folder / "other"
        other.mkdir()
        write_small_model(other, head_dim=80)
        wanted = self.alone([("import os", 4)])
        words = "must divide the head dim .* of 80. .* nvfp4, turbo4"
        for patches in (growing_server(), paged_server(self.make_pool)):
            with qs.enabled(kv="q8", force_fused=True):
                with serving(self.folder, patches) as ask:
                    for _ in range(2):
                        with self.assertRaisesRegex(RuntimeError, words):
                            ask("import os", 4, model=str(other))
                        self.assertEqual([ask("import os", 4)], wanted)

    def test_a_draft_model(self):
        """Another one; prompts are known for both, and the pool is made once."""
        draft = self.folder / "draft"
        draft.mkdir()
        write_small_model(draft, seed=4)
        source = Path(unittest.__file__).read_text()
        asked = [(source[: 90 + 30 * i], 20) for i in (0, 1, 1, 2, 0)]
        wanted = self.alone(asked)
        options = ["--draft-model", str(draft)]
        for patches in (growing_server(), paged_server(self.make_pool)):
            with qs.enabled(kv="q8", force_fused=True):
                with serving(self.folder, patches, options) as ask:
                    self.assertEqual([ask(*each) for each in asked], wanted)
                    known = ask.__self__.generator.prompt_cache
                    self.assertGreater(len(known), 0)
                    for pool in self.pools:
                        self.assertLess(pool.n_free, pool.n_blocks)
        self.assertEqual(len(self.pools), 1)


class ManyAtOnce(server.ThreadingHTTPServer):
    """It lets more connections wait than Python's does."""

    request_queue_size = 64


class serving:
    """mlx-lm's server in this process; gives a function that asks it."""

    def __init__(self, folder, patches, options=()):
        self.options = ["--model", str(folder), *options]
        self.patches = patches

    def __enter__(self):
        self.patches.__enter__()
        parsed = []
        with (
            mock.patch("sys.argv", ["server", *self.options]),
            mock.patch.object(server, "run", lambda *a, **k: parsed.append(a)),
        ):
            server.main()
        provider = parsed[0][2]
        assert isinstance(provider.cli_args, Namespace)
        cache = server.LRUPromptCache(10)
        self.generator = server.ResponseGenerator(provider, cache)

        def handle(*arguments, **keywords):
            return server.APIHandler(
                self.generator, *arguments, system_fingerprint="test", **keywords
            )

        self.http = ManyAtOnce(("127.0.0.1", 0), handle)
        self.thread = threading.Thread(target=self.http.serve_forever)
        self.thread.start()
        return self.ask

    def __exit__(self, *error):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()
        self.generator.stop_and_join()
        self.patches.__exit__(*error)

    def ask(self, prompt, count, **others):
        body = {"prompt": prompt, "max_tokens": count, "temperature": 0.0, **others}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.http.server_address[1]}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                return as_served(json.load(response)["choices"][0]["text"])
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from None


if __name__ == "__main__":
    unittest.main()
