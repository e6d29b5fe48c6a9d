"""The assembled tree build/mlx: MLX with the series as commits, the overlay linked."""

import json
import os
import shutil
from pathlib import Path

from .assemble import check_new_files, compose, decompose
from .git import Git, GitFailure, SeriesError, borrow_objects
from .patch import Patch, check
from .project import Project

# Where the tree stood when patches/ and it were last in step.
APPLIED = "refs/series/applied"
BASE = "refs/series/base"


def open_tree(project: Project) -> Git:
    git = Git(project.tree)
    if not (project.tree / ".git").exists() or not git.succeeds("rev-parse", APPLIED):
        raise SeriesError("build/mlx is not a tree of `make apply`: move it away")
    return git


def link_record(project: Project) -> Path:
    return project.tree / ".git/series-links.json"


def made_links(project: Project) -> dict[str, Path]:
    """The links that `apply` made: path in the tree, and the file it leads to."""
    record = link_record(project)
    made = json.loads(record.read_text()) if record.exists() else {}
    return {path: project.root / here for path, here in made.items()}


def replaced_links(project: Project) -> list[str]:
    """Paths where an editor put a file in the place of a link."""
    links = {path: project.tree / path for path in made_links(project)}
    return [p for p, link in links.items() if link.is_file() and not link.is_symlink()]


def changed_files(project: Project, git: Git) -> tuple[list[str], list[str]]:
    """Uncommitted changes: to files of MLX, and new files."""
    changed, new = [], []
    status = git("status", "--porcelain", "-z", "--no-renames", "--untracked-files=all")
    for entry in filter(None, status.split("\0")):
        path = entry[3:]
        if not entry.startswith("??"):
            changed.append(path)
        elif not (project.tree / path).is_symlink():
            new.append(path)
    return changed, new + replaced_links(project)


def check_untouched(project: Project, git: Git) -> None:
    changed, new = changed_files(project, git)
    if changed or new:
        raise SeriesError(
            f"build/mlx has uncommitted work ({', '.join(changed + new)}): run `make "
            "refresh` to keep it in patches/ and overlay/, or undo it"
        )
    if git("rev-parse", "HEAD") != git("rev-parse", APPLIED):
        raise SeriesError(
            "build/mlx has commits that patches/ lacks: run `make refresh` to keep "
            f"them, or `git -C build/mlx reset --hard {APPLIED}`"
        )


def apply(project: Project) -> None:
    """Make build/mlx, or bring it to where patches/ and overlay/ are."""
    if project.tree.exists():
        git = open_tree(project)
        check_untouched(project, git)
        if not git.succeeds("cat-file", "-e", f"{project.pin}^{{tree}}"):
            raise SeriesError("build/mlx lacks the pinned commit: remove it first")
        fill(project, git)
        return
    git = borrow_objects(project.tree, project.source, bare=False)
    try:
        fill(project, git)
    except BaseException:
        # Half a tree would be in the way of the next try.
        shutil.rmtree(project.tree)
        raise


def fill(project: Project, git: Git) -> None:
    """Check out the series, and link the new files in."""
    links = project.links
    check_new_files(git, project)
    head = [project.pin, *compose(git, project.pin, project.patches)][-1]
    git("checkout", "--quiet", "--detach", head)
    git("update-ref", BASE, project.pin)
    git("update-ref", APPLIED, head)
    make_links(project, links)
    print(
        f"build/mlx: MLX {project.pin[:12]}, {len(project.patches)} patches, "
        f"{len(links)} new files"
    )


def make_links(project: Project, links: dict[str, Path]) -> None:
    for path, here in made_links(project).items():
        if links.get(path) != here:
            (project.tree / path).unlink(missing_ok=True)
    for path, here in links.items():
        link = project.tree / path
        if not link.is_symlink():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(here)
    record = {path: str(here.relative_to(project.root)) for path, here in links.items()}
    link_record(project).write_text(json.dumps(record, indent=1))
    exclude = project.tree / ".git/info/exclude"
    exclude.parent.mkdir(exist_ok=True)
    exclude.write_text("".join(f"/{path}\n" for path in links))


