#!/usr/bin/env python3
"""Draws calls of the op and checks each against float64.

    scripts/fuzz.py --calls 10000 --device gpu --record bench/results/fuzz.jsonl

Stops at the first failure, which hypothesis shrinks and prints.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx_quantized_sdpa
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
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--label", default="", help="what the record says of the build")
    parser.add_argument("--record", type=Path, help="JSON lines file to append to")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    mx.set_default_device(mx.gpu if arguments.device == "gpu" else mx.cpu)
    counts = dict.fromkeys(PARTS, 0)
    start, seed = time.monotonic(), arguments.seed
    with tqdm(total=arguments.calls, unit="call") as bar:
        while bar.n < arguments.calls:
            for name, (_, _, share) in PARTS.items():
                count = ROUND * share // 100
                run_part(name, count, seed)
                counts[name] += count
                bar.update(count)
            seed += 1
    record = {
        "calls": counts,
        "device": arguments.device,
        "label": arguments.label,
        "version": mlx_quantized_sdpa.__version__,
        "mlx": mx.__version__,
        "first_seed": arguments.seed,
        "rounds": seed - arguments.seed,
        "seconds": round(time.monotonic() - start, 1),
    }
    print(json.dumps(record))
    if arguments.record:
        with arguments.record.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
