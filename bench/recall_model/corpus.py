"""Text that every machine with Python has: the sources of the standard library."""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# 0xFF never occurs in UTF-8, so its id is free to mark the end of a file.
END_OF_TEXT = 0xFF

# One module in this many is held out.
HELD_OUT_FRACTION = 16

_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "lib-dynload"}
# Files made by a program: character tables and help topics.
_GENERATED = {"encodings", "pydoc_data"}
# Packages that distributions leave out: good for training, useless for comparing.
_OPTIONAL = {"test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo"}


@dataclass(frozen=True)
class SourceFile:
    """One file of the standard library; ``path`` is relative to its root."""

    path: Path
    text: bytes

    @property
    def module(self) -> str:
        """The module that the file belongs to: ``json`` also for test_json."""
        parts = self.path.with_suffix("").parts
        if parts[0] == "test" and len(parts) > 1:
            parts = parts[1:]
        return parts[0].removeprefix("test_")

    @property
    def held_out(self) -> bool:
        """Whether the file is kept from training: a fixed rule on its module's name."""
        digest = hashlib.sha256(self.module.encode()).digest()
        return digest[0] % HELD_OUT_FRACTION == 0

    @property
    def optional(self) -> bool:
        """Whether some distributions of Python lack the file."""
        return not _OPTIONAL.isdisjoint(self.path.parts)


def standard_library() -> Path:
    """Root of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_sources(root: Path) -> list[SourceFile]:
    """All UTF-8 sources below ``root``, in order of path."""
    sources = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not (_NOT_LIBRARY | _GENERATED).isdisjoint(relative.parts):
            continue
        text = path.read_bytes()
        if text and _is_utf8(text):
            sources.append(SourceFile(relative, text))
    return sources


def training_text(sources: list[SourceFile]) -> np.ndarray:
    """uint8 ``[bytes]``: every file not held out, each closed by END_OF_TEXT."""
    end = bytes([END_OF_TEXT])
    kept = [source.text + end for source in sources if not source.held_out]
    return np.frombuffer(b"".join(kept), np.uint8)


def held_out_windows(
    sources: list[SourceFile], count: int, length: int, skip: int = 0
) -> np.ndarray:
    """uint8 ``[count, length]``: the start of each of ``count`` held-out files.

    The files come in an order fixed by their names alone, the first ``skip`` left
    out, so that other releases of Python give nearly the same windows.
    """
    long_enough = [
        source
        for source in sources
        if source.held_out and not source.optional and len(source.text) >= length
    ]
    chosen = sorted(long_enough, key=_name_digest)[skip : skip + count]
    if len(chosen) < count:
        raise ValueError(
            f"only {len(chosen)} held-out files of {length} bytes; {count} wanted"
        )
    return np.stack([np.frombuffer(s.text[:length], np.uint8) for s in chosen])


def held_out_text(sources: list[SourceFile]) -> np.ndarray:
    """uint8 ``[bytes]``: all held-out files end to end."""
    kept = [s.text for s in sources if s.held_out and not s.optional]
    return np.frombuffer(b"".join(kept), np.uint8)


def digest(text: np.ndarray) -> str:
    """Tells whether two machines measure on the same text."""
    return hashlib.sha256(text.tobytes()).hexdigest()[:16]


def _name_digest(source: SourceFile) -> bytes:
    return hashlib.sha256(source.path.as_posix().encode()).digest()


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
