"""mlx-lm's commands over quantized caches, and its server under load."""

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx_quantized_sdpa as qs
import pytest
from mlx_quantized_sdpa.__main__ import is_lm_switch, main

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

import kv_cache_models  # noqa: E402
from kv_cache_models import as_served, write_small_model  # noqa: E402
from mlx_lm import load, stream_generate  # noqa: E402

WEIGHTS = str(kv_cache_models.WEIGHTS)
REQUESTS = 32


def command(*arguments):
    """How to run a command in a process of its own."""
    return [sys.executable, "-m", "mlx_quantized_sdpa", *map(str, arguments)]


class TestGenerate(unittest.TestCase):
    def setUp(self):
        # Whatever ran before in this process.
        qs.disable()
        self.addCleanup(qs.disable)

    def run_command(self, *arguments, typed=""):
        done = subprocess.run(
            command(*arguments),
            input=typed,
            capture_output=True,
            text=True,
            timeout=600,
        )
        return done.returncode, done.stdout + done.stderr

    def test_generates_what_the_library_does(self):
        model, tokenizer = load(WEIGHTS)
        prompt = "import os\n\n\ndef "
        with qs.enabled(model, "k8v4"):
            steps = stream_generate(model, tokenizer, prompt, max_tokens=16)
            wanted = "".join(step.text for step in steps)
        rc, printed = self.run_command(
            *("generate", "--kv", "k8v4", "--model", WEIGHTS, "--max-tokens", 16),
            *("--ignore-chat-template", "--prompt", prompt.replace("\n", "\\n")),
        )
        self.assertEqual(rc, 0, printed)
        self.assertIn(f"==========\n{wanted}\n", printed)

    def test_a_chat_of_two_turns(self):
        asked = ["def __init__(", "return self._"]
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(WEIGHTS, folder, dirs_exist_ok=True)
            settings = Path(folder) / "tokenizer_config.json"
            template = {"chat_template": "{{ messages[-1]['content'] }}"}
            settings.write_text(json.dumps(json.loads(settings.read_text()) | template))
            model, tokenizer = load(folder)
            cache = qs.make_prompt_cache(model, "k8v4")
            answers = []
            with qs.enabled(model, "k8v4"):
                for text in asked:
                    prompt = tokenizer.apply_chat_template(
                        [{"role": "user", "content": text}], add_generation_prompt=True
                    )
                    steps = stream_generate(
                        model, tokenizer, prompt, max_tokens=24, prompt_cache=cache
                    )
                    answers.append("".join(step.text for step in steps))
            chat = ("chat", "--kv", "k8v4", "--model", folder, "--max-tokens", 24)
            rc, printed = self.run_command(*chat, typed="\n".join([*asked, "q", ""]))
        self.assertEqual(rc, 0, printed)
        printed = "".join(printed.split())
        for answer in answers:
            self.assertGreater(len(answer.strip()), 8)
            self.assertIn("".join(answer.split()), printed)

    def test_a_prompt_that_was_cached(self):
        """Saved by one command, checked and continued by another."""
        model = ("--model", WEIGHTS)
        with tempfile.TemporaryDirectory() as folder:
            file = f"{folder}/prompt.safetensors"
            saved = ("--prompt", "import os, ", "--prompt-cache-file", file)
            rc, printed = self.run_command("cache_prompt", "--kv", "q4", *model, *saved)
            self.assertEqual(rc, 0, printed)
            cache = qs.load_prompt_cache(file)
            self.assertEqual(str(cache[0].formats[0]), "q4g64")
            asked = ("--prompt-cache-file", file, "--prompt", "sys", "--max-tokens", 4)
            rc, printed = self.run_command("generate", "--kv", "q4", *asked)
            self.assertEqual(rc, 0, printed)
            damaged = bytearray(Path(file).read_bytes())
            damaged[-1] ^= 1
            Path(file).write_bytes(damaged)
            rc, printed = self.run_command("generate", "--kv", "q4", *asked)
            self.assertNotEqual(rc, 0)
            self.assertIn("must be whole", printed)

    def test_what_is_no_spec_is_refused(self):
        printed = io.StringIO()
        with contextlib.redirect_stderr(printed):
            self.assertEqual(main(["server", "--kv", "k9", "--model", WEIGHTS]), 2)
        self.assertIn("[CacheSpec] a spec must begin with", printed.getvalue())
        self.assertFalse(qs.is_enabled())

    def test_mlx_lms_own_switches_are_refused(self):
        """They would be of no effect; shortened, mlx-lm's parsers know them too."""
        for command, *switches in (
            ("generate", "--kv-bits", "4"),
            ("server", "--kv-bits=8"),
            ("cache_prompt", "--kv-group-size", "32"),
            ("generate", "--quantized-kv", "0"),
        ):
            printed = io.StringIO()
            with contextlib.redirect_stderr(printed):
                asked = [command, "--model", "no such", *switches]
                self.assertEqual(main(asked), 2)
            words = f"must be said by --kv SPEC, such as --kv q4g64; got {switches[0]}."
            self.assertIn(words, printed.getvalue())
        for other in ("--quantize-activations", "--max-kv-size", "-q", "--"):
            self.assertFalse(is_lm_switch(other))

    def test_help_has_mlx_lms_options(self):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            with self.assertRaises(SystemExit) as ended:
                main(["server", "--help"])
        self.assertEqual(ended.exception.code, 0)
        self.assertIn("--kv SPEC", printed.getvalue())
        self.assertIn("--prompt-concurrency", printed.getvalue())
        self.assertFalse(qs.is_enabled())

    def test_usage(self):
        self.assertEqual((main(["--help"]), main([]), main(["train"])), (0, 2, 2))


