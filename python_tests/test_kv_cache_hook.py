"""The hook that gives mlx-lm's models the fused op, and takes it away again."""

import copy
import importlib.util
import inspect
import pkgutil
import sys
import tempfile
import types
import unittest
import warnings
import weakref
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import mlx_quantized_sdpa as qs
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

import kv_cache_models  # noqa: E402
import mlx_lm.models  # noqa: E402
from kv_cache_models import greedy, llama_model, rounded_caches  # noqa: E402
from mlx_lm import server  # noqa: E402
from mlx_lm.models import base, cache, gemma2, gpt_oss, llama  # noqa: E402
from mlx_lm.models.cache import KVCache, QuantizedKVCache  # noqa: E402
from mlx_quantized_sdpa import hook  # noqa: E402
from mlx_quantized_sdpa.cache import PackedKVCache  # noqa: E402
from mlx_quantized_sdpa.layers import needs_arrays  # noqa: E402

QUANTIZED = "quantized_scaled_dot_product_attention"
GENERAL = "scaled_dot_product_attention"
MLX_VLM = ("mlx_vlm.models.base", "mlx_vlm.models.cache")


def length_of(keys):
    """What needs no array of K."""
    if isinstance(keys, mx.array) or hasattr(keys, "shape"):
        return keys.shape[-2]
    return len(keys)


def repeated(x):
    """What needs an array."""
    return mx.repeat(x, 2, axis=1)


def widened(x):
    """A helper of a helper."""
    return repeated(x)


class Looking(nn.Module):
    def __call__(self, q, keys, values, mask, cache):
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        else:
            keys = mx.abs(keys)
        if isinstance(mask, mx.array):
            mask = mask[..., : length_of(keys)]
        return base.scaled_dot_product_attention(q, keys, values, cache, 1.0, mask)


class Repeating(Looking):
    def __call__(self, q, keys, values, mask, cache):
        keys, values = cache.update_and_fetch(keys, values)
        keys = widened(x=keys)
        return base.scaled_dot_product_attention(q, keys, values, cache, 1.0, mask)


class Multiplying(Looking):
    def __call__(self, q, keys, values, mask, cache):
        keys, values = cache.update_and_fetch(keys, values)
        return self.attend(q, keys, values)

    def attend(self, q, keys, values):
        return mx.softmax(q @ keys.swapaxes(-1, -2), axis=-1) @ values


class LookingAgain(Repeating):
    __call__ = Looking.__call__


class Joining(nn.Module):
    def __call__(self, q, keys, values, mask, cache):
        own, values = cache.update_and_fetch(keys, values)
        keys = mx.concatenate([own, keys], axis=2)
        return base.scaled_dot_product_attention(q, keys, values, cache, 1.0, mask)


class HookTest(unittest.TestCase):
    def setUp(self):
        self.own = {name: getattr(base, name) for name in (QUANTIZED, GENERAL)}
        self.addCleanup(qs.disable)

    def assert_undone(self):
        for name, own in self.own.items():
            self.assertIs(getattr(base, name), own)
        self.assertIs(llama.scaled_dot_product_attention, self.own[GENERAL])


