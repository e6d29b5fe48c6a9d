"""Hypothesis strategies of valid, extreme and damaged calls of the op."""

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st
from quantized_sdpa_reference import Case
from test_quantized_sdpa_matrix import random_case

# Of rows and keys, where a plan changes its mind or a vector ends.
EDGES = sorted(
    edge + step
    for edge in (1, 4, 8, 16, 32, 64, 96, 128, 192, 256, 512, 1024)
    for step in (-1, 0, 1)
    if edge + step > 0
)


class DrawnChoices:
    """What random_case takes of a NumPy generator: choices that shrink, seeded data."""

    def __init__(self, draw, seed):
        self._draw = draw
        self._data = np.random.default_rng(seed)

    def integers(self, low, high=None, size=None):
        low, high = (0, low) if high is None else (low, high)
        numbers = st.integers(int(low), int(high) - 1)
        if size is None:
            return self._draw(numbers)
        return np.array([self._draw(numbers) for _ in range(size)])

    def random(self, size=None):
        # In hundredths, since floats shrink slowly.
        return self.integers(100) / 100 if size is None else self._data.random(size)

    def uniform(self, low, high):
        # The one logarithm that random_case draws is that of T_kv: more short caches
        # than long ones, which calls_at_edges has too.
        return low + (high - low) * (self.integers(1001) / 1000) ** 2

    def standard_normal(self, size):
        return self._data.standard_normal(size)


@st.composite
def calls(draw):
    """Cases over every argument of the op."""
    seed = draw(st.integers(0, 2**16 - 1))
    return random_case(seed, DrawnChoices(draw, seed))


def with_q(case, change):
    """The case with change applied to the values of q, in its dtype."""
    return replace(case, q=change(case.q.astype(mx.float32)).astype(case.q.dtype))


def scaled_parts(case, factor):
    """The case with its float scales and biases multiplied, in their dtypes."""

    def scaled(x):
        if not mx.issubdtype(x.dtype, mx.floating):
            return x
        return (x.astype(mx.float32) * factor).astype(x.dtype)

    return case.map_kv(scaled)


EXTREMES = {
    "huge logits": lambda case: with_q(case, lambda q: q * 300),
    "tiny q": lambda case: with_q(case, lambda q: q * 1e-6),
    "negative zeros": lambda case: with_q(case, lambda q: mx.where(q > 0, q, -0.0)),
    "equal keys": lambda case: with_q(case, mx.zeros_like),
    "small scales": lambda case: scaled_parts(case, 1e-4),
    "no scale": lambda case: scaled_parts(case, 0.0),
    "negative scale": lambda case: replace(
        case, kwargs={**case.kwargs, "scale": -case.kwargs["scale"]}
    ),
}


@st.composite
def extreme_calls(draw):
    """(name of the extreme, case)."""
    name = draw(st.sampled_from(sorted(EXTREMES)))
    return name, EXTREMES[name](draw(calls()))


@st.composite
def calls_at_edges(draw):
    """Cases whose numbers of keys and rows lie at an edge."""
    seed = draw(st.integers(0, 2**16 - 1))
    choices = DrawnChoices(draw, seed)
    T_q = draw(st.sampled_from([n for n in EDGES if n < 200]))
    T_kv = draw(st.sampled_from(EDGES if T_q < 20 else [n for n in EDGES if n < 300]))
    shape = {"B": 1, "N_q": draw(st.sampled_from((1, 2, 4))), "N_kv": 1}
    return random_case(seed, choices, {**shape, "T_q": T_q, "T_kv": T_kv})


@dataclass(frozen=True)
class Damage:
    """A change of one argument that may or may not leave the call valid."""

    name: str
    value: object

    def apply(self, arguments):
        return {**arguments, self.name: self.value}

    def __str__(self):
        value = self.value
        if isinstance(value, mx.array):
            value = f"{value.dtype} {list(value.shape)}"
        return f"{self.name}={value}"


NAMES = ("q", "k", "k_scales", "k_biases", "v", "v_scales", "v_biases")
ARRAYS = (*NAMES, "mask", "sinks", "lengths", "left_padding", "block_table")
ARRAYS += ("k_codebook", "v_codebook")
DTYPES = (mx.float32, mx.float16, mx.bfloat16, mx.uint32, mx.int32, mx.uint8, mx.bool_)
NUMBERS = ("k_bits", "v_bits", "bits", "k_group_size", "v_group_size", "group_size")


def arguments_of(case):
    """Every argument by name."""
    return {**dict(zip(NAMES, case.args, strict=True)), **case.kwargs}


@st.composite
def reshaped(draw, x):
    """x with another shape or dtype, or something of the same shape by chance."""
    if x is None or isinstance(x, str):
        x = mx.zeros((2,))
    kind = draw(st.sampled_from(("axis", "drop", "cut", "grow", "dtype", "empty")))
    if kind == "dtype" or x.ndim == 0:
        return mx.zeros(x.shape, draw(st.sampled_from(DTYPES)))
    axis = draw(st.integers(0, x.ndim - 1))
    shape = list(x.shape)
    if kind == "axis":
        shape.insert(axis, draw(st.integers(1, 2)))
    elif kind == "drop":
        del shape[axis]
    else:
        step = {"cut": -1, "grow": 1, "empty": -shape[axis]}[kind]
        shape[axis] = max(0, shape[axis] + step)
    return mx.zeros(shape, x.dtype)


@st.composite
def damages(draw, arguments):
    """A Damage of a call with these arguments."""
    kind = draw(st.sampled_from(("array", "none", "number", "mode", "scalar")))
    if kind == "array":
        name = draw(st.sampled_from(ARRAYS))
        return Damage(name, draw(reshaped(arguments.get(name))))
    if kind == "none":
        return Damage(draw(st.sampled_from(ARRAYS)), None)
    if kind == "number":
        number = draw(st.sampled_from((-1, 0, 1, 2, 3, 4, 7, 8, 16, 32, 64, 128)))
        return Damage(draw(st.sampled_from(NUMBERS)), number)
    if kind == "mode":
        names = ("affine", "mxfp4", "mxfp8", "nvfp4", "turbo2", "turbo4", "q8_0", "")
        mode = draw(st.sampled_from(("mode", "k_mode", "v_mode", "mask")))
        return Damage(mode, draw(st.sampled_from(names)))
    number = draw(st.sampled_from((0.0, -1.0, float("inf"), float("nan"), 1e30)))
    name = draw(st.sampled_from(("scale", "softcap", "window_size")))
    return Damage(
        name, int(number) if name == "window_size" and number <= 0 else number
    )


@st.composite
def damaged_calls(draw):
    """(case, one Damage to its arguments)."""
    case: Case = draw(calls())
    return case, draw(damages(arguments_of(case)))
