"""Time the op on the default device against stock MLX, PyTorch and FlashInfer.

    python bench/gpu_bench.py                          # the whole suite, for a GPU
    python bench/gpu_bench.py --quick                  # small shapes: does it work
    python bench/gpu_bench.py --append --shapes 0:6    # a part; --list numbers them

Answers are checked first, a wrong one is not timed. A time is one call's share of a
chain of calls in one mx.eval, each reading another copy of the cache, so that it
comes from memory; the other libraries' calls are captured in a CUDA graph. Each shape
has a process of its own, and each record is on the disk before the next is taken.
"""

import argparse
import math
import os
import statistics
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path

# Expected results are float32; the products of the default are not.
os.environ["MLX_ENABLE_TF32"] = "0"

import mlx.core as mx
import torch_rivals
from apart import run_apart
from cases import MAIN_FORMATS
from gpu_cases import formats, selected, shapes
from gpu_timing import LEAST_SECONDS, chain_sampler, seconds_a_call
from machine import commit, gpu_versions
from records import add_line, read_lines, written_whole
from rivals.mlx_common import dequantize, is_turbo, quantize
from rivals.mlx_fused import keywords
from torch_rivals import COLD_BYTES, PAGE

BENCH = Path(__file__).resolve().parent
# NMSE of bfloat16: the contract's for the op; others may round what is in between.
TOLERANCE, RIVAL_TOLERANCE = 1e-5, 1e-3
DEVICE_LOST = 3


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


def nmse(found, expected):
    found, expected = (x.astype(mx.float32) for x in (found, expected))
    return (mx.square(found - expected).sum() / mx.square(expected).sum()).item()


def nbytes(cache):
    return sum(x.nbytes for part in cache for x in flat(part))


def flat(part):
    return [x for x in part if x is not None] if isinstance(part, tuple) else [part]


def each_array(part, change):
    if isinstance(part, tuple):
        return tuple(None if x is None else change(x) for x in part)
    return change(part)


def copies_of(cache, cold_bytes):
    n = int(cold_bytes / nbytes(cache)) + 1
    again = partial(each_array, change=lambda x: x + 0)
    copies = [cache] + [tuple(map(again, cache)) for _ in range(n - 1)]
    mx.eval([flat(part) for copy in copies for part in copy])
    return copies


def joined(parts):
    """One array of a batch from those of its sequences."""
    return None if parts[0] is None else mx.concatenate(parts)


def exact(part, operand):
    """Float32 values of a dense or quantized operand, its scales not rounded."""
    if not isinstance(part, tuple):
        return part.astype(mx.float32)
    if operand.mode == "affine" or is_turbo(operand):
        part = part[:1] + each_array(part[1:], lambda x: x.astype(mx.float32))
    return dequantize(part, operand, mx.float32)


def expected_result(shape, q, cache, fmt=None, lengths=None):
    """Attention in float32, a sequence at a time: arrays stay below 2**31 values."""
    rows = []
    for i in range(shape.batch):
        row = slice(i, i + 1)
        parts = (each_array(part, lambda x, row=row: x[row]) for part in cache)
        operands = (fmt.k, fmt.v) if fmt else (None, None)
        k, v = (exact(part, operand) for part, operand in zip(parts, operands))
        n = shape.kv_len if lengths is None else lengths[i]
        arrays = q[row].astype(mx.float32), k[..., :n, :], v[..., :n, :]
        rows.append(dense(shape)(*arrays))
        mx.eval(rows[-1])
    return mx.concatenate(rows)


def large_array(quick=False):
    """4 GiB that are not all alike; their bytes are read by a maximum."""
    return mx.arange(2**24 if quick else 2**30, dtype=mx.uint32)