class TestSwitch(HookTest):
    def test_reaches_loaded_models_and_is_undone(self):
        qs.enable()
        self.assertTrue(qs.is_enabled())
        self.assertIsNot(
            base.quantized_scaled_dot_product_attention, self.own[QUANTIZED]
        )
        self.assertIs(
            llama.scaled_dot_product_attention, base.scaled_dot_product_attention
        )
        self.assertIsNot(llama.scaled_dot_product_attention, self.own[GENERAL])
        qs.disable()
        self.assertFalse(qs.is_enabled())
        self.assert_undone()

    def test_again_changes_nothing(self):
        qs.enable()
        first = base.scaled_dot_product_attention
        qs.enable()
        self.assertIs(base.scaled_dot_product_attention, first)
        qs.disable()
        qs.disable()
        self.assert_undone()

    def test_models_imported_later_are_reached_and_undone(self):
        name = "mlx_lm.models.qwen2"
        with mock.patch.dict(sys.modules):
            sys.modules.pop(name, None)
            qs.enable()
            from mlx_lm.models import qwen2

            self.assertIs(
                qwen2.scaled_dot_product_attention, base.scaled_dot_product_attention
            )
            qs.disable()
            self.assertIs(qwen2.scaled_dot_product_attention, self.own[GENERAL])

    def test_block_gives_back_what_was_before(self):
        with qs.enabled():
            self.assertTrue(qs.is_enabled())
            with qs.enabled(force_fused=True):
                pass
            self.assertTrue(qs.is_enabled())
        self.assert_undone()
        with self.assertRaises(KeyError), qs.enabled():
            raise KeyError
        self.assert_undone()

    def test_another_patch_on_top_is_not_lost(self):
        qs.enable()
        with mock.patch.object(base, QUANTIZED):
            with self.assertRaisesRegex(RuntimeError, "replaced since enable"):
                qs.disable()
        qs.disable()
        self.assert_undone()

    def test_says_when_mlx_lm_is_not_whole(self):
        with mock.patch.dict(sys.modules, {base.__name__: None}):
            with self.assertRaisesRegex(ImportError, "mlx-lm must be able to import"):
                qs.enable()
        self.assertFalse(qs.is_enabled())

    def test_says_what_mlx_lm_could_not_import(self):
        for cause, words in (
            (ModuleNotFoundError("No module named 'mlx_lm'", name="mlx_lm"), "pip"),
            (ImportError("cannot import name 'x' from 'transformers'"), "got cannot"),
            (ModuleNotFoundError("No module named 'jinja2'", name="jinja2"), "jinja2"),
        ):
            with mock.patch.object(hook.importlib, "import_module", side_effect=cause):
                with self.assertRaisesRegex(ImportError, f"mlx-lm must be .*{words}"):
                    qs.enable()
            self.assertFalse(qs.is_enabled())

    def test_says_when_mlx_lm_is_too_old(self):
        for found in ("0.30.7", "0.31", "0.31.2"):
            with mock.patch.object(mlx_lm, "__version__", found):
                words = f"mlx-lm must be 0.31.3 or newer; got {found}."
                with self.assertRaisesRegex(ImportError, words):
                    qs.enable()
            self.assert_undone()
        for found in ("0.31.3", "0.32.0.dev1", "0.100", "1"):
            with mock.patch.object(mlx_lm, "__version__", found):
                with qs.enabled():
                    self.assertTrue(qs.is_enabled())

    def test_says_when_mlx_lm_has_changed(self):
        with mock.patch.object(base, QUANTIZED, None):
            with self.assertRaisesRegex(ImportError, f"must have {QUANTIZED}"):
                qs.enable()
        self.assert_undone()

    def test_says_when_mlx_vlm_has_changed(self):
        """And leaves mlx-lm, which is as it must be, as it was."""
        modules = {
            name: types.ModuleType(name)
            for name in ("mlx_vlm", "mlx_vlm.models", *MLX_VLM)
        }
        for name in MLX_VLM:
            setattr(modules["mlx_vlm.models"], name.rpartition(".")[2], modules[name])
        with mock.patch.dict(sys.modules, modules):
            with self.assertRaisesRegex(ImportError, "mlx_vlm.models.base must have"):
                qs.enable()
            self.assertFalse(qs.is_enabled())
            self.assert_undone()
        qs.enable()
        qs.disable()
        self.assert_undone()


