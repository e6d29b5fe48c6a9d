"""Builds wheels for arm64 macOS 14 on another system, for each Python found.

They have never run on a Mac, and say so. What MLX's macOS wheels hold is the measure:
their headers are compiled against, their libmlx.dylib is linked against, no system
symbol is taken that they do not take, and their extensions' ABI tag must be ours.
"""

import argparse
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import lief
import nanobind

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "macos"
PLATFORM = "macosx_14_0_arm64"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
SYSTEM = {
    "libc++": "/usr/lib/libc++.1.dylib",
    "libSystem": "/usr/lib/libSystem.B.dylib",
    "libobjc": "/usr/lib/libobjc.A.dylib",
}
# What MLX happens not to use, but C, POSIX and C++11 have long had.
ALWAYS_THERE = {
    "libc++": ["__ZNSt3__19to_stringEx"],
    "libSystem": ["_erfc", "_sched_yield", "_wmemchr"],
}
ABI_TAG = re.compile(rb"nanobind_[a-z]+_libcpp_\w+")
WARNING = (
    "This wheel was cross-compiled and has never run on a Mac: its Metal kernels are "
    "checked on the CPU only (see the README of the project)."
)


def run(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True)


def headers_of(name: str) -> Path | None:
    """The folder of Python.h, of a Python of that version if one is installed."""
    program = shutil.which(f"python{name}")
    if program is None:
        return None
    code = "import sysconfig; print(sysconfig.get_path('include'))"
    done = subprocess.run([program, "-c", code], capture_output=True, text=True)
    folder = Path(done.stdout.strip())
    return folder if (folder / "Python.h").exists() else None


def download_mlx(python: str) -> Path:
    """MLX's wheels for macOS and a version of Python, unpacked."""
    folder = WORK / f"mlx-{python}"
    if not (folder / "done").exists():
        mlx = version("mlx")
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--platform", PLATFORM, "--dest", folder]
        run(*command, "--python-version", python, f"mlx=={mlx}", f"mlx-metal=={mlx}")
        for wheel in folder.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(folder)
            wheel.unlink()
        (folder / "done").touch()
    return folder


def extension(folder: Path) -> Path:
    (found,) = folder.glob("mlx/core.*.so")
    return found


def write_symbols(folder: Path) -> None:
    """What may be linked against besides libmlx, beside it."""
    found = {name: set(ALWAYS_THERE.get(name, ())) for name in SYSTEM}
    names = {install_name: name for name, install_name in SYSTEM.items()}
    for path in (folder / "mlx/lib/libmlx.dylib", extension(folder)):
        binaries = lief.MachO.parse(str(path))
        libraries = [library.name for library in binaries.at(0).libraries]
        # Of a library's own list its own name is the first.
        if path.suffix == ".dylib":
            libraries = libraries[1:]
        for symbol in binaries.at(0).imported_symbols:
            ordinal = symbol.library_ordinal
            if 0 < ordinal <= len(libraries) and libraries[ordinal - 1] in names:
                found[names[libraries[ordinal - 1]]].add(symbol.name)
    for name, symbols in found.items():
        listed = ", ".join(f"'{symbol}'" for symbol in sorted(symbols))
        (folder / f"{name}.tbd").write_text(
            "--- !tapi-tbd\ntbd-version: 4\ntargets: [ arm64-macos ]\n"
            f"install-name: '{SYSTEM[name]}'\nexports:\n"
            f"  - targets: [ arm64-macos ]\n    symbols: [ {listed} ]\n...\n"
        )
        print(f"{len(symbols)} symbols of {name}")
    source = Path(nanobind.cmake_dir()) / "darwin-ld-cpython.sym"
    shutil.copyfile(source, folder / "python.sym")


