"""Markdown tables of the records."""

import sys

from targets import (
    Times,
    against_stock,
    by_requirement,
    evaluate,
    missing,
    shape_of,
)


def table(heads, rows):
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def milliseconds(seconds):
    return f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def floors(record, times):
    """Least time for the bytes and for the arithmetic, on this machine, in ms."""
    found = []
    for probe, amount in (("read_bandwidth", "kv_bytes"), ("fma_peak", "flops")):
        limit = times.probe(record["group"], probe)
        size = limit and (limit["kv_bytes"] or limit["flops"])
        ratio = limit and record[amount] / size
        found.append(milliseconds(ratio * limit["median_s"]) if limit else "")
    return found


def ratio_to_fused(record, times):
    shape = shape_of(record)
    for storage in (record["format"], "affine8"):
        ours = times.get(record["group"], "fused", storage, shape)
        if ours:
            return f"{record['median_s'] / ours:.3g}"
    return ""


def time_row(record, times):
    label = record["rival"] + (" (one call)" if record["one_call"] else "")
    is_attention = record["nmse"] is not None
    return [
        label,
        record["format"],
        str(shape_of(record)) if is_attention else record["note"],
        milliseconds(record["median_s"]),
        f"{milliseconds(record['p10_s'])}–{milliseconds(record['p90_s'])}",
        ratio_to_fused(record, times) if is_attention else "",
        *(floors(record, times) if is_attention else ("", "")),
        f"{record['nmse']:.1e}" if is_attention else "",
        f"{record['rounds']} × {record['calls']}",
    ]


def probe_line(records, group):
    times = Times(records)
    bandwidth = times.probe(group, "read_bandwidth")
    peak = times.probe(group, "fma_peak")
    parts = []
    if bandwidth:
        rate = bandwidth["kv_bytes"] / bandwidth["median_s"] / 1e9
        parts.append(f"reads {rate:.1f} GB/s")
    if peak:
        rate = peak["flops"] / peak["median_s"] / 1e9
        parts.append(f"{peak['note']} {rate:.0f} GFLOP/s")
    return ", ".join(parts)


def print_group(records):
    if not records:
        return
    group = records[0]["group"]
    times = Times(records)
    heads = ["rival", "cache", "shape", "ms", "p10–p90", "over fused"]
    heads += ["bytes floor", "flops floor", "NMSE", "samples"]
    timed = [r for r in records if r["kind"] == "time"]
    if timed:
        print(f"\n### {group}\n\nMachine: {probe_line(records, group)}\n")
        print(table(heads, [time_row(r, times) for r in timed]))
    for record in records:
        if record["kind"] == "left_out":
            verdict = "WRONG, not timed" if record["wrong"] else "left out"
            name = f"{record['rival']} {record['format']}, {shape_of(record)}"
            print(f"\n- {verdict}: {name}: {record['reason']}")
    sys.stdout.flush()


def target_row(name, targets):
    """A requirement by the place where it is worst."""
    worst = min(targets, key=lambda target: target.margin)
    met = sum(target.met for target in targets)
    return [
        name,
        worst.target,
        worst.reached,
        worst.where,
        f"{worst.margin:.2f}",
        "yes" if met == len(targets) else f"**{met} of {len(targets)}**",
    ]


def print_targets(records):
    found = evaluate(records)
    rows = [target_row(*row) for row in by_requirement(found).items()]
    heads = ["must reach", "target", "reached at worst", "where", "target / reached"]
    print("\n### Targets\n\nA ratio of 1 or more is met, whichever way it points.\n")
    print(table([*heads, "met"], rows))
    missed = [
        [t.name, t.where, t.target, t.reached, f"{t.margin:.2f}"]
        for t in found
        if not t.met
    ]
    if missed:
        heads = ["not met", "where", "target", "reached", "target / reached"]
        print(f"\n{table(heads, missed)}")


def print_against_stock(records):
    rows = [
        [
            f"{ours['format']}, {shape_of(ours)}",
            f"{best['rival']} {best['format']}",
            milliseconds(best["median_s"]),
            milliseconds(ours["median_s"]),
            f"{ratio:.3g}",
        ]
        for ratio, group, ours, best in against_stock(records)
    ]
    print("\n### Against the best of stock MLX, worst first\n")
    print(
        table(["inputs", "best stock path", "its ms", "our ms", "times faster"], rows)
    )


def print_memory(records):
    rows = [
        [
            record["rival"],
            record["format"],
            str(shape_of(record)),
            f"{record['rss_bytes'] / 1e6:.1f}" if record["rss_bytes"] else "",
            f"{record['mlx_bytes'] / 1e6:.1f}",
            f"{record['out_bytes'] / 1e6:.1f}",
        ]
        for record in records
        if record["kind"] == "memory"
    ]
    heads = ["rival", "cache", "shape", "process MB", "mx peak MB", "result MB"]
    if rows:
        print("\n### Peak memory above the inputs, measured in a process of its own\n")
        print(table(heads, rows))


def print_threads(records):
    rows = [
        [
            record["format"],
            str(shape_of(record)),
            milliseconds(record["one_thread_s"]),
            milliseconds(record["two_threads_s"]),
            f"{record['speedup']:.2f}",
        ]
        for record in records
        if record["kind"] == "threads"
    ]
    if rows:
        print("\n### One thread and two\n")
        print(table(["cache", "shape", "one, ms", "two, ms", "times faster"], rows))


def print_summary(records):
    """All tables that span groups; the exit status of the benchmark."""
    print_memory(records)
    print_threads(records)
    print_against_stock(records)
    print_targets(records)
    slower = [row for row in against_stock(records) if row[0] < 1]
    absent = missing(records)
    if absent:
        print(f"\nFAILED: {len(absent)} results of the op are missing or wrong.")
    if slower:
        print(f"\nFAILED: slower than stock MLX on {len(slower)} shapes.")
    return 1 if slower or absent else 0
