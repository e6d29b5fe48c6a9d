#!/usr/bin/env python3
"""Plants every fault of python_tests/planted_faults.py and prints what noticed it.

    scripts/mutate.py -j 2 --record bench/results/mutation.json
    scripts/mutate.py window         # those with this word in their name or file

Fails where a fault stays unnoticed, cannot be planted, or where a test that must
notice one fails without it. Expects the installed package and its build tools.
"""

import argparse
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import record

TESTS = record.ROOT / "python_tests"
sys.path.insert(0, str(TESTS))

import planting  # noqa: E402
from planted_faults import FAULTS  # noqa: E402


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="plant only what has one of them")
    parser.add_argument("-j", "--jobs", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=record.ROOT / "build" / "mutate")
    parser.add_argument("--record", type=Path, help="JSON file to write")
    return parser.parse_args()


def wanted(words):
    def matches(fault):
        text = f"{fault.what} {fault.file} {fault.test}".lower()
        return any(word.lower() in text for word in words)

    return [fault for fault in FAULTS if not words or matches(fault)]


def outcome(workshop, fault):
    how, seconds = planting.timed(workshop, fault)
    where, _ = fault.plant()
    print(f"| {fault.what} | {where.name} | {how or 'SURVIVED'} | {fault.test} |")
    sys.stdout.flush()
    return {
        "what": fault.what,
        "file": str(where),
        "test": fault.test,
        "noticed": how,
        "seconds": seconds,
    }


def area(file):
    """What a fault of this file is counted under."""
    if file.startswith("python/"):
        return "caches"
    return "cuda" if "/cuda/" in file else "cpu"


def summary(faults, found):
    """Of `faults`, those that were planted so far."""
    return {
        "faults": len(faults),
        "planted": len(found),
        "noticed": sum(bool(each["noticed"]) for each in found),
        "planted_by_area": Counter(area(each["file"]) for each in found),
        "seconds": round(sum(each["seconds"] for each in found), 1),
        "each": found,
    }


def main():
    arguments = parse_arguments()
    faults = wanted(arguments.words)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    workshop = planting.Workshop(arguments.folder)
    for emulated, build in workshop.builds.items():
        if any(fault.is_built(emulated) for fault in faults):
            build.make()
    if said := workshop.failing(faults):
        sys.exit(f"{said}\nthese tests fail without a fault")
    print("| fault | file | noticed | by |\n|---|---|---|---|", flush=True)
    origin, found = record.origin(), []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for each in pool.map(partial(outcome, workshop), faults):
            found.append(each)
            if arguments.record:
                record.write(arguments.record, {**origin, **summary(faults, found)})
    survivors = [each["what"] for each in found if not each["noticed"]]
    print(f"{len(found) - len(survivors)} of {len(found)} faults noticed")
    if survivors:
        sys.exit("not noticed: " + "; ".join(survivors))


if __name__ == "__main__":
    main()
