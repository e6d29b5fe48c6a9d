"""Every C++ file of the feature carries one of its stems, so that git finds it."""

from collections.abc import Iterator
from pathlib import Path

import lint_common

STEMS = ("quantized_sdpa", "kv_codec", "softmax_state", "fast_quantized")


def check(name: str, text: str) -> Iterator[str]:
    if lint_common.is_cxx(name) and not any(stem in Path(name).stem for stem in STEMS):
        yield f"1: the file's name must hold one of {', '.join(STEMS)}"


if __name__ == "__main__":
    lint_common.run(check)
