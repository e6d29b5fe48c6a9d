"""Patch files: a header in plain words, then a diff that only inserts."""

import re
from dataclasses import dataclass
from pathlib import Path

from .git import SeriesError

MAX_ADDED_LINES = 40
NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)+")
FIELDS = ("Wires", "Why", "Overlay")
REQUIRED = FIELDS[:2]
FIELD = re.compile(rf"({'|'.join(FIELDS)}): *(.*)")
# Lines between "diff" and "---" that name anything but a changed text file.
OTHER_CHANGE = re.compile(r"(new|deleted|old) |similarity|rename|copy|Binary|GIT bin")


@dataclass(frozen=True)
class Claim:
    """New files that a patch wires: a pattern, or one file kept in another folder."""

    pattern: str
    folder: str = ""

    def matches(self, path: str) -> bool:
        expression = re.escape(self.pattern).replace(r"\*", "[^/]*")
        return re.fullmatch(expression, path) is not None


@dataclass(frozen=True)
class Patch:
    name: str
    header: str
    diff: str

    @property
    def text(self) -> str:
        return f"{self.header}\n{self.diff}"

    @property
    def message(self) -> str:
        """Of the commit in the assembled tree, from which refresh reads it back."""
        return f"{self.name}\n\n{self.header}"

    @property
    def fields(self) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        for line in self.header.splitlines():
            field = FIELD.fullmatch(line)
            if field:
                found.append((field[1], field[2]))
            elif found and line.startswith("  "):
                name, value = found.pop()
                found.append((name, f"{value} {line.strip()}"))
            elif line:
                fail(self.name, f"has a header line outside its fields: {line!r}")
        return found

    @property
    def claims(self) -> list[Claim]:
        values = [value for name, value in self.fields if name == "Overlay"]
        return [Claim(*value.split(" from ")) for value in values]

    @property
    def files(self) -> list[str]:
        return re.findall(r"^\+\+\+ b/(.*)$", self.diff, re.MULTILINE)


def fail(name: str, what: str) -> None:
    raise SeriesError(f"patches/{name}.patch {what}")


def parse(name: str, text: str) -> Patch:
    header, start, diff = text.partition("\ndiff --git ")
    if not start:
        fail(name, "holds no diff: delete it, or commit its change and refresh")
    return Patch(name, header, start[1:] + diff)


def from_message(message: str, diff: str) -> Patch:
    name, _, header = message.partition("\n")
    if not NAME.fullmatch(name):
        raise SeriesError(
            f"the commit {name!r} in build/mlx names no patch: give it a subject "
            "like core-add-op, and the header of the patch as its body"
        )
    return Patch(name, header.strip() + "\n", diff)


def check(patch: Patch) -> None:
    if not NAME.fullmatch(patch.name):
        fail(patch.name, "must be named area-verb-object in lower case")
    present = {field for field, value in patch.fields if value}
    for field in REQUIRED:
        if field not in present:
            fail(patch.name, f"needs a header line `{field}:`")
    check_diff(patch)


def check_diff(patch: Patch) -> None:
    added = 0
    in_hunk = False
    for line in patch.diff.splitlines():
        if line.startswith("diff --git "):
            in_hunk = False
        elif line.startswith("@@ "):
            in_hunk = True
        elif not in_hunk and OTHER_CHANGE.match(line):
            fail(
                patch.name,
                f"does more than change text ({line}): new files go to overlay/",
            )
        elif in_hunk and line.startswith("-"):
            fail(patch.name, f"removes a line, but may only insert: {line}")
        elif in_hunk and line.startswith("+"):
            added += 1
    if added > MAX_ADDED_LINES:
        fail(
            patch.name,
            f"adds {added} lines, at most {MAX_ADDED_LINES}: split it, or move "
            "code to overlay/",
        )


def read_series(folder: Path) -> list[Patch]:
    """The patches in their order, each checked by itself."""
    order = folder / "series"
    if not order.exists():
        raise SeriesError(f"{order} is missing: it lists the patches in their order")
    names = [line for line in order.read_text().splitlines() if line]
    files = {path.stem for path in folder.glob("*.patch")}
    for name in sorted(files.symmetric_difference(names)):
        if name in files:
            fail(name, "is not listed in patches/series: add or delete it")
        fail(name, "is listed in patches/series but missing")
    if len(set(names)) != len(names):
        raise SeriesError("patches/series lists a patch twice")
    patches = [parse(n, (folder / f"{n}.patch").read_text()) for n in names]
    for patch in patches:
        check(patch)
    return patches
