"""Trains mlx-lm's Llama model on source text mixed with recall lines."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.llama import Model, ModelArgs
from tqdm import tqdm

from .recall import ANSWER, TEXT, lines_only, mixed_with_text

CONTEXT = 8192

_BATCHES_AHEAD = 4


def model_args(**changes) -> ModelArgs:
    """The model's shape: 6 layers, 8 query heads on 2 KV heads of dimension 64."""
    shape = {
        "model_type": "llama",
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "intermediate_size": 384,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "vocab_size": 256,
        "max_position_embeddings": CONTEXT,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    }
    return ModelArgs(**(shape | changes))


@dataclass(frozen=True)
class Stage:
    """Part of the training: from ``begin`` (0 to 1) on, sequences of ``length``."""

    begin: float
    length: int


@dataclass(frozen=True)
class Recipe:
    """All that decides a training run besides the model's shape and the text."""

    steps: int = 5000
    minutes: float | None = None  # squeezes the schedule into this time
    tokens_a_step: int = 65536
    stages: tuple[Stage, ...] = (
        Stage(0.0, 1024),
        Stage(0.35, 2048),
        Stage(0.5, 4096),
        Stage(0.65, 8192),
    )
    peak_rate: float = 3e-3
    warmup: float = 0.03
    final_rate: float = 0.02  # as a share of the peak
    weight_decay: float = 0.1
    lines_only_share: float = 0.25  # of the sequences
    answer_weight: float = 2.0  # of a looked-up byte against a byte of text
    seed: int = 0

    def length(self, progress: float) -> int:
        """Sequence length at ``progress`` (0 to 1)."""
        return [s.length for s in self.stages if s.begin <= progress][-1]

    def rate(self, progress: float) -> float:
        """Learning rate at ``progress``: linear warm-up, then half a cosine."""
        if progress < self.warmup:
            return self.peak_rate * progress / self.warmup
        done = (progress - self.warmup) / (1 - self.warmup)
        cosine = (1 + math.cos(math.pi * min(done, 1.0))) / 2
        return self.peak_rate * (self.final_rate + (1 - self.final_rate) * cosine)


@dataclass
class Progress:
    """What a training run leaves: the loss curve and what it took."""

    curve: list[dict] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


