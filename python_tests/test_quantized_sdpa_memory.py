"""Every large allocation of a call fails in turn: an error or the right result."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_quantized_sdpa_matrix import run_python

FAULTS = Path(__file__).parent / "faults"

SCRIPT = """
import ctypes, gc

import mlx.core as mx
from quantized_sdpa_reference import MXFP4, affine, check_output, make_case
from quantized_sdpa_reference import strided_columns

shim = ctypes.CDLL({shim!r})
shim.fail_allocation.argtypes = [ctypes.c_long, ctypes.c_size_t]
shim.count_allocations.restype = ctypes.c_long
# Kept buffers would serve a call without an allocation.
mx.set_cache_limit(0)

def attempt(case, n):
    shim.fail_allocation(n, 4096)
    try:
        out = case.run(force_fused=True)
        mx.eval(out)
        return out, shim.count_allocations() >= n
    except RuntimeError as error:
        text = "bytes of memory are required; got none."
        assert str(error).endswith(text), error
        return None, True
    finally:
        shim.fail_allocation(0, 0)

# What a first call sets up; its thread has less memory than the others need.
mx.eval(make_case(T_kv=1, D=32, k=affine(4, 32)).run(force_fused=True))
shapes = (
    dict(T_q=1, T_kv=2000),
    dict(T_q=40, T_kv=90),
    dict(T_q=9, T_kv=600, dtype=mx.bfloat16, k=affine(8)),
    dict(T_q=9, T_kv=3000, k=MXFP4),
    dict(T_q=1, T_kv=200, layout=strided_columns),
)
errors = passed = 0
for shape in shapes:
    case = make_case(D=128, **shape)
    mx.eval([x for x in case.args if x is not None])
    expected = case.reference()[0]
    n, reached = 1, True
    while reached:
        out, reached = attempt(case, n)
        errors += out is None
        if out is not None:
            passed += reached
            check_output(out, expected, case.q.dtype)
        n += 1
    check_output(case.run(force_fused=True), expected, case.q.dtype)
print(errors, passed)
"""


THREADS = """
import ctypes, os

import mlx.core as mx
from quantized_sdpa_reference import check_output, make_case

case = make_case(T_kv=4096, D=64)
mx.eval([x for x in case.args if x is not None])
expected = case.reference()[0]

def n_threads():
    return len(os.listdir("/proc/self/task"))

before = n_threads()
if {shim!r}:
    ctypes.CDLL({shim!r}).allow_threads(ctypes.c_long({allowed}))
check_output(case.run(force_fused=True), expected, case.q.dtype)
print(n_threads() - before)
"""

on_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="the C library is not glibc"
)
without_sanitizer = pytest.mark.skipif(
    "san.so" in os.environ.get("LD_PRELOAD", ""),
    reason="a sanitizer's functions come first",
)


def compiled(name, folder):
    """The path of a library that comes before the C library."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "a C compiler is required"
    shim = folder / f"{name}.so"
    source = FAULTS / f"{name}.c"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", shim, source], check=True
    )
    return str(shim)


@on_linux
@without_sanitizer
@pytest.mark.parametrize("allowed", (0, 3))
def test_threads_that_cannot_be_had(allowed, tmp_path):
    """The call is done by those that there are."""
    shim = compiled("threads", tmp_path)
    found = run_python(
        "-c",
        THREADS.format(shim=shim, allowed=allowed),
        LD_PRELOAD=shim,
        MLX_QUANTIZED_SDPA_THREADS="8",
    )
    assert int(found) == allowed


@on_linux
def test_threads_are_as_many_as_cores_that_may_be_used():
    script = "import os\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    found = run_python("-c", script + THREADS.format(shim="", allowed=0))
    assert int(found) == 0


@on_linux
@without_sanitizer
def test_no_allocation_that_fails_ends_the_process(tmp_path):
    shim = compiled("allocations", tmp_path)
    # One thread: which of several comes first is no matter of the call.
    found = run_python(
        "-c",
        SCRIPT.format(shim=shim),
        LD_PRELOAD=shim,
        MLX_QUANTIZED_SDPA_THREADS="1",
    )
    errors, passed = map(int, found.split())
    # Of each call its result and what its threads share; a thread's own memory is
    # made up for.
    assert errors >= 10
    assert passed >= 2
