"""Each check finds what it is for, and leaves alone what only looks like it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import check_bit_widths  # noqa: E402
import check_function_length  # noqa: E402
import check_names  # noqa: E402
import check_text  # noqa: E402


@pytest.mark.parametrize(
    ("name", "complaints"),
    [
        ("overlay/mlx/quantized_sdpa_plan.cpp", 0),
        ("overlay/mlx/backend/common/kv_codec.h", 0),
        ("overlay/python/src/fast_quantized.cpp", 0),
        ("bench/plot.py", 0),
        ("overlay/mlx/helpers.cpp", 1),
        ("overlay/mlx/backend/metal/kernels/vector.metal", 1),
    ],
)
def test_names(name, complaints):
    assert len(list(check_names.check(name, ""))) == complaints


@pytest.mark.parametrize(
    ("line", "complaints"),
    [
        ("if (bits == 4) {", 1),
        ("if (k_bits != 8 && x)", 1),
        ("if constexpr (3 == Codec::bits)", 1),
        ("return codec.bits() == 6;", 1),
        ("if (bits == other.bits)", 0),
        ("if (width * 32 % bits != 0)", 0),
        ("int words = dim * Codec::bits / 32;", 0),
        ("x = y;  // as bits == 4 needs", 0),
    ],
)
def test_bit_widths(line, complaints):
    name = "overlay/mlx/quantized_sdpa.cpp"
    assert len(list(check_bit_widths.check(name, line))) == complaints


def test_bit_widths_may_stand_in_the_codec():
    name = "overlay/mlx/backend/common/kv_codec.h"
    assert not list(check_bit_widths.check(name, "if (bits == 4) {"))


@pytest.mark.parametrize(
    ("line", "complaints"),
    [
        ("cd /" + "work/main", 1),
        ("find_links = /" + "opt/wheels", 1),
        ("see https://files.python" + "hosted.org/x", 1),
        ("pip install from PyPI", 0),
        ("build/work/tree and peak/work/balance", 0),
    ],
)
def test_text(line, complaints):
    assert len(list(check_text.check("README.md", line))) == complaints


def cxx_function(lines, header="int f(int a) {"):
    return "\n".join([header, *["  a += 1; // }"] * (lines - 2), "}"])


@pytest.mark.parametrize(
    ("name", "lines", "complaints"),
    [
        ("a.cpp", 60, 0),
        ("a.cpp", 61, 1),
        ("quantized_sdpa_kernels.cpp", 120, 0),
        ("quantized_sdpa_kernels.cpp", 121, 1),
        ("quantized_sdpa.cu", 120, 0),
    ],
)
def test_cxx_function_length(name, lines, complaints):
    text = f"namespace mlx {{\nclass A {{\n{cxx_function(lines)}\n}};\n}}\n"
    assert len(list(check_function_length.check(name, text))) == complaints


def test_cxx_functions_are_told_apart():
    text = "\n".join(
        [
            '#define BRACE {\nconst char* s = "{(";\nstruct P { int a = 1; };',
            cxx_function(10, "template <typename T>\nT f(const T& x) const {"),
            cxx_function(5, "static auto g() -> int {"),
        ]
    )
    assert list(check_function_length.cxx_functions(text)) == [(4, 14), (15, 19)]


def test_python_function_length_leaves_out_the_docstring():
    docstring = '    """' + "\n" * 70 + '    """\n'
    body = "    a = 1\n"
    for lines, complaints in ((60, 0), (61, 1)):
        text = "def f():\n" + docstring + body * lines
        assert len(list(check_function_length.check("a.py", text))) == complaints
