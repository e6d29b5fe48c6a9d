"""Models whose attention or caches are of another shape than a Llama's."""

import unittest
import warnings

import mlx.core as mx
import mlx_quantized_sdpa as qs
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

import kv_cache_models as models  # noqa: E402
from kv_cache_models import VOCABULARY, prompt  # noqa: E402
from mlx_lm.models import cache as lm_cache  # noqa: E402
from mlx_lm.models import (
    deepseek_v32,
    falcon_h1,
    gemma3n,
    gemma4_text,
)
from mlx_lm.models import llama4 as llama4_module  # noqa: E402
from mlx_lm.models import (
    longcat_flash,
)
from mlx_lm.models import mamba as mamba_module  # noqa: E402
from mlx_lm.models import plamo as plamo_module  # noqa: E402
from mlx_lm.models import (
    plamo2,
    stablelm,
)
from mlx_quantized_sdpa.cache import (  # noqa: E402
    PackedKVCache,
    PackedLatentKVCache,
)

try:
    from mlx_lm.models import mistral4
except ImportError:
    mistral4 = None

# mlx-lm before 0.32: some of its models fail over its own caches.
OLD = hasattr(lm_cache._BaseCache, "meta_state")

SPECS = ("q8", "k8v4", "rot4")

LATENTS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1024,
    "routed_scaling_factor": 1.0,
    "n_routed_experts": 4,
}
EXPERTS = {
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
}


def longcat():
    """Two caches of latents a layer."""
    return models.made(
        longcat_flash,
        **LATENTS,
        model_type="longcat_flash",
        attention_method="MLA",
        zero_expert_type="identity",
        ffn_hidden_size=64,
        moe_topk=2,
        expert_ffn_hidden_size=32,
        zero_expert_num=1,
        num_layers=2,
        rope_theta=10000.0,
        mla_scale_q_lora=True,
        mla_scale_kv_lora=True,
        attention_bias=False,
    )


def mistral():
    """A prompt is attended densely, over K and V made of the latents."""
    return models.made(
        mistral4,
        **LATENTS,
        **EXPERTS,
        model_type="mistral4",
        rope_parameters={
            "rope_theta": 10000.0,
            "type": "default",
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 1024,
        },
    )


def others_with_latents():
    """Those that the mlx-lm that is installed has."""
    return (longcat, mistral) if mistral4 else (longcat,)


def sparse_deepseek():
    """An indexer has the second cache of each layer."""
    return models.made(
        deepseek_v32,
        **LATENTS,
        **EXPERTS,
        model_type="deepseek_v32",
        index_head_dim=32,
        index_n_heads=2,
        index_topk=16,
        rope_scaling={"factor": 1.0, "mscale_all_dim": 1.0, "type": "yarn"},
    )


def plamo():
    """Attention gets copies of K and V, one for each head."""
    return models.made(
        plamo_module,
        model_type="plamo",
        hidden_size=256,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=4,
        n_shared_head=2,
        rms_norm_eps=1e-5,
        vocab_size=VOCABULARY,
    )


def stable_lm():
    """Attention gets queries and K in float32."""
    return models.made(
        stablelm,
        model_type="stablelm",
        hidden_size=256,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        rope_theta=10000.0,
        partial_rotary_factor=0.25,
        layer_norm_eps=1e-5,
        use_qkv_bias=False,
        use_parallel_residual=False,
        qk_layernorm=False,
        vocab_size=VOCABULARY,
    )


def second_plamo():
    """It calls MLX's attention, not mlx-lm's."""
    return models.made(
        plamo2,
        model_type="plamo2",
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size_per_head=16,
        mamba_d_state=16,
        mamba_num_heads=4,
        mamba_enabled=True,
        intermediate_size=64,
        vocab_size=VOCABULARY,
        full_attention_idx=[1],
    )


