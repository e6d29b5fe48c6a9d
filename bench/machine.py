"""What a result must say about where it came from."""

import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "mlx",
    "mlx-lm",
    "mlx-quantized-sdpa",
    "torch",
    "onnxruntime",
    "llama-cpp-python",
    "numpy",
)
ROOT = Path(__file__).resolve().parents[1]


def _said(*command):
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def device_name():
    """The processor's model and family: virtual machines shorten the name alone."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return _said("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", cpuinfo.read_text(), re.M))
    name = fields.get("model name", platform.machine())
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name


def versions():
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def commit():
    """The commit of the working tree, with a plus sign where it has changes."""
    changed = _said("git", "status", "--porcelain", "--untracked-files=no")
    return _said("git", "rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
