#!/usr/bin/env python3
"""Steps of decoding over caches that live random lives, checked every 1000.

    scripts/soak.py --steps 1000000 --record bench/results/soak.json

Stops at the first wrong answer, or where memory is not flat to the byte. The record is
brought up to date as it runs, so that a run may be ended at any time.
"""

import argparse
import sys
import time
from pathlib import Path

import mlx.core as mx
import record
from tqdm import tqdm

TESTS = record.ROOT / "python_tests"
sys.path.insert(0, str(TESTS))

import soak  # noqa: E402


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100000)
    parser.add_argument("--every", type=int, default=1000, help="steps between checks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="JSON file to write")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    mx.set_default_device(mx.cpu)
    origin, start = record.origin(), time.monotonic()
    with tqdm(total=arguments.steps, unit="step", mininterval=10) as bar:

        def report(run):
            bar.update(run.steps - bar.n)
            if arguments.record:
                contents = {
                    **origin,
                    "seed": arguments.seed,
                    "steps": run.steps,
                    "by_cache": run.counts,
                    "checks": run.checks,
                    "refused_by_a_full_pool": run.refused,
                    "idle_bytes": run.flat,
                    "seconds": round(time.monotonic() - start, 1),
                }
                record.write(arguments.record, contents)

        done = soak.run(
            arguments.steps,
            report=report,
            seed=arguments.seed,
            check_every=arguments.every,
        )
    print(f"{done.steps} steps, {done.checks} answers compared, {done.flat} bytes idle")


if __name__ == "__main__":
    main()
