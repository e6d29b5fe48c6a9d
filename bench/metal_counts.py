"""Counts what the Metal kernels load and multiply, on the CPU executor of the tests:
python bench/metal_counts.py writes metal_counts.json and .md in bench/results. No time
is measured.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "python_tests"), str(ROOT / "python_tests" / "metal")]

from rig import executor, fake  # noqa: E402

fake.build()
METAL = fake.Metal("checked", count_loads=True)

import mlx.core as mx  # noqa: E402
import stock  # noqa: E402
from quantized_sdpa_reference import (  # noqa: E402
    MXFP4,
    MXFP8,
    NVFP4,
    TURBO2,
    TURBO3,
    TURBO4,
    affine,
    make_case,
)
from report import table  # noqa: E402

FORMATS = [affine(bits) for bits in (2, 3, 4, 5, 6, 8)]
FORMATS += [MXFP4, MXFP8, NVFP4, TURBO2, TURBO3, TURBO4]
PREFILL_FORMATS = [affine(4), affine(8), MXFP4, TURBO4]
HEADS = {"N_q": 8, "N_kv": 2, "D": 128, "dtype": mx.float16, "layout": None}
KEYS, PREFILL_KEYS, PREFILL_QUERIES = 1024, 256, 64
OPERANDS = ("k_codes", "k_scales", "k_biases", "v_codes", "v_scales", "v_biases")

HEAD = """\
# Counts of the Metal kernels

Written by `make metal-counts`: the kernels' own text, launched by the real host code,
counted on the CPU executor of `python_tests/metal`. Nothing here is a time, and nothing
here was run on a GPU.

- Bytes are what the loads of a simdgroup ask device memory for, each address once a
  load however many lanes share it, over the whole launch. Caches are not modelled.
- Float16 queries, {N_q} query heads on {N_kv} KV heads, head dim {D}, no mask.
"""
DECODE = """
## Decode, one query, {keys} keys

`K/V` is the size of the quantized K and V with scales and biases; `read` over it is how
often each byte is read. `widths` are the sizes of a lane's loads of codes; `barriers`
are those of a threadgroup's whole run. The kernel is the plan's choice.

"""
DECODE_HEADS = ["format", "kernel", "K/V bytes", "read", "read / K/V"]
DECODE_HEADS += ["widths of codes", "barriers"]
PREFILL = """
## Prefill, {queries} queries, {keys} keys

A threadgroup holds a block of rows (query heads of a KV head times queries); every
block reads the keys once. `MMA` are products of 8 x 8 matrices; the minimum is that of
both products over all rows and keys. A tile is the keys that are decoded at once.

"""
PREFILL_HEADS = ["kernel", "blocks", "read / K/V / blocks", "MMA", "minimum", "ratio"]
PREFILL_HEADS += ["barriers a tile"]


def run(case):
    """What the op's launches counted; K and V in bytes."""
    METAL.launches()
    mx.eval([x for x in (case.q, *case.k, *case.v) if x is not None])
    mx.eval(case.run(force_fused=True))
    mx.synchronize()
    complaints = METAL.complaints()
    assert not complaints, complaints
    size = sum(x.nbytes for x in (*case.k, *case.v) if x is not None)
    return METAL.launches(), size


def loads(launch, names):
    """Bytes that simdgroups loaded from buffers, and the widths of their loads."""
    rows = [b for b in launch["buffers"] if b["name"] in names]
    widths = [sum(b["loads_by_width"][i] for b in rows) for i in range(5)]
    return (
        sum(b["simdgroup_load_bytes"] for b in rows),
        [2**i for i, count in enumerate(widths) if count],
    )


def groups(launch):
    x, y, z = launch["groups"]
    return x * y * z


def decode_row(fmt):
    launches, size = run(make_case(k=fmt, T_kv=KEYS, **HEADS))
    used = [n for n in OPERANDS if fmt.mode == "affine" or "biases" not in n]
    read, _ = loads(launches[0], used)
    _, widths = loads(launches[0], ("k_codes", "v_codes"))
    barriers = launches[0]["threadgroup_barriers"] / groups(launches[0])
    assert read <= 1.02 * size, f"{fmt}: reads {read} of {size} bytes"
    assert min(widths) >= 4, f"{fmt}: loads of {min(widths)} bytes"
    widths = ", ".join(f"{w} B" for w in widths)
    kernel = launches[0]["kernel"].split("_")[2]
    ratio = f"{read / size:.3f}"
    return [str(fmt), kernel, str(size), str(read), ratio, widths, f"{barriers:g}"]


