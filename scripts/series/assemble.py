"""Patches to commits and back, in git's object store alone."""

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from .git import Git, GitFailure, SeriesError, borrow_objects, commit_tree, diff_of
from .patch import Patch, from_message
from .project import Project


def scratch_repository(project: Project, folder: str) -> Git:
    return borrow_objects(Path(folder), project.source, bare=True)


def compose(git: Git, base: str, patches: Iterable[Patch]) -> list[str]:
    """A commit for each patch, on top of the base."""
    commits: list[str] = []
    with TemporaryDirectory() as folder:
        staged = git.with_index(Path(folder) / "index")
        staged("read-tree", base)
        parent = base
        for patch in patches:
            stage(staged, patch, base)
            tree = staged("write-tree").strip()
            parent = commit_tree(git, tree, [parent], patch.message)
            commits.append(parent)
    return commits


def stage(staged: Git, patch: Patch, base: str) -> None:
    try:
        staged("apply", "--cached", "--whitespace=nowarn", "-", text=patch.diff)
    except GitFailure as failure:
        where = str(failure).splitlines()[0].removeprefix("error: ")
        raise SeriesError(
            f"patches/{patch.name}.patch does not apply to MLX {base[:12]} ({where}): "
            "correct its context; `make drift` tells what moved"
        ) from None


def decompose(git: Git, base: str, head: str) -> list[Patch]:
    """The patch that each commit from base to head stands for."""
    commits = git.lines("rev-list", "--reverse", f"{base}..{head}")
    return [
        from_message(git("log", "-1", "--format=%B", commit), diff_of(git, commit))
        for commit in commits
    ]


def existing_files(git: Git, commit: str, paths: Iterable[str]) -> list[str]:
    present = set(git.lines("ls-tree", "-r", "--name-only", commit))
    return [path for path in paths if path in present]


def check_new_files(git: Git, project: Project) -> None:
    for path in existing_files(git, project.pin, project.links):
        raise SeriesError(
            f"overlay/{path} exists in MLX {project.pin[:12]}: rename it, or make the "
            "change a patch"
        )
