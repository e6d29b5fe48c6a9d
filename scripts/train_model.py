#!/usr/bin/env python3
"""Trains the benchmarks' language model and records how good it is.

On a GPU where MLX has one, on the CPU otherwise:

    python scripts/train_model.py                  # the whole recipe: minutes on a GPU
    python scripts/train_model.py --smoke --output build/model    # seconds on a CPU
"""

import argparse
import dataclasses
import platform
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.llama import Model
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from recall_model import checkpoint, corpus, evaluation, recall, training  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What is measured after training."""

    window_lengths: tuple[int, ...] = (1024, 8192)
    windows: int = 16
    recall_lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    probes: int = 16
    pairs: int = 16
    seed: int = 1
    spot_windows: int = 4
    spot_length: int = 512


SMOKE_RECIPE = training.Recipe(
    steps=30,
    tokens_a_step=1024,
    stages=(training.Stage(0.0, 64), training.Stage(0.7, 128)),
)
SMOKE_SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
SMOKE_MEASUREMENT = Measurement(
    window_lengths=(256,),
    windows=2,
    recall_lengths=(256,),
    probes=1,
    pairs=4,
    spot_length=256,
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=checkpoint.WEIGHTS)
    parser.add_argument("--sources", type=Path, default=corpus.standard_library())
    parser.add_argument("--smoke", action="store_true", help="a tiny model, few steps")
    parser.add_argument("--steps", type=int, help="length of the schedule")
    parser.add_argument("--minutes", type=float, help="squeeze the schedule into this")
    parser.add_argument("--rate", type=float, help="peak learning rate")
    return parser.parse_args()


def chosen_recipe(arguments: argparse.Namespace) -> training.Recipe:
    """The recipe with the command line's changes."""
    recipe = SMOKE_RECIPE if arguments.smoke else training.Recipe()
    changes = {
        "steps": arguments.steps,
        "minutes": arguments.minutes,
        "peak_rate": arguments.rate,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(recipe, **changes)


def measure(model: Model, sources: list, plan: Measurement) -> dict:
    """Held-out perplexity and recall accuracy with mlx-lm's dense cache."""
    perplexity = {}
    for length in tqdm(plan.window_lengths, desc="perplexity", unit="length"):
        windows = corpus.held_out_windows(sources, plan.windows, length)
        found = evaluation.predict(model, windows, make_prompt_cache, 2048)
        perplexity[str(length)] = round(found.perplexity, 4)
    text = corpus.held_out_text(sources)
    by_length = {}
    for length in tqdm(plan.recall_lengths, desc="recall", unit="length"):
        rng = np.random.default_rng(plan.seed)
        probes = [
            recall.make_probe(text, length, plan.pairs, rng) for _ in range(plan.probes)
        ]
        right = evaluation.recalled(model, probes, make_prompt_cache, 2048)
        by_length[str(length)] = {
            "accuracy": round(float(right.mean()), 4),
            "by_depth": [round(x, 4) for x in evaluation.accuracy_by_depth(right)],
        }
    return {
        "held_out_digest": corpus.digest(text),
        "held_out_perplexity_a_byte": perplexity,
        "recall": by_length,
        "spot_check": spot_check(model, sources, plan),
        "measured_with": dataclasses.asdict(plan),
    }


def spot_check(model: Model, sources: list, plan: Measurement) -> dict:
    """Perplexity of single windows, for a machine without the time for all."""
    windows = corpus.held_out_windows(sources, plan.spot_windows, plan.spot_length)
    found = [
        evaluation.predict(model, window[None], make_prompt_cache).perplexity
        for window in windows
    ]
    return {
        "device": device_name(),
        "length": plan.spot_length,
        "held_out_perplexity_a_byte": [round(value, 4) for value in found],
    }


def device_name() -> str:
    """The default device's kind and model."""
    device = mx.default_device()
    name = mx.device_info(device).get("device_name") or platform.processor()
    return f"{device.type.name}: {name}".rstrip(": ")


def describe_run(recipe: training.Recipe, progress: training.Progress) -> dict:
    """Where and how the training ran."""
    return {
        "device": device_name(),
        "mlx": mx.__version__,
        "python": platform.python_version(),
        "minutes": round(progress.seconds / 60, 2),
        "steps": progress.steps,
        "tokens": progress.tokens,
        "recipe": dataclasses.asdict(recipe),
        "curve": progress.curve,
    }


def main() -> None:
    arguments = parse_arguments()
    recipe = chosen_recipe(arguments)
    mx.random.seed(recipe.seed)
    sources = corpus.read_sources(arguments.sources)
    text = corpus.training_text(sources)
    model = Model(training.model_args(**(SMOKE_SHAPE if arguments.smoke else {})))
    progress = training.train(model, text, recipe)
    run = describe_run(recipe, progress) | {"training_bytes": len(text)}
    checkpoint.save(arguments.output, model, {"training": run})
    plan = SMOKE_MEASUREMENT if arguments.smoke else Measurement()
    metrics = measure(model, sources, plan) | {"training": run}
    checkpoint.save(arguments.output, model, metrics)
    for name in ("held_out_perplexity_a_byte", "recall"):
        print(name, metrics[name])


if __name__ == "__main__":
    main()
