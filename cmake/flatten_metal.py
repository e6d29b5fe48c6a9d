"""Prints a header with its project includes put in place, each once:
python flatten_metal.py ROOT HEADER [FUNCTION]

Metal's run-time compiler sees no include path. With FUNCTION the text comes as
the C++ source of mlx::core::metal::FUNCTION(), which returns it.
"""

import re
import sys
from pathlib import Path

INCLUDE = re.compile(r'#include "([^"]+)"\s*')
CPP = """\
namespace mlx::core::metal {{

const char* {function}() {{
  return R"metal({text})metal";
}}

}} // namespace mlx::core::metal
"""


def flatten(root: Path, header: str, seen: set[str] | None = None) -> str:
    seen = set() if seen is None else seen
    if header in seen:
        return ""
    seen.add(header)
    lines = []
    for line in (root / header).read_text(encoding="ascii").splitlines(keepends=True):
        include = INCLUDE.fullmatch(line)
        if include:
            lines.append(flatten(root, include[1], seen))
        elif line.strip() != "#pragma once":
            lines.append(line)
    return "".join(lines)


if __name__ == "__main__":
    text = flatten(Path(sys.argv[1]), sys.argv[2])
    if len(sys.argv) > 3:
        text = CPP.format(function=sys.argv[3], text=text)
    sys.stdout.write(text)
