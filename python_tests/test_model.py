"""The benchmarks' language model: its text, its weights, its record, its training."""

import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

import mlx.core as mx  # noqa: E402
from mlx_lm import load, stream_generate  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from mlx_lm.models.llama import Model  # noqa: E402

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "scripts")]

import train_model  # noqa: E402
from recall_model import checkpoint, corpus, evaluation, recall, training  # noqa: E402

SOURCES = corpus.read_sources(corpus.standard_library())


class TestCorpus(unittest.TestCase):
    def test_held_out_modules_stay_out_of_training(self):
        held_out = {source.module for source in SOURCES if source.held_out}
        kept = {source.module for source in SOURCES if not source.held_out}
        self.assertFalse(held_out & kept)
        self.assertIn("collections", held_out)
        text = corpus.training_text(SOURCES).tobytes()
        self.assertNotIn(b"class OrderedDict(dict):", text)

    def test_a_test_goes_with_what_it_tests(self):
        tested = corpus.SourceFile(Path("test/test_bz2.py"), b"x")
        self.assertEqual(tested.module, "bz2")
        self.assertTrue(tested.held_out)
        self.assertTrue(tested.optional)

    def test_windows_are_starts_of_different_files(self):
        windows = corpus.held_out_windows(SOURCES, 4, 1024)
        self.assertEqual((windows.shape, windows.dtype), ((4, 1024), np.uint8))
        self.assertEqual(len({window.tobytes() for window in windows}), 4)
        skipped = corpus.held_out_windows(SOURCES, 2, 1024, skip=2)
        np.testing.assert_array_equal(skipped, windows[2:])
        with self.assertRaisesRegex(ValueError, "held-out files of 1024 bytes"):
            corpus.held_out_windows(SOURCES, 10**6, 1024)


class TestRecallText(unittest.TestCase):
    def setUp(self):
        self.rng = np.random.default_rng(0)
        self.text = corpus.held_out_text(SOURCES)

    def assert_answers_are_in_the_context(self, tokens, kinds):
        """Each digit marked as an answer repeats what its key's first line states."""
        stated = {}
        line = recall.LINE_BYTES
        for begin in np.flatnonzero(kinds != recall.TEXT)[:-line]:
            row = tokens[begin : begin + line].tobytes()
            if not row.startswith(b"# recall ") or not row.endswith(b"\n"):
                continue
            question, value = row[: recall.QUESTION_BYTES], row[recall.QUESTION_BYTES :]
            asked = (kinds[begin : begin + line] == recall.ANSWER).any()
            self.assertEqual(asked, question in stated)
            self.assertEqual(stated.setdefault(question, value), value)
        self.assertGreater(len(stated), 3)

    def test_lines_state_a_value_before_they_ask_for_it(self):
        tokens, kinds = recall.lines_only(1000, self.rng)
        self.assertEqual((tokens.shape, kinds.shape), ((1000,), (1000,)))
        self.assert_answers_are_in_the_context(tokens, kinds)

    def test_lines_stand_between_lines_of_text(self):
        window = self.text[:4096]
        tokens, kinds = recall.mixed_with_text(window, 30, self.rng)
        self.assertEqual((tokens.shape, kinds.shape), ((4096,), (4096,)))
        self.assert_answers_are_in_the_context(tokens, kinds)
        kept = tokens[kinds == recall.TEXT]
        np.testing.assert_array_equal(kept, window[: len(kept)])

    def test_a_probe_states_its_pairs_in_order_of_depth(self):
        probe = recall.make_probe(self.text, 1024, 8, self.rng)
        self.assertEqual(len(probe.context) + recall.LINE_BYTES, 1024)
        places = [probe.context.tobytes().index(pair.line) for pair in probe.pairs]
        self.assertEqual(places, sorted(places))
        self.assertLess(places[0], 100)
        self.assertGreater(places[-1], 700)
        with self.assertRaisesRegex(ValueError, "do not fit"):
            recall.make_probe(self.text, 100, 8, self.rng)


