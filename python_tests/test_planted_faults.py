"""Every fault can be planted; a few of those that need no build are noticed."""

from collections import Counter

import planting
import pytest
from planted_faults import FAULTS

SOME = (
    "the first tokens are evicted",
    "a shared block is not copied before it is written",
    "a block that was copied stays held",
    "the signs of a rotation are not undone",
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_fault_can_be_planted(fault):
    path, text = fault.plant()
    assert text != (planting.ROOT / path).read_text()
    if path.suffix == ".py":
        compile(text, path, "exec")


def test_there_are_enough_faults():
    assert len(FAULTS) >= 40
    assert not [what for what, n in Counter(f.what for f in FAULTS).items() if n > 1]
    folders = Counter(fault.file.split("/quantized_sdpa")[0] for fault in FAULTS)
    assert folders["overlay/mlx/backend/cpu"] >= 12
    assert folders["overlay/mlx/backend/cuda"] >= 10
    assert folders["python/mlx_quantized_sdpa"] >= 12


@pytest.mark.parametrize("what", SOME)
def test_fault_is_noticed(what):
    (fault,) = (fault for fault in FAULTS if fault.what == what)
    assert planting.Workshop().attempt(fault)


def test_a_fault_that_does_no_harm_survives():
    harmless = planting.Fault(
        "harmless",
        "python/mlx_quantized_sdpa",
        "return -(-length // block_size)",
        "return (length + block_size - 1) // block_size",
        "test_blocks.py::TestTables",
        "def blocks_for(",
    )
    assert planting.Workshop().attempt(harmless) == ""


def test_text_that_is_not_there_once_is_refused(tmp_path):
    (tmp_path / "some.py").write_text("twice\ntwice\n")
    for text, count in (("no such text", 0), ("twice", 2)):
        fault = planting.Fault("x", "some.py", text, "", "")
        with pytest.raises(ValueError, match=f"x: the text is there {count} times"):
            fault.plant(tmp_path)
