"""Tiny random models of mlx-lm's own classes, and caches that tests compare with."""

import json
import shutil
import sys
import unittest
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_quantized_sdpa as qs
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models import cache as lm_cache
from mlx_lm.models import deepseek_v3, gemma2, gemma3_text, gpt_oss, llama, qwen3
from mlx_quantized_sdpa.spec import CacheSpec

# The function of that name hides the module.
lm_generate = sys.modules["mlx_lm.generate"]

VOCABULARY = 97
# Of the small model, whose tokenizer is used too.
WEIGHTS = Path(__file__).parents[1] / "bench" / "recall_model" / "weights"
WINDOW = 16


class FusedTest(unittest.TestCase):
    """With the op in mlx-lm, no silent fallback, and one tiny model."""

    @classmethod
    def setUpClass(cls):
        cls.model = llama_model()

    def setUp(self):
        qs.enable(force_fused=True)
        self.addCleanup(qs.disable)


def llama_model(layers=2, head_dim=64, heads=8, kv_heads=2, module=llama):
    """A Llama, perhaps of a module of its own."""
    return made(
        module,
        model_type="llama",
        hidden_size=64,
        num_hidden_layers=layers,
        intermediate_size=64,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        vocab_size=VOCABULARY,
    )


def qwen3_model():
    """A model that has no say in its caches: it takes ``max_kv_size``."""
    return made(
        qwen3,
        model_type="qwen3",
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        rms_norm_eps=1e-5,
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
        rope_theta=10000.0,
        tie_word_embeddings=True,
    )


def gemma2_model(softcap=2.0):
    """Scores near a soft cap, which mlx-lm computes without MLX's attention."""
    return made(
        gemma2,
        model_type="gemma2",
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=256,
        rms_norm_eps=1e-5,
        vocab_size=VOCABULARY,
        attn_logit_softcapping=softcap,
    )


def gemma3_model():
    """Sliding layers, and each third sees all tokens; head dim 256."""
    return made(
        gemma3_text,
        model_type="gemma3_text",
        hidden_size=64,
        num_hidden_layers=3,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        vocab_size=VOCABULARY,
        sliding_window=WINDOW,
        sliding_window_pattern=3,
        query_pre_attn_scalar=256,
    )


def gpt_oss_model():
    """Sliding and other layers in turn, with attention sinks."""
    model = made(
        gpt_oss,
        model_type="gpt_oss",
        num_hidden_layers=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        head_dim=64,
        num_attention_heads=8,
        num_key_value_heads=2,
        sliding_window=WINDOW,
    )
    for layer in model.layers:
        layer.self_attn.sinks = mx.random.normal(layer.self_attn.sinks.shape)
    return model


def deepseek_model(quantized=False):
    """Multi-head latent attention: latents of 64 and rotary parts of 32."""
    model = made(
        deepseek_v3,
        model_type="deepseek_v3",
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_shared_experts=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        kv_lora_rank=64,
        q_lora_rank=32,
        qk_rope_head_dim=32,
        qk_nope_head_dim=32,
        v_head_dim=32,
        first_k_dense_replace=1,
        rope_scaling={"factor": 1.0, "mscale_all_dim": 1.0, "type": "yarn"},
    )
    if quantized:
        nn.quantize(model, group_size=32, bits=8)
    return model


def made(module, **arguments):
    mx.random.seed(7)
    model = module.Model(module.ModelArgs.from_dict(arguments))
    model.update(_livelier(model.parameters()))
    mx.eval(model.parameters())
    return model


def write_small_model(folder, seed=3, **others):
    """A random model in float32, so that no choice hangs on the order of sums."""
    folder = Path(folder)
    config = json.loads((WEIGHTS / "config.json").read_text())
    config |= {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
    config |= {"layer_types": config["layer_types"][:2]} | others
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(WEIGHTS / name, folder)
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    weights = dict(tree_flatten(_livelier(model.parameters())))
    mx.save_safetensors(f"{folder}/model.safetensors", weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))


def _livelier(parameters):
    """Larger weights: tokens then hang on what attention reads."""
    if isinstance(parameters, dict):
        return {name: _livelier(each) for name, each in parameters.items()}
    if isinstance(parameters, list):
        return [_livelier(each) for each in parameters]
    return parameters * 2 if parameters.ndim > 1 else parameters


def rounded(kind, kv):
    """mlx-lm's own cache of this kind, of the values that a quantized one gives."""
    spec = CacheSpec.parse(kv)

    class Rounded(kind):
        def update_and_fetch(self, keys, values):
            return super().update_and_fetch(
                *(round_trip(f, x) for f, x in zip((spec.k, spec.v), (keys, values)))
            )

    return Rounded


def round_trip(made, x):
    """``x`` as a format stores it."""
    made = made.for_head_dim(x.shape[-1])
    return made.dequantize(made.quantize(x), x.dtype)


def rounded_caches(model, kv, max_kv_size=None):
    """Those of all layers of a model."""
    caches = lm_cache.make_prompt_cache(model, max_kv_size)
    for cache in caches:
        cache.__class__ = rounded(type(cache), kv)
    return caches


def prompt(length, seed=0):
    """Tokens that never repeat for long."""
    return [(5 * i * i + 3 + 7 * seed * i + seed) % VOCABULARY for i in range(length)]


def make_prompts(lengths, prefix=()):
    """Tokens of each length, all of them after ``prefix``."""
    return [
        [*prefix, *((5 * i * i + 3 * row) % VOCABULARY for i in range(n))]
        for row, n in enumerate(lengths)
    ]


def greedy(model, cache, tokens, count=12, **arguments):
    """The next ``count`` greedy tokens and their log-probabilities."""
    steps = generate_step(
        mx.array(tokens), model, max_tokens=count, prompt_cache=cache, **arguments
    )
    found, logprobs = zip(*steps)
    return list(found), mx.stack(logprobs)


def forced(model, cache, tokens):
    """Log-probabilities after each of these tokens, put in one by one."""
    logits = [model(mx.array([[token]]), cache=cache)[:, -1] for token in tokens]
    logits = mx.concatenate(logits)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def reborn(cache):
    """A cache made of another's state, as this version of mlx-lm does it."""
    if not hasattr(lm_cache._BaseCache, "meta_state"):
        return type(cache).from_state(cache.state)
    return type(cache).from_state(cache.state, cache.meta_state)


def stopping(sequences):
    """What a batch takes to end each of its texts at a sequence of tokens."""
    if hasattr(lm_generate, "StopSequences"):
        stops = [lm_generate.StopSequences([tokens]) for tokens in sequences]
        return {"stop_sequences": stops}
    kind = lm_generate.SequenceStateMachine
    return {"state_machines": [kind({"normal": [(t, None)]}) for t in sequences]}


def as_served(text):
    """Before mlx-lm 0.32 its server leaves out a last character that is not whole."""
    if hasattr(lm_generate, "StopSequences"):
        return text
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


def in_batches(model, prompts, counts, **arguments):
    """Tokens of every prompt; few are in work at a time, so that some join later."""
    generator = BatchGenerator(
        model, completion_batch_size=4, prefill_batch_size=3, **arguments
    )
    uids = generator.insert(prompts, counts)
    found = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            found[response.uid].append(response.token)
    generator.close()
    return [found[uid] for uid in uids]
