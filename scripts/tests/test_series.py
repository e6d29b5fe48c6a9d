"""The series scripts on a toy MLX of three files, with every kind of bad input."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from series.__main__ import main  # noqa: E402

LIST = """\
add_library(mlx)
target_sources(mlx
  PRIVATE array.cpp
          fast.cpp)

install(mlx)
"""
HEADER = "".join(f"void op_{i}();\n" for i in range(12))
ADD_OP = """\
Wires: the op into the library,
  and its test.
Why: the list of sources is in CMakeLists.txt.
Overlay: mlx/op*
Overlay: python/tests/test_op.py from python_tests

diff --git a/mlx/CMakeLists.txt b/mlx/CMakeLists.txt
--- a/mlx/CMakeLists.txt
+++ b/mlx/CMakeLists.txt
@@ -3,4 +3,6 @@ target_sources(mlx
   PRIVATE array.cpp
           fast.cpp)
 
+target_sources(mlx PRIVATE op.cpp)
+
 install(mlx)
"""
DECLARE_OP = """\
Wires: the declaration of the op.
Why: only fast.h is included by all.

diff --git a/mlx/fast.h b/mlx/fast.h
--- a/mlx/fast.h
+++ b/mlx/fast.h
@@ -4,6 +4,7 @@ void op_2();
 void op_3();
 void op_4();
 void op_5();
+#include "op.h"
 void op_6();
 void op_7();
 void op_8();
