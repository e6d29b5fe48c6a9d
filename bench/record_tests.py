"""What the test suites last said, as bench/results/tests.json.

`make test`, with and without SAN=, `make test-metal`, `make test-cuda` and
`make test-cuda-wheel` leave their reports in build/junit; this counts them by suite and
file.
"""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import machine

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "build" / "junit"
OUTCOMES = {"failure": "failed", "error": "failed", "skipped": "skipped"}


def count(report):
    """Tests of each file of a suite, by outcome."""
    files = {}
    for case in ElementTree.parse(report).iter("testcase"):
        # Such as python_tests.metal.test_detector.TestRaces: up to the module.
        parts = case.get("classname", "").removeprefix("python_tests.").split(".")
        modules = [part for part in parts if not part[:1].isupper()]
        outcomes = [OUTCOMES[x.tag] for x in case if x.tag in OUTCOMES]
        found = files.setdefault(
            ".".join(modules), {"passed": 0, "failed": 0, "skipped": 0}
        )
        found[outcomes[0] if outcomes else "passed"] += 1
    return dict(sorted(files.items()))


def main():
    reports = sorted(REPORTS.glob("*.xml"))
    if not reports:
        sys.exit("build/junit has no reports: make test test-metal test-cuda")
    record = {
        "device": machine.device_name(),
        "commit": machine.commit(),
        "suites": {report.stem: count(report) for report in reports},
    }
    path = ROOT / "bench" / "results" / "tests.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
