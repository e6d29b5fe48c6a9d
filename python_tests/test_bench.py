"""The benchmark's own tests: what it times, what it refuses, what it writes."""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import apart  # noqa: E402
import cases  # noqa: E402
import evidence  # noqa: E402
import figures  # noqa: E402
import fused  # noqa: E402
import gpu_bench  # noqa: E402
import gpu_cases  # noqa: E402
import gpu_timing  # noqa: E402
import machine  # noqa: E402
import oracle  # noqa: E402
import record_tests  # noqa: E402
import records  # noqa: E402
import report  # noqa: E402
import rivals  # noqa: E402
import suite as suites  # noqa: E402
import targets  # noqa: E402
import timing  # noqa: E402
import torch_rivals  # noqa: E402
from cases import Entry, Group, Shape  # noqa: E402
from rivals.prepared import Absent, Prepared, calls_over, copies_for  # noqa: E402

SMALL = Shape(q_len=1, kv_len=64, dtype="float32", q_heads=4, kv_heads=2, head_dim=64)
SOME_ROWS = replace(SMALL, q_len=3)


class SilentProgress:
    def set_postfix_str(self, text):
        pass


class Fake:
    """A rival whose answer is right until ``spoil`` changes it."""

    def __init__(self, spoil=lambda out: out):
        self.spoil = spoil
        self.calls = 0

    def __call__(self, entry, inputs, threads, cold):
        shape = entry.shape

        def run(calls):
            self.calls += calls

        def output():
            arrays = inputs.q, inputs.k, inputs.v
            return self.spoil(oracle.attention(*arrays, shape.scale, shape.causal))

        values = (inputs.q, inputs.k, inputs.v)
        return Prepared(run, output, lambda: values, kv_bytes=64, tolerance=1e-6)


@pytest.fixture
def make_suite(monkeypatch):
    def make(fakes):
        def prepare(entry, *rest):
            return fakes[entry.rival](entry, *rest)

        monkeypatch.setattr(rivals, "prepare", prepare)
        monkeypatch.setattr(timing, "TARGET_SECONDS", 1e-6)
        arguments = argparse.Namespace(
            quick=True, rounds=4, threads=2, warm=True, max_call_seconds=30.0
        )
        return suites.Suite(arguments, lambda record: json.dumps(record))

    return make


def ready(suite, *names, shape=SMALL):
    entries = tuple(Entry(name, shape, "affine8") for name in names)
    group = Group("test", entries)
    return group, suite.ready_all(group, SilentProgress())


# --------------------------------------------------------------------------------------
# Refusing wrong answers
# --------------------------------------------------------------------------------------


def one_wrong_head(out):
    out[[0, 1]] = out[[1, 0]]
    return out


