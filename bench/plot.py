"""Draw decode times over the length of the cache from recorded results.

python bench/plot.py bench/results/cpu.jsonl --dtype bfloat16 --out decode.png
python bench/plot.py bench/results/gpu.jsonl
"""

import argparse
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from cases import MAIN_FORMATS
from records import read_lines

matplotlib.use("Agg")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, help="default: beside the results")
    return parser.parse_args()


def is_drawn(record):
    """The main formats and the machine's limits; the rest would hide them."""
    affine = record["format"] in MAIN_FORMATS
    if record["rival"] in ("fused", "mlx_lm_quantized"):
        return affine
    return record["rival"] not in ("mlx_dequantize_sdpa", "mlx_quantized_matmul")


def decode_lines(records, dtype):
    """Records by (rival, format), sorted by the length of the cache."""
    lines = {}
    for record in records:
        decode = record["group"].startswith(f"decode-{dtype}-")
        timed = record["kind"] == "time" and decode and not record["one_call"]
        if timed and is_drawn(record):
            name = record["rival"], record["format"]
            lines.setdefault(name, []).append(record)
    for line in lines.values():
        line.sort(key=lambda record: record["shape"]["kv_len"])
    return lines


def byte_floors(lines):
    """Least time to read an affine cache, by the bandwidth of the same group."""
    probes = lines.get(("read_bandwidth", "none"), [])
    speed = {r["group"]: r["kv_bytes"] / r["median_s"] for r in probes}
    for (rival, storage), line in lines.items():
        if rival == "fused":
            points = [r for r in line if r["group"] in speed]
            lengths = [r["shape"]["kv_len"] for r in points]
            yield storage, lengths, [r["kv_bytes"] / speed[r["group"]] for r in points]


def draw(axes, lines):
    slowest_first = sorted(lines.items(), key=lambda item: -item[1][-1]["median_s"])
    for (rival, storage), line in slowest_first:
        if line[0]["nmse"] is None:
            continue
        lengths = [r["shape"]["kv_len"] for r in line]
        low, mid, high = (
            [r[key] * 1e3 for r in line] for key in ("p10_s", "median_s", "p90_s")
        )
        ours = rival == "fused"
        (drawn,) = axes.plot(
            lengths,
            mid,
            marker="o" if ours else ".",
            linewidth=2.5 if ours else 1,
            label=f"{rival} {storage}",
        )
        axes.fill_between(lengths, low, high, alpha=0.15, color=drawn.get_color())
    for storage, lengths, seconds in byte_floors(lines):
        floor = [s * 1e3 for s in seconds]
        label = f"bytes of {storage} / bandwidth"
        axes.plot(lengths, floor, "k:" if storage == "affine8" else "k-.", label=label)


GPU_RIVALS = ("mlx_sdpa", "mlx_lm_quantized", "flashinfer", "flashinfer_tensor_cores")
GPU_FORMATS = (*MAIN_FORMATS, "k8v4")
FLOORS = dict(zip(GPU_FORMATS, ("k:", "k-.", "k--")))


def gpu_lines(records):
    """{batch: {(rival, format): {keys: record}}} of decoding with the same heads.

    Of a call that was recorded twice, the later one counts.
    """
    found = {}
    for record in records:
        shape, rival = record["shape"], record["rival"]
        heads = (shape["q_heads"], shape["kv_heads"], shape["head_dim"])
        decode = shape["q_len"] == 1 and heads == (32, 8, 128)
        ours = rival == "fused" and record["format"] in GPU_FORMATS
        drawn = ours or rival in GPU_RIVALS or rival.startswith("torch_")
        if decode and drawn and record["us"] and "shortest" not in shape:
            lines = found.setdefault(shape["batch"], {})
            name = rival, record["format"]
            lines.setdefault(name, {})[shape["kv_len"]] = record
    return dict(sorted(found.items()))


def draw_gpu(axes, lines, colors):
    for (rival, storage), line in sorted(lines.items()):
        lengths, ours = sorted(line), rival == "fused"
        times = [line[n]["us"] for n in lengths]
        style = {"marker": "o", "linewidth": 2.5} if ours else {"marker": "."}
        style["color"] = colors[rival, storage]
        axes.plot(lengths, times, label=f"{rival} {storage}", **style)
        if ours:
            floors = [line[n]["floor_us"] for n in lengths]
            label = f"bytes of {storage} / bandwidth"
            axes.plot(lengths, floors, FLOORS[storage], marker="_", label=label)
    axes.set(xscale="log", yscale="log", xlabel="keys in the cache")
    lengths = sorted({n for line in lines.values() for n in line})
    axes.set_xticks(lengths, [f"{n / 1024:g}K" for n in lengths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def gpu_figure(records):
    """One panel a batch size; None where no decoding was timed."""
    panels = gpu_lines(records)
    if not panels:
        return None
    names = sorted({name for lines in panels.values() for name in lines})
    colors = {name: f"C{i}" for i, name in enumerate(names)}
    size = (5 * len(panels) + 2, 5.5)
    figure, rows = plt.subplots(1, len(panels), figsize=size, squeeze=False)
    for axes, (batch, lines) in zip(rows[0], panels.items()):
        draw_gpu(axes, lines, colors)
        axes.set_title(f"{batch} sequence" + "s" * (batch > 1))
    rows[0][0].set_ylabel("µs a call")
    labels = {line.get_label(): line for axes in rows[0] for line in axes.lines}
    beside = {"fontsize": 8, "loc": "center left", "bbox_to_anchor": (1, 0.5)}
    rows[0][-1].legend(labels.values(), labels.keys(), **beside)
    devices = {record["device"] for record in records if "device" in record}
    heads = "Decode, 32 query and 8 KV heads, D 128, bfloat16"
    figure.suptitle(f"{heads}\n{', '.join(sorted(devices))}", y=1.02)
    return figure


def write_gpu(records, out):
    figure = gpu_figure(records)
    if figure is None:
        return "no decode times"
    figure.savefig(out, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return out


def main():
    arguments = parse_arguments()
    records = read_lines(arguments.results)
    if any("us" in record for record in records):
        print(
            write_gpu(records, arguments.out or arguments.results.with_suffix(".png"))
        )
        return
    lines = decode_lines(records, arguments.dtype)
    if not lines:
        raise SystemExit(f"no decode times in {arguments.dtype}")
    figure, axes = plt.subplots(figsize=(9, 6))
    draw(axes, lines)
    axes.set(xscale="log", yscale="log", xlabel="keys in the cache", ylabel="ms a call")
    lengths = sorted({r["shape"]["kv_len"] for line in lines.values() for r in line})
    axes.set_xticks(lengths, [f"{n // 1024}K" for n in lengths])
    axes.minorticks_off()
    shape = next(iter(lines.values()))[0]["shape"]
    axes.set_title(
        f"Decode, {shape['q_heads']} query and {shape['kv_heads']} KV heads, "
        f"D {shape['head_dim']}, {arguments.dtype}, {records[0]['threads']} threads\n"
        f"{records[0]['device']}"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    out = arguments.out or arguments.results.with_suffix(".png")
    figure.savefig(out, dpi=120, bbox_inches="tight")
    print(out)


if __name__ == "__main__":
    main()
