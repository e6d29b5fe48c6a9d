"""Random inputs, attention in float64, and the check that comes before any timing."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


class WrongAnswer(Exception):
    """A rival's result is too far from float64 attention on its own values."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """Float32 arrays ``[heads, length, head_dim]``."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray


@lru_cache(maxsize=4)
def keys_values(kv_heads, kv_len, head_dim):
    rng = np.random.default_rng(0)
    size = (kv_heads, kv_len, head_dim)
    return tuple(rng.standard_normal(size, dtype=np.float32) for _ in range(2))


def make_inputs(shape):
    rng = np.random.default_rng(1)
    size = (shape.q_heads, shape.q_len, shape.head_dim)
    q = rng.standard_normal(size, dtype=np.float32)
    return Inputs(q, *keys_values(shape.kv_heads, shape.kv_len, shape.head_dim))


def attention(q, k, v, scale, causal):
    """Float64 attention, one query head at a time to keep the scores small."""
    repeats = q.shape[0] // k.shape[0]
    out = np.empty((*q.shape[:-1], v.shape[-1]))
    q_len, kv_len = q.shape[1], k.shape[1]
    hidden = np.arange(kv_len) > np.arange(kv_len - q_len, kv_len)[:, None]
    for kv_head in range(k.shape[0]):
        keys = k[kv_head].astype(np.float64)
        values = v[kv_head].astype(np.float64)
        for head in range(kv_head * repeats, (kv_head + 1) * repeats):
            scores = q[head].astype(np.float64) @ keys.T * scale
            if causal:
                scores[hidden] = -np.inf
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[head] = weights @ values / weights.sum(axis=-1, keepdims=True)
    return out


def nmse(found, expected):
    """Squared error over squared size: unlike an absolute error, it keeps its
    meaning on long caches, whose results are small."""
    difference = np.asarray(found, dtype=np.float64) - expected
    return float(np.sum(difference**2) / np.sum(expected**2))


def check_prepared(prepared, shape):
    """The NMSE of a rival on the values that it holds, or WrongAnswer."""
    answer = attention(*prepared.values(), shape.scale, shape.causal)
    return check(prepared.output(), answer, prepared.tolerance)


def check(found, expected, tolerance):
    """The NMSE of a result, or WrongAnswer."""
    found = np.asarray(found)
    if found.shape != expected.shape:
        raise WrongAnswer(f"shape {found.shape}, expected {expected.shape}")
    error = nmse(found, expected)
    if not error <= tolerance:  # NaN fails as well
        raise WrongAnswer(f"NMSE {error:.2e}, allowed {tolerance:.0e}")
    return error