class TestWeights(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.model, cls.tokenizer = load(str(checkpoint.WEIGHTS))
        cls.record = checkpoint.load_metrics()

    def test_shape_and_size(self):
        shape = self.model.args
        self.assertEqual(shape.num_attention_heads, 4 * shape.num_key_value_heads)
        self.assertEqual(shape.head_dim, 64)
        size = (checkpoint.WEIGHTS / "model.safetensors").stat().st_size
        self.assertLess(size, 8_000_000)

    def test_tokens_are_bytes(self):
        text = "def f(x):\n    return 'π €' + \"\\0\"  # ÿ Ā\t\r\n"
        self.assertEqual(self.tokenizer.encode(text), list(text.encode()))
        self.assertEqual(self.tokenizer.decode(list(text.encode())), text)
        self.assertEqual(self.tokenizer.eos_token_ids, {corpus.END_OF_TEXT})

    def test_generates_through_mlx_lm(self):
        prompt = "import os\n\n# recall ABCD: 271828\n\nx = 1\n# recall ABCD: "
        pieces = stream_generate(self.model, self.tokenizer, prompt, max_tokens=6)
        self.assertEqual("".join(piece.text for piece in pieces), "271828")

    def test_perplexity_is_near_the_record(self):
        for value in self.record["held_out_perplexity_a_byte"].values():
            self.assertLess(value, 3.0)
        spot = self.record["spot_check"]
        recorded = spot["held_out_perplexity_a_byte"]
        windows = corpus.held_out_windows(SOURCES, len(recorded), spot["length"])
        found = evaluation.predict(self.model, windows, make_prompt_cache).perplexity
        wanted = np.exp(np.mean(np.log(recorded)))
        text = corpus.held_out_text(SOURCES)
        same_text = corpus.digest(text) == self.record["held_out_digest"]
        self.assertLess(abs(np.log(found / wanted)), 0.01 if same_text else 0.3)

    def test_recall_is_near_the_record(self):
        text = corpus.held_out_text(SOURCES)
        rng = np.random.default_rng(5)
        probes = [recall.make_probe(text, 512, 8, rng)]
        right = evaluation.recalled(self.model, probes, make_prompt_cache)
        self.assertEqual(right.shape, (1, 8))
        recorded = self.record["recall"]["512"]["accuracy"]
        self.assertGreater(recorded, 0.9)
        self.assertGreater(right.mean(), recorded - 0.2)

    def test_recall_notices_a_context_without_the_answers(self):
        text = corpus.held_out_text(SOURCES)
        rng = np.random.default_rng(6)
        probe = recall.make_probe(text, 512, 4, rng)
        other = recall.Probe(probe.context, recall.random_pairs(4, rng))
        right = evaluation.recalled(self.model, [other], make_prompt_cache)
        self.assertEqual(right.sum(), 0)

    def test_depth_bands_run_from_start_to_end(self):
        right = np.array([[False, False, True, True, True, True, True, False]])
        found = evaluation.accuracy_by_depth(right)
        self.assertEqual(found, [0.0, 1.0, 1.0, 0.5])


class TestTraining(unittest.TestCase):
    def test_schedule(self):
        recipe = training.Recipe()
        self.assertEqual(recipe.rate(0.0), 0.0)
        self.assertAlmostEqual(recipe.rate(recipe.warmup), recipe.peak_rate)
        final = recipe.peak_rate * recipe.final_rate
        self.assertAlmostEqual(recipe.rate(1.0), final)
        lengths = [recipe.length(share) for share in (0.0, 0.4, 0.6, 1.0)]
        self.assertEqual(lengths, [1024, 2048, 4096, 8192])

    def test_a_few_steps_lower_the_loss_and_save_a_model(self):
        recipe = train_model.SMOKE_RECIPE
        mx.random.seed(recipe.seed)
        model = Model(training.model_args(**train_model.SMOKE_SHAPE))
        progress = training.train(model, corpus.training_text(SOURCES), recipe)
        first, last = progress.curve[0]["text"], progress.curve[-1]["text"]
        self.assertLess(last, 0.8 * first)
        self.assertEqual(progress.steps, recipe.steps)
        plan = train_model.SMOKE_MEASUREMENT
        metrics = train_model.measure(model, SOURCES, plan)
        with tempfile.TemporaryDirectory() as folder:
            run = train_model.describe_run(recipe, progress)
            checkpoint.save(Path(folder), model, metrics | {"training": run})
            again, _ = load(folder)
            windows = corpus.held_out_windows(SOURCES, plan.windows, 256)
            found = evaluation.predict(again, windows, make_prompt_cache).perplexity
        recorded = metrics["held_out_perplexity_a_byte"]["256"]
        self.assertAlmostEqual(found, recorded, delta=1e-3 * recorded)

    def test_too_little_text_is_an_error(self):
        model = Model(training.model_args(**train_model.SMOKE_SHAPE))
        with self.assertRaises(ValueError):
            training.train(model, np.zeros(10, np.uint8), train_model.SMOKE_RECIPE)

    def test_a_time_limit_ends_the_schedule(self):
        recipe = training.Recipe(
            steps=10**6,
            minutes=1e-6,
            tokens_a_step=128,
            stages=(training.Stage(0.0, 32),),
        )
        model = Model(training.model_args(**train_model.SMOKE_SHAPE))
        progress = training.train(model, corpus.training_text(SOURCES), recipe)
        self.assertEqual(progress.steps, 1)


if __name__ == "__main__":
    unittest.main()