def make_sequence(
    text: np.ndarray, length: int, recipe: Recipe, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One training sequence and the kinds of its bytes, uint8 ``[length]`` each."""
    if rng.random() < recipe.lines_only_share:
        return lines_only(length, rng)
    begin = rng.integers(len(text) - length + 1)
    most = max(length // 64, 3)
    return mixed_with_text(text[begin : begin + length], rng.integers(2, most), rng)


def make_batch(
    text: np.ndarray, length: int, recipe: Recipe, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and kinds, uint8 ``[batch, length + 1]``: inputs and targets overlap."""
    count = max(recipe.tokens_a_step // length, 1)
    rows = [make_sequence(text, length + 1, recipe, rng) for _ in range(count)]
    tokens, kinds = zip(*rows, strict=True)
    return np.stack(tokens), np.stack(kinds)


def batches(
    text: np.ndarray, recipe: Recipe, length_now: Callable[[], int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless batches, a few made ahead, each of the length wanted at that time."""
    rng = np.random.default_rng(recipe.seed)
    with ThreadPoolExecutor(max_workers=1) as worker:
        ahead: deque = deque()
        while True:
            while len(ahead) < _BATCHES_AHEAD:
                length = length_now()
                ahead.append(worker.submit(make_batch, text, length, recipe, rng))
            yield ahead.popleft().result()


def losses_by_kind(model: Model, tokens: mx.array, kinds: mx.array):
    """Mean loss over text bytes and over answer bytes, in nats, and their counts.

    ``tokens`` and ``kinds`` are integer arrays ``[batch, length + 1]``.
    """
    logits = model(tokens[:, :-1]).astype(mx.float32)
    losses = nn.losses.cross_entropy(logits, tokens[:, 1:])

    def mean_over(kind):
        chosen = (kinds[:, 1:] == kind).astype(mx.float32)
        count = chosen.sum()
        return (losses * chosen).sum() / mx.maximum(count, 1.0), count

    return (*mean_over(TEXT), *mean_over(ANSWER))


def weighted_loss(params, model: Model, dtype, answer_weight: float, tokens, kinds):
    """The loss to descend, then its two parts; computed in ``dtype``."""
    model.update(tree_map(lambda p: p.astype(dtype), params))
    text, text_count, answers, answer_count = losses_by_kind(model, tokens, kinds)
    answer_share = answer_weight * answer_count
    total = (text * text_count + answers * answer_share) / (text_count + answer_share)
    return total, text, answers


def make_step(model: Model, optimizer: optim.Optimizer, dtype, recipe: Recipe):
    """A function of weights, optimizer state, batch and learning rate.

    Compiled on a GPU; on the CPU compiling takes longer than a short run.
    """
    loss = partial(
        weighted_loss, model=model, dtype=dtype, answer_weight=recipe.answer_weight
    )
    loss_and_gradients = mx.value_and_grad(loss)

    def step(params, state, tokens, kinds, rate):
        values, gradients = loss_and_gradients(params, tokens=tokens, kinds=kinds)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.state = state | {"learning_rate": rate}
        params = optimizer.apply_gradients(gradients, params)
        return params, optimizer.state, values

    return mx.compile(step) if _on_gpu() else step


def _on_gpu() -> bool:
    return mx.default_device().type == mx.DeviceType.gpu


def train(model: Model, text: np.ndarray, recipe: Recipe) -> Progress:
    """Trains ``model`` in place on ``text`` (uint8 ``[bytes]``).

    Weights stay float32 while training; a GPU computes in bfloat16. They end bfloat16.
    """
    params = model.parameters()
    optimizer = optim.AdamW(0.0, betas=[0.9, 0.95], weight_decay=recipe.weight_decay)
    optimizer.init(params)
    state = optimizer.state
    step = make_step(model, optimizer, mx.bfloat16 if _on_gpu() else mx.float32, recipe)
    log = _Log(recipe)
    source = batches(text, recipe, lambda: recipe.length(log.share_done))
    for tokens, kinds in source:
        rate = mx.array(recipe.rate(log.share_done))
        batch = mx.array(tokens.astype(np.int32)), mx.array(kinds)
        params, state, values = step(params, state, *batch, rate)
        mx.async_eval(params, state, values)
        log.add(tokens.size, tokens.shape[1] - 1, values)
        if log.share_done >= 1:
            break
    source.close()
    model.update(tree_map(lambda p: p.astype(mx.bfloat16), params))
    mx.eval(model.parameters())
    return log.finish()


class _Log:
    """Progress bar, loss curve, and how much of the schedule is done."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.progress = Progress()
        self.share_done = 0.0
        self.bar = tqdm(total=recipe.steps, unit="step", mininterval=5)
        self.start = time.perf_counter()
        self.every = max(recipe.steps // 100, 1)

    def add(self, tokens: int, length: int, values) -> None:
        """Counts one step."""
        progress = self.progress
        progress.steps += 1
        progress.tokens += tokens
        self.bar.update()
        if progress.steps % self.every == 0 or progress.steps == 1:
            self._record(length, values)
        self.share_done = progress.steps / self.recipe.steps
        if self.recipe.minutes is not None:
            minutes = (time.perf_counter() - self.start) / 60
            self.share_done = max(self.share_done, minutes / self.recipe.minutes)

    def _record(self, length: int, values) -> None:
        loss, text, answers = (round(v.item(), 4) for v in values)
        self.progress.curve.append(
            {
                "step": self.progress.steps,
                "length": length,
                "loss": loss,
                "text": text,
                "answers": answers,
            }
        )
        self.bar.set_postfix(length=length, text=text, answers=answers)

    def finish(self) -> Progress:
        """Closes the bar; returns the record."""
        self.bar.close()
        self.progress.seconds = time.perf_counter() - self.start
        return self.progress