def mamba():
    """A model without attention."""
    return models.made(
        mamba_module,
        model_type="mamba",
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        state_size=16,
        num_hidden_layers=2,
        conv_kernel=4,
        use_bias=False,
        use_conv_bias=True,
        time_step_rank=4,
    )


def llama4():
    """Layers that see a chunk of the text; each fourth one sees all of it."""
    return models.made(
        llama4_module,
        model_type="llama4",
        text_config={
            "attention_bias": False,
            "attention_chunk_size": 32,
            "head_dim": 64,
            "hidden_size": 64,
            "interleave_moe_layer_step": 8,
            "intermediate_size": 64,
            "intermediate_size_mlp": 64,
            "max_position_embeddings": 1024,
            "model_type": "llama4_text",
            "num_attention_heads": 4,
            "num_experts_per_tok": 1,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 2,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "use_qk_norm": True,
            "vocab_size": VOCABULARY,
        },
    )


def gemma4():
    """The last layers read K and V of earlier ones, without a cache of their own."""
    return models.made(
        gemma4_text,
        hidden_size=64,
        num_hidden_layers=6,
        intermediate_size=64,
        num_attention_heads=4,
        head_dim=64,
        global_head_dim=128,
        vocab_size=VOCABULARY,
        vocab_size_per_layer_input=VOCABULARY,
        num_key_value_heads=1,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        sliding_window=16,
        sliding_window_pattern=2,
    )


def gemma3_nano():
    """The last layers ask the caches of earlier ones for K and V."""
    text = gemma3n.TextConfig(
        model_type="gemma3n_text",
        hidden_size=64,
        num_hidden_layers=6,
        intermediate_size=64,
        num_attention_heads=4,
        head_dim=64,
        rms_norm_eps=1e-6,
        vocab_size=VOCABULARY,
        num_key_value_heads=1,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCABULARY,
        sliding_window=16,
        max_position_embeddings=1024,
        rope_local_base_freq=10000.0,
        rope_theta=100000.0,
        final_logit_softcapping=30.0,
        layer_types=["sliding_attention", "full_attention"] * 3,
        activation_sparsity_pattern=[0.0] * 6,
        hidden_size_per_layer_input=8,
        altup_num_inputs=2,
        altup_coef_clip=120.0,
        altup_correct_scale=True,
        altup_active_idx=0,
        laurel_rank=8,
    )
    mx.random.seed(7)
    return gemma3n.Model(gemma3n.ModelArgs("gemma3n", vars(text)))


def falcon():
    """Attention and a state space model in each layer, with a cache each."""
    return models.made(
        falcon_h1,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        mamba_d_ssm=64,
        mamba_d_head=16,
        mamba_n_heads=4,
        mamba_d_state=16,
        vocab_size=VOCABULARY,
    )


def bounded(cache, max_size):
    """mlx-lm's cache that keeps so many tokens, in the place of one that keeps all."""
    if isinstance(cache, lm_cache.CacheList):
        return lm_cache.CacheList(*(bounded(c, max_size) for c in cache.caches))
    return lm_cache.RotatingKVCache(max_size, 4)


