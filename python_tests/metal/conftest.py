"""What the tests of the Metal kernels share."""

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from rig import fake  # noqa: E402


def pytest_configure(config):
    # With xdist the controller comes first, and it alone builds.
    if not hasattr(config, "workerinput"):
        fake.build()


def pytest_terminal_summary(terminalreporter):
    """What tests recorded: how many branches ran, how planted faults were noticed."""
    reports = terminalreporter.stats.get("passed", [])
    found = Counter(p for r in reports for p in r.user_properties)
    for (name, value), count in sorted(found.items()):
        terminalreporter.write_line(
            f"{name}: {value}" + f", {count} times" * (count > 1)
        )


@pytest.fixture(scope="session")
def loaded_metal():
    return fake.Metal()


@pytest.fixture
def metal(loaded_metal):
    """The op's Metal half on the executor, with default settings."""
    loaded_metal.mode("plain")
    loaded_metal.set(seed=0, order=0, flush_denormals=1, count_loads=0)
    loaded_metal.complaints()
    loaded_metal.launches()
    return loaded_metal