WRONG = {
    "zeros": np.zeros_like,
    "not a number": lambda out: out * np.nan,
    "swapped heads": one_wrong_head,
    "wrong scale": lambda out: out * 1.1,
    "missing head": lambda out: out[1:],
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_answer_is_not_timed(make_suite, kind):
    wrong, right = Fake(WRONG[kind]), Fake()
    suite = make_suite({"wrong": wrong, "right": right})
    _, found = ready(suite, "wrong", "right")
    assert [entry.rival for entry, _, _ in found] == ["right"]
    assert wrong.calls == 0
    (record,) = suite.records
    assert record["kind"] == "left_out" and record["rival"] == "wrong"
    assert record["wrong"] is True


@pytest.mark.parametrize("drop", [1, 16])
def test_lost_keys_are_wrong(make_suite, drop):
    def shorter(entry, inputs, threads, cold):
        prepared = Fake()(entry, inputs, threads, cold)
        arrays = inputs.q, inputs.k[:, :-drop], inputs.v[:, :-drop]
        prepared.output = lambda: oracle.attention(*arrays, entry.shape.scale, False)
        return prepared

    suite = make_suite({"shorter": shorter})
    _, found = ready(suite, "shorter")
    assert not found and suite.records[0]["wrong"]


def test_wrong_op_fails_the_run(make_suite, capsys):
    suite = make_suite({"fused": Fake(np.zeros_like)})
    ready(suite, "fused")
    assert report.print_summary(suite.records) == 1
    assert "missing or wrong" in capsys.readouterr().out


def test_absent_rival_is_named(make_suite):
    def absent(*_):
        raise Absent("library X")

    suite = make_suite({"gone": absent, "right": Fake()})
    _, found = ready(suite, "gone", "right")
    assert len(found) == 1
    (record,) = suite.records
    assert (record["rival"], record["reason"]) == ("gone", "library X")
    assert record["wrong"] is False


def test_slow_rival_is_named(make_suite, monkeypatch):
    suite = make_suite({"slow": Fake()})
    monkeypatch.setattr(timing, "seconds_of", lambda run: 1.0)
    _, found = ready(suite, "slow", shape=replace(SMALL, q_len=512, kv_len=512))
    assert not found
    assert "too slow: about 64 s" in suite.records[0]["reason"]


# --------------------------------------------------------------------------------------
# Oracle
# --------------------------------------------------------------------------------------


def test_oracle_by_hand():
    q, v = np.zeros((2, 1, 4)), np.arange(12.0).reshape(1, 3, 4)
    k = np.ones((1, 3, 4))
    np.testing.assert_allclose(
        oracle.attention(q, k, v, 1.0, False), np.tile(v.mean(axis=1), (2, 1, 1))
    )


def test_oracle_causal_is_aligned_to_the_last_key():
    inputs = oracle.make_inputs(SOME_ROWS)
    arrays = inputs.q, inputs.k, inputs.v
    out = oracle.attention(*arrays, SOME_ROWS.scale, True)
    for row in range(3):
        end = SOME_ROWS.kv_len - 2 + row
        keys, values = inputs.k[:, :end], inputs.v[:, :end]
        one = inputs.q[:, row : row + 1]
        expected = oracle.attention(one, keys, values, SOME_ROWS.scale, False)
        np.testing.assert_allclose(out[:, row : row + 1], expected)


def test_nmse_of_zeros_is_one():
    assert oracle.nmse(np.zeros(5), np.ones(5)) == 1


# --------------------------------------------------------------------------------------
# Timing
# --------------------------------------------------------------------------------------


def test_runs_are_interleaved():
    order = []
    runners = [
        timing.Runner(name, lambda calls, name=name: order.append((name, calls)))
        for name in "abc"
    ]
    for runner, rounds in zip(runners, (6, 6, 3), strict=True):
        runner.rounds, runner.calls = rounds, 2
    timing.run_in_turns(runners, settle=0)
    assert [len(runner.seconds) for runner in runners] == [6, 6, 3]
    assert all(calls == 2 for _, calls in order)
    names = [name for name, _ in order]
    for start in range(0, len(names), 5):  # a pair of rounds holds c once
        assert sorted(names[start : start + 5]) == list("aabbc")


def test_turns_are_spread():
    assert timing.turns(3, 15) == {0, 5, 10}
    assert timing.turns(15, 15) == set(range(15))


def test_slow_rivals_keep_three_rounds():
    assert timing.rounds_for(10.0, 15) == 3
    assert timing.rounds_for(0.001, 15) == 15


def test_calls_fill_a_sample():
    assert timing.calls_for(10.0) == 1
    assert timing.calls_for(1e-9) == timing.MAX_CALLS
    assert timing.calls_for(timing.TARGET_SECONDS / 4) == 4


def test_summary():
    found = timing.summary([float(i) for i in range(11)])
    assert found == {"median_s": 5.0, "p10_s": 1.0, "p90_s": 9.0}


def test_cold_copies_are_read_in_turn():
    seen = []
    run = calls_over(seen.append, ["a", "b", "c"])
    run(2)
    run(2)
    assert seen == ["a", "b", "c", "a"]
    assert copies_for(1 << 20, cold=False) == 1
    assert copies_for(1 << 20, cold=True) * (1 << 20) >= 64 << 20


# --------------------------------------------------------------------------------------
# Cases
# --------------------------------------------------------------------------------------


def test_decode_groups_hold_every_rival():
    groups = {group.name: group.entries for group in cases.groups()}
    for dtype in ("bfloat16", "float16", "float32"):
        for kv_len in (4096, 16384, 32768):
            entries = groups[f"decode-{dtype}-{kv_len}"]
            found = {(entry.rival, entry.format) for entry in entries}
            assert found >= {("fused", name) for name in cases.FORMATS}
            assert found >= {(row[0], row[1]) for row in targets.FASTER_THAN}
            assert found >= {(name, "none") for name in cases.PROBES}
            shapes = {entry.shape for entry in entries}
            assert shapes == {Shape(kv_len=kv_len, dtype=dtype)}


def test_every_fused_entry_meets_stock_in_its_group():
    for group in cases.groups():
        stock = {e.shape for e in group.entries if e.rival in rivals.STOCK}
        fused = {e.shape for e in group.entries if e.rival == "fused"}
        assert fused and fused <= stock


def test_entries_are_unique_and_known():
    for group in cases.groups() + cases.groups(quick=True):
        assert len(set(group.entries)) == len(group.entries)
        assert {entry.rival for entry in group.entries} <= set(rivals.MODULES)


def test_rows_and_heads_are_compared():
    groups = {group.name: group.entries for group in cases.groups()}
    fused = [e for e in groups["verify-4096"] if e.rival == "fused"]
    assert {e.shape.q_len for e in fused} == {1, 2, 8, 32}
    fused = [e for e in groups["heads-16384"] if e.rival == "fused"]
    assert {e.shape.repeats for e in fused} == {4, 8, 16}
    assert {e.shape.kv_heads for e in fused} == {8}


def test_flops_count_visible_keys():
    shape = Shape(q_len=5, kv_len=9, q_heads=2, kv_heads=1, head_dim=3)
    visible = sum(9 - 4 + row for row in range(5))
    assert shape.flops == 2 * 2 * 3 * 2 * visible
    assert Shape(q_len=1, kv_len=10, q_heads=1, head_dim=1).flops == 40


# --------------------------------------------------------------------------------------
# Rivals
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SMALL, SOME_ROWS], ids=["one-row", "rows"])
@pytest.mark.parametrize(
    "rival, storage",
    [
        ("mlx_sdpa", "dense"),
        ("mlx_lm_quantized", "affine8"),
        ("mlx_lm_quantized", "affine4"),
        ("mlx_quantized_matmul", "k8v4"),
        ("mlx_quantized_matmul", "nvfp4"),
        ("mlx_dequantize_sdpa", "affine8"),
        ("mlx_dequantize_sdpa", "mxfp4"),
        ("torch_sdpa", "dense"),
        ("onnxruntime_gqa", "int8"),
        ("llama_cpp", "q8_0"),
        ("llama_cpp", "q4_0"),
        ("llama_cpp", "f16"),
    ],
)
def test_rival_is_right_where_installed(rival, storage, shape):
    entry = Entry(rival, shape, storage)
    try:
        prepared = rivals.prepare(entry, oracle.make_inputs(shape), 2, cold=False)
    except Absent as reason:
        pytest.skip(str(reason))
    answer = oracle.attention(*prepared.values(), shape.scale, shape.causal)
    oracle.check(prepared.output(), answer, 1e-3)
    prepared.run(2)