def build(python: str, headers: Path, folder: Path) -> Path:
    """The extension, compiled and linked."""
    build_folder = WORK / f"build-{python}"
    soabi = f"cpython-{python.replace('.', '')}-darwin"
    defines = {
        "CMAKE_TOOLCHAIN_FILE": ROOT / "cmake/macos/toolchain.cmake",
        "CMAKE_PROJECT_INCLUDE": ROOT / "cmake/macos/rules.cmake",
        "CMAKE_BUILD_TYPE": "Release",
        "HOST_PYTHON": sys.executable,
        "MACOS_FOLDER": folder,
        "MLX_ROOT": folder / "mlx/share/cmake/MLX",
        "nanobind_ROOT": nanobind.cmake_dir(),
        "SKBUILD_SOABI": soabi,
        "SKBUILD_SOSABI": "abi3",
        "Python_EXECUTABLE": shutil.which(f"python{python}"),
        "Python_INCLUDE_DIR": headers,
    }
    arguments = [f"-D{name}={value}" for name, value in defines.items()]
    run("cmake", "-S", ROOT, "-B", build_folder, "-G", "Ninja", *arguments)
    run("cmake", "--build", build_folder)
    return build_folder / f"_ext.{soabi}.so"


def check(built: Path, mlx: Path) -> None:
    """Same ABI tag as MLX's extension, arm64, and no newer system than MLX's."""
    tags = [set(ABI_TAG.findall(path.read_bytes())) for path in (built, extension(mlx))]
    if tags[0] != tags[1] or len(tags[0]) != 1:
        sys.exit(f"{built.name}: ABI tags {tags[0]} are not those of MLX, {tags[1]}")
    systems = []
    for path in (built, extension(mlx)):
        files = lief.MachO.parse(str(path))
        binary = files.at(0)
        systems.append((str(binary.header.cpu_type), binary.build_version.minos))
    if systems[0] != systems[1]:
        sys.exit(f"{built.name}: made for {systems[0]}, MLX for {systems[1]}")
    (tag,) = tags[0]
    print(f"{built.name}: ABI tag {tag.decode()}, {systems[0]}")


def pack(base: Path, built: Path, python: str) -> None:
    """The Linux wheel with the extension, the names and the warning of this one."""
    folder = WORK / f"wheel-{python}"
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "wheel", "unpack", "--dest", folder, base)
    (tree,) = folder.iterdir()
    package = tree / "mlx_quantized_sdpa"
    for old in package.glob("_ext.*.so"):
        old.unlink()
    shutil.copyfile(built, package / built.name)
    (info,) = tree.glob("*.dist-info")
    tag = "cp" + python.replace(".", "")
    edit(info / "WHEEL", r"(?m)^Tag: .*$", f"Tag: {tag}-{tag}-{PLATFORM}")
    edit(info / "METADATA", r"(?m)^Requires-Dist: mlx\[cpu\]", "Requires-Dist: mlx")
    edit(info / "METADATA", r"(?m)^(Summary: .*)$", r"\1 (cross-built, never run)")
    edit(info / "METADATA", r"\n\n", f"\n\n**{WARNING}**\n\n")
    # Apart from this machine's wheel, which `dist/*.whl` must name alone.
    made = ROOT / "dist" / "macos"
    made.mkdir(parents=True, exist_ok=True)
    run(sys.executable, "-m", "wheel", "pack", "--dest-dir", made, tree)


def edit(path: Path, pattern: str, replacement: str) -> None:
    text, count = re.subn(pattern, replacement, path.read_text(), count=1)
    if count != 1:
        sys.exit(f"{path.name} has nothing like {pattern}")
    path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, help="the wheel for this system")
    base = parser.parse_args().wheel
    missing = []
    for python in PYTHONS:
        headers = headers_of(python)
        if headers is None:
            missing.append(python)
            continue
        mlx = download_mlx(python)
        write_symbols(mlx)
        built = build(python, headers, mlx)
        check(built, mlx)
        pack(base, built, python)
    if missing:
        print(
            f"no wheel for Python {', '.join(missing)}: its headers are not installed"
        )
    if len(missing) == len(PYTHONS):
        sys.exit("no Python with headers was found")


if __name__ == "__main__":
    main()
