"""Counts of what was run, kept in bench/results for the pages made from them."""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import machine  # noqa: E402

RESULTS = ROOT / "bench" / "results"


def origin():
    """Where a record comes from: device, versions and commit."""
    found = {name: text for name, text in machine.versions().items() if text}
    return {
        "device": machine.device_name(),
        "versions": {k: found[k] for k in ("python", "mlx", "mlx-quantized-sdpa")},
        "commit": machine.commit(),
    }


def write(path, contents):
    """Replace the file as a whole."""
    path = Path(path)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(contents, indent=2) + "\n")
    os.replace(partial, path)


def keep_run(path, run):
    """Put `run` into the list in the file, in the place of one with its label."""
    path = Path(path)
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    others = [each for each in runs if each["label"] != run["label"]]
    write(path, {"runs": sorted([*others, run], key=lambda each: each["label"])})