def test_llama_cpp_without_its_package(monkeypatch):
    from rivals import llama_cpp

    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    llama_cpp.ggml.cache_clear()
    with pytest.raises(Absent, match="llama-cpp-python"):
        rivals.prepare(Entry("llama_cpp", SMALL, "f16"), None, 2, cold=False)


def test_llama_cpp_blocks():
    from rivals.llama_cpp import decode

    scale = np.array([0.5], dtype=np.float16).tobytes()
    codes = np.arange(-16, 16, dtype=np.int8)
    raw = np.frombuffer(scale + codes.tobytes(), np.uint8)
    np.testing.assert_array_equal(decode(raw, "q8_0"), codes / 2)
    raw = np.frombuffer(scale + bytes([0x2F] * 16), np.uint8)
    expected = [(15 - 8) / 2] * 16 + [(2 - 8) / 2] * 16
    np.testing.assert_array_equal(decode(raw, "q4_0"), expected)


# --------------------------------------------------------------------------------------
# Records and targets
# --------------------------------------------------------------------------------------

FIELDS = {
    "kind": str,
    "device": str,
    "versions": dict,
    "commit": str,
    "threads": int,
    "cold": bool,
    "group": str,
    "rival": str,
    "format": str,
    "shape": dict,
    "one_call": bool,
    "median_s": float,
    "p10_s": float,
    "p90_s": float,
    "rounds": int,
    "calls": int,
    "nmse": float,
    "kv_bytes": int,
    "flops": (int, float),
    "note": str,
}


def test_time_records_have_every_field(make_suite, monkeypatch, capsys):
    monkeypatch.setattr(timing, "SETTLE_SECONDS", 0)
    suite = make_suite({"fused": Fake(), "mlx_sdpa": Fake()})
    lines = []
    suite.write = lambda record: lines.append(json.dumps(record))
    entries = (Entry("fused", SMALL, "affine8"), Entry("mlx_sdpa", SMALL, "dense"))
    suite.run(Group("decode-float32-64", entries))
    assert len(lines) == 2
    for line in lines:
        record = json.loads(line)
        assert set(record) == set(FIELDS)
        for name, kind in FIELDS.items():
            assert isinstance(record[name], kind), name
        assert targets.shape_of(record) == SMALL
        assert record["rounds"] == 4
    report.print_group(suite.records)
    assert "| fused | affine8 |" in capsys.readouterr().out


def time_record(group, rival, storage, shape, seconds, **fields):
    made = {"kind": "time", "group": group, "rival": rival, "format": storage}
    made.update(shape=vars(shape), one_call=False, median_s=seconds, p10_s=seconds)
    made.update(p90_s=seconds, rounds=3, calls=1, nmse=0.0, kv_bytes=1, note="")
    return {**made, "flops": shape.flops, **fields}


def by_name(records):
    found = targets.by_requirement(targets.evaluate(records))
    return {name: row[0] for name, row in found.items()}


@pytest.mark.parametrize("seconds, met", [(0.69e-3, True), (0.71e-3, False)])
def test_decode_target(seconds, met):
    shape = Shape(kv_len=4096)
    group = "decode-bfloat16-4096"
    records = [time_record(group, "fused", "affine8", shape, seconds)]
    target = by_name(records)["decode affine8, T_kv 4096"]
    assert target.met is met


@pytest.mark.parametrize("seconds, met", [(6.1e-3, True), (5.9e-3, False)])
def test_ratio_target(seconds, met):
    shape = Shape(kv_len=4096)
    group = "decode-bfloat16-4096"
    records = [
        time_record(group, "fused", "affine8", shape, 1e-3),
        time_record(group, "llama_cpp", "q8_0", shape, seconds),
    ]
    target = by_name(records)["decode affine8 against llama_cpp q8_0"]
    assert target.met is met


