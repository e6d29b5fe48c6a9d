"""The machine's own limits, timed in turns with everything else."""

import ctypes
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
from rivals.prepared import Prepared

READ_BYTES = 256 << 20
FMA_CHAINS, FMA_ROUNDS = 12, 2_000_000
FMA_SOURCE = """
#ifdef __AVX512F__
enum { width = 16 };
#else
enum { width = 8 };
#endif
typedef float vec __attribute__((vector_size(4 * width)));
/* Independent chains in registers; returns the floating-point operations made. */
double spin(long rounds) {
  vec x[CHAINS], scale = {0}, shift = {0};
  scale += 0.5f;
  shift += 1.0f;
  for (int i = 0; i < CHAINS; i++) x[i] = shift * (float)i;
  for (long n = 0; n < rounds; n++)
    for (int i = 0; i < CHAINS; i++) x[i] = x[i] * scale + shift;
  float sum = 0;
  for (int i = 0; i < CHAINS; i++) sum += x[i][0];
  return 2.0 * width * CHAINS * rounds + (sum < 0);
}
"""
MATMUL_SIZE = 1536


def in_threads(work, parts, pool):
    return list(pool.map(work, parts))


def read_bandwidth(entry, inputs, threads, cold):
    """The largest of many numbers: reads every byte, keeps nothing."""
    numbers = np.ones(READ_BYTES // 4, dtype=np.float32)
    parts = np.array_split(numbers, threads)
    pool = ThreadPoolExecutor(threads)

    def run(calls):
        for _ in range(calls):
            in_threads(np.max, parts, pool)

    return Prepared(run, None, None, READ_BYTES)


@lru_cache(maxsize=1)
def fma_library():
    """The FMA loop as a C function, or None on a machine without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fma.so"
        options = ["-O3", "-march=native", "-ffp-contract=fast", "-funroll-loops"]
        command = [compiler, *options, f"-DCHAINS={FMA_CHAINS}", "-shared", "-fPIC"]
        command += ["-x", "c", "-", "-o", str(library)]
        made = subprocess.run(command, input=FMA_SOURCE, text=True, capture_output=True)
        if made.returncode:
            return None
        spin = ctypes.CDLL(str(library)).spin
    spin.restype, spin.argtypes = ctypes.c_double, [ctypes.c_long]
    return spin


def fma_peak(entry, inputs, threads, cold):
    """A loop of multiply-adds in registers; without a compiler, a matrix product."""
    spin = fma_library()
    if spin is None:
        return matmul_peak()
    pool = ThreadPoolExecutor(threads)
    operations = spin(1) * FMA_ROUNDS * threads

    def run(calls):
        for _ in range(calls):
            in_threads(spin, [FMA_ROUNDS] * threads, pool)

    return Prepared(run, None, None, 0, flops=operations, note="FMA loop")


def matmul_peak():
    a = np.ones((MATMUL_SIZE, MATMUL_SIZE), dtype=np.float32)

    def run(calls):
        for _ in range(calls):
            a @ a

    return Prepared(run, None, None, 0, flops=2 * MATMUL_SIZE**3, note="numpy matmul")


RIVALS = {"read_bandwidth": read_bandwidth, "fma_peak": fma_peak}
