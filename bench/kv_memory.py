#!/usr/bin/env python3
"""Memory of prefill over dense and quantized KV caches, mlx-lm's and ours.

Each row runs in a process of its own. With --last only the last chunks of a prompt are
attended, which need the most; with --layers only the first layers attend, one after the
other, as all of them would. Tokens are written to all caches all the same. A row says
what it did.

python bench/kv_memory.py --out bench/results/kv_memory.json
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_quantized_sdpa as qs
from machine import commit
from mlx_lm.models.cache import KVCache, QuantizedKVCache
from mlx_quantized_sdpa.evaluation.cli import about
from mlx_quantized_sdpa.evaluation.report import markdown
from mlx_quantized_sdpa.paged import PagedPool
from recall_model import checkpoint
from tqdm import tqdm

CHUNK = 512
LENGTHS = (8192, 32768)


def mlx_lm_quantized(bits):
    return lambda model, length: [QuantizedKVCache(64, bits) for _ in model.layers]


def ours(spec):
    return lambda model, length: qs.make_prompt_cache(model, spec, capacity=length)


def paged(spec):
    return lambda model, length: PagedPool(spec, length).make_prompt_cache(model)


CACHES = {
    "mlx-lm dense": lambda model, length: [KVCache() for _ in model.layers],
    "mlx-lm 8 bit": mlx_lm_quantized(8),
    "mlx-lm 4 bit": mlx_lm_quantized(4),
    "q8": ours("q8"),
    "k8v4": ours("k8v4"),
    "q4": ours("q4"),
    "turbo4": ours("turbo4"),
    "rot4": ours("rot4"),
    "paged q8": paged("q8"),
    "paged q4": paged("q4"),
}


def measure(name, length, last, layers):
    """The figures of one row, in bytes.

    Args:
        name (str): Of the cache.
        length (int): Tokens, whole chunks of them.
        last (int, optional): So many chunks are attended; default: all.
        layers (int, optional): In so many layers; default: all.
    """
    model = checkpoint.load_model()
    if not name.startswith("mlx-lm"):
        qs.enable(force_fused=True)
    chunks = length // CHUNK
    attended = min(last or chunks, chunks)
    tokens = mx.arange(CHUNK)[None] % 200 + 1
    mx.eval(model(tokens[:, :8]), tokens)
    mx.clear_cache()
    before = mx.get_active_memory(), maximum_resident()
    cache = CACHES[name](model, length)
    for _ in range(chunks - attended):
        write_only(cache)
    peaks = []
    for _ in range(attended):
        mx.reset_peak_memory()
        write_only(cache[layers:] if layers else [])
        # The model runs as many layers as it is given caches.
        mx.eval(model(tokens, cache=cache[:layers])[:, -1], [c.state for c in cache])
        mx.clear_cache()
        peaks.append(mx.get_peak_memory() - before[0])
    return {
        "cache": name,
        "length": length,
        "attended": attended * CHUNK,
        "attended_layers": layers or len(cache),
        "kv_bytes": sum(layer.nbytes for layer in cache),
        "peak": max(peaks),
        "peaks": peaks,
        "process_growth": maximum_resident() - before[1],
    }


def write_only(cache):
    """A chunk of keys and values that no query attends to."""
    for layer in cache:
        layer.update_and_fetch(*mx.random.normal((2, 1, 2, CHUNK, 64), mx.bfloat16))
        mx.eval(layer.state)


def maximum_resident():
    """The most memory that the process has had, in bytes."""
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024


def table(rows):
    """The rows in Markdown."""
    dense = {r["length"]: r for r in rows if r["cache"] == "mlx-lm dense"}
    heads = "tokens,cache,KV MiB,less,peak MiB,KV share,attended,layers"
    lines = []
    for row in rows:
        stock = dense.get(row["length"])
        share = row["kv_bytes"] / row["peak"]
        line = [
            str(row["length"]),
            row["cache"],
            f"{row['kv_bytes'] / 2**20:.1f}",
            f"{1 - row['kv_bytes'] / stock['kv_bytes']:.1%}" if stock else "",
            f"{row['peak'] / 2**20:.1f}",
            f"{share:.0%}",
            f"{row['attended']}",
            str(row.get("attended_layers", "")),
        ]
        lines.append(line)
    return markdown(heads.split(","), lines)


def read_rows(path):
    """The rows of an earlier run, which this one adds to."""
    return json.loads(path.read_text())["rows"] if path and path.exists() else []


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--caches", default=",".join(CACHES), help="of these")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--last", type=int, help="chunks to attend (default: all)")
    parser.add_argument("--layers", type=int, help="layers that attend (default: all)")
    parser.add_argument("--out", type=Path, help="write the figures here")
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        name, length = options.row
        found = measure(name, int(length), options.last, options.layers)
        print(json.dumps(found))
        return
    wanted = [
        (name, length)
        for length in options.lengths.split(",")
        for name in options.caches.split(",")
    ]
    rows = read_rows(options.out)
    for name, length in tqdm(wanted, unit="row"):
        command = [sys.executable, __file__, "--row", name, length]
        for option in ("last", "layers"):
            if value := getattr(options, option):
                command += [f"--{option}", str(value)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows = [r for r in rows if (r["cache"], str(r["length"])) != (name, length)]
        rows.append({**json.loads(done.stdout), "commit": commit()})
        rows.sort(key=lambda row: (row["length"], list(CACHES).index(row["cache"])))
        if options.out:
            found = about(str(checkpoint.WEIGHTS.name))
            # Rows may be of several runs: each has its own.
            found.pop("commit", None)
            record = {"about": found, "rows": rows}
            options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