class TestModels(unittest.TestCase):
    def setUp(self):
        self.addCleanup(qs.disable)

    def logits(self, model, cache):
        """Of a prompt in two chunks, and of tokens one by one."""
        tokens = prompt(60)
        found = [
            model(mx.array([tokens[a:b]]), cache=cache)[0]
            for a, b in ((0, 20), (20, 50))
        ]
        return mx.concatenate([*found, models.forced(model, cache, tokens[50:])])

    def test_other_models_with_latents(self):
        for make in others_with_latents():
            with self.subTest(make.__name__):
                model = make()
                wanted = self.logits(model, lm_cache.make_prompt_cache(model))
                cache = qs.make_prompt_cache(model, "q8")
                kinds = [type(getattr(c, "caches", [c])[0]) for c in cache]
                self.assertEqual(set(kinds), {PackedLatentKVCache})
                found = self.logits(model, cache)
                error = mx.square(found - wanted).mean() / mx.var(wanted)
                self.assertLess(float(error), 1e-3)

    def test_latents_of_a_bounded_number_of_tokens(self):
        """As over mlx-lm's own cache of so many, also where some are evicted."""
        for make in (models.deepseek_model, *others_with_latents()):
            with self.subTest(make.__name__):
                model = make()
                stock = [
                    bounded(cache, 16) for cache in lm_cache.make_prompt_cache(model)
                ]
                cache = qs.make_prompt_cache(model, "q8", max_kv_size=16)
                for begin, end in ((0, 10), (10, 14), (14, 30), (30, 31), (31, 45)):
                    tokens = mx.array([prompt(45)[begin:end]])
                    wanted, found = (model(tokens, cache=c)[0] for c in (stock, cache))
                    error = mx.square(found - wanted).mean() / mx.var(wanted)
                    self.assertLess(float(error), 1e-3, (begin, end))

    def test_other_models_with_latents_in_batches(self):
        for make in others_with_latents():
            for max_kv_size in (None, 200):
                with self.subTest(make.__name__, max_kv_size=max_kv_size):
                    model = make()
                    with qs.enabled(model, "q8", max_kv_size=max_kv_size):
                        self.check_two_rows(model)

    def check_two_rows(self, model):
        """Two prompts, padded on the right, and tokens after them."""
        prompts = [prompt(30), prompt(7, 1)]
        alone = []
        for tokens in prompts:
            cache = lm_cache.make_prompt_cache(model)
            model(mx.array([tokens]), cache=cache)
            alone.append(models.forced(model, cache, prompt(5, 2)))
        caches = [lm_cache.make_prompt_cache(model) for _ in prompts]
        merged = [a.merge([a, b]) for a, b in zip(*caches)]
        for c in merged:
            c.prepare(lengths=[30, 7], right_padding=[0, 23])
        model(mx.array([prompts[0], prompts[1] + [0] * 23]), cache=merged)
        for c in merged:
            c.finalize()
        for step, token in enumerate(prompt(5, 2)):
            out = model(mx.array([[token]] * 2), cache=merged)[:, -1]
            out = out - mx.logsumexp(out, axis=-1, keepdims=True)
            for row in range(2):
                difference = mx.abs(out[row] - alone[row][step]).max()
                self.assertLess(float(difference), 0.05, (row, step))

    def test_a_soft_cap(self):
        """Of Gemma 2, whose whole attention is replaced."""
        model, prompts = models.gemma2_model(), [prompt(n, n) for n in (30, 5, 21, 9)]
        own = type(model.layers[0].self_attn).__call__
        wanted = self.logits(model, lm_cache.make_prompt_cache(model))
        other = models.gemma2_model(1e6)
        uncapped = self.logits(other, lm_cache.make_prompt_cache(other))
        self.assertGreater(self.error(uncapped, wanted), 0.1)
        pool = qs.PagedPool("q8", n_tokens=1024)
        rounded = [(kv, models.rounded_caches(model, kv), 1e-6) for kv in SPECS]
        dense = [
            (kv, lm_cache.make_prompt_cache(model), 1e-3)
            for kv in ("q8+recent16", "q8+first1:dense", pool)
        ]
        for kv, cache, bound in rounded + dense:
            with self.subTest(str(kv)), qs.enabled(model, kv, force_fused=True):
                wanted = self.logits(model, cache)
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    found = self.logits(model, lm_cache.make_prompt_cache(model))
                self.assertLess(self.error(found, wanted), bound)
                alone = [models.greedy(model, None, each, 20)[0] for each in prompts]
                self.assertEqual(models.in_batches(model, prompts, [20] * 4), alone)
        bounded = models.rounded_caches(model, "q8", 24)
        wanted = self.logits(model, bounded)
        with qs.enabled(model, "q8", max_kv_size=24, force_fused=True):
            found = self.logits(model, lm_cache.make_prompt_cache(model))
        self.assertLess(self.error(found, wanted), 1e-6)
        self.assertIs(type(model.layers[0].self_attn).__call__, own)

    def error(self, found, wanted):
        return float(mx.square(found - wanted).mean() / mx.var(wanted))

    def test_shared_and_mixed_layers(self):
        others = (falcon, stable_lm) if OLD else (gemma3_nano, falcon, stable_lm)
        for make in (gemma4, *others):
            with self.subTest(make.__name__):
                model = make()
                wanted = self.logits(model, lm_cache.make_prompt_cache(model))
                with qs.enabled(model, "q8", force_fused=True):
                    found = self.logits(model, lm_cache.make_prompt_cache(model))
                    error = mx.square(found - wanted).mean() / mx.var(wanted)
                    self.assertLess(float(error), 2e-3)
                    if OLD and make is falcon:
                        continue
                    prompts = [prompt(n, n) for n in (30, 5, 21)]
                    alone = [
                        models.greedy(model, None, tokens, 20)[0] for tokens in prompts
                    ]
                    self.assertEqual(models.in_batches(model, prompts, [20] * 3), alone)

    def test_what_cannot_be_quantized_stays_and_says_so(self):
        refused = [
            (sparse_deepseek, "a layer of this model has several"),
            (mamba, "has no KV cache that can be quantized, only ArraysCache"),
            (second_plamo, "model has attention of its own, in Attention"),
            (plamo, "model works on K and V by itself, in Attention"),
        ]
        if OLD:
            refused.append((gemma3_nano, "needs mlx-lm 0.32 for others"))
        for make, words in refused:
            with self.subTest(make.__name__):
                model = make()
                stock = lm_cache.make_prompt_cache(model)
                wanted = self.logits(model, stock)
                with pytest.warns(UserWarning, match=words):
                    cache = qs.make_prompt_cache(model, "q8")
                self.assertEqual(list(map(type, cache)), list(map(type, stock)))
                self.assertTrue(mx.array_equal(self.logits(model, cache), wanted))

    @pytest.mark.skipif(OLD, reason="mlx-lm's own chunked caches fail before 0.32")
    def test_some_layers_stay_and_say_so(self):
        model = llama4()
        stock = lm_cache.make_prompt_cache(model)
        wanted = self.logits(model, stock)
        with pytest.warns(UserWarning, match="3 of 4 caches stay .* ChunkedKVCache"):
            cache = qs.make_prompt_cache(model, "q8")
        self.assertEqual(type(cache[0]), type(stock[0]))
        self.assertIsInstance(cache[3], PackedKVCache)
        error = mx.square(self.logits(model, cache) - wanted).mean() / mx.var(wanted)
        self.assertLess(float(error), 1e-3)

    def test_newest_tokens_that_cannot_stay_dense(self):
        for make, bound, words in (
            (models.llama_model, 32, "written in the place of the oldest one; got q8"),
            (models.deepseek_model, None, "MLA's latents are K and V in one; got q8"),
        ):
            with self.assertRaisesRegex(ValueError, words):
                qs.make_prompt_cache(make(), "q8+recent16", max_kv_size=bound)
        with pytest.warns(UserWarning, match="recent16 does not hold for 2 of 3"):
            cache = qs.make_prompt_cache(models.gemma3_model(), "q8+recent16")
        self.assertEqual([getattr(c, "recent", 0) for c in cache], [0, 0, 16])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            spec = "q8+recent16+sliding:dense"
            cache = qs.make_prompt_cache(models.gemma3_model(), spec)
        self.assertTrue(cache[0].formats[0].is_dense)

    def test_others_say_nothing(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for make in (models.llama_model, models.gpt_oss_model, longcat):
                qs.make_prompt_cache(make(), "q8")


if __name__ == "__main__":
    unittest.main()
