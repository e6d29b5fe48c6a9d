"""The programs that the rig needs: Clang 19 or newer, and LLVM's tools beside it."""

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

METAL = Path(__file__).resolve().parents[1]
ROOT = METAL.parents[1]
BUILD = ROOT / "build" / "metal"
OLDEST = 19
NEWEST = 30


class Missing(RuntimeError):
    """A program is not there; the message says which and how to get it."""


def version(program: str) -> int:
    run = subprocess.run([program, "--version"], capture_output=True, text=True)
    found = re.search(r"clang version (\d+)", run.stdout)
    return int(found[1]) if found else 0


@functools.cache
def clang() -> str:
    """Path of clang++; the environment variable METAL_CLANG goes before PATH."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        raise Missing(
            "The Metal kernels are executed on x86-64 Linux only; this is "
            f"{platform.system()} on {platform.machine()}."
        )
    named = os.environ.get("METAL_CLANG")
    names = [f"clang++-{n}" for n in range(OLDEST, NEWEST)] + ["clang++"]
    for name in [named] if named else names:
        path = shutil.which(name)
        if path and version(path) >= OLDEST:
            return path
    raise Missing(
        f"The Metal tests need clang++ {OLDEST} or newer"
        + (f"; METAL_CLANG is {named}." if named else " in PATH.")
        + f" On Debian and Ubuntu: apt-get install clang-{OLDEST} llvm-{OLDEST} "
        f"libclang-rt-{OLDEST}-dev."
    )


def tool(name: str) -> str:
    """A program of the same LLVM as clang, such as llvm-dis."""
    folder = Path(os.path.realpath(clang())).parent
    path = shutil.which(name, path=str(folder)) or shutil.which(
        f"{name}-{version(clang())}"
    )
    if not path:
        raise Missing(f"The Metal tests need {name} of the same LLVM as {clang()}.")
    return path


def sanitizer_runtime(name: str) -> str:
    """Path of one of Clang's runtime libraries."""
    file = f"libclang_rt.{name}-x86_64.so"
    for candidate in (file, f"libclang_rt.{name}.so"):
        path = subprocess.run(
            [clang(), f"-print-file-name={candidate}"], capture_output=True, text=True
        ).stdout.strip()
        if os.path.isabs(path) and os.path.exists(path):
            return path
    raise Missing(f"The Metal tests need Clang's runtime library {file}.")


def run(command: list[str | Path], what: str, **options) -> str:
    """Output of a command; its complaints become the error."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, **options
    )
    if done.returncode:
        raise CompileError(f"{what}:\n{done.stderr}{done.stdout}")
    return done.stdout


class CompileError(RuntimeError):
    """A compiler refused its input."""


if __name__ == "__main__":
    try:
        print(f"Metal is compiled by {clang()}, version {version(clang())}.")
    except Missing as missing:
        sys.exit(str(missing))
