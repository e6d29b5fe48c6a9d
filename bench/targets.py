"""The speeds that the op must reach, and what the records say about each."""

from dataclasses import dataclass, fields

from cases import Shape
from rivals import STOCK

DECODE_MS = {
    "affine8": {4096: 0.7, 16384: 2.5, 32768: 5.0},
    "affine4": {4096: 0.75, 16384: 2.8, 32768: 5.5},
}
# rival, its format, the op's format, times faster
FASTER_THAN = (
    ("llama_cpp", "q8_0", "affine8", 6),
    ("llama_cpp", "q4_0", "affine4", 10),
    ("onnxruntime_gqa", "int8", "affine8", 3),
    ("torch_sdpa", "dense", "affine8", 4),
    ("torch_sdpa", "dense", "affine4", 4),
    ("mlx_sdpa", "dense", "affine8", 40),
    ("mlx_sdpa", "dense", "affine4", 40),
    ("mlx_lm_quantized", "affine8", "affine8", 200),
    ("mlx_lm_quantized", "affine4", "affine4", 200),
)
VERIFY_COST = 4.0  # T_q 8 over T_q 1
WIDE_GROUP_COST = 1.7  # GQA 16:1 over 8:1
PREFILL_PEAK_SHARE = 0.75
PREFILL_OVER_TORCH = 0.6
TWO_THREADS = 1.8
# A tile's memory does not grow with the cache: 8 times the keys, at most this more.
MEMORY_GROWTH = 1.25


@dataclass(frozen=True)
class Target:
    """One requirement at one place. A margin of 1 or more is met, whatever the unit
    of the two values."""

    name: str
    where: str
    target: str
    reached: str
    margin: float

    @property
    def met(self):
        return self.margin >= 1


def at_most(name, where, limit, reached, unit=""):
    words = f"≤ {limit:g}{unit}", f"{reached:.3g}{unit}"
    return Target(name, where, *words, limit / reached)


def at_least(name, where, limit, reached, unit=""):
    words = f"≥ {limit:g}{unit}", f"{reached:.3g}{unit}"
    return Target(name, where, *words, reached / limit)


def shape_of(record):
    names = [field.name for field in fields(Shape)]
    return Shape(**{name: record["shape"][name] for name in names})


class Times:
    """Medians by rival, format and shape, each within its own group: only there were
    they taken in turns."""

    def __init__(self, records):
        self.groups = {}
        for record in records:
            if record["kind"] == "time" and not record["one_call"]:
                group = self.groups.setdefault(record["group"], {})
                key = record["rival"], record["format"], shape_of(record)
                group[key] = record

    def entries(self, rival):
        """(group's name, format, shape, record) of every result of a rival."""
        for name, group in self.groups.items():
            for (found, storage, shape), record in group.items():
                if found == rival:
                    yield name, storage, shape, record

    def get(self, group, rival, storage, shape):
        record = self.groups.get(group, {}).get((rival, storage, shape))
        return record and record["median_s"]

    def probe(self, group, rival):
        for (found, _, _), record in self.groups.get(group, {}).items():
            if found == rival:
                return record
        return None


def decode_times(times):
    for group, storage, shape, record in times.entries("fused"):
        limit = DECODE_MS.get(storage, {}).get(shape.kv_len)
        if group.startswith("decode-") and limit:
            name = f"decode {storage}, T_kv {shape.kv_len}"
            yield at_most(name, shape.dtype, limit, record["median_s"] * 1e3, " ms")


def decode_ratios(times):
    for group, storage, shape, record in times.entries("fused"):
        if not group.startswith("decode-bfloat16"):
            continue
        for rival, rival_storage, our_storage, limit in FASTER_THAN:
            theirs = times.get(group, rival, rival_storage, shape)
            if storage == our_storage and theirs:
                name = f"decode {storage} against {rival} {rival_storage}"
                ratio = theirs / record["median_s"]
                yield at_least(name, f"T_kv {shape.kv_len}", limit, ratio, "×")


