"""docs/evidence.html: what was shown, from the records in bench/results alone.

A test fails where the page is not what they say.
"""

from pathlib import Path

import figures
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from mlx_quantized_sdpa.evaluation import charts
from mlx_quantized_sdpa.evaluation.report import STYLE
from report import milliseconds, target_row
from rivals.mlx_fused import TOLERANCE
from targets import against_stock, by_requirement, evaluate

PAGE = figures.ROOT / "docs" / "evidence.html"

# Lines of the decode chart: label, rival, format of the record.
DECODE_LINES = (
    ("ours, 8 bit", "fused", "affine8"),
    ("ours, 4 bit", "fused", "affine4"),
    ("torch bf16", "torch_sdpa", "dense"),
    ("ORT int8", "onnxruntime_gqa", "int8"),
    ("llama.cpp q8_0", "llama_cpp", "q8_0"),
    ("MLX bf16", "mlx_sdpa", "dense"),
    ("mlx-lm 8 bit", "mlx_lm_quantized", "affine8"),
)
# Records that are tables as they stand.
COUNTED = {
    "Drawn calls against float64": "fuzz.json",
    "Planted faults": "mutation.json",
    "Soak": "soak.json",
}
# Where a record comes from stands behind what it says.
ORIGIN = ("backend", "seed", "first_seed", "device", "versions", "commit")
# What each layer of a proof shows, what it cannot, and its test files by suite.
CUDA_LAYERS = (
    (
        "emulated GPU",
        "small kernels with lost barriers, fences and waits, stray or misaligned "
        "accesses are refused, right ones are not",
        "faults that it does not look for",
        {"cuda": ("cuda.test_emulated_gpu",)},
    ),
    (
        "kernels on it",
        "results against float64; accesses of shared memory and of K and V in bounds, "
        "aligned and ordered; copies and products come only when they are waited for",
        "how a GPU rounds exp2, log2 and tanh; how long anything takes",
        {
            "cuda": (
                "cuda.test_quantized_sdpa_emulated",
                "cuda.test_quantized_sdpa_nonfinite_emulated",
                "cuda.test_quantized_sdpa_prefill",
            )
        },
    ),
    (
        "the wheel in MLX's CUDA library",
        "the op's results in MLX's own encoder, graphs, memory and events, compiled by "
        "NVRTC, on a stand-in for the driver: streams are late, memory that was given "
        "back is gone, and kernels run on the emulated GPU",
        "what a driver does, and that a GPU takes the code",
        {
            "cuda-wheel": (
                "cuda.stand_in.test_quantized_sdpa_stand_in",
                "cuda.test_quantized_sdpa_prefill",
            )
        },
    ),
)
METAL_LAYERS = (
    (
        "L0, L1",
        "the text obeys MSL's rules and a strict front end takes every instance",
        "that Apple's compiler takes it",
        {"metal": ("metal.test_front_end",)},
    ),
    (
        "L2, L3",
        "results against float64 lane by lane; no race, no read out of bounds or of "
        "what was never written",
        "how a GPU rounds exp and tanh, or treats denormal numbers",
        {"metal": ("metal.test_detector",)},
    ),
    (
        "L4",
        "the executor gives MLX's own kernels the bits that Apple's compiler gave them",
        "the same of our kernels, which Apple's compiler has not seen",
        {"metal": ("metal.test_calibration",)},
    ),
    (
        "L5",
        "planted faults are noticed",
        "that no other fault is there",
        {"metal": ("metal.test_mutations",)},
    ),
    (
        "L6",
        "the real host code names, binds and launches as the kernels expect; the op's "
        "own tests pass through it",
        "what Metal's driver does: order of passes, residency, threads a pipeline has",
        {
            "metal": ("metal.test_offsets",),
            "metal-op": ("test_fast_quantized_sdpa",),
        },
    ),
)


def read(name):
    """A record, or None where none was made."""
    return figures.read(name) if (figures.RESULTS / name).exists() else None


def fused_table(rows):
    heads, *lines = figures.fused_lines(rows)
    return {"heads": heads, "rows": lines}


