#!/usr/bin/env python3
"""The main job: text from a real model over dense, 8-bit and 4-bit KV caches.

Generates through mlx-lm with the fused op, and prints what quantizing the cache
changes in the text and in what the model knows, and what it saves in bytes and time.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import mlx_quantized_sdpa as qs
import numpy as np
from mlx_lm import load, stream_generate
from mlx_lm.models.cache import KVCache, QuantizedKVCache
from mlx_quantized_sdpa.evaluation.report import markdown
from recall_model import checkpoint, corpus, evaluation, recall
from tqdm import tqdm

GROUP_SIZE = 64


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much of everything is run; lengths and counts are in bytes of text."""

    prompts: int = 4
    prompt_length: int = 256
    generated: int = 96
    windows: int = 3
    window_length: int = 1024
    contexts: tuple[int, ...] = (1024, 4096, 8192)
    # mlx-lm's dense prefill on the CPU takes minutes beyond this.
    longest_dense: int = 1024
    pairs: int = 16
    rounds: int = 7


QUICK = Sizes(
    prompts=1,
    prompt_length=64,
    generated=8,
    windows=1,
    window_length=128,
    contexts=(256, 512),
    longest_dense=256,
    pairs=4,
    rounds=2,
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of KV cache: of ``bits`` a number, or dense."""

    name: str
    bits: int | None

    def make_cache(self, model) -> list:
        """An empty cache for each layer."""
        if self.bits is None:
            return [KVCache() for _ in model.layers]
        return [QuantizedKVCache(GROUP_SIZE, self.bits) for _ in model.layers]


DENSE = Kind("dense", None)
KINDS = (DENSE, Kind("8-bit", 8), Kind("4-bit", 4))


@dataclasses.dataclass
class Result:
    """What was found for one kind of cache; by context length where it says so."""

    texts: list[str] = dataclasses.field(default_factory=list)
    same_prefix: float = 0.0
    same_next: float = 0.0
    perplexity: float = 0.0
    recall: dict[int, float] = dataclasses.field(default_factory=dict)
    kv_bytes: dict[int, int] = dataclasses.field(default_factory=dict)
    fused_ms: dict[int, float] = dataclasses.field(default_factory=dict)
    stock_ms: dict[int, float] = dataclasses.field(default_factory=dict)


class Demo:
    """Runs the parts over every kind of cache and keeps the results."""

    def __init__(self, sizes: Sizes, bar: tqdm):
        self.sizes = sizes
        self.bar = bar
        self.model, self.tokenizer = load(str(checkpoint.WEIGHTS))
        self.sources = corpus.read_sources(corpus.standard_library())
        self.results = {kind.name: Result() for kind in KINDS}

    @contextmanager
    def part(self, what: str) -> Iterator[None]:
        """Shows a piece of work in the progress bar."""
        self.bar.set_description(f"{what:24}")
        yield
        self.bar.update()

    def run(self) -> None:
        """Everything, with the fused op wherever a quantized cache is read."""
        with qs.enabled(force_fused=True):
            self.generate()
            self.predict()
        for length in self.sizes.contexts:
            with qs.enabled(force_fused=True):
                caches = self.fill_and_ask(length)
            with self.part(f"decode at {length}"):
                self.time_decode(caches, length)

    def generate(self) -> None:
        """Greedy continuations of held-out files, against those of the dense cache."""
        sizes = self.sizes
        prompts = corpus.held_out_windows(
            self.sources, sizes.prompts, sizes.prompt_length
        )
        for kind in KINDS:
            result = self.results[kind.name]
            for prompt in prompts:
                with self.part(f"text, {kind.name}"):
                    result.texts.append(self.continuation(prompt, kind))
            dense = self.results[DENSE.name].texts
            same = [common_prefix(a, b) for a, b in zip(result.texts, dense)]
            result.same_prefix = statistics.mean(same)

    def continuation(self, prompt: np.ndarray, kind: Kind) -> str:
        """What mlx-lm generates greedily after ``prompt``."""
        pieces = stream_generate(
            self.model,
            self.tokenizer,
            prompt.tolist(),
            max_tokens=self.sizes.generated,
            prompt_cache=kind.make_cache(self.model),
        )
        return "".join(piece.text for piece in pieces)

    def predict(self) -> None:
        """Held-out perplexity, and how often the likeliest next byte is dense's."""
        sizes = self.sizes
        windows = corpus.held_out_windows(
            self.sources, sizes.windows, sizes.window_length, skip=sizes.prompts
        )
        dense = None
        for kind in KINDS:
            found = []
            for window in windows:
                with self.part(f"perplexity, {kind.name}"):
                    found.append(
                        evaluation.predict(self.model, window[None], kind.make_cache)
                    )
            guesses = np.stack([each.guesses for each in found])
            dense = guesses if dense is None else dense
            losses = np.stack([each.losses for each in found])
            result = self.results[kind.name]
            result.perplexity = evaluation.Predictions(losses, guesses).perplexity
            result.same_next = float((guesses == dense).mean())

    def fill_and_ask(self, length: int) -> dict[str, list]:
        """Fills each kind of cache with one long context, weighs it and asks it."""
        rng = np.random.default_rng(length)
        text = corpus.held_out_text(self.sources)
        probe = recall.make_probe(text, length, self.sizes.pairs, rng)
        caches: dict[str, list] = {}
        # Dense comes last: a long one is made from the 8-bit cache.
        for kind in reversed(KINDS):
            result = self.results[kind.name]
            with self.part(f"recall at {length}, {kind.name}"):
                if kind is DENSE and length > self.sizes.longest_dense:
                    cache = dequantized(caches["8-bit"])
                else:
                    cache = kind.make_cache(self.model)
                    evaluation.read_contexts(self.model, [probe], cache)
                    right = evaluation.answers(self.model, [probe], cache)
                    result.recall[length] = float(right.mean())
            result.kv_bytes[length] = sum(layer.nbytes for layer in cache)
            caches[kind.name] = cache
        return caches

    def time_decode(self, caches: dict[str, list], length: int) -> None:
        """Median time of one decoding step: fused, and by mlx-lm's own attention."""
        fused = {name: [] for name in caches}
        stock = {name: [] for name in caches}
        for _ in range(self.sizes.rounds):
            with qs.enabled(force_fused=True):
                for name, cache in caches.items():
                    if name != DENSE.name:
                        fused[name].append(decode_step(self.model, cache))
            for name, cache in caches.items():
                stock[name].append(decode_step(self.model, cache))
        for name in caches:
            result = self.results[name]
            result.stock_ms[length] = statistics.median(stock[name])
            if fused[name]:
                result.fused_ms[length] = statistics.median(fused[name])


def common_prefix(a: str, b: str) -> int:
    """How many bytes at the start are the same."""
    return len(os.path.commonprefix([a.encode(), b.encode()]))


def dequantized(cache: list[QuantizedKVCache]) -> list[KVCache]:
    """Dense caches with the values of quantized ones."""
    dense = []
    for layer in cache:
        formats = {"group_size": layer.group_size, "bits": layer.bits}
        keys, values = (
            mx.dequantize(*(x[..., : layer.offset, :] for x in packed), **formats)
            for packed in (layer.keys, layer.values)
        )
        dense.append(KVCache())
        dense[-1].update_and_fetch(keys, values)
    return dense


def decode_step(model, cache: list) -> float:
    """Milliseconds to decode one byte; the cache is left as it was."""
    token = mx.array([[ord("#")]])
    begin = time.perf_counter()
    mx.eval(model(token, cache=cache))
    elapsed = time.perf_counter() - begin
    for layer in cache:
        layer.trim(1)
    return elapsed * 1e3


def table(results: dict[str, Result], sizes: Sizes) -> str:
    """The table of results."""
    contexts = sizes.contexts
    names = " / ".join(
        f"{length // 1024}K" if length >= 1024 else str(length) for length in contexts
    )
    columns: list[tuple[str, Callable[[Result], str]]] = [
        ("KV bytes", lambda r: f"{r.kv_bytes[contexts[-1]]:,}"),
        ("same text", lambda r: f"{r.same_prefix:.0f} of {sizes.generated}"),
        ("same next", lambda r: f"{r.same_next:.1%}"),
        ("perplexity", lambda r: f"{r.perplexity:.4f}"),
        (f"recall {names}", lambda r: by_length(r.recall, contexts, "{:.0%}")),
        (f"fused ms {names}", lambda r: by_length(r.fused_ms, contexts, "{:.1f}")),
        (f"stock ms {names}", lambda r: by_length(r.stock_ms, contexts, "{:.1f}")),
    ]
    heads = ["KV cache", *(title for title, _ in columns)]
    rows = [
        [name, *(show(result) for _, show in columns)]
        for name, result in results.items()
    ]
    return markdown(heads, rows)


def by_length(found: dict[int, float], contexts: tuple[int, ...], form: str) -> str:
    """The figures of all contexts in one cell; a dash where there is none."""
    return " / ".join(
        form.format(found[length]) if length in found else "-" for length in contexts
    )


def explanation(sizes: Sizes) -> str:
    """What the columns mean, and what the record of the training adds."""
    record = checkpoint.load_metrics()
    trained = ", ".join(
        f"{length}: {found['accuracy']:.0%}"
        for length, found in record["recall"].items()
    )
    return f"""
KV bytes: at the longest context. same text: bytes until the greedy text first differs
from dense. same next: how often the likeliest next byte is the same as dense's.
perplexity: a byte, on held-out text. recall: share of {sizes.pairs} six-digit values
looked up from the context; a dash where mlx-lm's dense prefill on a CPU takes minutes
(recorded when the model was trained, dense, by context: {trained}).
ms: one decoding step of the whole model; fused is this package's op, stock is mlx-lm's
own attention over the same cache."""


def show_texts(results: dict[str, Result]) -> Iterator[str]:
    """Lines that show how each cache continued the first file."""
    for name, result in results.items():
        yield f"--- {name}"
        yield result.texts[0].rstrip()


def machine() -> str:
    """The machine and the versions, for the figures to be read with."""
    info = mx.device_info(mx.default_device())
    return (
        f"{info.get('device_name') or platform.processor()}, {os.cpu_count()} CPUs, "
        f"MLX {mx.__version__} on {mx.default_device().type.name}, "
        f"mlx-quantized-sdpa {qs.__version__}"
    )


def main(arguments: list[str] | None = None) -> dict[str, Result]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try it")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else Sizes()
    pieces = len(KINDS) * (sizes.prompts + sizes.windows + len(sizes.contexts))
    with tqdm(total=pieces + len(sizes.contexts), unit="part") as bar:
        demo = Demo(sizes, bar)
        demo.run()
    print(machine())
    print("\n".join(show_texts(demo.results)), end="\n\n")
    print(table(demo.results, sizes))
    print(explanation(sizes))
    if options.json:
        found = {name: dataclasses.asdict(r) for name, r in demo.results.items()}
        found = {"machine": machine(), "sizes": dataclasses.asdict(sizes), **found}
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return demo.results


if __name__ == "__main__":
    main()