def test_row_cost_targets():
    rows, heads = "verify-4096", "heads-4096"
    wide, wider = Shape(q_heads=64), Shape(q_heads=128)
    records = [
        time_record(rows, "fused", "affine8", Shape(), 1e-3),
        time_record(rows, "fused", "affine8", Shape(q_len=8), 3.9e-3),
        time_record(heads, "fused", "affine8", wide, 1e-3),
        time_record(heads, "fused", "affine8", wider, 1.8e-3),
    ]
    found = by_name(records)
    assert found["T_q 8 over T_q 1"].met
    assert not found["GQA 16:1 over 8:1"].met


def test_prefill_targets():
    group, shape = "prefill-float32-4096", Shape(q_len=512, dtype="float32")
    peak = time_record(group, "fma_peak", "none", shape, 1.0, flops=shape.flops * 10)
    records = [
        peak,
        time_record(group, "fused", "affine8", shape, 0.125),
        time_record(group, "torch_sdpa", "dense", shape, 0.2),
    ]
    found = by_name(records)
    assert found["prefill's share of FMA peak"].reached == "0.8"
    assert not found["prefill over torch"].met


def test_memory_and_thread_targets():
    long = Shape(q_len=512, kv_len=32768, dtype="float32")
    common = {"rival": "fused", "format": "affine8", "kind": "memory"}
    records = [
        {**common, "shape": vars(replace(long, kv_len=4096)), "rss_bytes": 100},
        {**common, "shape": vars(long), "rss_bytes": 130, "mlx_bytes": 100},
        {**common, "shape": vars(long), "kind": "threads", "speedup": 1.9},
    ]
    growth, speedup = sorted(targets.evaluate(records), key=lambda t: t.name)
    assert not growth.met and speedup.met


def test_slower_than_stock_fails_the_run(capsys):
    group, shape = "decode-bfloat16-4096", Shape()
    ours = time_record(group, "fused", "affine8", shape, 2e-3)
    others = [
        time_record(group, "mlx_sdpa", "dense", shape, 5e-3),
        time_record(group, "mlx_lm_quantized", "affine8", shape, 1e-3),
        time_record(group, "mlx_lm_quantized", "affine4", shape, 1e-4),
    ]
    ((ratio, _, _, best),) = targets.against_stock([ours, *others])
    assert ratio == pytest.approx(0.5) and best["rival"] == "mlx_lm_quantized"
    assert report.print_summary([ours, *others]) == 1
    faster = {**ours, "median_s": 0.5e-3}
    assert report.print_summary([faster, *others]) == 0


def test_figures_of_the_readme_follow_the_records(monkeypatch):
    text = figures.README.read_text()
    assert figures.with_figures(text) == text
    (row,) = re.findall(r"^\| 4K \| ([\d.]+) \|", text, re.MULTILINE)
    altered = text.replace(f"| 4K | {row} |", "| 4K | 0.01 |")
    assert figures.with_figures(altered) == text
    monkeypatch.setitem(figures.TABLES, "absent", figures.cpu_decode)
    with pytest.raises(SystemExit, match="one place for absent; got 0"):
        figures.with_figures(text)


def test_the_evidence_follows_the_records():
    assert evidence.PAGE.read_text() == evidence.page()
    assert evidence.read("fused.json") == fused.fused_rows()


def test_the_evidence_says_what_was_not_recorded(monkeypatch):
    own = evidence.read
    monkeypatch.setattr(
        evidence, "read", lambda name: own(name) if name == "fused.json" else None
    )
    assert evidence.page().count("No record") == len(evidence.COUNTED) + 6


def test_fused_head_dims_must_be_even_steps(monkeypatch):
    monkeypatch.setattr(fused, "is_fused", lambda backend, k, *rest: k in (32, 64, 128))
    with pytest.raises(SystemExit, match="no even steps"):
        fused.fused_dims("CPU", "affine", 4, 32)


def test_tests_are_counted_by_file(tmp_path):
    report = tmp_path / "some.xml"
    report.write_text("""<testsuites><testsuite>
        <testcase classname="python_tests.metal.test_a.TestA" name="one"/>
        <testcase classname="python_tests.metal.test_a" name="two"><failure/></testcase>
        <testcase classname="python_tests.test_b.TestB" name="3"><skipped/></testcase>
        </testsuite></testsuites>""")
    assert record_tests.count(report) == {
        "metal.test_a": {"passed": 1, "failed": 1, "skipped": 0},
        "test_b": {"passed": 0, "failed": 0, "skipped": 1},
    }


