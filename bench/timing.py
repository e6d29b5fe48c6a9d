"""Timing in turns: every rival runs once a round, in an order that changes."""

import math
import random
import time
from dataclasses import dataclass, field

import numpy as np

TARGET_SECONDS = 0.025
MAX_CALLS = 32
FAST_ROUNDS, QUICK_ROUNDS, SLOW_ROUNDS = 15, 5, 3
SLOW_SECONDS = 0.5
# OpenMP, ONNX Runtime and BLAS threads spin on after a call; let them fall asleep.
SETTLE_SECONDS = 0.03


@dataclass
class Runner:
    """Something that makes ``calls`` calls in ``run(calls)``, and its samples."""

    name: str
    run: object
    calls: int = 1
    rounds: int = FAST_ROUNDS
    seconds: list = field(default_factory=list)

    def sample(self):
        start = time.perf_counter()
        self.run(self.calls)
        self.seconds.append((time.perf_counter() - start) / self.calls)


def seconds_of(run, calls=1):
    start = time.perf_counter()
    run(calls)
    return (time.perf_counter() - start) / calls


def calls_for(call_seconds):
    """Calls a sample, so that a sample is long against the clock and wake-ups."""
    return max(1, min(MAX_CALLS, math.ceil(TARGET_SECONDS / call_seconds)))


def rounds_for(call_seconds, fast_rounds):
    return SLOW_ROUNDS if call_seconds > SLOW_SECONDS else fast_rounds


def turns(rounds, total):
    """The ``rounds`` of ``total`` in which a runner takes part, evenly spread."""
    return {i * total // rounds for i in range(min(rounds, total))}


def run_in_turns(runners, settle=SETTLE_SECONDS, on_sample=lambda runner: None):
    """Sample every runner as often as it asks for, all of them interleaved."""
    total = max((runner.rounds for runner in runners), default=0)
    schedule = [(runner, turns(runner.rounds, total)) for runner in runners]
    order = random.Random(0)
    for number in range(total):
        present = [runner for runner, chosen in schedule if number in chosen]
        order.shuffle(present)
        for runner in present:
            time.sleep(settle)
            runner.sample()
            on_sample(runner)


def summary(seconds):
    """Median and the 10th and 90th percentile, in seconds."""
    p10, median, p90 = np.percentile(seconds, (10, 50, 90))
    return {"median_s": float(median), "p10_s": float(p10), "p90_s": float(p90)}