class TestModels(HookTest):
    """Which models get quantized caches, and from which functions."""

    def kinds(self, caches):
        return {type(each).__name__ for each in caches}

    def test_one_model(self):
        model, other = llama_model(), llama_model()
        qs.enable(model, "k8v4")
        self.assertEqual(self.kinds(cache.make_prompt_cache(model)), {"PackedKVCache"})
        self.assertEqual(self.kinds(model.make_cache()), {"PackedKVCache"})
        self.assertEqual(self.kinds(cache.make_prompt_cache(other)), {"KVCache"})
        qs.disable(model)
        self.assertEqual(self.kinds(cache.make_prompt_cache(model)), {"KVCache"})
        self.assertTrue(qs.is_enabled())

    def test_every_model(self):
        model = llama_model()
        own = cache.make_prompt_cache
        qs.enable(kv="q4")
        self.assertIsNot(server.make_prompt_cache, own)
        self.assertEqual(self.kinds(cache.make_prompt_cache(model)), {"PackedKVCache"})
        self.assertEqual(self.kinds(own(model)), {"KVCache"})
        qs.disable()
        self.assertIs(server.make_prompt_cache, own)
        self.assertIs(cache.make_prompt_cache, own)
        self.assertFalse(hasattr(cache, "PackedKVCache"))

    def test_a_model_of_its_own_and_all_others(self):
        model, other = llama_model(), llama_model()
        qs.enable(kv="q4")
        qs.enable(model, "q8")
        for each, bits in ((model, 8), (other, 4)):
            found = cache.make_prompt_cache(each)
            self.assertEqual(found[0].formats[0].bits, bits)

    def test_blocks_nest(self):
        model = llama_model()
        with qs.enabled(model, "q8"):
            with qs.enabled(model, "q4", max_kv_size=9):
                found = cache.make_prompt_cache(model)
                self.assertEqual(self.kinds(found), {"PackedRotatingKVCache"})
                self.assertEqual((found[0].max_size, found[0].keep), (9, 4))
            found = cache.make_prompt_cache(model)
            self.assertEqual(found[0].formats[0].bits, 8)
        self.assertEqual(self.kinds(cache.make_prompt_cache(model)), {"KVCache"})
        self.assert_undone()

    def test_a_bound_that_the_caller_asks_for(self):
        model = llama_model()
        with qs.enabled(model, "q8"):
            found = cache.make_prompt_cache(model, max_kv_size=12)
        self.assertEqual((found[0].max_size, found[0].keep), (12, 4))

    def test_quantized_caches_are_refused_while_it_is_off(self):
        """MLA would compute wrong numbers, others end where nobody says why."""
        pool = qs.PagedPool("q8", 64, 8)
        for make, kv in (
            (llama_model, "q8"),
            (llama_model, pool),
            (kv_cache_models.deepseek_model, "q8"),
        ):
            model = make()
            cache = qs.make_prompt_cache(model, kv)
            batch = [c.merge([c, c]) for c in cache]
            qs.disable()
            for each in (cache, batch):
                with self.assertRaisesRegex(RuntimeError, r"sdpa\.enable\(\); got a"):
                    model(mx.array([[1, 2, 3]] * (1 + (each is batch))), cache=each)
            self.assertEqual([c.size() for c in cache], [0] * len(cache))

    def test_the_model_is_not_kept_alive(self):
        model = llama_model()
        qs.enable(model, "q8")
        gone = weakref.ref(model)
        del model
        self.assertIsNone(gone())
        qs.disable()

    def test_copies_of_a_model(self):
        for copied in (copy.deepcopy, copy.copy):
            with self.subTest(copied.__name__):
                model = llama_model()
                qs.enable(model, "k8v4")
                other = copied(model)
                makes = other.make_cache
                del model
                if copied is copy.copy:
                    with self.assertRaisesRegex(RuntimeError, "enable.. the copy"):
                        makes()
                    qs.enable(other, "k8v4")
                self.assertEqual(self.kinds(other.make_cache()), {"PackedKVCache"})
                self.assertIs(copy.deepcopy(makes), makes)
                qs.disable()
                self.assertNotIn("make_cache", vars(other))

    def test_blocks_leave_nothing_behind(self):
        model = llama_model()
        qs.enable()
        for _ in range(3):
            with qs.enabled(model, "q8"):
                self.assertEqual(len(hook._hook.models), 1)
        self.assertEqual(hook._hook.models, {})
        qs.enable(model, "q8")
        del model
        self.assertEqual(hook._hook.models, {})

    def test_a_pool(self):
        model = llama_model()
        pool = qs.PagedPool("q8", n_tokens=64)
        self.assertEqual(
            self.kinds(qs.make_prompt_cache(model, pool)), {"PagedKVCache"}
        )
        for name in ("max_kv_size", "capacity"):
            with self.assertRaisesRegex(ValueError, f"made without {name}; got 16"):
                qs.make_prompt_cache(model, pool, **{name: 16})
        with qs.enabled(model, pool):
            self.assertEqual(
                self.kinds(cache.make_prompt_cache(model)), {"PagedKVCache"}
            )
            with self.assertRaisesRegex(ValueError, "without max_kv_size; got 16"):
                cache.make_prompt_cache(model, max_kv_size=16)

    def test_what_is_no_spec_changes_nothing(self):
        model = llama_model()
        for arguments in ((model, "q9"), ("q8",)):
            with self.assertRaises(ValueError):
                qs.enable(*arguments)
        with self.assertRaisesRegex(ValueError, "for every model say kv='q8'"):
            qs.enable("q8")
        self.assertFalse(qs.is_enabled())
        self.assert_undone()


