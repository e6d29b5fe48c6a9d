"""What the kernels read and multiply, counted.

The executor counts each load of a lane. Of the lanes of one load, those that read the
same address count once, as a GPU fetches it once.
"""

import struct
from dataclasses import dataclass

import kernel_text
import numpy as np
import stock
from mlx_quantized_sdpa import _ext

from rig import executor, library

FEATURES = (
    "has_mask mask_is_bool mask_is_half mask_is_bfloat is_causal has_window "
    "has_softcap has_sinks has_left_padding has_lengths has_block_table has_code_gaps "
    "return_lse is_split"
).split()
DIM = 128
N_KV = 2
# Mode, bits, group size; codebooks and byte scales follow from the mode.
FORMATS = {
    "affine 4 bit": ("affine", 4, 64),
    "affine 8 bit": ("affine", 8, 64),
    "affine 2 bit": ("affine", 2, 64),
    "affine 3 bit": ("affine", 3, 64),
    "affine 5 bit": ("affine", 5, 64),
    "affine 6 bit": ("affine", 6, 64),
    "mxfp8": ("mxfp8", 8, 32),
    "nvfp4": ("nvfp4", 4, 16),
    "turbo4": ("turbo", 4, DIM),
    "turbo3": ("turbo", 3, DIM),
}


@dataclass
class Work:
    """One launch: `rows` queries of each KV head on `keys` keys."""

    kernel: str
    k: str
    v: str
    rows: int
    keys: int
    n_splits: int = 1


@dataclass
class Result:
    codes_stored: int
    codes_read: int
    scales_stored: int
    scales_read: int
    narrowest: int
    barriers: int
    mma: int
    threadgroup_bytes: int


