"""Time the op on the CPU against MLX, mlx-lm, PyTorch, ONNX Runtime and llama.cpp.

    python bench/cpu_bench.py            # the whole suite
    python bench/cpu_bench.py --quick    # a few minutes: does it work, roughly how fast
    python bench/cpu_bench.py --only 'decode-bfloat16'
    python bench/cpu_bench.py --only 'threads' --update  # recorded anew, the rest stays

Every result is first checked against float64 attention on the values that this very
rival stores; a wrong one is not timed. The exit status is 1 if the op is missing,
wrong, or slower than the best of stock MLX on any shape.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

from records import written_whole

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results/cpu.jsonl"
METHOD = """\
Times are medians of one call, all lines of a group taken in turns. MLX's lines, the
op's too, are the share of one call in one mx.eval of several independent calls, for
evaluating any single op costs a wake-up of MLX's threads: see "(one call)" and
mlx_add. The others are calls in a loop. Unless --warm is given, calls read copies of
the cache in turn, so that it comes from memory, as the layers of a model do."""


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few shapes and rounds")
    parser.add_argument("--only", default="", help="regular expression on group names")
    parser.add_argument("--list", action="store_true", help="print the groups and stop")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="rounds of a fast rival")
    parser.add_argument(
        "--warm",
        action="store_true",
        help="one copy of each cache, which may stay in the last-level cache",
    )
    parser.add_argument(
        "--max-call-seconds",
        type=float,
        default=30.0,
        help="leave out a rival whose call is expected to take longer",
    )
    parser.add_argument(
        "--update",
        action="store_true",
        help="replace the groups that are run in bench/results/cpu.jsonl",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="JSON lines; default: bench/results/cpu.jsonl, of a part of the suite "
        "build/cpu_bench.jsonl",
    )
    return parser.parse_args()


def results_path(arguments):
    """A partial run does not overwrite the recorded results."""
    partial = arguments.quick or arguments.only or arguments.warm
    default = BENCH.parent / "build/cpu_bench.jsonl"
    path = arguments.out or (default if partial else RESULTS)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def update_results(records):
    """Put the groups of ``records`` in the place of those recorded before."""
    new = {record["group"] for record in records}
    old = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    kept = [record for record in old if record["group"] not in new]
    lines = [json.dumps(record) + "\n" for record in kept + records]
    RESULTS.write_text("".join(lines))


def limit_threads(threads):
    """Libraries read these when they are loaded, so before any import of one."""
    for name in ("OMP", "OPENBLAS", "MLX_QUANTIZED_SDPA"):
        suffix = "THREADS" if name.startswith("MLX") else "NUM_THREADS"
        os.environ[f"{name}_{suffix}"] = str(threads)


def main():
    arguments = parse_arguments()
    if arguments.update and (arguments.quick or arguments.warm):
        sys.exit("--update takes whole groups, cold: without --quick and --warm")
    limit_threads(arguments.threads)
    from report import print_summary
    from suite import Suite, all_groups, run_groups

    every = all_groups(arguments.quick)
    chosen = [group for group in every if re.search(arguments.only, group.name)]
    if arguments.list:
        print("\n".join(f"{g.name}: {len(g.entries)} entries" for g in chosen))
        return 0
    path = results_path(arguments)
    with written_whole(path) as file:

        def write(record):
            file.write(json.dumps(record) + "\n")
            file.flush()

        suite = Suite(arguments, write)
        print(f"{suite.origin}\n\n{METHOD}")
        run_groups(suite, chosen)
    print(f"\nRecords: {path}")
    if arguments.update:
        update_results(suite.records)
    return print_summary(suite.records)


if __name__ == "__main__":
    sys.exit(main())