def test_memory_of_prefill_says_what_was_attended(tmp_path):
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    out = tmp_path / "rows.json"
    command = [sys.executable, str(BENCH / "kv_memory.py"), "--out", str(out)]
    command += ["--caches", "q8,mlx-lm dense", "--lengths", "1024"]
    subprocess.run([*command, "--last", "1", "--layers", "1"], check=True)
    theirs, ours = json.loads(out.read_text())["rows"]
    assert (theirs["cache"], ours["cache"]) == ("mlx-lm dense", "q8")
    for row in (theirs, ours):
        assert (row["attended"], row["attended_layers"]) == (512, 1)
        assert row["peak"] > row["kv_bytes"]
    # 6 layers, K and V, 2 heads of 64 values; with a scale and a bias of 2 bytes.
    assert theirs["kv_bytes"] == 1024 * 6 * 2 * 2 * 64 * 2
    assert ours["kv_bytes"] == 1024 * 6 * 2 * 2 * (64 + 4)
    # The scores of a chunk, 8 heads of bfloat16, are nowhere in memory.
    assert theirs["peak"] - ours["peak"] > 512 * 1024 * 8 * 2


# --------------------------------------------------------------------------------------
# The benchmark of GPUs, on the CPU
# --------------------------------------------------------------------------------------

FEW_KEYS = gpu_cases.Shape(2, kv_len=128, q_heads=4, kv_heads=2)


@pytest.fixture
def gpu_run(tmp_path, monkeypatch):
    """Runs every task of a small shape here, where faults can be planted."""
    monkeypatch.setattr(
        gpu_bench, "seconds_a_call", lambda *rest: gpu_timing.Timed(2e-6, 1e-6, 3e-6, 8)
    )
    monkeypatch.setattr(gpu_bench, "read_bandwidth", lambda quick: 1e9)
    monkeypatch.setattr(torch_rivals, "find_spec", lambda name: None)
    numbers = iter(range(100))

    def run(shape=FEW_KEYS):
        path = tmp_path / f"{next(numbers)}.jsonl"
        tasks = gpu_bench.tasks_of(shape)
        gpu_bench.run_shape(shape, path, True, tasks, lambda i: None)
        lines = records.read_lines(path)
        found = {(r["rival"], r["format"]): r for r in lines}
        assert len(found) == len(lines)
        return found, path.with_suffix(".log")

    return run


def test_the_gpu_benchmark_times_every_layout(gpu_run):
    found, log = gpu_run()
    for name in cases.MAIN_FORMATS:
        for layout in ("fused", "fused_paged", "fused_ragged"):
            record = found[layout, name]
            assert record["us"] == 2 and record["nmse"] < gpu_bench.TOLERANCE
            assert record["floor_us"] == pytest.approx(record["kv_bytes"] / 1e3)
    assert 0 < found["mlx_sdpa", "dense"]["nmse"] < gpu_bench.RIVAL_TOLERANCE
    assert not log.exists()
    whole, ragged = (found[name, "affine8"] for name in ("fused", "fused_ragged"))
    assert ragged["kv_bytes"] == pytest.approx(0.75 * whole["kv_bytes"])


def test_lengths_from_the_shortest_on(gpu_run):
    found, _ = gpu_run(replace(FEW_KEYS, shortest=3))
    assert set(found) == {
        (layout, name)
        for layout in ("fused_ragged", "fused_paged_ragged")
        for name in cases.MAIN_FORMATS
    }
    for record in found.values():
        assert record["us"] == 2 and record["shape"]["shortest"] == 3
    bytes_a_key = 2 * 2 * (128 + 2 * 2 * 2)
    assert found["fused_ragged", "affine8"]["kv_bytes"] == bytes_a_key * (3 + 128)


@pytest.mark.parametrize("lost", [1, 13])
def test_the_gpu_benchmark_does_not_time_wrong_answers(gpu_run, monkeypatch, lost):
    own = gpu_bench.fused

    def shorter(shape, fmt, lengths=None, **layout):
        ends = mx.full((shape.batch,), shape.kv_len) if lengths is None else lengths
        return own(shape, fmt, lengths=ends.astype(mx.int32) - lost, **layout)

    monkeypatch.setattr(gpu_bench, "fused", shorter)
    # A value of two-byte floats is 2**-9 away at most: what a lost key changes shows.
    found, _ = gpu_run(replace(FEW_KEYS, kv_len=4096))
    for (rival, _), record in found.items():
        assert bool(record["us"]) != rival.startswith("fused")
        assert record["us"] or record["error"].startswith("wrong: NMSE")


def test_the_bound_is_the_contracts():
    from rivals import mlx_fused

    assert gpu_bench.TOLERANCE == mlx_fused.TOLERANCE["bfloat16"]
    text = (BENCH / "gpu_bench.py").read_text()
    told = text.index('os.environ["MLX_ENABLE_TF32"] = "0"')
    assert told < text.index("import mlx.core")


