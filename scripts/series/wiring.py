"""Whether new files are built: sources and kernels are named, includes exist."""

import re
from collections.abc import Iterable
from pathlib import Path

from .git import SeriesError
from .patch import Patch, fail
from .project import Project

SOURCES = (".cpp", ".cu", ".metal", ".cmake", ".rst")
KERNELS = "mlx/backend/metal/kernels/"
INCLUDE = re.compile(r'^\s*#include "((?:mlx|python)/[^"]+)"', re.MULTILINE)


def check_built(project: Project) -> None:
    """Each patch names the sources that it claims, in CMake or a list of contents.

    A kernel's header that the host needs too may come before the patch that names it.
    """
    anywhere = "\n".join(map(added_lines, project.patches)).split()
    for patch in project.patches:
        files = project.new_files[patch.name]
        lists = [added_lines(patch)]
        lists += [here.read_text() for path, here in files.items() if is_cmake(path)]
        names = named_in("\n".join(lists))
        for path in files:
            later = f"kernels/{Path(path).name}" in anywhere
            if must_be_named(path) and not later and not names_of(path) & names:
                fail(
                    patch.name,
                    f"claims {path} but names it in no added line: add it to the "
                    "CMakeLists.txt of its folder",
                )


def named_in(text: str) -> set[str]:
    return {Path(word).name for word in re.findall(r"[\w./]+", text)}


def added_lines(patch: Patch) -> str:
    return "\n".join(re.findall(r"^\+(?!\+\+ )(.*)$", patch.diff, re.MULTILINE))


def is_cmake(path: str) -> bool:
    return path.endswith(".cmake")


def must_be_named(path: str) -> bool:
    """Headers of Metal kernels too: what is compiled from them depends on each."""
    return path.endswith(SOURCES) or (path.startswith(KERNELS) and path.endswith(".h"))


def names_of(path: str) -> set[str]:
    """MLX names kernels and pages without their suffix."""
    file = Path(path)
    short = path.startswith(KERNELS) or file.suffix == ".rst"
    return {file.name, file.stem} if short else {file.name}


def check_names(project: Project, present: Iterable[str]) -> None:
    """The files that added lines name are new, or in the pinned MLX."""
    known = {Path(path).name for path in (*present, *project.links)}
    for patch in project.patches:
        for word in re.findall(r"[\w./]+", added_lines(patch)):
            name = Path(word).name
            if name.endswith((*SOURCES, ".h", ".cuh")) and name not in known:
                fail(
                    patch.name,
                    f"names {name}, which is in neither overlay/ nor MLX: correct it",
                )


def check_includes(project: Project, present: Iterable[str]) -> None:
    """What a new file includes is in the pinned MLX or new as well."""
    known = {*present, *project.links}
    for path, here in project.links.items():
        if Path(path).suffix not in (".h", ".cuh", ".cpp", ".cu", ".metal"):
            continue
        for name in INCLUDE.findall(here.read_text()):
            if name not in known:
                raise SeriesError(
                    f"overlay/{path} includes {name}, which is not in MLX "
                    f"{project.pin[:12]}: include what is there"
                )
