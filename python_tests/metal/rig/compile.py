"""Compiles the Metal text on standard input and prints the library's path:
python -m rig.compile [plain | checked | sanitized | coverage]
"""

import sys

from . import library

if __name__ == "__main__":
    mode = sys.argv[1] if len(sys.argv) > 1 else "plain"
    try:
        print(library.compile_library(library.Text(sys.stdin.read(), ()), mode))
    except Exception as error:
        sys.exit(str(error))
