"""The evaluation's figures are right where they are known; its report shows them."""

import contextlib
import html.parser
import io
import json
import math
import os
import random
import sys
import tempfile
import unittest
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx_quantized_sdpa as qs
import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

import kv_cache_models as models  # noqa: E402
from mlx_lm.models import cache as lm_cache  # noqa: E402
from mlx_quantized_sdpa import __main__ as command  # noqa: E402
from mlx_quantized_sdpa.evaluation import (  # noqa: E402
    charts,
    cli,
    measure,
    report,
    speed,
)
from mlx_quantized_sdpa.evaluation.metrics import (  # noqa: E402
    Predictions,
    compare_continuations,
    divergence,
    log_probabilities,
)
from mlx_quantized_sdpa.evaluation.needles import make_haystack  # noqa: E402

REPOSITORY = Path(__file__).parents[1]


class TestMetrics(unittest.TestCase):
    def test_perplexity_divergence_and_agreement_of_known_distributions(self):
        p, q = np.array([[0.5, 0.25, 0.25]] * 3), np.array([[0.25, 0.5, 0.25]] * 3)
        dense, logits = mx.array(np.log(p) + 7), mx.array(np.log(q) - 3)
        found = Predictions()
        found.add(logits[:2], mx.array([0, 1]), dense[:2])
        found.add(logits[2:], mx.array([2]), dense[2:])
        self.assertAlmostEqual(found.perplexity, (4 * 2 * 4) ** (1 / 3), places=5)
        wanted = 0.5 * math.log(2) + 0.25 * math.log(0.5)
        self.assertAlmostEqual(found.mean_divergence, wanted, places=5)
        self.assertAlmostEqual(found.divergence_quantile(0.99), wanted, places=5)
        self.assertEqual((found.agreement, found.positions), (0.0, 3))
        same = Predictions()
        same.add(dense, mx.array([0, 0, 0]), dense)
        self.assertEqual((same.mean_divergence, same.agreement), (0.0, 1.0))
        self.assertAlmostEqual(same.perplexity, 2, places=5)

    def test_divergence_of_what_has_no_probability(self):
        p = log_probabilities(mx.array([0.0, -mx.inf]))
        self.assertAlmostEqual(
            divergence(p, mx.log(mx.array([0.5, 0.5]))).item(), math.log(2), places=5
        )

    def test_where_continuations_part(self):
        found = compare_continuations(
            [1, 2, 9, 4], [1, 2, 3, 4], [5, 6, 0.25, 7], [1, 0, 3, 4]
        )
        self.assertEqual((found.same, found.length, found.margin), (2, 4, 0.25))
        self.assertEqual(found.same_choices, 0.75)
        found = compare_continuations([1, 2], [1, 2], [1, 1], [1, 2])
        self.assertEqual((found.same, found.margin, found.same_choices), (2, None, 1.0))


def by_letters(text):
    return list(text.encode())


def by_small_letters(text):
    return [each % models.VOCABULARY for each in text.encode()]


def by_words(text):
    """Joins a space to what follows it, as many tokenizers do."""
    pieces = text.replace(" ", "\0 ").replace("\n", "\0\n").split("\0")
    return [hash(piece) for piece in pieces if piece]


class TestNeedles(unittest.TestCase):
    def test_needles_stand_at_even_depths_and_can_be_asked_for(self):
        text = "".join(f"line {i} of some text\n" for i in range(40))
        for encode, length in ((by_letters, 3000), (by_words, 700)):
            stack = make_haystack(text, length, 5, encode)
            self.assertEqual([n.depth for n in stack.needles], [0, 0.2, 0.4, 0.6, 0.8])
            for needle in stack.needles:
                line = needle.question + needle.answer
                begin = find(stack.context, line)
                self.assertAlmostEqual(
                    begin / len(stack.context), needle.depth, delta=0.05
                )
                self.assertLessEqual(len(stack.context) + len(line), length)
                self.assertTrue(needle.answer)
            self.assertGreater(len(stack.context), 0.9 * length)
        found = make_haystack(text, 3000, 1, by_letters).needles[0]
        self.assertRegex(bytes(found.question), rb"^# recall [A-Z]{4}: $")
        self.assertRegex(bytes(found.answer), rb"^\d{6}$")

    def test_the_small_model_knows_such_lines(self):
        with on_path(REPOSITORY / "bench"):
            from recall_model import recall
        needle = make_haystack("a\n", 200, 1, by_letters).needles[0]
        line = bytes(needle.question + needle.answer) + b"\n"
        pair = recall.Pair(line[9:13], line[15:21])
        self.assertEqual(line, pair.line)

    def test_what_does_not_fit(self):
        with self.assertRaisesRegex(ValueError, "5 needles must fit .* got 60 tokens"):
            make_haystack("text\n", 60, 5, by_letters)
        with self.assertRaisesRegex(ValueError, "with lines is required; got none"):
            make_haystack("", 600, 5, by_letters)


