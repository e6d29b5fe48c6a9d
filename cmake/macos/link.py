"""Links a Python extension for arm64 macOS 14: link.py FOLDER OUTPUT INPUTS...

Strictly: every symbol must be in MLX's library, in Python, or among those that
MLX's own macOS wheels take from the system, which FOLDER lists.
"""

import os
import sys

LINKERS = "ld64.lld", "ld64.lld-22", "ld64.lld-21", "ld64.lld-20", "ld64.lld-19"
COMMAND = """-bundle -arch arm64 -platform_version macos 14.0 14.5 -dead_strip
    -rpath @loader_path/../mlx/lib""".split()


def main(folder: str, output: str, *inputs: str) -> None:
    # The rest are Apple's frameworks, by a path of the machine that built MLX.
    inputs = [name for name in inputs if name.endswith((".o", ".a"))]
    libraries = ["mlx/lib/libmlx.dylib", "libc++.tbd", "libSystem.tbd", "libobjc.tbd"]
    arguments = [*COMMAND, "-o", output, *inputs]
    arguments += [os.path.join(folder, name) for name in libraries]
    arguments.append(f"@{os.path.join(folder, 'python.sym')}")
    for linker in LINKERS:
        try:
            os.execvp(linker, [linker, *arguments])
        except FileNotFoundError:
            continue
    sys.exit("ld64.lld is needed to link for macOS: install LLVM's lld, 19 or newer.")


if __name__ == "__main__":
    main(*sys.argv[1:])
