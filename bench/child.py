"""Work in processes of their own: memory peaks, and thread counts that are read once.

python bench/child.py memory '{"rival": "fused", ...}'   # prints one line of JSON
python bench/child.py serve '{"rival": "fused", ...}'    # one time a line asked for
"""

import json
import os
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve()


def entry_from(text):
    from cases import Entry, Shape

    fields = json.loads(text)
    return Entry(fields["rival"], Shape(**fields["shape"]), fields["format"])


def process_bytes(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def restart_peak():
    """Linux forgets the highest resident size; False where it cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def memory(entry, threads):
    """Peak memory of one call above what its inputs take."""
    import mlx.core as mx
    import rivals
    from oracle import make_inputs

    prepared = rivals.prepare(entry, make_inputs(entry.shape), threads, cold=False)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    watched = restart_peak()
    resident = process_bytes("VmRSS") if watched else 0
    prepared.run(1)
    peak = process_bytes("VmHWM") - resident if watched else None
    shape = entry.shape
    item = 4 if shape.dtype == "float32" else 2
    return {
        "rss_bytes": peak,
        "mlx_bytes": mx.get_peak_memory() - before,
        "out_bytes": shape.q_heads * shape.q_len * shape.head_dim * item,
    }


def serve(entry, threads):
    """Answer every line on stdin with the seconds of one call."""
    import rivals
    from oracle import check_prepared, make_inputs
    from timing import calls_for, seconds_of

    prepared = rivals.prepare(entry, make_inputs(entry.shape), threads, cold=True)
    check_prepared(prepared, entry.shape)
    calls = calls_for(seconds_of(prepared.run))
    print("ready", flush=True)
    for _ in sys.stdin:
        print(seconds_of(prepared.run, calls), flush=True)


def main():
    task, text = sys.argv[1:]
    threads = int(os.environ["MLX_QUANTIZED_SDPA_THREADS"])
    entry = entry_from(text)
    if task == "serve":
        serve(entry, threads)
    else:
        print(json.dumps(memory(entry, threads)))


if __name__ == "__main__":
    main()