def arrays(format_name: str, keys: int) -> list[np.ndarray]:
    mode, bits, group = FORMATS[format_name]
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 1 << 32, (1, N_KV, keys, DIM * bits // 32), np.uint32)
    if mode == "mxfp8":
        codes &= 0x3F3F3F3F
    shape = (1, N_KV, keys, DIM // group)
    if mode in ("mxfp8", "nvfp4"):
        scales = rng.integers(40, 60, shape).astype(np.uint8)
        scales += 80 * (mode == "mxfp8")
    else:
        scales = rng.uniform(0.01, 0.1, shape).astype(np.float16)
    levels = np.linspace(-2, 2, 1 << bits, dtype=np.float32)
    return [codes, scales, scales.copy(), levels]


def operand(format_name: str) -> tuple:
    mode, bits, group = FORMATS[format_name]
    scales = "uint8" if mode in ("mxfp8", "nvfp4") else "float16"
    return (mode, bits, group, DIM, scales, scales)


def strides(x: np.ndarray) -> list[int]:
    return [step // x.itemsize for step in x.strides]


def params(work: Work, q, k, v) -> np.ndarray:
    packed = b""
    for codes, scales, biases, _ in (k, v):
        for x in (codes, scales, biases):
            packed += struct.pack("<4q", *strides(x))
        packed += struct.pack("<q", 1)
    packed += struct.pack("<4q", *strides(q)) + bytes(9 * 8)
    numbers = (work.rows * N_KV, N_KV, 1, work.keys, 0, 0, work.n_splits, 0)
    packed += struct.pack("<8i2f", *numbers, DIM**-0.5, 0)
    return np.frombuffer(packed, np.uint8).copy()


def plan(work: Work) -> tuple[str, int, int]:
    """Rows, keys and simdgroups of the kernel that the host takes for the work."""
    problem = _ext._problem(
        n_q_heads=N_KV * work.rows,
        n_kv_heads=N_KV,
        kv_len=work.keys,
        k_format=FORMATS[work.k],
        v_format=FORMATS[work.v],
    )
    kernel, rows, keys, simdgroups, _, _ = _ext._plan_metal(problem, work.keys, "")
    assert kernel == work.kernel, f"the plan takes {kernel} for {work}"
    return rows, keys, simdgroups


def run(work: Work, rows: int | None = None) -> Result:
    """What a launch counts, with the plan's number of rows unless one is given."""
    planned, tile, simdgroups = plan(work)
    rows = rows or planned
    name, line = _ext._metal_kernel(
        work.kernel, "float16", operand(work.k), operand(work.v), rows, tile
    )
    text = library.Text(kernel_text.kernels() + line, ())
    compiled = executor.Library(library.compile_library(text, "checked"))
    q = np.random.default_rng(2).standard_normal((1, N_KV * work.rows, 1, DIM))
    q = q.astype(np.float16)
    k, v = arrays(work.k, work.keys), arrays(work.v, work.keys)
    buffers = {0: q, 9: params(work, q, k, v), 10: np.zeros_like(q)}
    buffers.update(enumerate([*k, *v], start=1))
    if work.n_splits > 1:
        partial = np.zeros((N_KV, work.rows, work.n_splits, DIM), np.float32)
        buffers.update({12: partial, 13: partial[..., :2].copy()})
    counts = compiled.launch(
        name,
        buffers,
        groups=(-(-work.rows // rows) * work.n_splits, N_KV, 1),
        threads=(32 * simdgroups, 1, 1),
        constants={**dict.fromkeys(FEATURES, False), "is_split": work.n_splits > 1},
        device=executor.Device(count_loads=True),
    )
    return result(counts, codes=(1, 5), scales=(2, 3, 6, 7), buffers=buffers)


def result(counts, codes, scales, buffers) -> Result:
    read = counts.buffers
    used = [i for i in scales if read[i].lane_loads]
    widths = [i for c in codes for i in range(5) if read[c].loads_by_width[i]]
    return Result(
        codes_stored=sum(buffers[i].nbytes for i in codes),
        codes_read=sum(read[i].simdgroup_load_bytes for i in codes),
        scales_stored=sum(buffers[i].nbytes for i in used),
        scales_read=sum(read[i].simdgroup_load_bytes for i in used),
        narrowest=1 << min(widths),
        barriers=counts.threadgroup_barriers,
        mma=counts.mma,
        threadgroup_bytes=counts.threadgroup_bytes,
    )


def least_mma(work: Work) -> int:
    """Of 8 x 8 x 8, with rows and keys that do not fill one counted in full."""
    return N_KV * -(-work.rows // 8) * -(-work.keys // 8) * (2 * DIM // 8)


def run_stock(work: Work) -> Result:
    """MLX's kernels for float16 K and V on the same number of keys."""
    device = executor.Device(count_loads=True)
    one_query = work.kernel == "vector"
    shape = stock.Shape(
        "half",
        DIM,
        queries=1 if one_query else work.rows // 4,
        keys=work.keys,
        n_q=N_KV * (work.rows if one_query else 4),
        n_kv=N_KV,
    )
    if one_query:
        compiled = stock.from_source(
            stock.VECTOR, "dense", f"sdpa_vector, half, {DIM}, {DIM}", "checked"
        )
        stock.run_vector(compiled, "dense", shape, device)
    else:
        function = f"attention, half, 32, 16, {DIM}, {DIM}, 4, 1, half, float"
        compiled = stock.from_source(stock.STEEL, "dense", function, "checked")
        stock.run_steel(compiled, "dense", shape, (32, 16), device=device)
    _, k, v = shape.arrays()
    return result(device.counts[0], (1, 2), (), {1: k, 2: v})


DECODE = [Work("vector", name, name, rows=4, keys=512) for name in FORMATS]
DECODE += [
    Work("vector", "affine 8 bit", "affine 4 bit", rows=4, keys=512),
    Work("vector", "affine 4 bit", "affine 4 bit", rows=8, keys=512),
    Work("vector", "affine 4 bit", "affine 4 bit", rows=1, keys=500, n_splits=3),
    Work("vector", "affine 3 bit", "affine 5 bit", rows=8, keys=500),
    Work("vector", "affine 6 bit", "affine 2 bit", rows=8, keys=512),
]
PREFILL = [Work("steel", name, name, rows=64, keys=256) for name in FORMATS]
PREFILL.append(Work("steel", "affine 8 bit", "affine 4 bit", rows=32, keys=250))
# Two threadgroups a KV head; MLX's tiles of 32 queries of one head are full then.
MORE_ROWS = Work("steel", "affine 4 bit", "affine 4 bit", rows=128, keys=256)
