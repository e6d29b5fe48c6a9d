#!/usr/bin/env python3
"""Draws calls of the op and checks each against float64.

    scripts/fuzz.py --calls 10000 --device gpu --record bench/results/fuzz.json

Stops at the first failure, which hypothesis shrinks and prints. The record is brought
up to date after every round, so that a run may be ended at any time.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import mlx.core as mx
import record
from tqdm import tqdm

TESTS = Path(__file__).resolve().parent.parent / "python_tests"
sys.path.insert(0, str(TESTS))

from test_quantized_sdpa_fuzz import PARTS, run_part  # noqa: E402

# Hypothesis keeps what it has drawn, so a run is cut into rounds.
ROUND = 500


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("-j", "--jobs", type=int, default=2, help="processes")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--label", default="cpu", help="of the run in the record")
    parser.add_argument("--record", type=Path, help="JSON file; see record.keep_run")
    return parser.parse_args()


def fuzz_round(device, seed):
    """All parts once, drawn from one seed; the calls of each."""
    mx.set_default_device(mx.gpu if device == "gpu" else mx.cpu)
    counts = {name: ROUND * share // 100 for name, (_, _, share) in PARTS.items()}
    for name, count in counts.items():
        run_part(name, count, seed)
    return counts


def rounds_in_turn(arguments):
    """The calls of each round, in the order of their seeds."""
    seeds = range(arguments.seed, arguments.seed + -(-arguments.calls // ROUND))
    # NumPy's threads would only wait for each other; the op's belong to the test.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # MLX's threads do not live through a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, context) as pool:
        yield from pool.map(partial(fuzz_round, arguments.device), seeds)


def main():
    arguments = parse_arguments()
    run = {
        "label": arguments.label,
        "backend": arguments.device,
        **record.origin(),
        "first_seed": arguments.seed,
        "rounds": 0,
        "calls": dict.fromkeys(PARTS, 0),
    }
    start = time.monotonic()
    with tqdm(total=arguments.calls, unit="call", mininterval=10) as bar:
        for counts in rounds_in_turn(arguments):
            run["calls"] = {name: run["calls"][name] + counts[name] for name in PARTS}
            run["rounds"] += 1
            run["total"] = sum(run["calls"].values())
            run["seconds"] = round(time.monotonic() - start, 1)
            bar.update(run["total"] - bar.n)
            if arguments.record:
                record.keep_run(arguments.record, run)
    print(json.dumps(run))


if __name__ == "__main__":
    main()
