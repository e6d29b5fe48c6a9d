"""What every rival hands to the benchmark."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle
from pathlib import Path

import numpy as np

LAST_LEVEL = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
LEAST_COLD_BYTES = 96 << 20


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


@lru_cache(maxsize=1)
def cold_bytes():
    """Three times the last-level cache: copies of a KV cache that take so much and
    are read in turn come from memory, as those of a model's layers do."""
    if not LAST_LEVEL.exists():
        return LEAST_COLD_BYTES
    kilobytes = int(LAST_LEVEL.read_text().strip().removesuffix("K"))
    return max(LEAST_COLD_BYTES, 3 * kilobytes << 10)


def copies_for(kv_bytes, cold):
    return max(1, -(-cold_bytes() // kv_bytes)) if cold else 1


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
