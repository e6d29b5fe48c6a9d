"""Every C++ file of the feature carries one of its stems, so that git finds it."""

from collections.abc import Iterator
from pathlib import Path

import lint_common

# What runs kernels of GPUs on the CPU, and headers that others include by name:
# no part of the feature.
NO_PART = (
    "python_tests/metal/",
    "python_tests/cuda/",
    "cmake/macos/include/",
    "cmake/stand_in/",
)
STEMS = (
    "quantized_sdpa",
    "kv_codec",
    "softmax_state",
    "visible_keys",
    "fast_quantized",
)


def check(name: str, text: str) -> Iterator[str]:
    if not lint_common.is_cxx(name) or name.startswith(NO_PART):
        return
    if not any(stem in Path(name).stem for stem in STEMS):
        yield f"1: the file's name must hold one of {', '.join(STEMS)}"


if __name__ == "__main__":
    lint_common.run(check)