def find(tokens, part):
    for begin in range(len(tokens)):
        if tokens[begin : begin + len(part)] == part:
            return begin
    raise AssertionError("the needle is not in the context")


@contextlib.contextmanager
def on_path(folder):
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


class TestDefaults(unittest.TestCase):
    def test_the_text_was_held_out_from_the_small_model(self):
        with on_path(REPOSITORY / "bench"):
            from recall_model import corpus
        sources = corpus.read_sources(corpus.standard_library())
        held_out = {s.path.as_posix() for s in sources if s.held_out and not s.optional}
        self.assertLessEqual(set(cli.DEFAULT_TEXT), held_out)

    def test_the_small_model_is_found_in_a_checkout_only(self):
        before = os.getcwd()
        with tempfile.TemporaryDirectory() as folder:
            try:
                os.chdir(REPOSITORY)
                self.assertEqual(cli.find_model(None), str(cli.SMALL_MODEL))
                os.chdir(folder)
                self.assertEqual(cli.find_model("mine"), "mine")
                with self.assertRaisesRegex(ValueError, "must be named.*repository"):
                    cli.find_model(None)
            finally:
                os.chdir(before)

    def test_options_change_sizes(self):
        options = cli.make_parser().parse_args(
            ["--quick", "--lengths", "64,128", "--windows", "0"]
        )
        sizes = cli.read_sizes(options)
        self.assertEqual((sizes.lengths, sizes.windows), ((64, 128), 0))
        self.assertEqual(sizes.generated, cli.QUICK.generated)


