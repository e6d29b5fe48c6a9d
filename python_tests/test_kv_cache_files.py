"""Prompt caches in files: the same bit for bit, and refused where not whole."""

import json
import tempfile
import unittest
import warnings
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx_quantized_sdpa as qs
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

import kv_cache_models as models  # noqa: E402
from kv_cache_models import prompt  # noqa: E402
from mlx_lm.models import cache as lm_cache  # noqa: E402
from mlx_quantized_sdpa import persistence  # noqa: E402
from mlx_quantized_sdpa.cache import PackedKVCache, PackedLatentKVCache  # noqa: E402


class FilesTest(unittest.TestCase):
    def setUp(self):
        self.addCleanup(qs.disable)
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.file = self.folder / "prompt.safetensors"

    def filled(self, make=models.llama_model, kv="k8v4", length=40, **arguments):
        model = make()
        cache = qs.make_prompt_cache(model, kv, **arguments)
        models.greedy(model, cache, prompt(length), 3)
        return model, cache

    def assert_same_caches(self, found, wanted):
        for a, b in zip(found, wanted, strict=True):
            self.assertIs(type(a), type(b))
            self.assertEqual(a.meta_state, b.meta_state)
            for x, y in zip(a.used_arrays(), b.used_arrays(), strict=True):
                self.assertEqual(x.dtype, y.dtype)
                self.assertTrue(mx.array_equal(x, y))