class TestServer(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.model = folder.name
        write_small_model(self.model)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = tempfile.TemporaryFile("w+")
        self.server = subprocess.Popen(
            command("server", "--kv", "q8", "--model", self.model, "--port", self.port),
            stdout=self.log,
            stderr=self.log,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        self.addCleanup(self.stop)

    def stop(self):
        self.server.kill()
        self.server.wait()
        self.log.close()

    def printed(self):
        self.log.seek(0)
        return self.log.read()

    def ask(self, prompt, count):
        body = {"prompt": prompt, "max_tokens": count, "temperature": 0.0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        while True:
            try:
                with urllib.request.urlopen(request, timeout=300) as response:
                    return json.load(response)["choices"][0]["text"]
            except urllib.error.HTTPError as error:
                self.fail(f"{error}: {error.read()}\n{self.printed()}")
            except ConnectionError:
                # Python's server has only a few places for connections to wait in.
                self.assertIsNone(self.server.poll(), self.printed())
                time.sleep(0.1)

    def wait(self):
        for _ in range(600):
            self.assertIsNone(self.server.poll(), self.printed())
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.2)
        self.fail(self.printed())

    def test_requests_at_once_get_what_each_gets_alone(self):
        source = Path(unittest.__file__).read_text()
        asked = [
            (source[100 * i : 100 * i + 5 + (37 * i) % 150], 4 + (7 * i) % 13)
            for i in range(REQUESTS)
        ]
        self.wait()
        with ThreadPoolExecutor(REQUESTS) as pool:
            found = list(pool.map(lambda each: self.ask(*each), asked))
        model, tokenizer = load(self.model)
        with qs.enabled(model, "q8"):
            alone = [
                "".join(
                    step.text
                    for step in stream_generate(
                        model, tokenizer, text, max_tokens=count
                    )
                )
                for text, count in asked
            ]
        alone = list(map(as_served, alone))
        self.assertEqual(list(map(as_served, found)), alone, self.printed())
        # A prompt that is known already, and its continuation.
        text, count = asked[1]
        self.assertEqual(as_served(self.ask(text, count)), alone[1])


if __name__ == "__main__":
    unittest.main()
