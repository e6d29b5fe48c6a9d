"""No committed text names a machine's own folders or a package registry's host."""

import re
from collections.abc import Iterator

import lint_common

FORBIDDEN = {
    "an absolute path of one machine": re.compile(
        r"(?<![\w.$})/-])/(work|farm|opt|root|home|Users)/\w"
    ),
    "a registry's host": re.compile(
        r"\b[\w.-]*(pypi|pythonhosted|npmjs|debian|ubuntu)[\w-]*\.(org|com)\b"
    ),
}


def check(name: str, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        for what, pattern in FORBIDDEN.items():
            if pattern.search(line):
                yield f"{number}: {what}"


if __name__ == "__main__":
    lint_common.run(check)