def error_table(records):
    """The largest error of the op by format and type of q, beside its bound."""
    worst = {}
    for record in records:
        if record["kind"] == "time" and record["rival"] == "fused":
            dtype = record["shape"]["dtype"]
            key = record["format"], dtype
            worst[key] = max(worst.get(key, 0), record["nmse"])
    formats = list(dict.fromkeys(name for name, _ in worst))
    lines = [
        [
            name,
            *(f"{worst[name, d]:.1e}" if (name, d) in worst else "" for d in TOLERANCE),
        ]
        for name in formats
    ]
    lines.append(["bound", *(f"{bound:.0e}" for bound in TOLERANCE.values())])
    return {"heads": ["format", *TOLERANCE], "rows": lines}


def floor_ms(times, storage):
    """The least time that reading the cache takes at the bandwidth of the run."""
    bandwidth = times["read_bandwidth", "none"]
    rate = bandwidth["kv_bytes"] / bandwidth["median_s"]
    return times["fused", storage]["kv_bytes"] / rate * 1e3


def decode_chart(groups):
    lines = []
    # The last rival is far above all others.
    for label, rival, storage in DECODE_LINES[:-1]:
        points = [
            (kv_len, times[rival, storage]["median_s"] * 1e3)
            for kv_len, times in groups.items()
            if (rival, storage) in times
        ]
        if points:
            lines.append(charts.Line(label, points))
    floors = [(kv_len, floor_ms(times, "affine8")) for kv_len, times in groups.items()]
    lines.append(charts.Line("8-bit bytes", floors))
    return Markup(charts.lines("Decode, ms a call", "ms", lines))


def decode_table(groups):
    heads = ["keys", *(label for label, _, _ in DECODE_LINES), "8-bit bytes alone"]
    rows = []
    for kv_len, times in groups.items():
        cells = [
            figures.time_text(times.get((rival, storage)))
            for _, rival, storage in DECODE_LINES
        ]
        floor = milliseconds(floor_ms(times, "affine8") / 1e3)
        rows.append([figures.thousands(kv_len), *cells, floor])
    return {"heads": heads, "rows": rows}


def target_table(records):
    rows = [target_row(*row) for row in by_requirement(evaluate(records)).items()]
    rows = [[cell.replace("*", "") for cell in row] for row in rows]
    heads = ["must reach", "target", "at worst", "where", "target / reached", "met"]
    return {"heads": heads, "rows": rows}


def cpu(records):
    """All of the CPU's speed, and the machine it is of."""
    if not records:
        return None
    first = records[0]
    groups = figures.decode_groups(records)
    worst = against_stock(records)[0]
    return {
        "device": first["device"],
        "threads": first["threads"],
        "versions": {k: v for k, v in first["versions"].items() if v},
        "commits": sorted({record["commit"] for record in records}),
        "table": decode_table(groups),
        "chart": decode_chart(groups),
        "targets": target_table(records),
        "worst": {"times": f"{worst[0]:.1f}", "group": worst[1]},
        "errors": error_table(records),
    }


def gpu(records):
    """Every time of the GPU beside that of its bytes."""
    if not records:
        return None
    rows = [
        [
            r["rival"],
            r["format"],
            " ".join(f"{name} {size}" for name, size in r["shape"].items()),
            f"{r['us']:.1f}" if r["us"] else r["error"],
            f"{r['floor_us']:.1f}" if r["floor_us"] else "",
        ]
        for r in records
    ]
    devices = {record["device"] for record in records if "device" in record}
    return {
        "device": ", ".join(sorted(devices)),
        "commits": sorted({record["commit"] for record in records}),
        "table": {"heads": ["", "cache", "shape", "µs", "bytes alone"], "rows": rows},
    }


