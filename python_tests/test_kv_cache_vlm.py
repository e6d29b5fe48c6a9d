"""The same switch in mlx-vlm's models, where it is installed."""

import types
import unittest

import mlx.core as mx
import mlx_quantized_sdpa as qs
import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

from mlx_vlm.models import cache as vlm_cache  # noqa: E402
from mlx_vlm.models.gemma3 import config as gemma_config  # noqa: E402
from mlx_vlm.models.gemma3 import language as gemma_language  # noqa: E402
from mlx_vlm.models.qwen2_vl import config as qwen_config  # noqa: E402
from mlx_vlm.models.qwen2_vl import language as qwen_language  # noqa: E402


def qwen():
    text = qwen_config.TextConfig(
        model_type="qwen2_vl",
        hidden_size=256,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=4,
        rms_norm_eps=1e-5,
        vocab_size=97,
        num_key_value_heads=2,
        rope_scaling={"type": "mrope", "mrope_section": [8, 12, 12]},
    )
    vision = types.SimpleNamespace(spatial_merge_size=2)
    whole = qwen_config.ModelConfig(text, vision, "qwen2_vl")
    return qwen_language.LanguageModel(text, whole)


def gemma():
    return gemma_language.LanguageModel(
        gemma_config.TextConfig(
            model_type="gemma3_text",
            hidden_size=64,
            num_hidden_layers=3,
            intermediate_size=64,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=64,
            vocab_size=97,
            sliding_window=16,
            sliding_window_pattern=3,
            rms_norm_eps=1e-5,
            query_pre_attn_scalar=64,
        )
    )


def logits(model, cache):
    """Of a prompt, and of tokens put in one by one until windows have wrapped."""
    tokens = [7 * i * i % 97 for i in range(60)]
    found = [model(mx.array([tokens[:30]]), cache=cache).logits[0]]
    found += [model(mx.array([[t]]), cache=cache).logits[0] for t in tokens[30:]]
    return mx.concatenate(found)


class TestModels(unittest.TestCase):
    def test_caches_are_quantized_and_the_switch_is_undone(self):
        for make in (qwen, gemma):
            with self.subTest(make.__name__):
                mx.random.seed(1)
                model = make()
                wanted = logits(model, vlm_cache.make_prompt_cache(model))
                with qs.enabled(model, "q8", force_fused=True):
                    cache = vlm_cache.make_prompt_cache(model)
                    self.assertTrue(all("Packed" in type(c).__name__ for c in cache))
                    found = logits(model, cache)
                error = mx.square(found - wanted).mean() / mx.var(wanted)
                self.assertLess(float(error), 5e-3)
                stock = vlm_cache.make_prompt_cache(model)
                self.assertFalse(any("Packed" in type(c).__name__ for c in stock))
                again = logits(model, vlm_cache.make_prompt_cache(model))
                self.assertTrue(mx.array_equal(again, wanted))


if __name__ == "__main__":
    unittest.main()
