"""L4: the executor runs MLX's own kernels alike from source and as Apple compiled them.

Both end bit for bit in the same results, which are those of float64 within rounding.
Apple's kernels come from MLX's wheel for macOS: the package index must be reachable.
"""

import numpy as np
import pytest
import stock
from stock import Shape

from rig import executor

TOLERANCE = {"float": 2e-6, "half": 2e-3, "bfloat": 2e-2}


def same_bits(ours, apples):
    assert len(ours) == len(apples)
    for x, y in zip(ours, apples):
        np.testing.assert_array_equal(
            np.ascontiguousarray(x).view(np.uint8),
            np.ascontiguousarray(y).view(np.uint8),
        )


def close(out, shape, mask=None):
    expected = stock.attend(*shape.arrays(), shape.scale, shape.causal, mask)
    error = np.abs(stock.values(out) - expected).max()
    assert error < TOLERANCE[shape.type] * np.abs(expected).max()


def type_name(type_):
    return {"half": "float16_t", "bfloat": "bfloat16_t"}.get(type_, type_)


@pytest.mark.parametrize(
    "shape",
    [
        Shape("float", 128, 1, 300),
        Shape("float", 128, 3, 300, causal=True),
        Shape("half", 128, 1, 517, n_q=8, batch=2),
        Shape("bfloat", 128, 1, 200),
        Shape("half", 64, 2, 129, causal=True),
    ],
    ids=str,
)
def test_vector(shape):
    dim = shape.dim
    name = f"sdpa_vector_{type_name(shape.type)}_{dim}_{dim}"
    ours = stock.from_source(
        stock.VECTOR, name, f"sdpa_vector, {shape.type}, {dim}, {dim}"
    )
    device = executor.Device(order=0)
    found = stock.run_vector(ours, name, shape, device)
    close(found[0], shape)
    same_bits(found, stock.run_vector(stock.from_apple(name), name, shape))


@pytest.mark.parametrize(
    "shape",
    [
        Shape("float", 128, 1, 1000, n_q=8),
        Shape("half", 128, 1, 1000, n_q=8, batch=2),
    ],
    ids=str,
)
def test_split(shape):
    kind, dim = type_name(shape.type), shape.dim
    names = (f"sdpa_vector_2pass_1_{kind}_{dim}_{dim}",)
    names += (f"sdpa_vector_2pass_2_{kind}_{dim}",)
    first = f"sdpa_vector_2pass_1, {shape.type}, {dim}, {dim}"
    second = f"sdpa_vector_2pass_2, {shape.type}, {dim}"
    ours = [
        stock.from_source(stock.VECTOR, names[0], first),
        stock.from_source(stock.VECTOR, names[1], second),
    ]
    found = stock.run_split(ours, names, shape)
    close(found[-1], shape)
    apples = [stock.from_apple(name) for name in names]
    same_bits(found, stock.run_split(apples, names, shape))


STEEL = {
    "float32, ragged": (Shape("float", 128, 70, 101), 16, None),
    "float32, aligned": (Shape("float", 128, 64, 64), 16, None),
    "float16, causal": (Shape("half", 128, 70, 101, causal=True), 16, None),
    "float16, additive mask": (Shape("half", 128, 64, 96), 16, "add"),
    "float16, bool mask": (Shape("half", 128, 50, 83), 16, "bool"),
    "bfloat16, dim 80": (Shape("bfloat", 80, 50, 83, causal=True), 32, None),
    "float16, dim 64": (Shape("half", 64, 40, 65), 32, None),
}


@pytest.mark.parametrize("case", STEEL)
def test_steel(case):
    shape, block_k, masked = STEEL[case]
    dim, kind = shape.dim, stock.NAMES[shape.type]
    mask, added, mask_type = None, None, shape.type
    if masked == "bool":
        mask = np.random.default_rng(4).random((shape.queries, shape.keys)) < 0.7
        mask[:, 0] = True
        added, mask_type = np.where(mask, 0, -np.inf), "bool"
    elif masked:
        mask = stock.random(shape.type, shape.queries, shape.keys, seed=5)
        added = stock.values(mask)
    suffix = "bool_" if masked == "bool" else kind
    name = (
        f"steel_attention_{kind}_bq32_bk{block_k}_bd{dim}_bv{dim}_wm4_wn1_mask{suffix}"
    )
    arguments = f"{shape.type}, 32, {block_k}, {dim}, {dim}, 4, 1, {mask_type}, float"
    ours = stock.from_source(stock.STEEL, name, f"attention, {arguments}")
    found, _ = stock.run_steel(ours, name, shape, (32, block_k), mask)
    close(found[0], shape, added)
    apples = stock.from_apple(name)
    same_bits(found, stock.run_steel(apples, name, shape, (32, block_k), mask)[0])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_dequantize(bits):
    rng = np.random.default_rng(bits)
    words = rng.integers(0, 2**32, (16, bits * 4), dtype=np.uint32)
    scales, biases = rng.standard_normal((2, 16, 2)).astype(np.float16)
    name = f"affine_dequantize_float16_t_gs_64_b_{bits}"
    ours = stock.from_source(
        stock.QUANTIZED, name, f"affine_dequantize, half, 64, {bits}"
    )
    packs = words.nbytes // {3: 3, 5: 5, 6: 3}.get(bits, 1)
    results = []
    for lib in (ours, stock.from_apple(name)):
        out = np.zeros((16, 128), np.float16)
        lib.launch(
            name,
            {0: words, 1: scales.copy(), 2: biases.copy(), 3: out},
            groups=(packs // 32, 1, 1),
            threads=(32, 1, 1),
            constants=dict.fromkeys(lib.constants, False),
        )
        results.append(out)
    same_bits(*[[out] for out in results])
    assert np.abs(results[0]).max() > 1


def test_stock_kernels_pass_the_detector():
    """No false alarm on kernels that have run on GPUs for years."""
    device = executor.Device(seed=1)
    shape = Shape("half", 64, 40, 65, causal=True)
    name = "steel"
    arguments = "half, 32, 32, 64, 64, 4, 1, half, float"
    lib = stock.from_source(stock.STEEL, name, f"attention, {arguments}", "checked")
    found, _ = stock.run_steel(lib, name, shape, (32, 32), device=device)
    close(found[0], shape)
    shape = Shape("half", 64, 1, 200)
    lib = stock.from_source(stock.VECTOR, name, "sdpa_vector, half, 64, 64", "checked")
    close(stock.run_vector(lib, name, shape, device)[0], shape)


@pytest.mark.parametrize("order", [1, 2])
def test_other_orders_of_sums_stay_close(order):
    device = executor.Device(seed=2, order=order)
    shape = Shape("float", 128, 70, 101)
    arguments = "float, 32, 16, 128, 128, 4, 1, float, float"
    lib = stock.from_source(stock.STEEL, "steel", f"attention, {arguments}")
    found, _ = stock.run_steel(lib, "steel", shape, (32, 16), device=device)
    close(found[0], shape)
