"""What leaves the repository: the check, the complete series, the drift report."""

import os
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from .assemble import (
    check_new_files,
    compose,
    decompose,
    existing_files,
    scratch_repository,
)
from .git import Git, GitFailure, SeriesError, commit_tree, diff_of
from .patch import Patch, fail
from .project import Project
from .wiring import check_built, check_includes, check_names


def check(project: Project) -> None:
    """Applied and refreshed, the series is what it was."""
    count = len(project.links)
    check_built(project)
    with TemporaryDirectory() as folder:
        git = scratch_repository(project, folder)
        check_new_files(git, project)
        present = git.lines("ls-tree", "-r", "--name-only", project.pin)
        check_names(project, present)
        check_includes(project, present)
        head = [project.pin, *compose(git, project.pin, project.patches)][-1]
        for old, new in zip(project.patches, decompose(git, project.pin, head)):
            if old.diff != new.diff:
                fail(old.name, "is not as git writes it: run `make apply refresh`")
    print(
        f"{len(project.patches)} patches apply to MLX {project.pin[:12]} unchanged and "
        f"claim {count} new files"
    )


def check_files(project: Project) -> None:
    """What needs no MLX: each patch by itself, and each new file in one of them."""
    count = len(project.links)
    check_built(project)
    print(f"{len(project.patches)} patches are well formed and claim {count} new files")


def export(project: Project) -> None:
    """build/series/*.patch for `git am`, new files inside, words left to a person."""
    target = project.root / "build/series"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    with TemporaryDirectory() as folder:
        git = scratch_repository(project, folder)
        check_new_files(git, project)
        commits = complete_commits(git, project)
        for number, (patch, commit) in enumerate(zip(project.patches, commits), 1):
            text = git(
                *("format-patch", "-1", "--stdout", "--keep-subject", "--no-stat"),
                *("--zero-commit", "--full-index", "--no-signature", "--no-renames"),
                commit,
            )
            subject = f"Subject: [PATCH {number}/{len(commits)}] TODO\n"
            text = text.replace("Subject: TODO\n", subject, 1)
            (target / f"{number:04}-{patch.name}.patch").write_text(text)
    print(f"build/series: {len(commits)} patches, subjects and messages left to write")


def complete_commits(git: Git, project: Project) -> list[str]:
    """A commit a patch that has the patch's new files too."""
    commits = []
    parent = project.pin
    wiring = compose(git, project.pin, project.patches)
    index = git.with_index(Path(git.folder) / "complete")
    added: dict[str, Path] = {}
    for patch, commit in zip(project.patches, wiring):
        added |= project.new_files[patch.name]
        index("read-tree", commit)
        for path, here in added.items():
            blob = git("hash-object", "-w", "--", str(here)).strip()
            mode = "100755" if os.access(here, os.X_OK) else "100644"
            index("update-index", "--add", "--cacheinfo", f"{mode},{blob},{path}")
        parent = commit_tree(git, index("write-tree").strip(), [parent], "TODO")
        commits.append(parent)
    return commits


def drift(project: Project) -> bool:
    """How each patch stands against MLX_REF; whether all of them still fit."""
    reference = os.environ.get("MLX_REF")
    if not reference:
        raise SeriesError(
            "MLX_REF= must name a commit, tag or branch of the MLX source"
        )
    source = Git(project.source, fixed=False)
    try:
        commit = source("rev-parse", "--verify", f"{reference}^{{commit}}").strip()
    except GitFailure:
        raise SeriesError(
            f"{project.source} has no commit {reference}: run `git fetch` there"
        ) from None
    with TemporaryDirectory() as folder:
        git = scratch_repository(project, folder)
        if git.succeeds("merge-base", project.pin, commit):
            span = f"{project.pin}...{commit}"
            lacks, has = git("rev-list", "--left-right", "--count", span).split()
            print(
                f"MLX {commit[:12]} has {has} commits that {project.pin[:12]} lacks, "
                f"and lacks {lacks}"
            )
        wiring = compose(git, project.pin, project.patches)
        staged = git.with_index(Path(folder) / "drift")
        staged("read-tree", commit)
        results = [
            stand_of(git, staged, patch, own)
            for patch, own in zip(project.patches, wiring)
        ]
        existing = existing_files(git, commit, project.links)
    for patch, result in zip(project.patches, results):
        print(f"{patch.name}: {result}")
    for path in existing:
        print(f"overlay/{path}: exists there now")
    return not existing and not any(CONFLICT in result for result in results)


PLAIN, MERGED, CONFLICT = "applies", "applies by a three-way merge", "does not apply"


def stand_of(git: Git, staged: Git, patch: Patch, commit: str) -> str:
    tree = staged("write-tree").strip()
    diff = diff_of(git, commit, blobs=True)
    places: list[str] = []
    for options, result in ((), PLAIN), (("--3way",), MERGED):
        try:
            staged("apply", "--cached", "--whitespace=nowarn", *options, "-", text=diff)
            return result
        except GitFailure as failure:
            places += re.findall(r"patch failed: (\S+)", str(failure))
            staged("read-tree", tree)
    return f"{CONFLICT} ({', '.join(dict.fromkeys(places))})"
