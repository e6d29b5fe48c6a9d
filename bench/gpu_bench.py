"""Time the op on the default device against stock MLX, PyTorch and FlashInfer.

    python bench/gpu_bench.py            # the whole suite, for a GPU
    python bench/gpu_bench.py --quick    # small shapes: does it work

Answers are checked first, a wrong one is not timed. A time is one call's share of a
chain of calls in one mx.eval, each reading another copy of the cache, so that it
comes from memory; the other libraries run in a loop between two synchronizations.
"""

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
from cases import FORMATS, MAIN_FORMATS, KVFormat, Operand
from machine import commit, versions
from records import written_whole
from rivals.mlx_common import dequantize, quantize
from rivals.mlx_fused import keywords
from torch_rivals import COLD_BYTES, PAGE, lines, synchronized_seconds

BENCH = Path(__file__).resolve().parent
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Shape:
    batch: int = 1
    q_len: int = 1
    kv_len: int = 32768
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def scale(self):
        return self.head_dim**-0.5

    @property
    def mask(self):
        return "causal" if self.q_len > 1 else None


def shapes(quick):
    if quick:
        return [Shape(kv_len=1024), Shape(kv_len=512, q_len=8), Shape(2, kv_len=256)]
    found = [Shape(b, kv_len=n) for b in (1, 8, 32) for n in (1024, 4096, 32768)]
    found += [Shape(b, kv_len=131072) for b in (1, 8)]
    found += [Shape(kv_len=131072, kv_heads=32 // gqa) for gqa in (1, 8, 16)]
    found += [
        Shape(kv_len=131072, q_heads=4096 // d, kv_heads=1024 // d, head_dim=d)
        for d in (64, 256, 512)
    ]
    found += [Shape(kv_len=n, q_len=8) for n in (32768, 131072)]
    return [*found, Shape(q_len=512)]


def formats(shape):
    found = list(FORMATS.values())
    if shape == Shape(kv_len=131072):
        others = [("affine", 6, 64), ("turbo3", 3, 128)]
        others += [("affine", bits, group) for bits in (4, 8) for group in (32, 128)]
        for mode, bits, group in others:
            operand = Operand(mode, bits, group)
            found.append(KVFormat(f"{mode}_{bits}_{group}", operand, operand))
    return found


def fused(shape, fmt, **layout):
    op = mx.fast.quantized_scaled_dot_product_attention
    options = {**keywords("k", fmt.k), **keywords("v", fmt.v), "force_fused": True}
    options |= layout
    return lambda q, k, v: op(q, *k, *v, scale=shape.scale, mask=shape.mask, **options)


def paged(cache, shape):
    """The cache in a pool of shuffled blocks, and the table that finds them."""
    n = shape.kv_len // PAGE
    order = mx.random.permutation(shape.batch * n)
    table = mx.argsort(order).reshape(shape.batch, n).astype(mx.int32)

    def blocks(x):
        if x is None:
            return None
        batch, heads, _, *width = x.shape
        x = x.reshape(batch, heads, n, PAGE, *width).swapaxes(1, 2)
        return x.flatten(0, 1)[order]

    pool = tuple(tuple(map(blocks, part)) for part in cache)
    mx.eval(table, [flat(part) for part in pool])
    return pool, table


def dense(shape):
    op = mx.fast.scaled_dot_product_attention
    return lambda q, k, v: op(q, k, v, scale=shape.scale, mask=shape.mask)


def dequantized(shape, fmt):
    attend = dense(shape)

    def call(q, k, v):
        k, v = dequantize(k, fmt.k, q.dtype), dequantize(v, fmt.v, q.dtype)
        return attend(q, k, v)

    return call


def mlx_lm_path(shape, fmt):
    from mlx_lm.models.base import quantized_scaled_dot_product_attention as op

    size = {"group_size": fmt.k.group_size, "bits": fmt.k.bits}
    return lambda q, k, v: op(q * 1, k, v, scale=shape.scale, mask=shape.mask, **size)


def median_us(call, q, copies, n, rounds):
    def chain():
        x = q
        for i in range(n):
            x = call(x, *copies[i % len(copies)])
        mx.eval(x)

    chain()
    times = [synchronized_seconds(chain) for _ in range(rounds)]
    return statistics.median(times) / n * 1e6


def nmse(found, expected):
    found, expected = (x.astype(mx.float32) for x in (found, expected))
    return (mx.square(found - expected).sum() / mx.square(expected).sum()).item()


def nbytes(cache):
    return sum(x.nbytes for part in cache for x in flat(part))


def flat(part):
    return [x for x in part if x is not None] if isinstance(part, tuple) else [part]


def copies_of(cache):
    n = int(COLD_BYTES / nbytes(cache)) + 1

    def again(part):
        if isinstance(part, tuple):
            return tuple(None if x is None else x + 0 for x in part)
        return part + 0

    copies = [cache] + [tuple(again(part) for part in cache) for _ in range(n - 1)]
    mx.eval([flat(part) for copy in copies for part in copy])
    return copies


def read_bandwidth(quick):
    """Bytes a second of a sum over a large array."""
    x = mx.zeros((2**24 if quick else 2**31,), mx.float16)
    mx.eval(x)

    def read():
        mx.eval(x.view(mx.uint32).max())

    read()
    return x.nbytes / statistics.median(synchronized_seconds(read) for _ in range(5))


class Bench:
    def __init__(self, arguments, file):
        self.quick = arguments.quick
        self.rounds = 3 if arguments.quick else 9
        self.file = file
        self.failed = False
        self.bandwidth = read_bandwidth(arguments.quick)
        self.origin = {
            "device": str(mx.device_info().get("device_name", mx.default_device())),
            "versions": versions(),
            "commit": commit(),
            "read_bandwidth": self.bandwidth,
        }
        print(f"{self.origin}\n")

    def record(self, shape, rival, fmt, us, kv_bytes, error):
        floor = kv_bytes / self.bandwidth * 1e6
        self.file.write(
            json.dumps(
                {
                    **self.origin,
                    "shape": asdict(shape),
                    "rival": rival,
                    "format": fmt,
                    "us": us,
                    "kv_bytes": kv_bytes,
                    "floor_us": floor,
                    "nmse": error,
                }
            )
            + "\n"
        )
        self.file.flush()
        share = f"{100 * floor / us:.0f} %" if us else "WRONG"
        print(f"  {rival:22} {fmt:14} {us or 0:10.1f} us  {share} of floor")

    def time(self, shape, rival, fmt, call, q, cache, expected, read=1.0):
        """``read`` is the share of the cache that a call must read."""
        ours = rival.startswith("fused")
        try:
            error = None if expected is None else nmse(call(q, *cache), expected)
        except (ImportError, ValueError, RuntimeError) as failure:
            print(f"  {rival} {fmt}: {str(failure).splitlines()[0]}")
            self.failed = self.failed or ours
            return
        us = None
        if error is None or error <= TOLERANCE or not ours:
            us = median_us(call, q, copies_of(cache), self.calls(cache), self.rounds)
        self.failed = self.failed or us is None
        self.record(shape, rival, fmt, us, nbytes(cache) * read, error)

    def calls(self, cache):
        """Enough for some ten milliseconds at full bandwidth."""
        us = nbytes(cache) / self.bandwidth * 1e6 + 10
        return 2 if self.quick else max(8, min(100, int(20000 / us)))

    def run(self, shape):
        print(shape, flush=True)
        size = (shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim)
        k, v = (mx.random.normal(size).astype(mx.bfloat16) for _ in "kv")
        q_size = (shape.batch, shape.q_heads, shape.q_len, shape.head_dim)
        q = mx.random.normal(q_size).astype(mx.bfloat16)
        self.time(shape, "mlx_sdpa", "dense", dense(shape), q, (k, v), None)
        for rival, fmt, us, size in lines(shape, self.calls((k, v)), self.rounds):
            self.record(shape, rival, fmt, us, size, None)
        for fmt in formats(shape):
            if fmt.k.mode.startswith("turbo") and shape.head_dim != fmt.k.group_size:
                continue
            cache = (quantize(k, fmt.k), quantize(v, fmt.v))
            exact = (
                dequantize(x, f, mx.float32) for x, f in zip(cache, (fmt.k, fmt.v))
            )
            expected = dense(shape)(q.astype(mx.float32), *exact)
            mx.eval(expected)
            calls = {"fused": fused(shape, fmt)}
            if fmt.name in MAIN_FORMATS:
                self.time_layouts(shape, fmt, q, cache, expected)
                calls["mlx_dequantize_sdpa"] = dequantized(shape, fmt)
                if shape.batch == 1:
                    calls["mlx_lm_quantized"] = mlx_lm_path(shape, fmt)
            for rival, call in calls.items():
                self.time(shape, rival, fmt.name, call, q, cache, expected)
            mx.clear_cache()

    def time_layouts(self, shape, fmt, q, cache, expected):
        """The same tokens in blocks, and sequences of different lengths."""
        blocks, table = paged(cache, shape)
        lengths = mx.full((shape.batch,), shape.kv_len, mx.int32)
        call = fused(shape, fmt, block_table=table, lengths=lengths)
        self.time(shape, "fused_paged", fmt.name, call, q, blocks, expected)
        if shape.batch == 1 or shape.q_len > 1:
            return
        lengths = mx.linspace(shape.kv_len // 2, shape.kv_len, shape.batch)
        lengths = lengths.astype(mx.int32)
        seen = mx.arange(shape.kv_len) < lengths[:, None]
        exact = (dequantize(x, f, mx.float32) for x, f in zip(cache, (fmt.k, fmt.v)))
        expected = mx.fast.scaled_dot_product_attention(
            q.astype(mx.float32), *exact, scale=shape.scale, mask=seen[:, None, None]
        )
        call = fused(shape, fmt, lengths=lengths)
        read = seen.mean().item()
        self.time(shape, "fused_ragged", fmt.name, call, q, cache, expected, read)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--out", type=Path, help="JSON lines")
    arguments = parser.parse_args()
    default = BENCH / "results/gpu.jsonl"
    if arguments.quick:
        default = BENCH.parent / "build/gpu_bench.jsonl"
    path = arguments.out or default
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        bench = Bench(arguments, file)
        for shape in shapes(arguments.quick):
            bench.run(shape)
    print(f"\nRecords: {path}")
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
