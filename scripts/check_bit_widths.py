"""Only kv_codec.h knows bit widths: nothing else compares one with a number.

It looks for comparisons as they are usually written and for no other way; one
with zero says nothing about a width.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import lint_common

COMPARISON = re.compile(
    r"\b\w*bits\w*(\(\))?\s*(==|!=)\s*[1-9]|\b[1-9]\s*(==|!=)\s*[\w.>:-]*\bbits\b"
)


def check(name: str, text: str) -> Iterator[str]:
    if not lint_common.is_cxx(name) or Path(name).name == "kv_codec.h":
        return
    for number, line in enumerate(text.splitlines(), 1):
        if COMPARISON.search(line.split("//")[0]):
            yield f"{number}: a bit width is compared outside kv_codec.h"


if __name__ == "__main__":
    lint_common.run(check)
