"""The repository: its pin, its new files, which patch each belongs to."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .git import Git, GitFailure, SeriesError, object_folder
from .patch import Patch, fail, read_series


@dataclass(frozen=True)
class Project:
    root: Path

    @property
    def tree(self) -> Path:
        return self.root / "build/mlx"

    @property
    def patch_folder(self) -> Path:
        return self.root / "patches"

    @cached_property
    def git(self) -> Git:
        return Git(self.root, fixed=False)

    @cached_property
    def pin(self) -> str:
        entry = self.git("ls-files", "--stage", "mlx").split()
        if not entry or entry[0] != "160000":
            raise SeriesError("no submodule `mlx` is recorded: restore it from git")
        return entry[1]

    @cached_property
    def source(self) -> Path:
        """A repository of MLX that has the pinned commit."""
        given = os.environ.get("MLX_SRC")
        source = Path(given).resolve() if given else self.root / "mlx"
        if not given and not (source / ".git").exists():
            raise SeriesError(
                "no MLX source: run `git submodule update --init mlx`, or set "
                "MLX_SRC to a clone of ml-explore/mlx"
            )
        try:
            object_folder(source)
        except (GitFailure, OSError):
            raise SeriesError(
                f"MLX_SRC must be a git repository of ml-explore/mlx; got {given}"
            ) from None
        self.check_commit(source, self.pin)
        return source

    def check_commit(self, source: Path, commit: str) -> None:
        if not Git(source, fixed=False).succeeds(
            "cat-file", "-e", f"{commit}^{{tree}}"
        ):
            raise SeriesError(
                f"{source} has no commit {commit}: run `git fetch origin {commit}` "
                "there"
            )

    @cached_property
    def patches(self) -> list[Patch]:
        return read_series(self.patch_folder)

    @cached_property
    def overlay_files(self) -> list[str]:
        command = ("ls-files", "--cached", "--others", "--exclude-standard", "overlay")
        files = {name.removeprefix("overlay/") for name in self.git.lines(*command)}
        return sorted(f for f in files if (self.root / "overlay" / f).is_file())

    @cached_property
    def new_files(self) -> dict[str, dict[str, Path]]:
        """For each patch its new files: path in MLX, and where the file is here."""
        owners: dict[str, str] = {}
        found: dict[str, dict[str, Path]] = {}
        for patch in self.patches:
            files = found[patch.name] = self.claimed_by(patch)
            for path in files:
                if path in owners:
                    raise SeriesError(
                        f"overlay/{path} is claimed by {owners[path]}.patch and "
                        f"{patch.name}.patch: keep one `Overlay:` line"
                    )
                owners[path] = patch.name
        for path in self.overlay_files:
            if path not in owners:
                raise SeriesError(
                    f"overlay/{path} is claimed by no patch: name it in an "
                    "`Overlay:` line of one in patches/"
                )
        return found

    def claimed_by(self, patch: Patch) -> dict[str, Path]:
        files: dict[str, Path] = {}
        for claim in patch.claims:
            if claim.folder:
                name = Path(claim.pattern).name
                matching = {claim.pattern: self.root / claim.folder / name}
            else:
                paths = [path for path in self.overlay_files if claim.matches(path)]
                matching = {path: self.root / "overlay" / path for path in paths}
            if not matching or not all(here.is_file() for here in matching.values()):
                fail(patch.name, f"claims {claim.pattern}, which is no file here")
            if not files.keys().isdisjoint(matching):
                fail(patch.name, f"claims the files of {claim.pattern} twice")
            files |= matching
        return files

    @property
    def links(self) -> dict[str, Path]:
        return {
            path: here
            for files in self.new_files.values()
            for path, here in files.items()
        }