"""


def git(folder, *arguments):
    identity = ("-c", "user.name=T", "-c", "user.email=t@localhost")
    command = ["git", *identity, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def commit_all(folder, message):
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", message)
    return git(folder, "rev-parse", "HEAD")


class Toy:
    def __init__(self, folder, capsys):
        self.capsys = capsys
        self.root = folder / "project"
        self.upstream = folder / "upstream"
        self.tree = self.root / "build/mlx"
        self.upstream.mkdir()
        git(self.upstream, "init", "--quiet")
        self.write_upstream("mlx/CMakeLists.txt", LIST)
        self.write_upstream("mlx/fast.h", HEADER)
        self.write_upstream(".gitignore", "*.so\n")
        self.pin = commit_all(self.upstream, "all")

        self.root.mkdir()
        git(self.root, "init", "--quiet")
        git(self.root, "clone", "--quiet", str(self.upstream), "mlx")
        self.write(".gitignore", "build/\n")
        self.write("overlay/mlx/op.cpp", "int op;\n")
        self.write("overlay/mlx/op.h", "")
        self.write("python_tests/test_op.py", "import op\n")
        self.write("patches/core-add-op.patch", ADD_OP)
        self.write("patches/core-declare-op.patch", DECLARE_OP)
        self.write("patches/series", "core-add-op\ncore-declare-op\n")
        git(self.root, "update-index", "--add", "--cacheinfo", f"160000,{self.pin},mlx")

    def write(self, name, text):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def write_upstream(self, name, text):
        path = self.upstream / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def read(self, name):
        return (self.root / name).read_text()

    def edit(self, name, old, new):
        text = self.read(name)
        assert old in text
        self.write(name, text.replace(old, new, 1))

    def patches(self):
        return {path.name: path.read_text() for path in self.root.glob("patches/*")}

    def run(self, command):
        """What it prints, where it must succeed."""
        code = main([command], self.root)
        printed = self.capsys.readouterr()
        assert code == 0, printed.err
        return printed.out

    def fails(self, command, *words):
        assert main([command], self.root) == 1
        printed = self.capsys.readouterr().err
        assert printed.startswith("error: ") and printed.count("\n") == 1, printed
        for word in words:
            assert word in printed
        return printed


@pytest.fixture
def toy(tmp_path, capsys, monkeypatch):
    for name in ("MLX_SRC", "MLX_REF", "PATCH"):
        monkeypatch.delenv(name, raising=False)
    return Toy(tmp_path, capsys)


# --------------------------------------------------------------------------------------
# What the commands do
# --------------------------------------------------------------------------------------


def test_apply_makes_the_tree(toy):
    assert "2 patches, 3 new files" in toy.run("apply")
    assert "PRIVATE op.cpp" in toy.read("build/mlx/mlx/CMakeLists.txt")
    assert '#include "op.h"' in toy.read("build/mlx/mlx/fast.h")
    links = {
        "mlx/op.cpp": "overlay/mlx/op.cpp",
        "python/tests/test_op.py": "python_tests/test_op.py",
    }
    for path, here in links.items():
        assert (toy.tree / path).resolve() == (toy.root / here).resolve()
    assert git(toy.tree, "status", "--porcelain") == ""
    subjects = git(toy.tree, "log", "--format=%s", f"{toy.pin}..HEAD").split()
    assert subjects == ["core-declare-op", "core-add-op"]


def test_the_source_is_never_written_to(toy):
    files = {p: p.stat().st_mtime_ns for p in (toy.root / "mlx").rglob("*")}
    for command in ("apply", "check", "export"):
        toy.run(command)
    assert files == {p: p.stat().st_mtime_ns for p in (toy.root / "mlx").rglob("*")}


def test_a_second_apply_leaves_untouched_files_alone(toy):
    toy.run("apply")
    fast = toy.tree / "mlx/fast.h"
    before = fast.stat().st_mtime_ns
    toy.edit("patches/core-add-op.patch", "op.cpp)\n+\n", "op.cpp b.cpp)\n+\n")
    toy.run("apply")
    assert "b.cpp" in toy.read("build/mlx/mlx/CMakeLists.txt")
    assert fast.stat().st_mtime_ns == before


def test_apply_drops_the_link_of_a_file_that_is_gone(toy):
    toy.write("overlay/mlx/op_b.h", "")
    toy.run("apply")
    (toy.root / "overlay/mlx/op_b.h").unlink()
    toy.run("apply")
    assert not (toy.tree / "mlx/op_b.h").is_symlink()
    assert (toy.tree / "mlx/op.cpp").exists()


def test_apply_and_refresh_change_nothing(toy):
    before = toy.patches()
    assert "2 patches apply" in toy.run("check")
    toy.run("apply")
    assert toy.run("refresh") == "nothing has changed\n"
    assert toy.patches() == before


def test_refresh_takes_an_edit_to_the_patch_of_its_file(toy):
    toy.run("apply")
    toy.edit("build/mlx/mlx/fast.h", '"op.h"\n', '"op.h"\nint more;\n')
    assert toy.run("refresh") == "patches/core-declare-op.patch\n"
    assert "+int more;\n" in toy.read("patches/core-declare-op.patch")
    toy.run("check")
    toy.run("apply")


def test_refresh_takes_an_edit_to_the_patch_that_is_named(toy, monkeypatch):
    toy.run("apply")
    toy.edit("build/mlx/mlx/fast.h", "void op_11();\n", "void op_11();\nint x;\n")
    monkeypatch.setenv("PATCH", "core-add-op")
    toy.run("refresh")
    assert "+int x;\n" in toy.read("patches/core-add-op.patch")
    toy.run("check")


def test_refresh_takes_a_commit_as_a_new_patch(toy):
    toy.run("apply")
    toy.edit("build/mlx/mlx/fast.h", "void op_11();\n", "void op_11();\nint x;\n")
    commit_all(toy.tree, "core-add-x\n\nWires: x.\nWhy: it is in fast.h.")
    assert "patches/core-add-x.patch" in toy.run("refresh")
    assert toy.read("patches/series").split()[-1] == "core-add-x"
    toy.run("check")


def test_refresh_takes_a_commit_away(toy):
    toy.run("apply")
    git(toy.tree, "reset", "--quiet", "--hard", "HEAD^")
    toy.run("refresh")
    assert toy.patches().keys() == {"series", "core-add-op.patch"}


def test_refresh_keeps_the_header_in_patches(toy):
    toy.run("apply")
    toy.edit("patches/core-add-op.patch", "Wires: the op", "Wires: the new op")
    toy.edit("build/mlx/mlx/fast.h", '"op.h"\n', '"op.h"\nint more;\n')
    toy.run("refresh")
    assert "Wires: the new op" in toy.read("patches/core-add-op.patch")


def test_refresh_moves_a_new_file_into_the_overlay(toy):
    toy.run("apply")
    (toy.tree / "mlx/op_b.h").write_text("int b;\n")
    assert toy.run("refresh") == "overlay/mlx/op_b.h\n"
    assert toy.read("overlay/mlx/op_b.h") == "int b;\n"
    assert (toy.tree / "mlx/op_b.h").is_symlink()
    toy.run("check")
    toy.run("apply")


def test_refresh_takes_the_file_that_an_editor_put_over_a_link(toy):
    toy.run("apply")
    link = toy.tree / "python/tests/test_op.py"
    link.unlink()
    link.write_text("import new_op\n")
    toy.run("refresh")
    assert link.is_symlink()
    assert toy.read("python_tests/test_op.py") == "import new_op\n"


def test_an_edit_through_a_link_is_one_of_the_overlay(toy):
    toy.run("apply")
    (toy.tree / "mlx/op.cpp").write_text("int other;\n")
    assert toy.read("overlay/mlx/op.cpp") == "int other;\n"
    toy.run("apply")


def test_export_is_complete(toy):
    toy.run("export")
    files = sorted((toy.root / "build/series").iterdir())
    names = ["0001-core-add-op.patch", "0002-core-declare-op.patch"]
    assert [file.name for file in files] == names
    for number, file in enumerate(files, 1):
        text = file.read_text()
        assert f"Subject: [PATCH {number}/2] TODO\n" in text
        assert "Wires:" not in text
    git(toy.upstream, "am", "--quiet", *map(str, files))
    toy.run("apply")
    for path in (*git(toy.tree, "ls-files").split(), "mlx/op.cpp"):
        assert (toy.upstream / path).read_text() == (toy.tree / path).read_text()
    present = git(toy.upstream, "ls-files").split()
    assert {"mlx/op.cpp", "python/tests/test_op.py"} <= set(present)


def test_drift_tells_how_each_patch_stands(toy, monkeypatch):
    toy.write_upstream("mlx/CMakeLists.txt", LIST.replace("array.cpp", "a.cpp\n b.cpp"))
    monkeypatch.setenv("MLX_SRC", str(toy.upstream))
    monkeypatch.setenv("MLX_REF", commit_all(toy.upstream, "near"))
    printed = toy.run("drift")
    assert "has 1 commits" in printed
    assert "core-add-op: applies by a three-way merge\n" in printed
    assert "core-declare-op: applies\n" in printed

    toy.write_upstream("mlx/fast.h", HEADER.replace("op_5", "f").replace("op_6", "g"))
    toy.write_upstream("mlx/op.cpp", "")
    monkeypatch.setenv("MLX_REF", commit_all(toy.upstream, "same lines"))
    assert main(["drift"], toy.root) == 1
    printed = toy.capsys.readouterr().out
    assert "core-declare-op: does not apply (mlx/fast.h:4)\n" in printed
    assert "overlay/mlx/op.cpp: exists there now\n" in printed


def test_a_shallow_submodule_will_do(toy):
    toy.write_upstream("new", "")
    commit_all(toy.upstream, "more")
    subprocess.run(["rm", "-rf", str(toy.root / "mlx")], check=True)
    url = f"file://{toy.upstream}"
    git(toy.root, "clone", "--quiet", "--depth", "1", url, "mlx")
    pin = git(toy.root / "mlx", "rev-parse", "HEAD")
    git(toy.root, "update-index", "--cacheinfo", f"160000,{pin},mlx")
    toy.run("check")
    toy.run("apply")
    toy.run("export")


# --------------------------------------------------------------------------------------
# Bad input: one line that says what to do
# --------------------------------------------------------------------------------------

NEEDS_MLX = ("apply", "check", "export", "drift")


def test_no_source(toy):
    subprocess.run(["rm", "-rf", str(toy.root / "mlx")], check=True)
    (toy.root / "mlx").mkdir()
    for command in NEEDS_MLX[:3]:
        toy.fails(command, "git submodule update --init mlx", "MLX_SRC")
    assert "well formed" in toy.run("check-files")


def test_a_source_that_is_no_repository(toy, monkeypatch, tmp_path):
    for place in (tmp_path / "nowhere", toy.root / "overlay"):
        monkeypatch.setenv("MLX_SRC", str(place))
        toy.fails("apply", "MLX_SRC must be a git repository", str(place))


def test_a_source_without_the_commit(toy, monkeypatch, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "--quiet")
    monkeypatch.setenv("MLX_SRC", str(other))
    toy.fails("check", f"has no commit {toy.pin}", f"git fetch origin {toy.pin}")


def test_a_reference_that_is_unknown(toy, monkeypatch):
    toy.fails("drift", "MLX_REF= must name")
    monkeypatch.setenv("MLX_REF", "v9")
    toy.fails("drift", "has no commit v9", "git fetch")


def spoil_file(toy):
    toy.edit("build/mlx/mlx/fast.h", "op_5", "f")


def spoil_new_file(toy):
    (toy.tree / "mlx/extra.cpp").write_text("")


def spoil_link(toy):
    (toy.tree / "mlx/op.cpp").unlink()
    (toy.tree / "mlx/op.cpp").write_text("")


@pytest.mark.parametrize("spoil", [spoil_file, spoil_new_file, spoil_link])
def test_apply_refuses_uncommitted_work(toy, spoil):
    toy.run("apply")
    spoil(toy)
    toy.fails("apply", "uncommitted work (mlx/", "make refresh")


def test_apply_refuses_commits_of_its_own(toy):
    toy.run("apply")
    spoil_file(toy)
    commit_all(toy.tree, "core-change-f")
    toy.fails("apply", "commits that patches/ lacks", "make refresh")


def test_apply_refuses_a_folder_that_it_did_not_make(toy):
    toy.tree.mkdir(parents=True)
    toy.fails("apply", "build/mlx is not a tree of `make apply`", "move it away")


def test_refresh_needs_a_tree(toy):
    toy.fails("refresh", "build/mlx is missing", "make apply")


def test_refresh_refuses_to_overwrite_a_newer_patch(toy):
    toy.run("apply")
    toy.edit("patches/core-add-op.patch", "op.cpp)\n+\n", "op.cpp b.cpp)\n+\n")
    spoil_file(toy)
    before = toy.patches()
    toy.fails("refresh", "patches/ has changed since `make apply`")
    assert toy.patches() == before


def test_refresh_asks_whose_an_edit_is(toy, monkeypatch):
    toy.run("apply")
    (toy.tree / ".gitignore").write_text("*.so\n*.o\n")
    toy.fails("refresh", ".gitignore is changed by no patch", "PATCH=")
    monkeypatch.setenv("PATCH", "core-add-o")
    toy.fails("refresh", "PATCH must be one of", "core-declare-op", "got core-add-o")


def test_refresh_refuses_a_removed_line(toy):
    toy.run("apply")
    spoil_file(toy)
    before = toy.patches()
    toy.fails("refresh", "core-declare-op.patch removes a line", "-void op_5();")
    assert toy.patches() == before


def test_refresh_refuses_a_commit_without_a_patch_name(toy):
    toy.run("apply")
    toy.edit("build/mlx/mlx/fast.h", "void op_11();\n", "void op_11();\nint x;\n")
    commit_all(toy.tree, "Add x")
    toy.fails("refresh", "'Add x'", "names no patch")


def test_a_patch_that_no_longer_applies(toy):
    toy.edit("patches/core-declare-op.patch", " void op_6();", " void op_six();")
    for command in ("check", "apply", "export"):
        toy.fails(command, "core-declare-op.patch does not apply", "mlx/fast.h:4")


def test_a_patch_that_applies_elsewhere(toy):
    toy.edit("patches/core-declare-op.patch", "@@ -4,6 +4,7 @@", "@@ -3,6 +3,7 @@")
    toy.fails("check", "core-declare-op.patch", "make apply refresh")
    toy.run("apply")
    toy.run("refresh")
    toy.run("check")


def test_a_new_file_that_exists_upstream(toy):
    toy.edit("patches/core-add-op.patch", "mlx/op*", "mlx/*")
    toy.write("overlay/mlx/fast.h", "")
    for command in ("check", "apply", "export"):
        toy.fails(command, "overlay/mlx/fast.h exists in MLX", "rename it")


def test_apply_works_after_one_that_failed(toy):
    before = toy.read("patches/core-declare-op.patch")
    toy.edit("patches/core-declare-op.patch", " void op_6();", " void op_six();")
    toy.fails("apply", "core-declare-op.patch does not apply")
    toy.write("patches/core-declare-op.patch", before)
    toy.run("apply")
    toy.run("check")


def test_a_new_file_claimed_by_no_patch(toy):
    toy.write("overlay/mlx/kernel.cpp", "")
    for command in ("check-files", "check", "apply", "export"):
        toy.fails(
            command, "overlay/mlx/kernel.cpp is claimed by no patch", "`Overlay:`"
        )


def test_a_new_file_claimed_twice(toy):
    line = "Why: only fast.h is included by all.\n"
    toy.edit("patches/core-declare-op.patch", line, f"{line}Overlay: mlx/op.cpp\n")
    words = ("overlay/mlx/op.cpp", "core-add-op.patch and core-declare-op.patch")
    toy.fails("check-files", *words)


def test_a_claim_of_nothing(toy):
    toy.edit("patches/core-add-op.patch", "op*", "none*")
    toy.fails("check-files", "core-add-op.patch claims mlx/none*", "no file")


def test_a_star_stays_in_its_folder(toy):
    toy.write("overlay/mlx/op/kernel.cpp", "")
    toy.fails("check-files", "overlay/mlx/op/kernel.cpp is claimed by no patch")


KERNEL = "mlx/backend/metal/kernels/op.h"


@pytest.mark.parametrize("path", ["mlx/op_b.cpp", "mlx/op.cu", KERNEL])
def test_a_source_that_nothing_compiles(toy, path):
    toy.write(f"overlay/{path}", "")
    line = "Overlay: mlx/op*\n"
    if path == KERNEL:
        toy.edit("patches/core-add-op.patch", line, f"{line}Overlay: {path}\n")
    words = (f"claims {path} but names it in no added line", "CMakeLists.txt")
    for command in ("check-files", "check"):
        toy.fails(command, *words)


@pytest.mark.parametrize("name", ["op_b.cpp", "backend/metal/kernels/op"])
def test_a_source_that_is_compiled(toy, name):
    path = f"mlx/{name}.h" if "kernels" in name else f"mlx/{name}"
    toy.write(f"overlay/{path}", "")
    if "kernels" in name:
        toy.edit(
            "patches/core-add-op.patch", "mlx/op*\n", f"mlx/op*\nOverlay: {path}\n"
        )
    toy.edit("patches/core-add-op.patch", "PRIVATE op.cpp", f"PRIVATE op.cpp {name}")
    toy.run("check")


def test_a_source_that_the_new_cmake_file_names(toy):
    toy.write("overlay/mlx/op_b.cpp", "")
    toy.write("overlay/mlx/op.cmake", "target_sources(mlx PRIVATE op_b.cpp)\n")
    line = "+target_sources(mlx PRIVATE op.cpp)\n"
    toy.edit("patches/core-add-op.patch", line, line + "+include(op.cmake)\n")
    toy.edit("patches/core-add-op.patch", "+3,6 @@", "+3,7 @@")
    toy.run("check")


def test_a_source_that_is_named_but_not_there(toy):
    toy.edit("patches/core-add-op.patch", "PRIVATE op.cpp", "PRIVATE op.cpp op_b.cpp")
    toy.fails("check", "core-add-op.patch names op_b.cpp", "neither overlay/ nor MLX")


def test_an_include_that_is_not_there(toy):
    toy.write("overlay/mlx/op.cpp", '#include "mlx/fast.h"\n#include "mlx/op_b.h"\n')
    toy.fails("check", "overlay/mlx/op.cpp includes mlx/op_b.h", "not in MLX")
    toy.write("overlay/mlx/op_b.h", "")
    toy.run("check")


BAD_PATCHES = [
    ("Wires: the declaration of the op.\n", "", "needs a header line `Wires:`"),
    ("Why: only", "Note: only", "has a header line outside its fields"),
    ("+++ b/mlx/fast.h\n", "+++ b/mlx/fast.h\nnew file mode 100644\n", "overlay/"),
    (" void op_5();\n", "-void op_5();\n", "removes a line"),
    ('+#include "op.h"\n', "+int x;\n" * 41, "adds 41 lines, at most 40"),
    ("diff --git", "diff", "holds no diff"),
]


@pytest.mark.parametrize(("old", "new", "words"), BAD_PATCHES)
def test_a_bad_patch(toy, old, new, words):
    toy.edit("patches/core-declare-op.patch", old, new)
    toy.fails("check-files", "patches/core-declare-op.patch", words)


def test_a_series_that_differs_from_the_folder(toy):
    toy.write("patches/series", "core-add-op\n")
    toy.fails("check-files", "core-declare-op.patch is not listed in patches/series")
    toy.write("patches/series", "core-add-op\ncore-declare-op\ncore-other\n")
    toy.fails("check-files", "core-other.patch is listed in patches/series but missing")
    toy.write("patches/series", "core-add-op\ncore-declare-op\ncore-add-op\n")
    toy.fails("check-files", "lists a patch twice")
    (toy.root / "patches/series").unlink()
    toy.fails("check-files", "patches/series is missing")


def test_an_unknown_command(toy):
    assert main(["applly"], toy.root) == 2
    assert "usage:" in toy.capsys.readouterr().err