class TestRoundTrips(FilesTest):
    def test_a_cache_whose_tokens_are_all_forgotten(self):
        for kv, arguments in (
            ("q8", {}),
            ("turbo4", {}),
            ("k-rot4v-mxfp8+recent16", {}),
            ("rot4", {"max_kv_size": 64}),
        ):
            with self.subTest(kv, **arguments):
                model, cache = self.filled(kv=kv, **arguments)
                wanted = models.forced(
                    model, qs.make_prompt_cache(model, kv, **arguments), prompt(5)
                )
                lm_cache.trim_prompt_cache(cache, 64)
                qs.save_prompt_cache(self.file, cache)
                found = qs.load_prompt_cache(self.file)
                self.assertEqual([each.offset for each in found], [0, 0])
                self.assertTrue(
                    mx.array_equal(models.forced(model, found, prompt(5)), wanted)
                )

    def test_every_kind_of_cache(self):
        for make, kv, arguments in (
            (models.llama_model, "k8v4", {}),
            (models.llama_model, "k8v-turbo3+recent16", {}),
            (models.llama_model, "mxfp8+first1:dense", {"capacity": 64}),
            (models.llama_model, "q3", {"max_kv_size": 16}),
            (models.gemma3_model, "rot4", {}),
            (models.deepseek_model, "rot8", {}),
        ):
            with self.subTest(make=make.__name__, kv=kv):
                model, cache = self.filled(make, kv, **arguments)
                qs.save_prompt_cache(self.file, cache, {"name": "x"}, model)
                found, metadata = qs.load_prompt_cache(self.file, True, model)
                self.assertEqual(metadata, {"name": "x"})
                self.assert_same_caches(found, cache)
                wanted = models.forced(model, cache, prompt(20, 1))
                self.assertTrue(
                    mx.array_equal(models.forced(model, found, prompt(20, 1)), wanted)
                )

    def test_loading_switches_on_what_reads_the_caches(self):
        """Without it MLA's queries would see the tokens after them."""
        for make in (models.llama_model, models.deepseek_model):
            model, cache = self.filled(make)
            qs.save_prompt_cache(self.file, cache)
            wanted = models.forced(model, cache, prompt(20, 1))
            qs.disable()
            found = qs.load_prompt_cache(self.file)
            self.assertTrue(qs.is_enabled())
            logits = models.forced(model, found, prompt(20, 1))
            self.assertTrue(mx.array_equal(logits, wanted))

    def test_k_and_v_of_different_types(self):
        """As where the norm of K has weights in float32; those of MLA are in one."""
        x, y = mx.random.normal((2, 1, 2, 40, 64))
        for k, v in ((mx.float32, mx.bfloat16), (mx.bfloat16, mx.float16)):
            for kv in ("q8", "q8+recent16", "k8v-turbo3", "mxfp8", "rot4"):
                for kind in (PackedKVCache, PackedLatentKVCache):
                    if kv == "q8+recent16" and kind is PackedLatentKVCache:
                        continue
                    cache = kind(kv)
                    views = cache.update_and_fetch(x.astype(k), y.astype(v))
                    if kind is PackedKVCache:
                        self.assertEqual([each[:].dtype for each in views], [k, v])
                    qs.save_prompt_cache(self.file, [cache])
                    with self.subTest(kv, k=k, v=v, kind=kind):
                        found = qs.load_prompt_cache(self.file)
                        self.assert_same_caches(found, [cache])
        model = models.qwen3_model()
        model.set_dtype(mx.bfloat16)
        for layer in model.layers:
            norm = layer.self_attn.k_norm
            norm.weight = norm.weight.astype(mx.float32)
        _, cache = self.filled(lambda: model)
        qs.save_prompt_cache(self.file, cache)
        self.assert_same_caches(qs.load_prompt_cache(self.file), cache)

    def test_a_file_without_a_suffix_gets_one(self):
        """mx.load takes no other; a folder with a point has no say in it."""
        _, cache = self.filled(length=5)
        folder = self.folder / "a.safetensors"
        folder.mkdir()
        for save in (qs.save_prompt_cache, lm_cache.save_prompt_cache):
            for name in ("plain", "of.version2"):
                save(str(folder / name), cache)
                (found,) = folder.iterdir()
                self.assertEqual(found.name, f"{name}.safetensors")
                self.assert_same_caches(qs.load_prompt_cache(found), cache)
                found.unlink()

    def test_by_mlx_lms_own_functions(self):
        for make in (models.llama_model, models.gemma3_model, models.deepseek_model):
            _, cache = self.filled(make)
            lm_cache.save_prompt_cache(str(self.file), cache, {"a": "b"})
            self.assertTrue(persistence.is_ours(self.file))
            found, metadata = lm_cache.load_prompt_cache(str(self.file), True)
            self.assertEqual(metadata, {"a": "b"})
            self.assert_same_caches(found, cache)

    def test_what_a_file_holds_that_is_not_wanted(self):
        """Nothing is converted unasked: who loads it is told."""
        model = models.llama_model()
        dense = lm_cache.make_prompt_cache(model)
        models.greedy(model, dense, prompt(9), 1)
        mla = models.deepseek_model()
        for cache, kv, words in (
            (dense, "q8", "stay as they are, dense, where q8 is wanted"),
            (qs.to_quantized(dense, "q4g32"), "q8", "q4g32, where q8 is wanted"),
            (qs.to_quantized(dense, "k8v4"), "q8", "q8g64 and q4g64, where q8"),
            (qs.to_quantized(dense, "q8+last1:dense"), "q8", "are, dense, where"),
            (qs.to_quantized(dense, "q8"), "q8", None),
            (qs.to_quantized(dense, "q8g32"), "q8", None),
            (qs.to_quantized(dense, "k8v4+last1:dense"), "k8v4+last1:dense", None),
            (qs.make_prompt_cache(mla, "k8v4"), "k-q8v-q8", None),
        ):
            lm_cache.save_prompt_cache(str(self.file), cache)
            with self.subTest(words, kv=kv), warnings.catch_warnings():
                warnings.simplefilter("error")
                with qs.enabled(kv=kv):
                    if words is None:
                        lm_cache.load_prompt_cache(str(self.file))
                        continue
                    with pytest.warns(UserWarning, match=words):
                        lm_cache.load_prompt_cache(str(self.file), True)

    def test_by_mlx_lms_own_format(self):
        """Its classes are looked up by name, where the switch has put them."""
        _, cache = self.filled(models.gemma3_model, "k8v4")
        own = "replaced"
        package = next(iter(_hook().packages.values()))
        replaced = getattr(package, own)
        save = replaced[lm_cache, "save_prompt_cache"]
        load = replaced[lm_cache, "load_prompt_cache"]
        save(str(self.file), cache)
        self.assertFalse(persistence.is_ours(self.file))
        self.assert_same_caches(load(str(self.file)), cache)

    def test_with_caches_of_mlx_lm(self):
        _, cache = self.filled()
        dense = lm_cache.RotatingKVCache(32, 4)
        dense.update_and_fetch(*mx.random.normal((2, 1, 2, 5, 64)))
        both = lm_cache.CacheList(cache[0], dense)
        qs.save_prompt_cache(self.file, [both, cache[1]])
        found = qs.load_prompt_cache(self.file)
        self.assert_same_caches([found[0][0], found[1]], cache)
        self.assertTrue(mx.array_equal(found[0][1].keys, dense.keys))
        self.assertEqual((found[0][1].keep, found[0][1].offset), (4, 5))

    def test_stale_rows_are_not_saved(self):
        _, cache = self.filled(capacity=4096)
        qs.save_prompt_cache(self.file, cache)
        self.assertLess(self.file.stat().st_size, cache[0].nbytes / 10)


def _hook():
    from mlx_quantized_sdpa import hook

    return hook._hook