@pytest.mark.parametrize(
    "failure",
    [
        ImportError("No module"),
        AssertionError(),
        NotImplementedError("a\nb"),
        KeyError(1),
    ],
)
def test_one_rival_does_not_end_the_others(gpu_run, monkeypatch, failure):
    def fails(shape):
        def make():
            raise failure

        yield "other", "dense", make

    def also_fails(*rest):
        raise failure

    monkeypatch.setattr(torch_rivals, "rivals", fails)
    monkeypatch.setattr(gpu_bench, "mlx_lm_path", also_fails)
    found, log = gpu_run(replace(FEW_KEYS, batch=1))
    failed = {name for name, record in found.items() if record["us"] is None}
    lm = {("mlx_lm_quantized", name) for name in cases.MAIN_FORMATS}
    assert failed == lm | {("other", "dense")}
    for name in failed:
        assert found[name]["error"].startswith(type(failure).__name__)
        assert "\n" not in found[name]["error"]
    assert log.read_text().count("Traceback") == 3
    assert str(failure) in log.read_text()


def test_the_whole_error_is_in_the_log(tmp_path, capsys):
    log = gpu_bench.Log(tmp_path / "gpu.jsonl", FEW_KEYS, {})
    try:
        raise RuntimeError("does not compile\nline 7: no such register")
    except RuntimeError:
        log.record("fused", "affine8", error=log.failure("fused", "affine8"))
    (record,) = records.read_lines(tmp_path / "gpu.jsonl")
    assert record["error"] == "RuntimeError: does not compile"
    assert "line 7" in (tmp_path / "gpu.log").read_text()
    assert capsys.readouterr().out.count("\n") == 1


def test_a_lost_device_ends_the_process(gpu_run, monkeypatch):
    monkeypatch.setattr(gpu_bench, "device_works", lambda: False)

    def faults(*rest):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(gpu_bench, "fused", faults)
    with pytest.raises(SystemExit) as end:
        gpu_run()
    assert end.value.code == gpu_bench.DEVICE_LOST


