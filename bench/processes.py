"""Runs child.py: memory peaks of prefill, and one thread against two."""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import numpy as np
from cases import MAIN_FORMATS, Entry, Group, Shape
from child import SCRIPT

MEMORY_LENGTHS = (4096, 8192, 16384, 32768)


def command(task, entry):
    return [sys.executable, str(SCRIPT), task, json.dumps(asdict(entry))]


def environment(threads):
    return {**os.environ, "MLX_QUANTIZED_SDPA_THREADS": str(threads)}


def memory_entries(quick):
    """mlx-lm's path in float32 only: in half precision it takes many minutes."""
    lengths = (1024, 4096) if quick else MEMORY_LENGTHS
    for kv_len in lengths:
        shape = Shape(q_len=64 if quick else 512, kv_len=kv_len, dtype="float32")
        for name in MAIN_FORMATS:
            yield Entry("fused", shape, name)
        yield Entry("mlx_lm_quantized", shape, "affine8")


def measure_memory(entry, threads):
    """The child's findings; RuntimeError with its last words where it failed."""
    done = subprocess.run(
        command("memory", entry),
        env=environment(threads),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"exit status {done.returncode}")
    return json.loads(done.stdout)


class Served:
    """A child that times one call each time it is asked."""

    def __init__(self, entry, threads):
        self.process = subprocess.Popen(
            command("serve", entry),
            env=environment(threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if self.process.stdout.readline().strip() != "ready":
            lines = self.process.stderr.read().strip().splitlines()
            raise RuntimeError(lines[-1] if lines else "the child gave no answer")

    def seconds(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def thread_entries(quick):
    shape = Shape(kv_len=4096 if quick else 16384)
    return [Entry("fused", shape, name) for name in MAIN_FORMATS]


def measure_threads(entry, rounds):
    """Medians of one thread and two, asked in turns."""
    served = {threads: Served(entry, threads) for threads in (1, 2)}
    samples = {threads: [] for threads in served}
    for _ in range(rounds):
        for threads, child in served.items():
            samples[threads].append(child.seconds())
    for child in served.values():
        child.close()
    one, two = (float(np.median(samples[threads])) for threads in (1, 2))
    return {"one_thread_s": one, "two_threads_s": two, "speedup": one / two}


def memory_group(quick):
    return Group("memory", tuple(memory_entries(quick)))


def thread_group(quick):
    return Group("threads", tuple(thread_entries(quick)))
