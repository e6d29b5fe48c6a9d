"""The tables of figures in README.md, made from the records.

python bench/figures.py           write them
python bench/figures.py --check   fail where README.md differs
"""

import json
import re
import sys
from pathlib import Path

from report import milliseconds, table

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
MARKED = r"(<!-- {name} -->\n\n).*?(\n<!-- end -->)"

# Column heads of the decode table: rival and format of the record behind each.
DECODE = {
    "ours, 8 bit": ("fused", "affine8"),
    "ours, 4 bit": ("fused", "affine4"),
    "MLX bf16": ("mlx_sdpa", "dense"),
    "mlx-lm 8 bit": ("mlx_lm_quantized", "affine8"),
    "torch bf16": ("torch_sdpa", "dense"),
    "ONNX Runtime int8": ("onnxruntime_gqa", "int8"),
    "llama.cpp q8_0": ("llama_cpp", "q8_0"),
    "llama.cpp q4_0": ("llama_cpp", "q4_0"),
}


def read(name):
    """A record: what a .json file holds, or a list of the lines of a .jsonl file."""
    text = (RESULTS / name).read_text()
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


def decode_groups(records):
    """Of decode in bfloat16, by number of keys: records by rival and format."""
    groups = {}
    for record in records:
        found = re.fullmatch(r"decode-bfloat16-(\d+)", record["group"])
        if found and record["kind"] == "time" and not record["one_call"]:
            times = groups.setdefault(int(found[1]), {})
            times[record["rival"], record["format"]] = record
    return dict(sorted(groups.items()))


def cpu_decode():
    """One row for each number of keys that a group of the benchmark has timed."""
    lines = [
        [thousands(kv_len), *(time_text(times.get(key)) for key in DECODE.values())]
        for kv_len, times in decode_groups(read("cpu.jsonl")).items()
    ]
    return table(["keys", *DECODE], lines)


def kv_caches():
    """What each cache changes, and its memory at the longest context."""
    found = read("kv_eval.json")["results"]
    rows = read("kv_memory.json")["rows"]
    timed = {each["spec"]: each["speeds"] for each in read("kv_speed.json")["results"]}
    longest = max(row["length"] for row in rows)
    memory = {row["cache"]: row for row in rows if row["length"] == longest}
    memory["dense"] = memory["mlx-lm dense"]
    heads = ["cache", "perplexity", "divergence", "same top", "needles"]
    heads += [f"KV MiB, {longest // 1024}K", "less", "peak MiB"]
    heads.append("step, of dense's " + "/".join(map(thousands, timed["dense"])))
    lines = [
        [*quality(each), *held(each["spec"], memory), shares(timed[each["spec"]])]
        for each in found
    ]
    stock = [name for name in memory if name.startswith("mlx-lm") and "bit" in name]
    lines += [[name, "", "", "", "", *held(name, memory), ""] for name in stock]
    return table(heads, lines)


def quality(found):
    name = found["spec"]
    needles = [right for at in found["lengths"].values() for right in at["right"]]
    deepest = thousands(max(map(int, found["lengths"])))
    change = "" if name == "dense" else f" ({found['perplexity_change']:+.3%})"
    return [
        name if name == "dense" else f"`{name}`",
        f"{found['perplexity']:.4f}{change}",
        f"{found['mean_divergence']:.1e}",
        f"{found['same_top_token']:.2%}",
        f"{sum(needles)} of {len(needles)}, to {deepest}",
    ]


def held(name, memory):
    row, dense = memory[name], memory["dense"]
    less = 1 - row["kv_bytes"] / dense["kv_bytes"]
    return [
        f"{row['kv_bytes'] / 2**20:.1f}",
        f"{less:.1%}" if less else "",
        f"{row['peak'] / 2**20:.0f}",
    ]


def shares(speeds):
    return "/".join(f"{at['of_dense']:.2f}" for at in speeds.values())


def thousands(length):
    return f"{int(length) // 1024}K"


def time_text(record):
    return "" if record is None else milliseconds(record["median_s"])


def fused_lines(rows):
    """Head dims that run fused, by formats that are alike and by backends."""
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    by_format = {}
    for row in rows:
        dims = "{first} to {last} by {step}".format(**row["dims"])
        also = "; 576 with 512" if row["mla"] else ""
        by_format.setdefault(row["format"], {})[row["backend"]] = dims + also
    alike = {}
    for name, cells in by_format.items():
        alike.setdefault(tuple(cells[b] for b in backends), []).append(name)
    lines = [[", ".join(names), *cells] for cells, names in alike.items()]
    return [["formats", *backends], *lines]


def fused():
    """What the plan says of each backend."""
    heads, *lines = fused_lines(read("fused.json"))
    return table(heads, lines)


TABLES = {"fused": fused, "cpu-decode": cpu_decode, "kv-caches": kv_caches}


def with_figures(text):
    """The text with each marked table made anew."""
    for name, make in TABLES.items():
        pattern = re.compile(MARKED.format(name=name), re.DOTALL)
        # No backslash of a table may be taken for a group.
        made = make().replace("\\", "\\\\")
        text, count = pattern.subn(rf"\g<1>{made}\n\g<2>", text)
        if count != 1:
            sys.exit(f"README.md must have one place for {name}; got {count}")
    return text


def main():
    before = README.read_text()
    after = with_figures(before)
    if "--check" not in sys.argv[1:]:
        README.write_text(after)
    elif before != after:
        sys.exit("README.md's figures are not those of bench/results: make figures")


if __name__ == "__main__":
    main()