def least_products():
    rows = HEADS["N_q"] * PREFILL_QUERIES
    return 2 * (rows // 8) * (PREFILL_KEYS // 8) * (HEADS["D"] // 8)


def prefill_cells(name, blocks, read, products, barriers):
    least = least_products()
    return [
        name,
        str(blocks),
        f"{read / blocks:.3f}",
        str(products),
        str(least),
        f"{products / least:.3f}",
        f"{barriers:.3g}",
    ]


def prefill_row(fmt):
    case = make_case(k=fmt, T_q=PREFILL_QUERIES, T_kv=PREFILL_KEYS, **HEADS)
    (launch,), size = run(case)
    used = [n for n in OPERANDS if fmt.mode == "affine" or "biases" not in n]
    read, _ = loads(launch, used)
    blocks = launch["groups"][0]
    keys = int(launch["kernel"].rsplit("keys", 1)[1])
    tables = fmt.is_turbo
    barriers = launch["threadgroup_barriers"] / groups(launch) - tables
    per_tile = barriers / (PREFILL_KEYS // keys)
    assert launch["mma"] == least_products(), f"{fmt}: {launch['mma']} products"
    return prefill_cells(
        f"{fmt}, {keys} keys a tile", blocks, read / size, launch["mma"], per_tile
    )


def stock_reads(counts, k_size):
    return sum(counts.buffers[i].simdgroup_load_bytes for i in (1, 2)) / (2 * k_size)


def stock_decode_row():
    shape = stock.Shape("half", 128, 1, KEYS, n_q=8)
    lib = stock.from_source(
        stock.VECTOR, "v", "sdpa_vector, half, 128, 128", mode="checked"
    )
    device = executor.Device(count_loads=True)
    stock.run_vector(lib, "v", shape, device)
    counts, size = device.counts[-1], 2 * 2 * KEYS * 128
    read = stock_reads(counts, size)
    widths = [2**i for i in range(5) if counts.buffers[1].loads_by_width[i]]
    widths = ", ".join(f"{w} B" for w in widths)
    barriers = counts.threadgroup_barriers / shape.n_q
    sizes = [str(2 * size), f"{read * 2 * size:.0f}", f"{read:.3f}"]
    return ["float16, dense", "MLX's `sdpa_vector`", *sizes, widths, f"{barriers:g}"]


def stock_prefill_row():
    shape = stock.Shape("half", 128, PREFILL_QUERIES, PREFILL_KEYS, n_q=8)
    arguments = "half, 32, 16, 128, 128, 4, 1, half, float"
    lib = stock.from_source(stock.STEEL, "s", f"attention, {arguments}", "checked")
    device = executor.Device(count_loads=True)
    _, counts = stock.run_steel(lib, "s", shape, (32, 16), device=device)
    blocks = PREFILL_QUERIES // 32 * shape.n_q // shape.n_kv
    read = stock_reads(counts, 2 * 2 * PREFILL_KEYS * 128)
    per_group = counts.threadgroup_barriers / (blocks * shape.n_kv)
    name = "MLX's `steel_attention`, float16, 16 keys a tile"
    barriers = per_group / (PREFILL_KEYS // 16)
    return prefill_cells(name, blocks, read, counts.mma, barriers)


def main():
    decode = [*map(decode_row, FORMATS), stock_decode_row()]
    prefill = [*map(prefill_row, PREFILL_FORMATS), stock_prefill_row()]
    record = {
        "decode": {"heads": DECODE_HEADS, "rows": decode},
        "prefill": {"heads": PREFILL_HEADS, "rows": prefill},
    }
    text = HEAD.format(**HEADS) + DECODE.format(keys=KEYS)
    text += table(DECODE_HEADS, decode) + "\n"
    text += PREFILL.format(queries=PREFILL_QUERIES, keys=PREFILL_KEYS)
    text += table(PREFILL_HEADS, prefill) + "\n"
    results = ROOT / "bench" / "results"
    (results / "metal_counts.json").write_text(json.dumps(record, indent=1) + "\n")
    (results / "metal_counts.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
