"""The benchmark's own tests: what it times, what it refuses, what it writes."""

import argparse
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import cases  # noqa: E402
import evidence  # noqa: E402
import figures  # noqa: E402
import fused  # noqa: E402
import gpu_bench  # noqa: E402
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


def test_the_gpu_benchmark_runs_and_refuses_wrong_answers(tmp_path, monkeypatch):
    out = tmp_path / "gpu.jsonl"
    shapes = [gpu_bench.Shape(2, kv_len=128, q_heads=4, kv_heads=2)]
    monkeypatch.setattr(gpu_bench, "shapes", lambda quick: shapes)
    monkeypatch.setattr("sys.argv", ["gpu_bench", "--quick", "--out", str(out)])
    assert gpu_bench.main() == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    ours = {(r["rival"], r["format"]): r for r in records if r["nmse"] is not None}
    for layout in ("fused", "fused_paged", "fused_ragged"):
        for name in cases.MAIN_FORMATS:
            assert ours[layout, name]["us"] > 0
    assert ours["fused_ragged", "affine8"]["kv_bytes"] == pytest.approx(
        0.75 * ours["fused", "affine8"]["kv_bytes"]
    )
    own = gpu_bench.fused
    monkeypatch.setattr(
        gpu_bench, "fused", lambda *a, **k: lambda *x: own(*a, **k)(*x) * 1.1
    )
    assert gpu_bench.main() == 1
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert not any(r["us"] for r in records if r["rival"].startswith("fused"))


def test_flashinfer_is_asked_for_what_the_op_does(monkeypatch):
    torch, flashinfer = mock.MagicMock(), mock.MagicMock()
    torch.randn.return_value.to.return_value.numel.return_value = 10**9
    torch.randn.return_value.to.return_value.element_size.return_value = 2
    # Those that are installed are imported already.
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch.nn.attention", mock.MagicMock())
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer)
    shape = gpu_bench.Shape(batch=2, kv_len=256)
    found = list(torch_rivals.lines(shape, n=3, rounds=2))
    names = [rival for rival, *_ in found]
    assert names == ["torch_flash_attention", "torch_cudnn_attention"] + 2 * [
        "flashinfer_tensor_cores",
        "flashinfer",
    ]
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper.return_value
    assert wrapper.run.call_count == 4 * 3 * (1 + 2)
    assert wrapper.plan.call_args.args[3:] == (32, 8, 128, torch_rivals.PAGE)
    pages = (8, 2, 8, torch_rivals.PAGE, 128)
    assert torch.randn.call_args_list[-1].args == (pages,)


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
