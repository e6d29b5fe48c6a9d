"""What every rival hands to the benchmark."""

from dataclasses import dataclass
from itertools import cycle

import numpy as np

# Copies of a cache are read in turn until they exceed this, as a model's layers
# do: a cache that stays in the last-level cache would flatter everyone.
COLD_BYTES = 96 << 20


class Absent(Exception):
    """The rival's library is not installed; the text says what is missing."""


@dataclass
class Prepared:
    """``run(n)`` makes n calls; ``output`` gives ``[heads, q_len, head_dim]`` of
    one; ``values`` the q, k, v that the rival really holds, as float arrays, or
    None for a probe of the machine, which has no answer to check."""

    run: object
    output: object
    values: object
    kv_bytes: int
    tolerance: float = 0.0
    flops: float = 0
    note: str = ""


def copies_for(kv_bytes, cold):
    return max(1, -(-COLD_BYTES // kv_bytes)) if cold else 1


def calls_over(call, copies):
    """``run(n)`` that calls ``call`` on the next copy each time."""
    turn = cycle(copies)

    def run(calls):
        for _ in range(calls):
            call(next(turn))

    return run


def to_heads(array, shape):
    """``[.., q_len, heads * head_dim]`` as ``[heads, q_len, head_dim]``."""
    rows = np.asarray(array).reshape(shape.q_len, shape.q_heads, shape.head_dim)
    return rows.transpose(1, 0, 2)
