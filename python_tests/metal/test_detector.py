"""L3: no race, no access out of bounds, nothing read before it is written.

Every load path and every barrier is on the way of a case; the last test shows it.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import cases
import kernel_text
import pytest

from rig import executor, fake
from rig.toolchain import sanitizer_runtime

CASES = dict(cases.all_cases())
HERE = Path(__file__).parent


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_no_fault(metal, name, order):
    """In order, then by random schedules and other orders of sums."""
    metal.mode("checked")
    metal.set(seed=order, order=order)
    cases.check(CASES[name])
    assert not metal.complaints()
    kernel = "quantized_sdpa_" + name.split(",")[0]
    launched = [launch["kernel"] for launch in metal.launches()]
    if "no keys" not in name:
        assert launched[0].startswith(kernel)
    assert len(launched) == (2 if "splits" in name else 1)


def test_denormals_may_be_flushed(metal):
    metal.mode("plain")
    for flush in (0, 1):
        metal.set(flush_denormals=flush, seed=0, order=0)
        for name in ("vector, bool mask", "steel, bool mask", "vector, splits"):
            cases.check(CASES[name])
    assert not metal.complaints()


RUN_ALL = """
import sys
sys.path[:0] = {paths!r}
from rig import fake
metal = fake.Metal({mode!r})
import cases
for name, make in cases.all_cases():
    if {names!r} and name not in {names!r}:
        continue
    print(name, flush=True)
    cases.check(make)
complaints = metal.complaints()
assert not complaints, complaints
"""


def run_all(mode, tail="", names=(), **environment):
    paths = [str(HERE), str(HERE.parent)]
    code = RUN_ALL.format(paths=paths, mode=mode, names=names) + tail
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


# Every way to load codes, scales, masks and tables; instances compile slowly.
SANITIZED = (
    "vector, splits with sinks",
    "vector, causal window",
    "vector, pages",
    "vector, codes with gaps",
    "vector, shared words",
    "vector, codebook of V",
    "steel, ragged rows",
    "steel, lengths and padding",
    "steel, codebook of K",
    "steel, bool mask",
)


@pytest.mark.parametrize("kernel", ["vector", "steel"])
def test_sanitizers_find_nothing(metal, kernel):
    """AddressSanitizer and UndefinedBehaviorSanitizer."""
    names = [name for name in SANITIZED if name.startswith(kernel)]
    assert len(names) >= 4 and CASES.keys() >= set(names)
    run = run_all(
        "sanitized",
        names=names,
        LD_PRELOAD=sanitizer_runtime("asan"),
        ASAN_OPTIONS="detect_leaks=0",
    )
    assert run.returncode == 0, run.stderr[-4000:]


def statements(report):
    """Lines of the kernels, whether any instance ran them."""
    flags = {}
    for line in filter(None, report.splitlines()):
        flag, file, offset = line.split()
        flags.setdefault(file, {})[offset] = flag == "1"
    ran = {}
    for file, hits in flags.items():
        for place, hit in zip(executor.source_lines(file, list(hits)), hits.values()):
            found = re.match(r"[0-9a-f]+\.metal:(\d+):", place)
            if found:
                number = int(found[1])
                ran[number] = ran.get(number, False) or hit
    return ran


def test_cases_reach_every_branch(metal, record_property):
    tail = (
        "import ctypes\nfrom rig import executor\n"
        "executor.machine().msl_coverage.restype = ctypes.c_char_p\n"
        "print('COVERAGE')\nprint(executor.machine().msl_coverage().decode())\n"
    )
    run = run_all("coverage", tail)
    assert run.returncode == 0, run.stderr[-4000:]
    ran = statements(run.stdout.split("COVERAGE\n")[1])
    text = kernel_text.kernels().splitlines()
    missed = [f"{n}: {text[n - 1]}" for n, hit in sorted(ran.items()) if not hit]
    record_property("branching lines that ran", f"{sum(ran.values())} of {len(ran)}")
    assert len(ran) > 200
    assert not missed, "\n".join(missed)


def test_the_package_is_the_fake_one(metal):
    from mlx_quantized_sdpa import _ext

    assert str(fake.PACKAGE) in _ext.__file__
