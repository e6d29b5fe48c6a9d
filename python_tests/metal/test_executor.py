"""The executor and the detector themselves, on one small kernel a feature."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from rig import executor, library

FEATURES = Path(__file__).parent / "kernels" / "features.metal"


@cache
def features(mode="checked", fault=0):
    text = f"#define FAULT {fault}\n" + FEATURES.read_text()
    return executor.Library(library.compile_library(library.Text(text), mode))


def to_bfloat(x):
    bits = np.float32(x).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat(x):
    return (x.astype(np.uint32) << 16).view(np.float32)


def sum_rows(name, x, n, mode="checked", fault=0, negate=False, **device):
    y = np.full(len(x), np.nan, np.float32)
    buffers = {0: x, 1: y, 2: np.int32([n])}
    if negate:
        buffers[3] = x[0, :1].copy()
    counts = features(mode, fault).launch(
        name,
        buffers,
        groups=(len(x), 1, 1),
        threads=(32, 4, 1),
        constants={"negate": negate, "offset": 2},
        device=executor.Device(**device),
    )
    return y, counts


@pytest.mark.parametrize("mode", ["plain", "checked", "coverage"])
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sums_of_rows(mode, order, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((5, 300)).astype(np.float32)
    for name, data, values in (
        ("row_sum_float", x, x),
        ("row_sum_half", x.astype(np.float16), x.astype(np.float16)),
        ("row_sum_bfloat", to_bfloat(x), from_bfloat(to_bfloat(x))),
    ):
        y, counts = sum_rows(name, data, 300, mode, order=order, seed=seed)
        expected = 2 + values.astype(np.float64).sum(1)
        np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5)
        assert counts.threadgroup_barriers == 5
        assert counts.simd_ops == 5 * 5
        assert counts.threadgroup_bytes == 16


def test_function_constants_turn_arguments_on():
    x = np.ones((2, 128), np.float32)
    y, _ = sum_rows("row_sum_float", x, 128, negate=True)
    np.testing.assert_array_equal(y, 2 + 1 - 128)


def test_counts_of_loads():
    x = np.ones((2, 256), np.float16)
    _, counts = sum_rows("row_sum_half", x, 256, count_loads=True)
    read = counts.buffers[0]
    assert read.lane_loads == 512 and list(read.loads_by_width) == [0, 512, 0, 0, 0]
    assert read.lane_load_bytes == read.simdgroup_load_bytes == 1024
    assert read.distinct_load_bytes == 1024
    # The length is one load for 32 lanes.
    assert counts.buffers[2].simdgroup_load_bytes < counts.buffers[2].lane_load_bytes
    assert counts.buffers[1].lane_store_bytes == 8


FAULTS = {
    1: "OUT OF BOUNDS: write of 4 bytes of threadgroup array",
    2: "OUT OF BOUNDS: read of 2 bytes of buffer 0",
    3: "UNINITIALISED: read of 4 bytes of threadgroup array",
    4: "RACE: ",
    5: "DIVERGENT: ",
    6: "read of 4 bytes of threadgroup array",
    7: "DIVERGENT: ",
    8: "RACE: write of 4 bytes of buffer 1",
    9: "RACE BETWEEN GROUPS: write of 4 bytes of buffer 1",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_detector_finds(fault, seed):
    x = np.ones((3, 256), np.float16)
    with pytest.raises(executor.Failure) as failure:
        sum_rows("row_sum_half", x, 256, fault=fault, seed=seed)
    assert FAULTS[fault] in str(failure.value)
    assert fault in (5, 7) or ".metal:" in str(failure.value)


def test_read_of_what_no_kernel_wrote():
    """A buffer that kernels write holds nothing until they do."""
    device = executor.Device()
    x, y = np.ones((2, 128), np.float32), np.zeros(2, np.float32)
    run = features().launch
    shape = {"groups": (2, 1, 1), "threads": (32, 4, 1), "device": device}
    shape["constants"] = {"negate": False, "offset": 0}
    run("row_sum_float", {0: x, 1: y, 2: np.int32([128])}, **shape)
    z = np.zeros(2, np.float32)
    run("row_sum_float", {0: y, 1: z, 2: np.int32([1])}, **shape)
    np.testing.assert_array_equal(z, [128, 128])
    device.written[id(y)][4:] = 0
    with pytest.raises(executor.Failure, match="UNINITIALISED"):
        run("row_sum_float", {0: y, 1: z, 2: np.int32([1])}, **shape)


def test_operations_of_a_simdgroup():
    x = np.random.default_rng(0).uniform(0.5, 1.5, 32).astype(np.float32)
    y = np.zeros((24, 32), np.float32)
    features().launch(
        "lane_operations",
        {0: x, 1: y},
        groups=(1, 1, 1),
        threads=(32, 1, 1),
        constants={"negate": False, "offset": 0},
    )
    lane = np.arange(32)
    quads = x.reshape(8, 4)
    ones = np.ones(32)
    expected = [
        x.sum() * ones,
        x.prod() * ones,
        x.min() * ones,
        x.max() * ones,
        np.cumsum(x),
        np.cumsum(x) - x,
        x[::-1],
        x[lane ^ 5],
        np.concatenate([x[3:], -x[:3]]),
        np.concatenate([-x[-3:], x[:-3]]),
        np.roll(x, -3),
        np.roll(x, 3),
        x[7] * ones,
        x[0] * ones,
        np.repeat(quads.sum(1), 4),
        np.repeat(quads.max(1), 4),
        x[lane ^ 1],
        (int((x > 1).any()) + 2 * int((x > 0).all())) * ones,
        (x > 1).sum() * ones,
        x.astype(np.float16).astype(np.float32).sum() * ones,
        (0 + 31 + np.bitwise_xor.reduce(lane)) * ones,
        3 * x.sum() * ones,
        x,
        x,
    ]
    np.testing.assert_allclose(y[19], expected[19], rtol=5e-3)
    y[19] = expected[19]
    np.testing.assert_allclose(y, expected, rtol=1e-5)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("type_", [np.float16, np.float32])
def test_matrices(type_, order):
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal((8, 8)).astype(type_) for _ in range(2))
    c = np.zeros((8, 8), np.float32)
    name = "matrices_half" if type_ == np.float16 else "matrices_float"
    counts = features().launch(
        name,
        {0: a, 1: b, 2: c},
        groups=(1, 1, 1),
        threads=(32, 1, 1),
        constants={"negate": False, "offset": 0},
        device=executor.Device(order=order),
    )
    a, b = a.astype(np.float64), b.astype(np.float64)
    np.testing.assert_allclose(c, a @ b.T + a, rtol=0, atol=4e-6)
    assert counts.mma == 2


def test_atomics_and_threadgroup_arguments():
    x = np.random.default_rng(2).integers(0, 8, 256).astype(np.uint32)
    counts, total = np.zeros(8, np.uint32), np.zeros(1, np.float32)
    device = executor.Device(seed=5)
    for array in (counts, total):
        device.written[id(array)] = np.ones(array.nbytes, np.uint8)
    features().launch(
        "histogram",
        {0: x, 1: counts, 2: total},
        groups=(4, 1, 1),
        threads=(64, 1, 1),
        constants={"negate": False, "offset": 0},
        threadgroup_bytes={0: 256},
        device=device,
    )
    np.testing.assert_array_equal(counts, np.bincount(x, minlength=8))
    assert total[0] == 128


def test_half_a_simdgroup_is_refused():
    with pytest.raises(executor.Failure, match="a threadgroup of 48 threads"):
        features().launch(
            "lane_operations",
            {},
            groups=(1, 1, 1),
            threads=(48, 1, 1),
            constants={"negate": False, "offset": 0},
        )


def test_denormals_are_flushed_on_demand():
    x = np.full((1, 128), 1e-40, np.float32)
    kept, _ = sum_rows("row_sum_float", x, 128, flush_denormals=False)
    text = FEATURES.read_text().replace("offset + (", "1e30f * (")
    found = []
    for flush in (True, False):
        y = np.zeros(1, np.float32)
        executor.Library(library.compile_library(library.Text(text), "plain")).launch(
            "row_sum_float",
            {0: x, 1: y, 2: np.int32([128])},
            groups=(1, 1, 1),
            threads=(32, 4, 1),
            constants={"negate": False, "offset": 0},
            device=executor.Device(flush_denormals=flush),
        )
        found.append(y[0])
    assert found[0] == 0 and found[1] > 1e-9 and kept[0] == 2
