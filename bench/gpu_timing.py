"""Seconds that one call takes on a GPU, apart from what a run of calls costs once."""

import statistics
import time
from dataclasses import dataclass

LEAST_CALLS, MOST_CALLS = 8, 1024
LEAST_SECONDS, MOST_SECONDS = 0.01, 0.25
# Of the median, from the 10th to the 90th percentile.
SPREAD = 0.05


@dataclass(frozen=True)
class Timed:
    """Seconds a call: median, 10th and 90th percentile; calls of the shorter runs."""

    median: float
    low: float
    high: float
    calls: int


def seconds_a_call(sample, rounds, least_seconds=LEAST_SECONDS):
    """Time of one call, where ``sample(n)`` gives the seconds of n calls in a row.

    It is (t(2n) - t(n)) / n: waking the device and encoding the first calls, while it
    has nothing to do, are in both and cancel. n grows until that stands out of noise.
    """
    sample(1)
    n = LEAST_CALLS if least_seconds else 1
    while n < MOST_CALLS and sample(n) < least_seconds:
        n *= 2
    while True:
        pairs = [(sample(n), sample(2 * n)) for _ in range(rounds)]
        found = sorted((twice - once) / n for once, twice in pairs)
        median, tenth = statistics.median(found), len(found) // 10
        low, high = found[tenth], found[-1 - tenth]
        steady = not least_seconds or high - low <= SPREAD * median
        longest = statistics.median(twice for _, twice in pairs)
        if median > 0 and steady or 2 * n > MOST_CALLS or longest > MOST_SECONDS:
            break
        n *= 2
    if median <= 0:
        raise RuntimeError(f"{n} calls take no time that stands out of noise")
    return Timed(median, low, high, n)


def chain_sampler(evaluate, call, q, copies):
    """Calls that each take the result of the one before, and a copy of the cache."""

    def sample(n):
        x = q
        for i in range(n):
            x = call(x, *copies[i % len(copies)])
        # Nothing has run yet: the clock starts when the graph stands.
        start = time.perf_counter()
        evaluate(x)
        return time.perf_counter() - start

    return sample