class TestFaults(FilesTest):
    def refused(self, words, **arguments):
        with self.assertRaisesRegex(ValueError, rf"^\[load_prompt_cache\] .*{words}"):
            qs.load_prompt_cache(self.file, **arguments)

    def test_every_damaged_byte_is_noticed(self):
        _, cache = self.filled(length=5)
        qs.save_prompt_cache(self.file, cache)
        whole = self.file.read_bytes()
        for place in range(8, len(whole), len(whole) // 60):
            damaged = bytearray(whole)
            damaged[place] ^= 0x10
            self.file.write_bytes(damaged)
            with self.subTest(place), self.assertRaises(ValueError):
                qs.load_prompt_cache(self.file)

    def test_cut_short(self):
        _, cache = self.filled(length=5)
        qs.save_prompt_cache(self.file, cache)
        whole = self.file.read_bytes()
        for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
            self.file.write_bytes(whole[:length])
            with self.subTest(length):
                self.refused("must be ")

    def rewritten(self, **changes):
        """The file with its description changed."""
        arrays, metadata = mx.load(str(self.file), return_metadata=True)
        mark = "mlx_quantized_sdpa"
        text = json.dumps({**json.loads(metadata[mark]), **changes})
        checksum = persistence.checksum(text, arrays)
        texts = {mark: text, f"{mark}.checksum": checksum}
        mx.save_safetensors(str(self.file), arrays, texts)

    def test_of_another_version(self):
        _, cache = self.filled()
        qs.save_prompt_cache(self.file, cache)
        self.rewritten(version=2)
        self.refused("must be of version 1; got 2")

    def test_mlx_lms_caches_of_another_time(self):
        """Its state has other parts since 0.32; files of both times are around."""
        cache = lm_cache.KVCache()
        cache.update_and_fetch(*[mx.zeros((1, 2, 3, 64))] * 2)
        arrays = {}
        described = persistence._describe(cache, "0", arrays)
        self.assertEqual(persistence._build(described, "0", arrays).offset, 3)
        old = described["meta"] is not None
        described["meta"] = None if old else ""
        words = "older than 0.32, as here" if old else "0.32 or newer, as here"
        with self.assertRaisesRegex(ValueError, f"KVCache must be .* {words}"):
            persistence._build(described, "0", arrays)

    def test_of_another_model(self):
        model, cache = self.filled()
        qs.save_prompt_cache(self.file, cache, model=model)
        self.refused("must be of this model", model=models.llama_model(head_dim=32))
        other = models.llama_model()
        layer = other.model.layers[1].mlp.up_proj
        layer.weight[-1, -1] += 1
        self.refused("must be of this model", model=other)
        layer.weight = models.llama_model().model.layers[1].mlp.up_proj.weight[::-1]
        self.refused("must be of this model", model=other)
        qs.load_prompt_cache(self.file, model=models.llama_model())

    def test_of_unknown_classes(self):
        _, cache = self.filled()
        qs.save_prompt_cache(self.file, cache)
        self.rewritten(layers=[{"class": "Popen", "module": "subprocess"}])
        self.refused("must be of known classes; got subprocess.Popen")

    def test_what_could_not_be_loaded_is_not_saved(self):
        class TheirKVCache(lm_cache.KVCache):
            pass

        pool = qs.PagedPool("q8", 512)
        model = models.llama_model()
        paged = pool.make_prompt_cache(model)
        for each in (TheirKVCache(), paged[0].merge([paged[0]])):
            kind = type(each).__name__
            with self.assertRaisesRegex(ValueError, rf"known classes; got \S*{kind}"):
                qs.save_prompt_cache(self.file, [each])
        self.assertFalse(self.file.exists())

    def test_a_missing_file(self):
        with self.assertRaises(FileNotFoundError):
            qs.load_prompt_cache(self.folder / "none.safetensors")

    def test_a_file_that_cannot_be_written_changes_nothing(self):
        _, cache = self.filled(length=5)
        qs.save_prompt_cache(self.file, cache)
        before = self.file.read_bytes()
        with mock.patch.object(mx, "save_safetensors", side_effect=OSError("full")):
            with self.assertRaisesRegex(OSError, "full"):
                qs.save_prompt_cache(self.file, cache)
        self.assertEqual(self.file.read_bytes(), before)
        self.assertEqual(
            [each.name for each in self.folder.iterdir()], [self.file.name]
        )

    def test_states_that_are_not_whole(self):
        _, cache = self.filled()
        text, *arrays = [cache[0].meta_state, *cache[0].used_arrays()]
        numbers = json.loads(text)
        longer = json.dumps({**numbers, "used": 99})
        older = json.dumps({**numbers, "version": 0})
        other = json.dumps({**numbers, "class": "KVCache"})
        wider = [mx.concatenate([arrays[0]] * 2, axis=-1), *arrays[1:]]
        halves = [x.astype(mx.float16) if i == 1 else x for i, x in enumerate(arrays)]
        for changed, parts, words in (
            (text, halves, r"and types .*'float32'\).* got .*'float16'\)"),
            (longer, arrays, "must hold 99 tokens in the shapes"),
            (text, wider, "must hold 43 tokens in the shapes"),
            (text, arrays[:-1], "must have 6 arrays; got 5"),
            (older, arrays, "must be of version 1; got 0"),
            (other, arrays, "must be one of PackedKVCache; got KVCache"),
            ("{", arrays, "must begin with what describes it; got '{'"),
        ):
            with self.assertRaisesRegex(ValueError, rf"^\[PackedKVCache\] .*{words}"):
                PackedKVCache.from_state([changed, *parts])


if __name__ == "__main__":
    unittest.main()