def refresh(project: Project) -> None:
    """Edits in build/mlx flow back to patches/ and, new files, to overlay/."""
    if not project.tree.exists():
        raise SeriesError("build/mlx is missing: run `make apply` first")
    git = open_tree(project)
    base = git("rev-parse", BASE).strip()
    check_patches_are_as_applied(project, git, base)
    touched = take_new_files(project, git)
    fold_changes(project, git, base)
    headers = {patch.name: patch.header for patch in project.patches}
    patches = [
        Patch(patch.name, headers.get(patch.name, patch.header), patch.diff)
        for patch in decompose(git, base, "HEAD")
    ]
    for patch in patches:
        check(patch)
    touched += write_patches(project, patches)
    head = [base, *compose(git, base, patches)][-1]
    git("reset", "--quiet", "--soft", head)
    git("update-ref", APPLIED, head)
    print("\n".join(touched) if touched else "nothing has changed")
    fresh = Project(project.root)
    make_links(fresh, fresh.links)


def check_patches_are_as_applied(project: Project, git: Git, base: str) -> None:
    head = [base, *compose(git, base, project.patches)][-1]
    steps = [
        git("log", "--format=%s %T", f"{base}..{commit}") for commit in (head, APPLIED)
    ]
    if steps[0] != steps[1]:
        raise SeriesError(
            "patches/ has changed since `make apply`: restore it, or undo the work in "
            "build/mlx and apply again"
        )


def take_new_files(project: Project, git: Git) -> list[str]:
    """New files in the tree move to where they belong here and leave a link."""
    homes = made_links(project)
    taken = []
    for path in changed_files(project, git)[1]:
        here = homes.get(path, project.root / "overlay" / path)
        here.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(project.tree / path, here)
        (project.tree / path).symlink_to(here)
        taken.append(str(here.relative_to(project.root)))
    return taken


def fold_changes(project: Project, git: Git, base: str) -> None:
    """Uncommitted changes join the one patch that changes the same file, or PATCH=."""
    changed, _ = changed_files(project, git)
    if not changed:
        return
    before = git("rev-parse", "HEAD").strip()
    targets = {path: target_of(git, base, path) for path in changed}
    try:
        for path, commit in targets.items():
            git("add", "--", path)
            git("commit", "--quiet", f"--fixup={commit}")
        git("-c", "sequence.editor=:", "rebase", "-q", "-i", "--autosquash", base)
    except GitFailure:
        git.succeeds("rebase", "--abort")
        git("reset", "--quiet", "--soft", before)
        raise SeriesError(
            f"the change to {', '.join(changed)} does not fit the patch: commit it to "
            "the right one by `git commit --fixup` and `git rebase`, in build/mlx"
        ) from None


def target_of(git: Git, base: str, path: str) -> str:
    wanted = os.environ.get("PATCH")
    commits = git.lines("log", "--format=%H %s", f"{base}..HEAD")
    names = {name: commit for commit, name in (line.split() for line in commits)}
    if wanted and wanted not in names:
        raise SeriesError(f"PATCH must be one of {', '.join(names)}; got {wanted}")
    if wanted:
        return names[wanted]
    owners = git.lines("log", "--format=%H", f"{base}..HEAD", "--", path)
    if len(owners) != 1:
        count = f"{len(owners)} patches" if owners else "no patch"
        raise SeriesError(
            f"{path} is changed by {count}: name the one this belongs to with PATCH="
        )
    return owners[0]


def write_patches(project: Project, patches: list[Patch]) -> list[str]:
    """Write what differs; tell which files that is."""
    files = {f"{patch.name}.patch": patch.text for patch in patches}
    files["series"] = "".join(f"{patch.name}\n" for patch in patches)
    written = []
    for name, text in files.items():
        path = project.patch_folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            written.append(f"patches/{name}")
    for path in project.patch_folder.glob("*.patch"):
        if path.name not in files:
            path.unlink()
            written.append(f"patches/{path.name}")
    return written
