"""Run by ``mlx.launch``: greedy text from a model whose heads are split."""

import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx_quantized_sdpa as qs
from mlx_lm import load
from mlx_lm.generate import generate_step
from mlx_quantized_sdpa.paged import PagedPool

# Of caches: what they store, and whether in blocks.
KINDS = (("q8", False), ("k8v4", True))


def generate(model, prompt, spec, paged, count=12):
    """Greedy tokens, and the KV heads of the cache of the first layer."""
    if paged:
        cache = PagedPool(spec, 512).make_prompt_cache(model)
    else:
        cache = qs.make_prompt_cache(model, spec)
    steps = generate_step(
        mx.array(prompt),
        model,
        max_tokens=count,
        prompt_cache=cache,
        prefill_step_size=30,
    )
    tokens = [token for token, _ in steps]
    heads = cache[0].state[0][0].shape[1] if paged else cache[0].keys[0].shape[1]
    return tokens, heads


def load_model(folder):
    """In float32: a sum over processes rounds in another order."""
    model, _ = load(folder)
    model.set_dtype(mx.float32)
    return model


def main(folder, prompt, results):
    group = mx.distributed.init(strict=True, backend="ring")
    model = load_model(folder)
    model.shard(group)
    qs.enable(force_fused=True)
    found = {}
    for spec, paged in KINDS:
        found[f"{spec} {paged}"] = generate(model, prompt, spec, paged)
    record = {"size": group.size(), "found": found}
    Path(results, f"{group.rank()}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3])
