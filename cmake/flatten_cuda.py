"""Prints the C++ source of mlx::core::quantized_sdpa::FUNCTION(), which returns the
text of a header with its project includes put in place, each once:
python flatten_cuda.py ROOT HEADER FUNCTION

NVRTC compiles it on the user's machine, where the sources are not.
"""

import sys
from pathlib import Path

from flatten_metal import flatten

CPP = """\
namespace mlx::core::quantized_sdpa {{

const char* {function}() {{
  return R"cuda({text})cuda";
}}

}} // namespace mlx::core::quantized_sdpa
"""

if __name__ == "__main__":
    root, header, function = sys.argv[1:]
    text = flatten(Path(root), header)
    sys.stdout.write(CPP.format(function=function, text=text))
