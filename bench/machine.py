"""What a result must say about where it came from."""

import ctypes
import os
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
# What times on a GPU depend on besides.
GPU_PACKAGES = (
    "mlx-cuda-12",
    "mlx-cuda-13",
    "mlx-metal",
    "flashinfer-python",
    "triton",
    "nvidia-cuda-nvrtc",
    "nvidia-cudnn-cu13",
)
NVRTC_LIBRARIES = ("libnvrtc.so.13", "libnvrtc.so.12")
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


def versions(packages=PACKAGES):
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def nvrtc_version():
    """That of the library which this process loads, or has loaded, by its name."""
    for name in NVRTC_LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        major, minor = ctypes.c_int(), ctypes.c_int()
        if library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)) == 0:
            return f"{major.value}.{minor.value}"
    return None


def gpu_versions():
    """Of packages, the driver and the compiler at run time; None where absent."""
    query = ("--query-gpu=driver_version", "--format=csv,noheader")
    drivers = _said("nvidia-smi", *query).splitlines()
    return {
        **versions(PACKAGES + GPU_PACKAGES),
        "driver": drivers[0] if drivers else None,
        "nvrtc": nvrtc_version(),
    }


def commit():
    """The commit of the working tree, with a plus sign where it has changes.

    QUANTIZED_SDPA_COMMIT says it where the files are a copy without history.
    """
    told = os.environ.get("QUANTIZED_SDPA_COMMIT")
    if told:
        return told
    changed = _said("git", "status", "--porcelain", "--untracked-files=no")
    found = _said("git", "rev-parse", "--short=12", "HEAD")
    return found + "+" * bool(changed) if found else "unknown"
