"""``python -m mlx_quantized_sdpa eval``."""

import argparse
import json
import os
import platform
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import mlx.core as mx

from .._versions import VERSION
from ..hook import enabled
from ..spec import CacheSpec
from . import report
from .measure import Measurement, Sizes

# Where a checkout keeps its small model.
SMALL_MODEL = Path("bench") / "recall_model" / "weights"

# Files of Python's standard library that the small model has not been trained on.
DEFAULT_TEXT = (
    "http/client.py",
    "queue.py",
    "collections/__init__.py",
    "selectors.py",
    "modulefinder.py",
)

QUICK = Sizes(
    windows=1,
    window_length=128,
    prompts=1,
    prompt_length=64,
    generated=16,
    lengths=(256, 512),
    needles=4,
    speed_lengths=(256, 512),
    steps=4,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints a table, and writes what was asked for."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        specs = [spec for spec in options.kv.split(",") if spec]
        for spec in specs:
            CacheSpec.parse(spec)
        sizes = read_sizes(options)
        folder = find_model(options.model)
        text = read_text(options.text)
        with enabled():
            pass  # mlx-lm is there, and new enough.
        for file in filter(None, (options.json, options.html)):
            check_writable(file)
    except (ImportError, ValueError, OSError) as error:
        parser.error(str(error))
    # First: what the machine does besides is not to be the measurement itself.
    started = about(folder) | {"caches": ", ".join(specs)}
    model, encode = load(folder, options.dtype)
    measurement = Measurement(model, encode, text, specs, sizes)
    try:
        measurement.check()
    except ValueError as error:
        parser.error(str(error))
    started["dtype"] = options.dtype or "the model's own"
    found = measure(measurement, started)
    print(report.table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    if options.html:
        options.html.write_text(report.html(found))
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    defaults = Sizes()
    parser = argparse.ArgumentParser(
        prog="python -m mlx_quantized_sdpa eval",
        description="What quantized KV caches change, and save, against the dense one.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        help="folder or name of a model for mlx-lm; default: the small model of a "
        f"checkout, {SMALL_MODEL}",
    )
    parser.add_argument(
        "--kv", default="q8,k8v4,turbo4,rot4", help="kinds of cache (%(default)s)"
    )
    parser.add_argument(
        "--text", type=Path, help="default: files of Python's standard library"
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="of the model (default: its own)",
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--html", type=Path, help="write a report with charts here")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try it")
    for name, help_text in (
        ("windows", "stretches of text to predict"),
        ("window-length", "tokens of each"),
        ("prompts", "prompts to continue"),
        ("prompt-length", "tokens of each"),
        ("generated", "tokens to generate after each"),
        ("needles", "needles in each context"),
        ("longest-dense", "longest context for the dense cache (default: all)"),
        ("steps", "decode steps to time at each length"),
        ("chunk", "tokens a prefill step"),
    ):
        default = getattr(defaults, name.replace("-", "_"))
        shown = "" if default is None else f" ({default})"
        parser.add_argument(f"--{name}", type=int, help=help_text + shown)
    for name, help_text in (
        ("lengths", "contexts with needles"),
        ("speed-lengths", "tokens in the caches whose decode steps are timed"),
    ):
        shown = ",".join(map(str, getattr(defaults, name.replace("-", "_"))))
        parser.add_argument(f"--{name}", help=f"{help_text}; '' for none ({shown})")
    return parser


def read_sizes(options: argparse.Namespace) -> Sizes:
    """The sizes that the options say."""
    chosen = asdict(QUICK if options.quick else Sizes())
    for name in chosen:
        value = getattr(options, name)
        if value is None:
            continue
        if name in ("lengths", "speed_lengths"):
            value = tuple(int(each) for each in value.split(",") if each)
        chosen[name] = value
    return Sizes(**chosen)


def find_model(name: str | None) -> str:
    """A model for ``mlx_lm.load``; by default the small one, where it is at hand.

    Raises:
        ValueError: If no model was named and none is at hand.
    """
    if name is not None:
        return name
    if (SMALL_MODEL / "config.json").exists():
        return str(SMALL_MODEL)
    raise ValueError(
        "[eval] a model must be named: a folder, or a name that mlx-lm can download. "
        f"The small model is in the project's repository, in {SMALL_MODEL}: run this "
        "from a checkout's root, or name that folder."
    )


def read_text(path: Path | None) -> str:
    """The text of a file, by default sources that every Python has."""
    if path is not None:
        return path.read_text()
    folder = Path(sysconfig.get_paths()["stdlib"])
    return "".join((folder / name).read_text() for name in DEFAULT_TEXT)


def check_writable(file: Path) -> None:
    """Raises an OSError where no file can be written; leaves none behind."""
    new = not file.exists()
    file.open("a").close()
    if new:
        file.unlink()


def load(folder: str, dtype: str | None) -> tuple[Any, Callable[[str], list[int]]]:
    """A model, and what makes tokens of a text."""
    import mlx_lm

    model, tokenizer = mlx_lm.load(folder)[:2]
    if dtype is not None:
        model.set_dtype(getattr(mx, dtype))

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))

    return model, encode


def measure(measurement: Measurement, started: dict[str, str]) -> dict[str, Any]:
    """The record of a whole run, under a progress bar."""
    from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

    with tqdm(unit="piece", dynamic_ncols=True) as bar:

        def progress(what: str) -> None:
            bar.set_description(f"{what:32}")
            bar.update()

        measurement.progress = progress
        bar.total = measurement.pieces
        results = list(measurement.run().values())
    return {
        "about": started,
        "sizes": asdict(measurement.sizes),
        "results": [result.as_record(results[0]) for result in results],
    }


def about(folder: str) -> dict[str, str]:
    """What the figures were taken with."""
    from importlib.metadata import version

    device = mx.device_info(mx.default_device())
    name = device.get("device_name") or platform.processor() or platform.machine()
    found = {
        "model": Path(folder).as_posix(),
        "device": f"{mx.default_device().type.name}: {name}",
        "processors": str(os.cpu_count()),
        "load before": f"{os.getloadavg()[0]:.1f}",
        "day": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "mlx-lm": version("mlx-lm"),
        "mlx-quantized-sdpa": VERSION,
    }
    if SMALL_MODEL.exists():
        found["commit"] = commit()
    return found


def commit() -> str:
    """Of the checkout in the working folder; a plus sign says that it has changes."""

    def said(*command: str) -> str:
        try:
            done = subprocess.run(["git", *command], capture_output=True, text=True)
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = said("status", "--porcelain", "--untracked-files=no")
    return (said("rev-parse", "--short=12", "HEAD") or "none") + "+" * bool(changed)
