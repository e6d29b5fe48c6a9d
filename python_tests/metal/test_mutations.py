"""L5: every fault planted in the kernels is noticed."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import kernel_text
import pytest
from mutations import MUTATIONS

HERE = Path(__file__).parent
# Runs the cases on the text that the number's fault is planted in.
RUN = """
import sys
sys.path[:0] = {paths!r}
from rig import fake
import cases
from mutations import MUTATIONS
mutation = MUTATIONS[{number}]
metal = fake.Metal("checked")
metal.plant({number})
makes = dict(cases.all_cases())
for name in mutation.cases:
    try:
        cases.check(makes[name])
        wrong = metal.complaints()
    except Exception as error:
        wrong = str(error)
        wrong = metal.complaints() + wrong
    if wrong:
        print("CAUGHT|" + name + "|" + wrong.strip().splitlines()[0])
        if ":" in wrong and len(wrong.strip().splitlines()) > 1:
            print("MORE|" + wrong.strip().splitlines()[1])
        sys.exit()
print("MISSED")
"""


def attempt(number):
    """What noticed a fault; empty where nothing did."""
    paths = [str(HERE), str(HERE.parent)]
    run = subprocess.run(
        [sys.executable, "-c", RUN.format(paths=paths, number=number)],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    lines = [line for line in run.stdout.splitlines() if "|" in line]
    if lines:
        return " ".join(line.split("|", 1)[1] for line in lines)
    if "MISSED" in run.stdout:
        return ""
    # A fault may end the process, but not before the kernels are compiled.
    assert run.returncode < 0, run.stderr[-2000:]
    return f"signal {-run.returncode}"


def kind(found):
    for word in ("RACE", "OUT OF BOUNDS", "UNINITIALISED", "DIVERGENT", "signal"):
        if word in found:
            return word
    return "wrong result"


@pytest.mark.parametrize("number", range(len(MUTATIONS)))
def test_fault_is_noticed(metal, number, record_property):
    mutation = MUTATIONS[number]
    found = attempt(number)
    print(f"| {mutation.what} | {kind(found)} | {found[:110]} |")
    record_property("planted fault noticed as", kind(found))
    assert found, f"{mutation.what}: no case of {mutation.cases} noticed it"


def test_there_are_enough_faults():
    assert len(MUTATIONS) >= 30
    assert not [n for n, c in Counter(m.what for m in MUTATIONS).items() if c > 1]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_fault_can_be_planted(mutation):
    text = kernel_text.kernels()
    assert mutation.apply(text) != text


def test_defects_of_the_readme():
    """The faults and tests that its table names are there."""
    table = (HERE / "README.md").read_text().split("## Defects")[1]
    faults = set(re.findall(r'"([a-z][^"]{9,})"', table))
    assert len(faults) > 10 and faults <= {m.what for m in MUTATIONS}
    files = [*HERE.glob("test_*.py"), *HERE.parent.glob("test_*.py")]
    text = "".join(file.read_text() for file in files)
    for name in re.findall(r"`(test_\w+)`", table):
        assert f"def {name}(" in text, name