def read_bandwidth(quick):
    """Bytes a second that MLX reads from a large array.

    The whole takes longer than its half by the bytes alone; two reads in one graph
    could run at once and share what is in the last-level cache.
    """
    whole = large_array(quick)
    # No slice: another kernel may reduce those.
    half = mx.arange(whole.size // 2, dtype=whole.dtype)
    mx.eval(whole, half)

    def seconds(x):
        found = x.max()
        start = time.perf_counter()
        mx.eval(found)
        return time.perf_counter() - start

    times = [(seconds(half), seconds(whole)) for _ in range(5 if quick else 30)][1:]
    more = statistics.median(twice - once for once, twice in times)
    if quick:  # says nothing of speed, and may run where much else does
        return whole.nbytes / min(twice for _, twice in times)
    if more <= 0:
        raise RuntimeError("the time of a read does not stand out of noise")
    return (whole.nbytes - half.nbytes) / more


def device_works():
    try:
        return mx.sum(mx.ones((8,))).item() == 8
    except Exception:
        return False


class Log:
    """Records to one file, and all that was said of failures to one beside it."""

    def __init__(self, path, shape, origin):
        self.path = path
        self.said = path.with_suffix(".log")
        self.origin = origin
        sizes = {k: v for k, v in asdict(shape).items() if v is not None}
        self.fields = {**origin, "shape": sizes}

    def record(self, rival, fmt, *, us=None, error=None, **fields):
        floor_us = None
        if "kv_bytes" in fields and "read_bandwidth" in self.origin:
            floor_us = fields["kv_bytes"] / self.origin["read_bandwidth"] * 1e6
        about = {"rival": rival, "format": fmt, "us": us, "error": error}
        rest = {"kv_bytes": None, "nmse": None, **fields, "floor_us": floor_us}
        add_line(self.path, {**self.fields, **about, **rest})
        said = f"{us:10.1f} us" if us else error
        share = f"  {100 * floor_us / us:.0f} % of floor" if us and floor_us else ""
        print(f"  {rival:22} {fmt:14} {said}{share}", flush=True)

    def failure(self, rival, fmt):
        """The first line of the exception at hand; the whole goes to the log."""
        kind, failure, _ = sys.exc_info()
        with open(self.said, "a", encoding="utf-8") as file:
            file.write(f"{rival} {fmt} {self.fields['shape']}\n")
            file.write(traceback.format_exc() + "\n")
        return f"{kind.__name__}: {(str(failure).splitlines() or [''])[0][:160]}"


class Bench:
    """Everything that is timed of one shape; ``run`` does one task of ``tasks``."""

    def __init__(self, shape, path, quick):
        self.shape = shape
        self.rounds = 3 if quick else 9
        self.least_seconds = 0 if quick else LEAST_SECONDS
        self.cold_bytes = 0 if quick else COLD_BYTES
        bandwidth = read_bandwidth(quick)
        origin = {
            "device": str(mx.device_info().get("device_name", mx.default_device())),
            "versions": gpu_versions(),
            "commit": commit(),
            "read_bandwidth": bandwidth,
        }
        self.log = Log(path, shape, origin)
        q_size = (shape.batch, shape.q_heads, shape.q_len, shape.head_dim)
        self.q = mx.random.normal(q_size).astype(mx.bfloat16)
        self.kept = {}
        print(f"  reads {bandwidth / 1e9:.0f} GB/s", flush=True)

    @cached_property
    def rows(self):
        """K and V of each sequence."""
        size = (1, self.shape.kv_heads, self.shape.kv_len, self.shape.head_dim)
        made = [
            [mx.random.normal(size).astype(mx.bfloat16) for _ in "kv"]
            for _ in range(self.shape.batch)
        ]
        mx.eval(made)
        return list(zip(*made))

    def run(self, rival, fmt):
        if rival == "fused":
            by_name = {f.name: f for f in formats(self.shape)}
            for layout, work in self.works(by_name[fmt]):
                self.attempt(layout, fmt, work)
        elif rival == "mlx_sdpa":
            self.attempt(rival, fmt, self.dense_fields)
        else:
            found = torch_rivals.rivals(self.shape)
            others = {(name, storage): make for name, storage, make in found}
            self.attempt(rival, fmt, partial(self.torch_fields, others[rival, fmt]))
        mx.clear_cache()

    def attempt(self, rival, fmt, work):
        """The record of what ``work()`` finds, or of what it raises."""
        try:
            fields = work()
        except Exception:
            fields = {"error": self.log.failure(rival, fmt)}
        self.log.record(rival, fmt, **fields)
        # An access out of bounds ends every later call of its process.
        if fields.get("error") and not device_works():
            sys.exit(DEVICE_LOST)

    def dense_fields(self):
        cache = tuple(mx.concatenate(rows) for rows in self.rows)
        expected = expected_result(self.shape, self.q, cache)
        return self.mlx_fields(dense(self.shape), cache, expected, RIVAL_TOLERANCE)

    def mlx_fields(self, call, cache, expected, tolerance=TOLERANCE, read=1.0):
        """``read`` is the share of the cache that a call must read."""
        error = nmse(call(self.q, *cache), expected)
        found = {"nmse": error if math.isfinite(error) else None}
        found["kv_bytes"] = nbytes(cache) * read
        if not error <= tolerance:
            return found | {"error": f"wrong: NMSE {error:.1e}, not {tolerance:.0e}"}
        copies = copies_of(cache, self.cold_bytes)
        sample = chain_sampler(mx.eval, call, self.q, copies)
        return found | self.timed(sample, "chain")

    def torch_fields(self, make_ready):
        mx.clear_cache()
        try:
            ready = make_ready()
            torch = torch_rivals.cuda_torch()
            try:
                sample = torch_rivals.graph_sampler(torch, ready)
                timed = self.timed(sample, "graph")
            except Exception:
                self.log.failure("capture of", "calls")
                sample = torch_rivals.loop_sampler(torch, ready)
                timed = self.timed(sample, "loop")
            return {"kv_bytes": ready.kv_bytes, **timed}
        finally:
            ready = sample = None
            torch_rivals.release()

    def timed(self, sample, how):
        found = seconds_a_call(sample, self.rounds, self.least_seconds)
        times = {"us": found.median, "p10_us": found.low, "p90_us": found.high}
        fields = {name: seconds * 1e6 for name, seconds in times.items()}
        return fields | {"calls": found.calls, "rounds": self.rounds, "how": how}

    def works(self, fmt):
        """(rival, what times it) of a format; the main ones in every layout."""
        ragged = self.shape.shortest is not None
        if not ragged:
            yield "fused", partial(self.op_fields, fmt)
        if fmt.name not in MAIN_FORMATS:
            return
        if ragged:
            yield "fused_paged_ragged", partial(self.paged_fields, fmt, self.lengths)
        else:
            yield "fused_paged", partial(self.paged_fields, fmt)
        if self.shape.batch > 1 and self.shape.q_len == 1:
            yield "fused_ragged", partial(self.ragged_fields, fmt)
        if not ragged:
            yield "mlx_dequantize_sdpa", partial(self.rival_fields, dequantized, fmt)
        if self.shape.batch == 1:
            yield "mlx_lm_quantized", partial(self.rival_fields, mlx_lm_path, fmt)

    def stored(self, fmt):
        """The cache in a format, kept until another is asked for."""
        if fmt not in self.kept:
            self.kept = {}
            sides = zip(self.rows, (fmt.k, fmt.v))
            parts = (
                [quantize(row, operand) for row in rows] for rows, operand in sides
            )
            cache = tuple(tuple(map(joined, zip(*side))) for side in parts)
            mx.eval([flat(part) for part in cache])
            self.kept = {fmt: cache}
        return self.kept[fmt]

    def expected(self, fmt, lengths=None):
        """Result of the stored cache, kept beside it."""
        cache, key = self.stored(fmt), (fmt, lengths and tuple(lengths))
        if key not in self.kept:
            self.kept[key] = expected_result(self.shape, self.q, cache, fmt, lengths)
        return self.kept[key]

    @property
    def lengths(self):
        shortest = self.shape.shortest or self.shape.kv_len // 2
        found = mx.linspace(shortest, self.shape.kv_len, self.shape.batch)
        return found.astype(mx.int32).tolist()

    def share(self, lengths):
        return sum(lengths) / (self.shape.batch * self.shape.kv_len)

    def op_fields(self, fmt):
        cache, call = self.stored(fmt), fused(self.shape, fmt)
        return self.mlx_fields(call, cache, self.expected(fmt))

    def rival_fields(self, make, fmt):
        cache, call = self.stored(fmt), make(self.shape, fmt)
        return self.mlx_fields(call, cache, self.expected(fmt), RIVAL_TOLERANCE)

    def paged_fields(self, fmt, lengths=None):
        expected = self.expected(fmt, lengths)
        lengths = lengths or [self.shape.kv_len] * self.shape.batch
        blocks, table = paged(self.stored(fmt), self.shape)
        call = fused(self.shape, fmt, block_table=table, lengths=mx.array(lengths))
        return self.mlx_fields(call, blocks, expected, read=self.share(lengths))

    def ragged_fields(self, fmt):
        """The same arrays with sequences of different lengths."""
        lengths = self.lengths
        call = fused(self.shape, fmt, lengths=mx.array(lengths))
        expected, read = self.expected(fmt, lengths), self.share(lengths)
        return self.mlx_fields(call, self.stored(fmt), expected, read=read)


def tasks_of(shape):
    """(rival, format) of what is timed; the op's own first, as time may be short."""
    found = [("fused", fmt.name) for fmt in formats(shape)]
    if shape.shortest is None:
        found.append(("mlx_sdpa", "dense"))
        found += [(rival, fmt) for rival, fmt, _ in torch_rivals.rivals(shape)]
    return found


def run_shape(shape, path, quick, tasks, start):
    bench = Bench(shape, path, quick)
    for i, task in enumerate(tasks):
        start(i)
        bench.run(*task)


def run_all(arguments, path, numbered):
    """Every shape in a process of its own, until the time is over."""
    end = time.monotonic() + arguments.minutes * 60
    origin = {"versions": gpu_versions(), "commit": commit()}
    for number, shape in numbered:
        if time.monotonic() > end:
            rest = f"--append --shapes {number}:{numbered[-1][0] + 1}"
            print(f"No time for the rest: go on with {rest}")
            return
        print(f"{number}: {shape}", flush=True)
        log = Log(path, shape, origin)
        run_apart(
            partial(run_shape, shape, path, arguments.quick),
            tasks_of(shape),
            arguments.limit,
            log.said,
            lambda task, reason, log=log: log.record(*task, error=reason),
        )


@contextmanager
def opened(path, append):
    """Where lines are added: the file itself, or one that takes its place."""
    if append:
        yield path
    else:
        with written_whole(path) as file:
            yield Path(file.name)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--list", action="store_true", help="the shapes, numbered")
    parser.add_argument("--shapes", metavar="I:J", help="only these of the list")
    parser.add_argument("--append", action="store_true", help="keep what the file has")
    parser.add_argument("--out", type=Path, help="JSON lines; a .log comes beside it")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="start no shape after these"
    )
    parser.add_argument(
        "--limit", type=float, default=120, help="seconds a format may take of a shape"
    )
    arguments = parser.parse_args()
    default = BENCH / "results/gpu.jsonl"
    if arguments.quick:
        default = BENCH.parent / "build/gpu_bench.jsonl"
    arguments.out = arguments.out or default
    try:
        arguments.selected = selected(shapes(arguments.quick), arguments.shapes)
    except ValueError as error:
        parser.error(str(error))
    part = arguments.shapes or arguments.minutes < math.inf
    if part and not arguments.append and arguments.out.exists():
        parser.error(f"a part of the run would replace {arguments.out}: add --append")
    return arguments


def draw(path):
    try:
        import plot
    except ImportError as error:
        print(f"No plot: {error}")
    else:
        print(f"Plot: {plot.write_gpu(read_lines(path), path.with_suffix('.png'))}")


def main():
    arguments = parse_arguments()
    if arguments.list:
        print(*(f"{i}: {shape}" for i, shape in arguments.selected), sep="\n")
        return 0
    path = arguments.out
    path.parent.mkdir(parents=True, exist_ok=True)
    before = len(read_lines(path)) if arguments.append and path.exists() else 0
    with opened(path, arguments.append) as lines:
        run_all(arguments, lines, arguments.selected)
    ours = [r for r in read_lines(path)[before:] if r["rival"].startswith("fused")]
    print(f"\nRecords: {path}")
    draw(path)
    return 0 if ours and all(r["us"] for r in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
