"""Builds the stand-in: python libraries.py MLX_LIBRARY FOLDER NVRTC_INCLUDE

MLX_LIBRARY is libmlx.so of mlx-cuda-13. Of every function that it wants and the
stand-in has not, the libraries in FOLDER have one that stops the process.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
OVERLAY = HERE.parents[2] / "overlay"
EMULATOR = HERE.parent / "include"
COMPILER = os.environ.get("CXX", "g++").split()
DRIVER, NVRTC = "libcuda.so.1", "libnvrtc.so.13"
# In this order: NVRTC's tells the driver's what it compiled.
SOURCES = {DRIVER: ("driver.cpp", "runtime.cpp"), NVRTC: ("nvrtc.cpp",)}
VENDORS = re.compile(r"(cuda|cublas|cudnn|cufft|cusolver|nccl|nvrtc|cu[A-Z])\w*")
MISSING = """\
#include <stdio.h>
#include <stdlib.h>
static void missing(const char* name) {
  fprintf(stderr, "The stand-in for CUDA has no %s.\\n", name);
  abort();
}
"""


@dataclass(frozen=True)
class Symbol:
    """``kind`` as nm says it, e.g. t for a function of the library's own."""

    name: str
    version: str
    kind: str
    offset: int


def symbols(library, *options):
    """What nm says of a library."""
    listed = subprocess.run(
        ["nm", *options, library], check=True, capture_output=True, text=True
    )
    for line in listed.stdout.splitlines():
        *offset, kind, name = line.split()
        name, _, version = name.partition("@")
        yield Symbol(name, version.strip("@"), kind, int("".join(offset) or "0", 16))


def wanted_of(library):
    """What the library wants of CUDA's, by the name of the one that has it."""
    wanted = {}
    for x in symbols(library, "-D", "--undefined-only"):
        if VENDORS.fullmatch(x.name):
            unversioned = "libnccl.so.2" if "nccl" in x.name else DRIVER
            wanted.setdefault(x.version or unversioned, set()).add(x.name)
    wanted[DRIVER] |= {x.name for x in runtime_of(library)}
    return wanted


def runtime_of(library):
    """The functions of CUDA's runtime, which is linked into the library."""
    for x in symbols(library):
        if x.kind == "t" and re.fullmatch(r"cuda[A-Z]\w*", x.name):
            yield x


def compile_sources(name, headers, folder):
    """The object files of one library."""
    for source in SOURCES.get(name, ()):
        compiled = folder / f"{source}.o"
        command = [*COMPILER, "-std=c++20", "-O1", "-fPIC", "-c", HERE / source]
        command += [f"-I{path}" for path in [OVERLAY, EMULATOR, *headers]]
        subprocess.run([*command, "-o", compiled], check=True)
        yield compiled


def link(name, objects, wanted, folder):
    """One library, with functions in the place of those that the objects lack."""
    present = {x.name for file in objects for x in symbols(file) if x.kind == "T"}
    missing, versions = folder / "missing.c", folder / "versions.txt"
    missing.write_text(
        MISSING
        + "".join(
            f'void {symbol}(void) {{ missing("{symbol}"); }}\n'
            for symbol in sorted(wanted - present)
        )
    )
    versions.write_text(f"{name} {{ global: *; }};\n")
    command = [*COMPILER, "-shared", "-fPIC", f"-Wl,-soname,{name}"]
    if name != DRIVER:
        command += [f"-Wl,--version-script={versions}"]
    command += [*objects, "-x", "c", "-w", missing, "-x", "none"]
    if name == NVRTC:
        command += [folder / DRIVER]
    subprocess.run([*command, "-o", folder / name], check=True)


def main():
    library, folder, *headers = sys.argv[1:]
    packages = find_spec("nvidia").submodule_search_locations
    headers += [f"{path}/cu13/include" for path in packages]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = wanted_of(library)
    for name in [*SOURCES, *sorted(set(wanted) - set(SOURCES))]:
        objects = list(compile_sources(name, headers, folder))
        link(name, objects, wanted.get(name, set()), folder)


if __name__ == "__main__":
    main()