class TestRun(unittest.TestCase):
    def test_a_run_at_tiny_sizes(self):
        printed, shown = io.StringIO(), io.StringIO()
        with tempfile.TemporaryDirectory() as folder:
            page, record = Path(folder) / "r.html", Path(folder) / "r.json"
            arguments = ["eval", str(REPOSITORY / cli.SMALL_MODEL), "--quick"]
            arguments += ["--kv", "q8,turbo4", "--lengths", "256", "--generated", "8"]
            arguments += ["--json", str(record), "--html", str(page)]
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(shown):
                self.assertEqual(command.main(arguments), 0)
            found, text = json.loads(record.read_text()), page.read_text()
        self.assertIn("100%", shown.getvalue())
        self.assertEqual(found["about"]["caches"], "q8, turbo4")
        self.assertGreaterEqual(set(found["about"]), {"device", "mlx", "day", "dtype"})
        self.check_figures(*found["results"])
        rows = [line.split("|")[1].strip() for line in printed.getvalue().splitlines()]
        self.assertEqual(rows, ["cache", "-----:", "dense", "q8", "turbo4"])
        check_page(self, text)
        inside = text.split('id="record">')[1].split("</script>")[0]
        self.assertEqual(json.loads(inside), found)

    def check_figures(self, dense, eight, four):
        self.assertEqual(dense["perplexity_change"], 0)
        self.assertEqual((dense["mean_divergence"], dense["same_top_token"]), (0, 1))
        self.assertEqual(dense["continuations"][0]["same_choices"], 1)
        self.assertLess(abs(eight["perplexity_change"]), 0.005)
        self.assertLess(eight["mean_divergence"], 0.01)
        self.assertLess(eight["mean_divergence"], four["mean_divergence"] / 5)
        self.assertGreater(eight["same_top_token"], 0.95)
        for result in (dense, eight):
            self.assertEqual(result["lengths"]["256"]["right"], [True] * 4)
        sizes = [r["lengths"]["256"]["kv_bytes"] for r in (dense, eight, four)]
        # A group of 64 adds two numbers of 2 bytes; turbo4 one for a vector of 64.
        self.assertEqual(sizes[1] / sizes[2], (64 + 4) / (32 + 2))
        # Rows for the questions are there from the start; dense ones are added.
        rows = 256 + cli.QUICK.steps + measure.SPARE
        self.assertLessEqual(sizes[1] / sizes[0], (64 + 4) / 128 * rows / 256)
        for result in (dense, eight, four):
            at = result["lengths"]["256"]
            self.assertGreaterEqual(at["prefill_peak"], at["kv_bytes"])
            self.assertEqual(list(result["speeds"]), ["256", "512"])
            for times in result["speeds"].values():
                self.assertGreater(min(times.values()), 0)

    def test_bad_input_is_refused_before_anything_is_loaded(self):
        for arguments, message in (
            (["--kv", "q9"], "q9"),
            (["no such", "--text", "/no/such/file"], "No such file"),
            (["--lengths", "many"], "many"),
            (["--lengths", "512,0"], "lengths must be at least 1; got 0"),
            (["--generated", "1"], "generated must be at least 2; got 1"),
            (["--needles", "0"], "needles must be at least 1; got 0"),
            (["--steps", "0"], "steps must be at least 1; got 0"),
            (["--chunk", "0"], "chunk must be at least 1; got 0"),
            (["--prompts", "-1"], "prompts must be at least 0; got -1"),
            (["no such", "--json", "/no/such/r.json"], "'/no/such/r.json'"),
            (["no such", "--html", str(REPOSITORY)], f"'{REPOSITORY}'"),
        ):
            errors = io.StringIO()
            with self.assertRaises(SystemExit), contextlib.redirect_stderr(errors):
                cli.main(arguments)
            self.assertIn(message, errors.getvalue())
        qs.disable()
        errors = io.StringIO()
        with (
            mock.patch("mlx_lm.__version__", "0.31.2"),
            contextlib.redirect_stderr(errors),
            self.assertRaises(SystemExit),
        ):
            cli.main(["no such"])
        self.assertIn("mlx-lm must be 0.31.3 or newer", errors.getvalue())

    def test_what_cannot_be_measured_is_refused_before_anything_is(self):
        with tempfile.TemporaryDirectory() as folder:
            text, record = Path(folder) / "text", Path(folder) / "r.json"
            text.write_text("a line\n" * 9)
            small = [
                str(REPOSITORY / cli.SMALL_MODEL),
                "--quick",
                "--json",
                str(record),
            ]
            for arguments, words in (
                (["--text", str(text)], "text of at least 129 tokens .* got 63"),
                (["--lengths", "512,60"], "4 needles must fit in the length; got 60"),
                (
                    ["--kv", "q8,q8g128"],
                    "q8g128 must divide the head dim; got a head dim of 64",
                ),
            ):
                errors = io.StringIO()
                with contextlib.redirect_stderr(errors):
                    with mock.patch.object(cli, "measure") as measured:
                        with self.assertRaises(SystemExit):
                            cli.main([*small, *arguments])
                measured.assert_not_called()
                self.assertRegex(errors.getvalue(), words)
                self.assertFalse(record.exists())
        qs.disable()

    def test_a_model_whose_caches_all_stay_dense(self):
        model = models.llama_model()
        text = "some text\n" * 40
        found = measure.Measurement(model, by_small_letters, text, ["q8"], cli.QUICK)
        found.check()
        with mock.patch.object(measure.hook, "_why_not", lambda *_: "is another"):
            with pytest.warns(UserWarning, match="this model is another"):
                with self.assertRaisesRegex(ValueError, "with q8 all of them stay"):
                    found.check()
        qs.disable()

    def test_nothing_is_asked_of_a_text_that_is_not_used(self):
        sizes = measure.Sizes(windows=0, prompts=0, lengths=(), speed_lengths=())
        model = models.llama_model()
        for text in ("a", ""):
            found = measure.Measurement(model, by_small_letters, text, ["q8"], sizes)
            if text:
                found.check()
                self.assertEqual(list(found.run()), ["dense", "q8"])
            else:
                with self.assertRaisesRegex(ValueError, "with tokens is required"):
                    found.check()
        qs.disable()


class TestSpeed(unittest.TestCase):
    def test_caches_are_filled_to_the_length(self):
        for make in (
            models.llama_model,
            models.gemma3_model,
            models.deepseek_model,
        ):
            model = make()
            dense = lm_cache.make_prompt_cache
            timer = speed.StepTimer(model, models.prompt(20), dense(model))
            quantized = qs.make_prompt_cache(model, "q8")
            for cache in (dense(model), quantized):
                timer.filled(cache, 50)
                self.assertEqual({layer.offset for layer in cache}, {50})
            timer.compare(quantized, dense(model), 3)
            trimmed = all(layer.is_trimmable() for layer in quantized)
            self.assertEqual(quantized[0].offset, 50 if trimmed else 55)
        qs.disable()

    def test_medians_of_steps_and_of_their_ratios(self):
        ticks = {"ours": iter((9, 9, 2, 6, 4)), "dense": iter((9, 9, 4, 6, 20))}
        timer = object.__new__(speed.StepTimer)
        with mock.patch.object(timer, "_step", lambda cache: next(ticks[cache]) / 1e3):
            found = timer.compare("ours", "dense", 3)
        self.assertEqual(found, speed.Speed(4, 6, 0.5))