def test_shapes_of_the_targets_come_first():
    shapes = gpu_cases.shapes()
    assert len(set(shapes)) == len(shapes)
    of = gpu_cases.Shape
    long = gpu_cases.LONG
    assert shapes[:4] == [of(kv_len=long), of(8), of(), of(kv_len=4096)]
    targets_end = shapes.index(of(q_len=512)) + 1
    named = shapes[:targets_end]
    assert {s.kv_len for s in named if s.q_len == 8} == {32768, long}
    deep = [s for s in named if s.kv_len == long and s.batch == s.q_len == 1]
    assert {s.q_heads // s.kv_heads for s in deep} == {1, 4, 8, 16}
    assert {s.head_dim for s in deep} == {64, 96, 128, 256, 512}
    assert of(32, kv_len=65536, shortest=1024) in named
    assert {s.batch for s in shapes if s.kv_len == 1024} == {1, 8, 32}
    for shape in shapes:
        names = [fmt.name for fmt in gpu_cases.formats(shape)]
        assert len(set(names)) == len(names) >= 2
        assert all(gpu_cases.holds(f.k, shape) for f in gpu_cases.formats(shape))


@pytest.mark.parametrize(
    "text, numbers",
    [(None, [0, 1, 2]), ("1", [1]), ("1:", [1, 2]), (":2", [0, 1]), ("1:9", [1, 2])],
)
def test_shapes_are_selected_by_number(text, numbers):
    assert [i for i, _ in gpu_cases.selected("abc", text)] == numbers


@pytest.mark.parametrize("text", ["3", "2:1", "one", "0:1:2"])
def test_shapes_that_are_not_there(text):
    with pytest.raises(ValueError, match=f"must be I or I:J of 0 to 3; got {text}"):
        gpu_cases.selected("abc", text)


def test_the_array_that_is_read_can_be_made():
    assert gpu_bench.large_array().nbytes == 4 << 30
    x = gpu_bench.large_array(quick=True)
    assert x.max().item() == x.size - 1


class Clock:
    """A device that takes 45 us a call, 1 ms before the first and 8 us to be told."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.calls = 0
        monkeypatch.setattr(gpu_timing.time, "perf_counter", lambda: self.now)

    def call(self, x):
        self.now += 8e-6
        return x + 1

    def evaluate(self, x):
        self.calls = x
        self.now += 1e-3 + 45e-6 * x


def test_a_call_is_timed_without_the_host(monkeypatch):
    clock = Clock(monkeypatch)
    sample = gpu_timing.chain_sampler(clock.evaluate, clock.call, 0, [()])
    found = gpu_timing.seconds_a_call(sample, rounds=5)
    assert found.median == pytest.approx(45e-6)
    assert clock.calls * 45e-6 > gpu_timing.LEAST_SECONDS


def test_calls_are_added_until_they_stand_out_of_noise():
    noise = itertools.cycle([0, 3e-3, 1e-3, 0, 2e-3])
    found = gpu_timing.seconds_a_call(lambda n: 40e-6 * n + next(noise), rounds=9)
    assert found.calls == gpu_timing.MOST_CALLS
    assert found.low < found.median < found.high
    with pytest.raises(RuntimeError, match="stands out of noise"):
        gpu_timing.seconds_a_call(lambda n: 1.0, rounds=3)


def says_what_runs(tasks, start):
    for i, task in enumerate(tasks):
        start(i)
        print(f"runs {task}", file=sys.stderr, flush=True)
        if task == "dies":
            os.abort()
        if task == "hangs":
            time.sleep(600)
        if task == "leaves":
            sys.exit(3)


def fails_at_once(tasks, start):
    raise RuntimeError("no device")


def test_a_process_that_ends_takes_no_other_task_with_it(tmp_path):
    said, failed = tmp_path / "said", []
    tasks = ["a", "dies", "b", "leaves", "c"]
    apart.run_apart(says_what_runs, tasks, 60, said, lambda *why: failed.append(why))
    assert failed == [
        ("dies", "the process ended by signal 6"),
        ("leaves", "exit status 3"),
    ]
    ran = re.findall("^runs (.*)", said.read_text(), re.M)
    assert ran == tasks


def test_a_process_that_hangs_is_ended(tmp_path):
    failed = []
    apart.run_apart(
        says_what_runs, ["hangs"], 5, tmp_path / "said", lambda *why: failed.append(why)
    )
    assert failed == [("hangs", "no end after 5 s")]


def test_what_cannot_start_is_not_tried_again(tmp_path):
    said, failed = tmp_path / "said", []
    apart.run_apart(fails_at_once, ["a", "b"], 60, said, lambda *x: failed.append(x))
    assert failed == [("a", "exit status 1"), ("b", "exit status 1")]
    assert said.read_text().count("no device\n") == 1


@pytest.fixture
def without_shapes(monkeypatch):
    """Runs that leave a line for each shape."""

    def run_apart(work, tasks, limit, said, failed):
        shape, path, quick = work.args
        record = {"rival": "fused", "us": None if shape.q_len > 1 else 1.0}
        records.add_line(path, record | {"kv_len": shape.kv_len})

    monkeypatch.setattr(gpu_bench, "run_apart", run_apart)
    monkeypatch.setattr(gpu_bench, "draw", lambda path: None)

    def main(*arguments):
        monkeypatch.setattr("sys.argv", ["gpu_bench", "--quick", *arguments])
        return gpu_bench.main()

    return main


def test_parts_of_a_run_add_up(without_shapes, tmp_path, capsys):
    main, path = without_shapes, tmp_path / "gpu.jsonl"
    out = ("--out", str(path))
    assert main(*out, "--shapes", "2") == 0
    with pytest.raises(SystemExit):
        main(*out, "--shapes", "0")
    assert "add --append" in capsys.readouterr().err
    assert main(*out, "--append", "--shapes", ":1") == 0
    assert main(*out, "--append", "--shapes", "1") == 1
    assert [r["kv_len"] for r in records.read_lines(path)] == [256, 1024, 512]
    assert main(*out) == 1
    assert [r["kv_len"] for r in records.read_lines(path)] == [1024, 512, 256]
    assert main(*out, "--append", "--minutes", "-1") == 1
    assert "go on with --append --shapes 0:3" in capsys.readouterr().out
    assert len(records.read_lines(path)) == 3


def test_a_small_shape_in_its_process(tmp_path):
    out = tmp_path / "gpu.jsonl"
    command = [sys.executable, str(BENCH / "gpu_bench.py"), "--quick", "--shapes", "2"]
    environment = {**os.environ, "QUANTIZED_SDPA_COMMIT": "of a copy"}
    subprocess.run([*command, "--out", str(out)], env=environment)
    found = records.read_lines(out)
    ours = [r for r in found if r["rival"].startswith("fused")]
    assert {r["format"] for r in ours} == set(cases.FORMATS)
    # Times may drown where much else runs, answers not.
    assert all(r["us"] or "stands out of noise" in r["error"] for r in ours)
    assert {r["commit"] for r in found} == {"of a copy"}
    for record in found:
        assert {"mlx-cuda-13", "flashinfer-python", "driver", "nvrtc"} <= set(
            record["versions"]
        )


def test_the_commit_of_a_copy(monkeypatch):
    monkeypatch.delenv("QUANTIZED_SDPA_COMMIT", raising=False)
    monkeypatch.setattr(machine, "_said", lambda *command: "")
    assert machine.commit() == "unknown"
    assert machine.gpu_versions()["driver"] is None
    monkeypatch.setattr(machine, "_said", lambda *command: "580.1\n580.1")
    assert machine.gpu_versions()["driver"] == "580.1"


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "lines"
    records.add_line(path, {"a": 1})
    with open(path, "a") as file:
        file.write('{"a": ')
    assert records.read_lines(path) == [{"a": 1}]
    records.add_line(path, {"a": 2})
    assert records.read_lines(path) == [{"a": 1}, {"a": 2}]


@pytest.fixture
def fake_torch(monkeypatch):
    torch, flashinfer = mock.MagicMock(), mock.MagicMock()
    torch.randn.return_value.to.return_value.numel.return_value = 10**9
    torch.randn.return_value.to.return_value.element_size.return_value = 2
    # Those that are installed are imported already.
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch.nn.attention", mock.MagicMock())
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer)
    monkeypatch.setattr(torch_rivals, "find_spec", lambda name: True)
    return torch, flashinfer


def test_flashinfer_is_asked_for_what_the_op_does(fake_torch):
    torch, flashinfer = fake_torch
    shape = gpu_cases.Shape(batch=2, kv_len=256)
    found = list(torch_rivals.rivals(shape))
    assert [name for name, *_ in found] == [
        "torch_flash_attention",
        "torch_cudnn_attention",
    ] + 2 * ["flashinfer_tensor_cores", "flashinfer"]
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper.return_value
    for rival, storage, make_ready in found:
        ready = make_ready()
        assert ready.kv_bytes == (4 if storage == "dense" else 2) * 10**9
        assert len(ready.caches) == 1
        torch_rivals.graph_sampler(torch, ready)(5)
        if rival.startswith("flashinfer"):
            dtype = wrapper.plan.call_args.kwargs["kv_data_type"]
            assert dtype is getattr(torch, storage)
    assert wrapper.run.call_count == 4 * (3 + 5)
    assert wrapper.plan.call_args.args[3:] == (32, 8, 128, torch_rivals.PAGE)
    pages = (8, 2, 8, torch_rivals.PAGE, 128)
    assert torch.randn.call_args_list[-1].args == (pages,)
    rows = torch_rivals.rivals(replace(shape, q_len=8))
    assert [storage for _, storage, _ in rows] == ["dense", "dense"]


def test_calls_that_cannot_be_captured_are_made_in_a_loop(
    fake_torch, tmp_path, monkeypatch
):
    torch, _ = fake_torch
    torch.cuda.graph.side_effect = RuntimeError("operation not permitted")
    bench = mock.MagicMock(log=gpu_bench.Log(tmp_path / "gpu.jsonl", FEW_KEYS, {}))
    bench.timed = lambda sample, how: {"us": sample(2), "how": how}
    _, _, make_ready = next(torch_rivals.rivals(FEW_KEYS))
    assert gpu_bench.Bench.torch_fields(bench, make_ready)["how"] == "loop"
    assert "not permitted" in (tmp_path / "gpu.log").read_text()
    assert torch.cuda.empty_cache.called


def gpu_record(rival, storage, us, kv_len, **sizes):
    shape = vars(gpu_cases.Shape(kv_len=kv_len)) | sizes
    shape = {name: size for name, size in shape.items() if size is not None}
    made = {"rival": rival, "format": storage, "us": us, "shape": shape}
    made |= {"floor_us": us and us * 0.75, "error": None}
    return made | {"device": "a device", "commit": "a1"}


def test_the_plot_of_a_gpu_has_the_floor(tmp_path, monkeypatch, capsys):
    plot = pytest.importorskip("plot", reason="matplotlib is not installed")
    path = tmp_path / "gpu.jsonl"
    for record in (
        gpu_record("fused", "affine8", 70.0, 2048),
        gpu_record("fused", "affine8", 8.0, 1024),
        gpu_record("fused", "affine8", 60.0, 2048),
        gpu_record("fused", "affine8", None, 4096),
        gpu_record("fused", "affine8", 5.0, 1024, shortest=3),
        gpu_record("fused", "affine8", 5.0, 1024, q_len=8),
        gpu_record("fused", "affine4", 30.0, 2048, batch=8),
        gpu_record("torch_flash_attention", "dense", 90.0, 1024),
        gpu_record("torch_flash_attention", "dense", 95.0, 1024, batch=8),
        gpu_record("mlx_dequantize_sdpa", "affine8", 900.0, 1024),
    ):
        records.add_line(path, record)
    figure = plot.gpu_figure(records.read_lines(path))
    one, eight = figure.axes
    found = {line.get_label(): line.get_xydata().tolist() for line in one.lines}
    assert found == {
        "fused affine8": [[1024, 8], [2048, 60]],
        "bytes of affine8 / bandwidth": [[1024, 6], [2048, 45]],
        "torch_flash_attention dense": [[1024, 90]],
    }
    assert [line.get_label() for line in eight.lines] == [
        "fused affine4",
        "bytes of affine4 / bandwidth",
        "torch_flash_attention dense",
    ]
    # One legend for all panels.
    assert one.lines[-1].get_color() == eight.lines[-1].get_color()
    named = {text.get_text() for text in eight.get_legend().get_texts()}
    assert named == set(found) | {line.get_label() for line in eight.lines}
    monkeypatch.setattr("sys.argv", ["plot", str(path)])
    plot.main()
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert plot.write_gpu([], tmp_path / "none.png") == "no decode times"
    page = evidence.gpu(records.read_lines(path))
    assert len(page["table"]["rows"]) == 10 and page["device"] == "a device"


def test_a_run_that_is_interrupted_leaves_the_records(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        with records.written_whole(path) as file:
            file.write("new")
            raise KeyboardInterrupt
    assert path.read_text() == "old"
    with records.written_whole(path) as file:
        file.write("new")
    assert [(x.name, x.read_text()) for x in tmp_path.iterdir()] == [
        ("records.jsonl", "new")
    ]