class TestReach(HookTest):
    """Models whose code is no module of mlx-lm's, and models with other attention."""

    def own_llama(self, folder, module=llama):
        """A Llama from a file of its own, as mlx-lm loads a ``model_file``."""
        file = Path(folder) / "custom.py"
        source = inspect.getsource(module)
        file.write_text(source.replace("from .", "from mlx_lm.models."))
        spec = importlib.util.spec_from_file_location("custom_model", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def test_code_that_is_no_module_of_mlx_lm(self):
        for enabled_before in (True, False):
            with self.subTest(enabled_before), tempfile.TemporaryDirectory() as folder:
                if enabled_before:
                    qs.enable()
                module = self.own_llama(folder)
                model = llama_model(module=module)
                wanted = greedy(model, rounded_caches(model, "q8"), [1, 2, 3])
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    caches = qs.make_prompt_cache(model, "q8")
                self.assertEqual(type(caches[0]).__name__, "PackedKVCache")
                found = greedy(model, caches, [1, 2, 3])
                self.assertTrue(mx.allclose(found[1], wanted[1], atol=1e-3))
                qs.disable()
                self.assertIs(module.scaled_dot_product_attention, self.own[GENERAL])

    def test_code_that_was_loaded_while_something_else_was_enabled(self):
        with tempfile.TemporaryDirectory() as folder:
            with qs.enabled():
                module = self.own_llama(folder)
            qs.enable(force_fused=True)
            found = qs.make_prompt_cache(llama_model(module=module), "q8")
            self.assertIsInstance(found[0], PackedKVCache)
            self.assertIs(
                module.scaled_dot_product_attention, base.scaled_dot_product_attention
            )
            qs.disable()
            self.assertIs(module.scaled_dot_product_attention, self.own[GENERAL])

    def test_attention_of_the_same_name(self):
        """A function of the model's own, which knows nothing of quantized caches."""
        with tempfile.TemporaryDirectory() as folder:
            module = self.own_llama(folder)
            own = lambda *_, **__: None  # noqa: E731
            module.scaled_dot_product_attention = own
            with pytest.warns(UserWarning, match="model has attention of its own"):
                caches = qs.make_prompt_cache(llama_model(module=module), "q8")
            self.assertEqual(type(caches[0]), KVCache)
            self.assertIs(module.scaled_dot_product_attention, own)

    def test_attention_without_any_function(self):
        with tempfile.TemporaryDirectory() as folder:
            module = self.own_llama(folder, gemma2)
            words = "model has attention of its own, in Attention[.]"
            with mock.patch.object(kv_cache_models, "gemma2", module):
                model = kv_cache_models.gemma2_model()
            with pytest.warns(UserWarning, match=words):
                caches = qs.make_prompt_cache(model, "q8")
            self.assertEqual(type(caches[0]), KVCache)

    def test_which_models_of_mlx_lm_need_arrays(self):
        """Of all; with MLA and with an index, what attention reads is another cache."""
        names = {each.name for each in pkgutil.iter_modules(mlx_lm.models.__path__)}
        found = set()
        # It needs a package that mlx-lm does not, and ends the process without it.
        for name in names - {"olmo"}:
            module = importlib.import_module(f"mlx_lm.models.{name}")
            layers = [
                each
                for each in vars(module).values()
                if inspect.isclass(each) and each.__module__ == module.__name__
            ]
            source = inspect.getsource(module)
            if "unembed_out" not in source and any(
                needs_arrays(kind.__new__(kind))
                for kind in layers
                if issubclass(kind, nn.Module)
            ):
                found.add(name)
        known = {"gear", "gemma2", "phi3small", "plamo", "plamo2"}
        self.assertEqual(found, known & names)

    def test_layers_and_their_helpers(self):
        for kind in (Looking, LookingAgain):
            self.assertFalse(needs_arrays(kind()))
        for kind in (Repeating, Multiplying, Joining):
            with self.subTest(kind.__name__):
                self.assertTrue(needs_arrays(kind()))

    def test_layers_that_need_arrays_by_their_settings(self):
        gear = pytest.importorskip("mlx_lm.models.gear")
        for softcap in (None, 30.0):
            layer = gear.Attention.__new__(gear.Attention)
            layer.attn_logit_softcapping = softcap
            self.assertEqual(needs_arrays(layer), softcap is not None)


class TestTokens(HookTest):
    def test_tokens_and_logits_agree_with_the_dequantized_cache(self):
        model = llama_model()
        prompt = [(5 * i * i + 3) % 97 for i in range(70)]
        for bits, group_size in ((8, 64), (4, 32), (3, 64)):
            with self.subTest(bits=bits, group_size=group_size):
                plain = rounded_caches(model, f"q{bits}g{group_size}")
                wanted, wanted_logits = greedy(model, plain, prompt)
                cache = [QuantizedKVCache(group_size, bits) for _ in model.layers]
                with qs.enabled(force_fused=True):
                    found, logits = greedy(model, cache, prompt)
                self.assertEqual(found, wanted)
                self.assertTrue(mx.allclose(logits, wanted_logits, atol=1e-3))

    def test_a_dense_cache_is_left_alone(self):
        model = llama_model()
        prompt = list(range(20))
        wanted, _ = greedy(model, [KVCache() for _ in model.layers], prompt)
        with qs.enabled(force_fused=True):
            found, _ = greedy(model, [KVCache() for _ in model.layers], prompt)
        self.assertEqual(found, wanted)

    def test_array_masks_reach_the_op(self):
        q = mx.random.normal((2, 8, 3, 64))
        k, v = mx.random.normal((2, 2, 2, 40, 64))
        packed_k, packed_v = mx.quantize(k, bits=4), mx.quantize(v, bits=4)
        cache = mock.Mock(bits=4, group_size=64)
        mask = mx.random.uniform(shape=(2, 1, 3, 40)) < 0.7
        additive = mx.where(mask, 0.0, -mx.inf)
        dense = [mx.dequantize(*x, bits=4) for x in (packed_k, packed_v)]
        for each in (mask, additive, None):
            wanted = mx.fast.scaled_dot_product_attention(
                q, *dense, scale=0.125, mask=each
            )
            with qs.enabled(force_fused=True):
                found = llama.scaled_dot_product_attention(
                    q, packed_k, packed_v, cache=cache, scale=0.125, mask=each
                )
            self.assertTrue(mx.allclose(found, wanted, atol=1e-4))

    def test_k_or_v_that_a_model_has_changed(self):
        """Attention as over dense K and V, with the padding that the cache knows."""
        singles = [PackedKVCache("q8") for _ in range(2)]
        for single, length in zip(singles, (30, 11)):
            single.update_and_fetch(*mx.random.normal((2, 1, 2, length, 64)))
        batch = PackedKVCache.merge(singles)
        keys, values = batch.update_and_fetch(*mx.random.normal((2, 2, 2, 3, 64)))
        self.assertEqual(keys.astype(mx.float16).dtype, mx.float16)
        q = mx.random.normal((2, 8, 3, 64))
        with qs.enabled(force_fused=True):
            mask = batch.make_mask(3)
            attend = llama.scaled_dot_product_attention
            wanted = attend(q, keys, values, batch, 0.125, mask)
            for k, v, scale in (
                (keys[:], values, 0.125),
                (keys, values[:], 0.125),
                (2 * keys[:], values, 0.0625),
                (keys.astype(mx.float32), values, 0.125),
            ):
                found = attend(q, k, v, batch, scale, mask)
                self.assertTrue(mx.allclose(found, wanted, atol=1e-4))
            same = attend(q, keys, keys, batch, 0.125, mask)
            dense = attend(q, keys, keys[:], batch, 0.125, mask)
            self.assertTrue(mx.allclose(same, dense, atol=1e-4))

    def test_k_of_a_pool_that_a_model_has_changed(self):
        pool = qs.PagedPool("q8", n_tokens=64)
        model = llama_model()
        paged = pool.make_prompt_cache(model)[0]
        keys, values = paged.update_and_fetch(*mx.random.normal((2, 1, 2, 3, 64)))
        self.assertEqual(keys.astype(mx.float16).dtype, mx.float16)
        with self.assertRaisesRegex(ValueError, "must reach attention as they are"):
            llama.scaled_dot_product_attention(
                mx.zeros((1, 8, 3, 64)), keys[:], values, paged, 0.125, "causal"
            )

    def test_queries_are_not_changed(self):
        q = mx.ones((1, 4, 1, 64))
        packed = mx.quantize(mx.random.normal((1, 4, 5, 64)), bits=8)
        cache = mock.Mock(bits=8, group_size=64)
        with qs.enabled():
            llama.scaled_dot_product_attention(
                q, packed, packed, cache=cache, scale=0.5, mask=None
            )
        self.assertTrue(mx.array_equal(q, mx.ones((1, 4, 1, 64))))


class TestSinks(HookTest):
    def setUp(self):
        super().setUp()
        self.q = mx.random.normal((1, 8, 4, 64))
        self.packed = mx.quantize(mx.random.normal((1, 2, 30, 64)), bits=8)
        self.arguments = {
            "cache": mock.Mock(bits=8, group_size=64),
            "scale": 0.125,
            "mask": "causal",
            "sinks": mx.random.normal((8,)),
        }

    def test_sinks_work_with_a_quantized_cache(self):
        dense = mx.dequantize(*self.packed, bits=8)
        wanted = mx.fast.scaled_dot_product_attention(
            self.q,
            dense,
            dense,
            scale=0.125,
            mask="causal",
            sinks=self.arguments["sinks"],
        )
        with qs.enabled(force_fused=True):
            found = gpt_oss.scaled_dot_product_attention(
                self.q, self.packed, self.packed, **self.arguments
            )
        self.assertTrue(mx.allclose(found, wanted, atol=1e-4))

    def test_without_the_hook_mlx_lm_refuses_them(self):
        with self.assertRaisesRegex(ValueError, "sinks"):
            gpt_oss.scaled_dot_product_attention(
                self.q, self.packed, self.packed, **self.arguments
            )


if __name__ == "__main__":
    unittest.main()