class Page(html.parser.HTMLParser):
    """Tags are closed in order; nothing is loaded from elsewhere."""

    EMPTY = {"meta"}

    def __init__(self):
        super().__init__()
        self.open, self.foreign = [], []

    def handle_starttag(self, tag, attributes):
        if tag not in self.EMPTY:
            self.open.append(tag)
        self.foreign += [v for k, v in attributes if k in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(case, text):
    page = Page()
    page.feed(text)
    case.assertEqual((page.open, page.foreign), ([], []))
    case.assertGreaterEqual(text.count("<svg"), 8)


class TestCharts(unittest.TestCase):
    def parsed(self, svg):
        return ElementTree.fromstring(svg)

    def test_nothing_leaves_the_picture(self):
        rng = random.Random(1)
        for _ in range(30):
            count = rng.randint(1, 7)
            rows = [
                charts.Bar(
                    f"row {i}", rng.uniform(-1, 1) * 10 ** rng.randint(-6, 3), "x"
                )
                for i in range(count)
            ]
            points = [
                (2.0**i * 1024, 10 ** rng.uniform(-3, 9))
                for i in range(rng.randint(1, 5))
            ]
            drawn = [
                charts.bars("b", rows),
                charts.lines("l", "ms", [charts.Line("<a & b>", points)] * count),
                charts.grid("g", ["1K", "2K"], [[True, False], [False, True]]),
            ]
            for svg in map(self.parsed, drawn):
                _, _, width, height = map(float, svg.get("viewBox").split())
                for part in svg:
                    x = float(part.get("x", part.get("cx", part.get("x1", 0))))
                    y = float(part.get("y", part.get("cy", part.get("y1", 0))))
                    self.assertTrue(0 <= x <= width and 0 <= y <= height, part.attrib)
                    right = x + float(part.get("width", 0))
                    self.assertLessEqual(right, width + 0.1)

    def test_bars_are_as_long_as_their_values(self):
        rows = [charts.Bar("a", 1, ""), charts.Bar("b", -2, ""), charts.Bar("c", 0, "")]
        found = [
            float(part.get("width"))
            for part in self.parsed(charts.bars("t", rows))
            if part.tag == "rect"
        ]
        self.assertAlmostEqual(found[1] / found[0], 2, places=1)
        self.assertEqual(found[2], 1)

    def test_short_numbers(self):
        found = [charts.short(x) for x in (0.5, 12, 1024, 1.5 * 2**20, 2**33)]
        self.assertEqual(found, ["0.5", "12", "1K", "1.5M", "8G"])


class TestReport(unittest.TestCase):
    def test_a_dash_stands_for_what_was_not_run(self):
        at = {
            "right": [True, False],
            "kv_bytes": 1,
            "prefill_peak": 2**20,
        }
        times = {"step_ms": 3, "dense_ms": 4, "of_dense": 0.75}
        results = [
            {
                "spec": "dense",
                "continuations": [],
                "lengths": {"64": at},
                "speeds": {"64": times},
            },
            {
                "spec": "<q8>",
                "continuations": [],
                "lengths": {"64": at, "128": at},
                "speeds": {"64": times, "128": times},
            },
        ]
        sizes = {"lengths": [64, 128], "speed_lengths": [64, 128]}
        found = {"sizes": sizes, "results": results, "about": {}}
        lines = report.table(found).splitlines()
        self.assertIn(" 50%/- |", lines[2])
        cells = [cell.strip() for cell in lines[2].split("|")]
        self.assertEqual(cells[-3:], ["3.0/-", "0.75/-", ""])
        cells = [cell.strip() for cell in lines[3].split("|")]
        self.assertEqual(cells[-3:], ["3.0/3.0", "0.75/0.75", ""])
        page = report.html(found)
        self.assertNotIn("<q8>", page.split('id="record">')[0])


if __name__ == "__main__":
    unittest.main()
