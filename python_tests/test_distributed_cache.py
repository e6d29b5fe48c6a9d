"""Two processes, each with half of the heads, write what one writes alone."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

import mlx.core as mx  # noqa: E402
import mlx_quantized_sdpa as qs  # noqa: E402
from distributed_llama import KINDS, generate, load_model  # noqa: E402

REPOSITORY = Path(__file__).parents[1]
MODEL = REPOSITORY / "bench" / "recall_model" / "weights"
SCRIPT = Path(__file__).with_name("distributed_llama.py")
LAUNCH = Path(sys.executable).with_name("mlx.launch")


@unittest.skipUnless(mx.distributed.is_available("ring"), "MLX has no ring backend")
class TestTwoProcesses(unittest.TestCase):
    def test_the_tokens_are_those_of_one_process(self):
        prompt = list(b'def read(path):\n    """Reads a file."""\n    with open(')
        with tempfile.TemporaryDirectory() as folder:
            self.launch(str(MODEL), json.dumps(prompt), folder)
            ranks = [json.loads(p.read_text()) for p in sorted(Path(folder).iterdir())]
        self.assertEqual([rank["size"] for rank in ranks], [2, 2])
        model = load_model(str(MODEL))
        with qs.enabled(force_fused=True):
            for spec, paged in KINDS:
                tokens, heads = generate(model, prompt, spec, paged)
                self.assertEqual(heads, 2)
                for rank in ranks:
                    found = rank["found"][f"{spec} {paged}"]
                    self.assertEqual(found, [tokens, 1])

    def launch(self, *arguments):
        command = [str(LAUNCH), "--backend", "ring", "--hosts", "127.0.0.1", "-n", "2"]
        command += ["--starting-port", str(free_ports(2))]
        command += ["--env", f"PYTHONPATH={os.pathsep.join(filter(None, sys.path))}"]
        command += ["--", sys.executable, str(SCRIPT), *arguments]
        # A group of its own: the launcher does not end its processes if it is ended.
        running = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            printed, _ = running.communicate(timeout=400)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
            running.wait()
        self.assertEqual(running.returncode, 0, printed)


def free_ports(count):
    """The first of ``count`` neighbouring ports that nobody listens on."""
    for first in range(32400, 60000, 97):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, each in enumerate(sockets):
                each.bind(("127.0.0.1", first + offset))
            return first
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
    raise RuntimeError("no free ports")


if __name__ == "__main__":
    unittest.main()
