"""What the repository's own checks share: which files, and how to report."""

import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

CXX_SUFFIXES = {".h", ".cpp", ".cu", ".cuh", ".metal"}

Check = Callable[[str, str], Iterable[str]]


def repository_files() -> list[str]:
    """Tracked files, and untracked ones that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True)
    return [name for name in listed.stdout.split("\0") if Path(name).is_file()]


def is_cxx(name: str) -> bool:
    return Path(name).suffix in CXX_SUFFIXES


def run(check: Check) -> None:
    """Print a line for each complaint of check(name, text); any one is a failure."""
    failed = False
    for name in repository_files():
        try:
            text = Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for complaint in check(name, text):
            print(f"{name}:{complaint}")
            failed = True
    sys.exit(failed)
