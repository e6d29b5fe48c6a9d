"""Perplexity and recall of a model through any kind of KV cache."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from .recall import QUESTION_BYTES, VALUE_DIGITS, Probe

# Makes one empty cache for each layer of a model.
CacheMaker = Callable[[Any], list]

DEPTH_BANDS = 4


def prefill(model, tokens: mx.array, cache: list, chunk: int = 512) -> mx.array:
    """Runs ``tokens`` (``[batch, length]``) into ``cache``, ``chunk`` at a time.

    Returns logits ``[batch, length, vocabulary]``.
    """
    logits = []
    for begin in range(0, tokens.shape[1], chunk):
        logits.append(model(tokens[:, begin : begin + chunk], cache=cache))
        mx.eval(logits[-1], [layer.state for layer in cache])
    return mx.concatenate(logits, axis=1)


@dataclass(frozen=True)
class Predictions:
    """What the model made of each byte but the first of some windows.

    ``losses`` (nats) and ``guesses`` (the likeliest bytes) are ``[count, length - 1]``.
    """

    losses: np.ndarray
    guesses: np.ndarray

    @property
    def perplexity(self) -> float:
        """Perplexity a byte."""
        return math.exp(self.losses.mean())


def predict(
    model, windows: np.ndarray, make_cache: CacheMaker, chunk: int = 512
) -> Predictions:
    """Predicts each byte of ``windows`` (uint8 ``[count, length]``) from those before.

    Every key and value, the newest too, is read back from the cache.
    """
    losses, guesses = [], []
    for window in windows:
        tokens = mx.array(window.astype(np.int32))[None]
        logits = prefill(model, tokens[:, :-1], make_cache(model), chunk)
        logits = logits.astype(mx.float32)
        chosen = mx.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        losses.append(np.array(mx.logsumexp(logits, axis=-1) - chosen))
        guesses.append(np.array(mx.argmax(logits, axis=-1)))
    return Predictions(np.concatenate(losses), np.concatenate(guesses))


def recalled(
    model, probes: list[Probe], make_cache: CacheMaker, chunk: int = 512
) -> np.ndarray:
    """Which answers the model gets right: bool ``[probes, pairs]``.

    The probes (of one length) run as one batch.
    """
    cache = make_cache(model)
    read_contexts(model, probes, cache, chunk)
    return answers(model, probes, cache)


def read_contexts(model, probes: list[Probe], cache: list, chunk: int = 512) -> None:
    """Fills an empty ``cache`` with the probes' contexts, one a row of the batch."""
    contexts = np.stack([probe.context for probe in probes]).astype(np.int32)
    prefill(model, mx.array(contexts), cache, chunk)


def answers(model, probes: list[Probe], cache: list) -> np.ndarray:
    """Asks for every pair of contexts in ``cache``: bool ``[probes, pairs]``, right.

    An answer is right when greedy decoding would write every digit of it. Each
    question starts from the same cache, which is left as it was.
    """
    columns = []
    for pairs in zip(*(probe.pairs for probe in probes), strict=True):
        text = b"".join(pair.question + pair.value for pair in pairs)
        tokens = np.frombuffer(text, np.uint8).reshape(len(probes), -1)
        columns.append(_answers_right(model, tokens.astype(np.int32), cache))
    return np.stack(columns, axis=1)


def _answers_right(model, tokens: np.ndarray, cache: list) -> np.ndarray:
    """bool ``[batch]``: whether each value is what the model would write greedily."""
    asked = mx.array(tokens[:, :-1])
    guesses = mx.argmax(model(asked, cache=cache), axis=-1)
    right = np.array(guesses[:, QUESTION_BYTES - 1 :]) == tokens[:, QUESTION_BYTES:]
    assert right.shape[1] == VALUE_DIGITS
    for layer in cache:
        layer.trim(asked.shape[1])
    return right.all(axis=1)


def accuracy_by_depth(right: np.ndarray) -> list[float]:
    """Share of right answers in each of DEPTH_BANDS equal bands, start to end.

    ``right`` is bool ``[probes, pairs]`` with the pairs in order of depth.
    """
    bands = np.array_split(right, DEPTH_BANDS, axis=1)
    return [float(band.mean()) for band in bands]
