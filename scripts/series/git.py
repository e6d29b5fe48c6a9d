"""Git, without the user's configuration where the result depends on it."""

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path


class SeriesError(Exception):
    """What is wrong and what to do, in one line."""


# Names, dates and settings fixed, so that equal patches give equal commits.
FIXED = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    **{
        f"GIT_{who}_{what}": value
        for who in ("AUTHOR", "COMMITTER")
        for what, value in {
            "NAME": "TODO",
            "EMAIL": "TODO",
            "DATE": "2000-01-01T00:00:00+0000",
        }.items()
    },
}
DIFF = (
    *("diff-tree", "-p", "--unified=3", "--no-renames", "--no-color"),
    *("--no-ext-diff", "--diff-algorithm=myers", "--indent-heuristic"),
    *("--src-prefix=a/", "--dst-prefix=b/"),
)


class GitFailure(Exception):
    pass


class Git:
    """Runs git in a folder; a call returns what git prints."""

    def __init__(self, folder: Path, fixed: bool = True, **variables: str) -> None:
        self.folder = folder
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("GIT_") or (not fixed and "CONFIG" in name)
        }
        self.environment |= (FIXED if fixed else {}) | variables

    def __call__(self, *arguments: str, text: str = "") -> str:
        done = subprocess.run(
            ["git", *arguments],
            cwd=self.folder,
            env=self.environment,
            input=text.encode(),
            capture_output=True,
        )
        if done.returncode:
            raise GitFailure(done.stderr.decode(errors="replace").strip())
        return done.stdout.decode()

    def succeeds(self, *arguments: str) -> bool:
        try:
            self(*arguments)
        except GitFailure:
            return False
        return True

    def lines(self, *arguments: str) -> list[str]:
        return self(*arguments).splitlines()

    def with_index(self, path: Path) -> "Git":
        other = Git(self.folder)
        other.environment["GIT_INDEX_FILE"] = str(path)
        return other


def object_folder(source: Path) -> Path:
    """Where a repository keeps its objects; GitFailure where it is none."""
    git = Git(source, fixed=False, GIT_CEILING_DIRECTORIES=str(source.parent))
    return source / git("rev-parse", "--git-path", "objects").strip()


def borrow_objects(repository: Path, source: Path, bare: bool) -> Git:
    """A new repository that reads the source's objects and writes only its own."""
    objects = object_folder(source)
    repository.mkdir(parents=True, exist_ok=True)
    git = Git(repository)
    git("init", "--quiet", *(["--bare"] if bare else []))
    folder = repository if bare else repository / ".git"
    (folder / "objects/info/alternates").write_text(f"{objects.resolve()}\n")
    shallow = objects.parent / "shallow"
    if shallow.exists():
        (folder / "shallow").write_text(shallow.read_text())
    return git


def diff_of(git: Git, commit: str, blobs: bool = False) -> str:
    """The change of a commit; with blobs, as `git apply --3way` needs it."""
    text = git(*DIFF, "--full-index", f"{commit}^", commit)
    if blobs:
        return text
    kept = (line for line in text.splitlines(True) if not line.startswith("index "))
    return "".join(kept)


def commit_tree(git: Git, tree: str, parents: Iterable[str], message: str) -> str:
    options = [option for parent in parents for option in ("-p", parent)]
    return git("commit-tree", tree, *options, text=message).strip()
