"""pytest -p fake_plugin: the op's own tests, with its Metal half on the executor.

METAL_MODE names how kernels are compiled, METAL_SEED and METAL_ORDER their schedule.
"""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from rig import fake  # noqa: E402

metal = None


def pytest_configure(config):
    global metal
    # With xdist the controller comes first, and it alone builds.
    if not hasattr(config, "workerinput"):
        fake.build()
    metal = fake.Metal(
        os.environ.get("METAL_MODE", "plain"),
        seed=os.environ.get("METAL_SEED", 0),
        order=os.environ.get("METAL_ORDER", 0),
    )


def fuses_on_metal(self, case):
    return self.fused and all(d % 16 == 0 and d <= 512 for d in case.head_dims)


def pytest_collection_finish():
    module = sys.modules.get("test_fast_quantized_sdpa")
    if module:
        module.QuantizedSDPATestCase.must_fuse = fuses_on_metal


@pytest.fixture(autouse=True)
def metal_has_no_complaint():
    """Every launch kept the contract between host and kernel."""
    import mlx.core as mx

    yield
    mx.synchronize()
    complaints = metal.complaints()
    assert not complaints, complaints
