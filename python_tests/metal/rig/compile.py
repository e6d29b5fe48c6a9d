"""Compiles the Metal text on standard input and prints the library's path:
python -m rig.compile [plain | checked | sanitized | coverage] [NUMBER]

NUMBER is that of a fault of mutations.py to plant first.
"""

import sys

from . import library


def planted(text: str, number: str) -> str:
    from mutations import MUTATIONS

    return MUTATIONS[int(number)].apply(text)


if __name__ == "__main__":
    mode = sys.argv[1] if len(sys.argv) > 1 else "plain"
    try:
        text = sys.stdin.read()
        if len(sys.argv) > 2:
            text = planted(text, sys.argv[2])
        print(library.compile_library(library.Text(text, ()), mode))
    except Exception as error:
        sys.exit(str(error))