def caches(found):
    """Quality of the caches on the small model, in bfloat16."""
    if not found:
        return None
    results = found["results"]
    rows = []
    for each in results:
        needles = [right for at in each["lengths"].values() for right in at["right"]]
        rows.append(
            [
                each["spec"],
                f"{each['perplexity']:.4f}",
                f"{each['perplexity_change']:+.3%}" if each is not results[0] else "",
                f"{each['mean_divergence']:.1e}",
                f"{each['same_top_token']:.2%}",
                f"{sum(needles)} of {len(needles)}",
            ]
        )
    heads = ["cache", "perplexity", "change", "divergence", "same top", "needles"]
    bars = [
        charts.Bar(each["spec"], each["mean_divergence"], row[3], index)
        for index, (each, row) in enumerate(zip(results[1:], rows[1:]), 1)
    ]
    chart = Markup(charts.bars("Mean divergence from the dense cache", bars))
    return {"heads": heads, "rows": rows, "chart": chart}


def memory(found):
    if not found:
        return None
    rows = [
        [
            row["cache"],
            figures.thousands(row["length"]),
            f"{row['kv_bytes'] / 2**20:.1f}",
            f"{row['peak'] / 2**20:.0f}",
        ]
        for row in found["rows"]
    ]
    return {"heads": ["cache", "tokens", "KV MiB", "prefill's peak MiB"], "rows": rows}


def layer_table(layers, tests):
    """A line a layer, with how many tests of it passed."""
    suites = (tests or {}).get("suites", {})
    rows = []
    for layer, shows, not_shown, places in layers:
        files = [
            suites[suite][name]
            for suite, names in places.items()
            for name in names
            if name in suites.get(suite, {})
        ]
        passed = sum(file["passed"] for file in files)
        failed = sum(file["failed"] for file in files)
        count = f"{passed} passed, {failed} failed" if files else "no record"
        rows.append([layer, shows, not_shown, count])
    return {"heads": ["layer", "shows", "does not show", "tests"], "rows": rows}


def test_table(tests):
    if not tests:
        return None
    rows = []
    for suite, files in tests["suites"].items():
        sums = [
            sum(f[k] for f in files.values()) for k in ("passed", "failed", "skipped")
        ]
        rows.append([suite, *map(str, sums)])
    heads = ["suite", "passed", "failed", "skipped"]
    return {"heads": heads, "rows": rows, "commit": tests["commit"]}


def plain(value):
    """A value of a record as a cell of a table."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain(each)}" for name, each in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def lines_of(found):
    """A line for each of these, by the names of what they hold."""
    heads = list(dict.fromkeys(key for line in found for key in line))
    heads.sort(key=lambda head: ORIGIN.index(head) if head in ORIGIN else -1)
    rows = [[plain(line.get(head, "")) for head in heads] for line in found]
    return {"heads": [head.replace("_", " ") for head in heads], "rows": rows}


def planted_fault(line):
    """One fault of the record, by the names of its file and test alone."""
    return {
        "fault": line["what"],
        "noticed": line["noticed"] or "no",
        "in": Path(line["file"]).name,
        "by": line["test"].rpartition("::")[2].rpartition("/")[2],
    }


def record_table(name):
    """A line for each run of a record, and one for each of what a run lists."""
    found = read(name)
    if not found:
        return None
    runs = [dict(run) for run in found.get("runs", [found])]
    each = [planted_fault(line) for run in runs for line in run.pop("each", [])]
    return {"runs": lines_of(runs), "each": lines_of(each) if each else None}


def page():
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    tests = read("tests.json")
    return environment.get_template("evidence.html.j2").render(
        style=Markup(STYLE),
        fused=fused_table(read("fused.json")),
        cpu=cpu(read("cpu.jsonl")),
        gpu=gpu(read("gpu.jsonl")),
        caches=caches(read("kv_eval.json")),
        memory=memory(read("kv_memory.json")),
        cuda_layers=layer_table(CUDA_LAYERS, tests),
        metal_layers=layer_table(METAL_LAYERS, tests),
        metal_counts=read("metal_counts.json"),
        tests=test_table(tests),
        records={name: record_table(file) for name, file in COUNTED.items()},
    )


def main():
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
    print(PAGE)


if __name__ == "__main__":
    main()
