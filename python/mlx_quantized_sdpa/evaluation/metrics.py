"""Figures that compare a quantized cache with the dense one, from logits and tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.generic]


@dataclass
class Predictions:
    """What a model said about each next token of some text, position by position.

    Attributes:
        losses (list): Negative log-likelihoods of the text's own tokens, in nats.
        divergences (list): Kullback-Leibler divergence of the next-token distribution
          from that of the dense cache, in nats.
        agreements (list): Whether the likeliest token is that of the dense cache.
    """

    losses: list[Values] = field(default_factory=list)
    divergences: list[Values] = field(default_factory=list)
    agreements: list[Values] = field(default_factory=list)

    def add(self, logits: mx.array, targets: mx.array, dense: mx.array) -> None:
        """Count a stretch of text.

        Args:
            logits (array): ``[T, vocabulary]``.
            targets (array): The tokens that follow, ``[T]``.
            dense (array): Logits with the dense cache, ``[T, vocabulary]``.
        """
        ours, theirs = log_probabilities(logits), log_probabilities(dense)
        losses = -mx.take_along_axis(ours, targets[:, None], axis=-1)[:, 0]
        agree = mx.argmax(ours, axis=-1) == mx.argmax(theirs, axis=-1)
        self.losses.append(np.array(losses))
        self.divergences.append(np.array(divergence(theirs, ours)))
        self.agreements.append(np.array(agree))

    @property
    def perplexity(self) -> float:
        """The exponential of the mean loss."""
        return math.exp(_joined(self.losses).mean())

    @property
    def mean_divergence(self) -> float:
        """In nats."""
        return float(_joined(self.divergences).mean())

    def divergence_quantile(self, share: float) -> float:
        """The divergence that ``share`` of the positions stay below, in nats."""
        return float(np.quantile(_joined(self.divergences), share))

    @property
    def agreement(self) -> float:
        """Share of positions with the same likeliest token."""
        return float(_joined(self.agreements).mean())

    @property
    def positions(self) -> int:
        """How many positions were counted."""
        return sum(map(len, self.losses))


def _joined(parts: Sequence[Values]) -> NDArray[np.float64]:
    return np.concatenate(list(parts)).astype(np.float64)


def log_probabilities(logits: mx.array) -> mx.array:
    """Log-probabilities ``[.., vocabulary]`` of logits, in float32."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def divergence(p: mx.array, q: mx.array) -> mx.array:
    """Kullback-Leibler divergence of q from p, both log-probabilities, in nats.

    Rounding can make it a little negative where they are the same; that counts as 0.
    """
    terms = mx.where(p == -mx.inf, 0.0, mx.exp(p) * (p - q))
    return mx.maximum(terms.sum(axis=-1), 0.0)


@dataclass(frozen=True)
class Continuation:
    """A greedy continuation beside the one with the dense cache.

    Attributes:
        same (int): Tokens at the start that are the same.
        length (int): Tokens generated.
        margin (float, optional): By how much, in nats, the dense cache preferred its
          token to its second choice where the two part; ``None`` if they do not.
        same_choices (float): Share of the dense continuation's tokens that are also
          the likeliest ones here, each after the same text.
    """

    same: int
    length: int
    margin: float | None
    same_choices: float


def compare_continuations(
    tokens: Sequence[int],
    dense_tokens: Sequence[int],
    dense_margins: Sequence[float],
    choices: Sequence[int],
) -> Continuation:
    """Where two greedy continuations of one prompt part.

    Args:
        tokens (sequence of int): Generated with the cache in question.
        dense_tokens (sequence of int): Generated with the dense one.
        dense_margins (sequence of float): First minus second log-probability of each.
        choices (sequence of int): The likeliest tokens of the cache in question after
          the same text as the dense ones.
    """
    same = 0
    while same < len(dense_tokens) and tokens[same] == dense_tokens[same]:
        same += 1
    margin = float(dense_margins[same]) if same < len(dense_tokens) else None
    alike = sum(a == b for a, b in zip(choices, dense_tokens, strict=True))
    return Continuation(same, len(dense_tokens), margin, alike / len(dense_tokens))
