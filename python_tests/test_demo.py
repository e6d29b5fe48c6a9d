"""The demo runs through at tiny sizes, and its figures can be believed."""

import contextlib
import io
import json
import sys
import tempfile
import unittest
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import demo  # noqa: E402
import mlx_quantized_sdpa as qs  # noqa: E402


class TestDemo(unittest.TestCase):
    def test_a_run_at_tiny_sizes(self):
        printed = io.StringIO()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "results.json"
            with contextlib.redirect_stdout(printed):
                results = demo.main(["--quick", "--json", str(path)])
            recorded = json.loads(path.read_text())
        self.assertFalse(qs.is_enabled())
        self.check_table(printed.getvalue())
        self.check_bytes(results)
        for name in ("8-bit", "4-bit"):
            self.check_quality(results[name], results["dense"])
        for name, result in results.items():
            self.assertEqual(set(result.stock_ms), set(demo.QUICK.contexts))
            self.assertEqual(bool(result.fused_ms), name != "dense")
            self.assertEqual(recorded[name]["perplexity"], result.perplexity)

    def check_table(self, printed):
        rows = [line for line in printed.splitlines() if line.startswith("| ")]
        found = [row.split("|")[1].strip() for row in rows[2:]]
        self.assertEqual(found, ["dense", "8-bit", "4-bit"])

    def check_bytes(self, results):
        dense, eight, four = (
            results[name].kv_bytes[512] for name in ("dense", "8-bit", "4-bit")
        )
        # A group of 64 adds a scale and a bias of two bytes each.
        self.assertAlmostEqual(eight / dense, (64 + 4) / 128)
        self.assertAlmostEqual(four / dense, (32 + 4) / 128)

    def check_quality(self, result, dense):
        self.assertGreaterEqual(min(result.recall.values()), 0.75)
        self.assertLess(abs(result.perplexity / dense.perplexity - 1), 0.15)
        self.assertGreater(result.same_next, 0.8)
        self.assertEqual(dense.same_next, 1.0)


class TestHelpers(unittest.TestCase):
    def test_common_prefix_counts_bytes(self):
        self.assertEqual(demo.common_prefix("πx", "πy"), 2)
        self.assertEqual(demo.common_prefix("", "a"), 0)

    def test_a_dash_stands_for_what_was_not_run(self):
        self.assertEqual(demo.by_length({1: 0.5}, (1, 2), "{:.0%}"), "50% / -")


if __name__ == "__main__":
    unittest.main()