def row_costs(times):
    """What more query rows and more query heads cost over the same cache."""
    for group, storage, shape, record in times.entries("fused"):
        where = f"{storage}, T_kv {shape.kv_len}"
        if group.startswith("verify-") and shape.q_len == 8:
            one = Shape(kv_len=shape.kv_len)
            base = times.get(group, "fused", storage, one)
            ratio = record["median_s"] / base
            yield at_most("T_q 8 over T_q 1", where, VERIFY_COST, ratio, "×")
        if group.startswith("heads-") and shape.repeats == 16:
            half = Shape(kv_len=shape.kv_len, q_heads=shape.q_heads // 2)
            base = times.get(group, "fused", storage, half)
            ratio = record["median_s"] / base
            yield at_most("GQA 16:1 over 8:1", where, WIDE_GROUP_COST, ratio, "×")


def prefill(times):
    for group, storage, shape, record in times.entries("fused"):
        if not group.startswith("prefill-"):
            continue
        where = f"{storage}, {shape.dtype}, T_q {shape.q_len}, T_kv {shape.kv_len}"
        peak = times.probe(group, "fma_peak")
        if peak:
            share = record["flops"] * peak["median_s"] / record["median_s"]
            share /= peak["flops"]
            name = "prefill's share of FMA peak"
            yield at_least(name, where, PREFILL_PEAK_SHARE, share)
        theirs = times.get(group, "torch_sdpa", "dense", shape)
        if theirs:
            ratio = record["median_s"] / theirs
            yield at_most("prefill over torch", where, PREFILL_OVER_TORCH, ratio, "×")


def thread_scaling(records):
    for record in records:
        if record["kind"] == "threads" and "speedup" in record:
            shape = shape_of(record)
            where = f"{record['format']}, T_kv {shape.kv_len}"
            speedup = record["speedup"]
            yield at_least("two threads over one", where, TWO_THREADS, speedup, "×")


def memory_growth(records):
    """The op's peak extra memory on the longest cache over that on the shortest."""
    found = {}
    for record in records:
        if record["kind"] == "memory" and record["rival"] == "fused":
            key = record["format"], record["shape"]["dtype"]
            # MLX counts its own arrays only; the process has the scratch as well.
            size = record["rss_bytes"] or record["mlx_bytes"]
            found.setdefault(key, {})[record["shape"]["kv_len"]] = size
    for (storage, dtype), by_length in found.items():
        low, high = min(by_length), max(by_length)
        if low < high:
            growth = by_length[high] / by_length[low]
            name = f"prefill's extra memory, T_kv {high} over {low}"
            yield at_most(name, f"{storage}, {dtype}", MEMORY_GROWTH, growth, "×")


def evaluate(records):
    times = Times(records)
    parts = (decode_times, decode_ratios, row_costs, prefill)
    found = [target for part in parts for target in part(times)]
    return found + [*thread_scaling(records), *memory_growth(records)]


def by_requirement(found):
    """Targets of one name together, in the order of their first."""
    rows = {}
    for target in found:
        rows.setdefault(target.name, []).append(target)
    return rows


def against_stock(records):
    """Worst first: (stock time / our time, group, our record, stock record)."""
    times = Times(records)
    found = []
    for group, storage, shape, ours in times.entries("fused"):
        stock = [
            record
            for (rival, kept_as, its_shape), record in times.groups[group].items()
            if rival in STOCK and its_shape == shape and kept_as in (storage, "dense")
        ]
        if stock:
            best = min(stock, key=lambda record: record["median_s"])
            found.append((best["median_s"] / ours["median_s"], group, ours, best))
    return sorted(found, key=lambda row: row[0])


def missing(records):
    """Entries of the op that gave no time, with the reason."""
    return [
        record
        for record in records
        if record["kind"] == "left_out" and record["rival"] == "fused"
    ]
