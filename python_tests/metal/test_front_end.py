"""L0 and L1: lints of the kernels' text, and a front end as strict as Metal's.

Clang reads the text twice: as C++ whose address spaces are disjoint types, where a
pointer without one is private as in MSL up to 4.0, and as C++ for OpenCL with a
generic address space, which has the rules of MSL 4.1 for methods.
"""

import re
import subprocess
from pathlib import Path

import kernel_text
import mlx.core as mx
import pytest

from rig import library, lints, translate
from rig.toolchain import CompileError, clang

HEADERS = Path(mx.__file__).parent / "include/mlx/backend/metal/kernels"
REGIMES = ("execute", "strict_generic")


def read_as(regime, text, *flags):
    """Clang's warnings in a regime; an error raises CompileError."""
    if regime == "strict_generic":
        library.check_strictly(text, regime, flags)
        return
    source = translate.translate(library.preprocess(text, "execute"))
    whole = library.KEYWORDS["execute"] + source.text + library.table(source)
    command = [clang(), *library.COMMON, *library.EXECUTE, "-fsyntax-only", *flags]
    run = subprocess.run(
        [*command, library.stored(whole, ".cpp")], capture_output=True, text=True
    )
    if run.returncode:
        raise CompileError(run.stderr)


# --------------------------------------------------------------------------------------
# The kernels
# --------------------------------------------------------------------------------------


def chunks():
    functions = [x.function for x in kernel_text.instances()] + kernel_text.merges()
    return [functions[i : i + 48] for i in range(0, len(functions), 48)]


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("chunk", range(len(chunks())))
def test_every_format_is_accepted(regime, chunk):
    text = kernel_text.instantiate(chunks()[chunk])
    read_as(regime, text, "-Werror=c++20-extensions", "-Werror=return-type")


@pytest.mark.parametrize("version", [310, 320, 400, 410])
def test_versions_of_the_language(version):
    text = kernel_text.instantiate(chunks()[0][:4])
    read_as("strict_generic", library.Text(text.text, (), version))


def kernel_files():
    files = [*kernel_text.KERNELS.glob("*.h"), *kernel_text.KERNELS.glob("*.metal")]
    shared = ("kv_codec.h", "softmax_state.h", "visible_keys.h")
    return files + [kernel_text.COMMON / name for name in shared]


@pytest.mark.parametrize("file", kernel_files(), ids=lambda file: file.name)
def test_lints(file):
    text = file.read_text()
    complaints = [*lints.ascii_only(text), *lints.recursion(text)]
    if file.parent == kernel_text.KERNELS:
        complaints += lints.forbidden_words(text)
        complaints += lints.known_names(text, HEADERS)
        complaints += lints.mutable_globals(text)
    assert not complaints, "\n".join(complaints)


def dump(text, *flags):
    source = translate.translate(library.preprocess(text, "strict_generic"))
    whole = library.KEYWORDS["strict_generic"] + source.text
    command = [clang(), "-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc"]
    command += ["-Xclang", f"-cl-ext={library.STRICT['strict_generic']}"]
    command += [*library.COMMON, "-fsyntax-only", "-fno-color-diagnostics", *flags]
    return subprocess.run(
        [*command, library.stored(whole, ".cl")], capture_output=True, text=True
    )


def test_address_spaces_and_conversions():
    names = ("Affine<3, 64>", "Mxfp8", "Turbo<4>")
    functions = []
    for codec in names:
        x = kernel_text.operand(codec, 128, "bfloat")
        for kernel, sizes in (("vector", (4,)), ("steel", (4, 16))):
            instance = kernel_text.Instance(kernel, "bfloat", x, x, sizes)
            functions.append(instance.function)
    text = kernel_text.instantiate(functions + ["quantized_sdpa_merge<bfloat, 128>"])
    complaints = list(lints.address_spaces(dump(text, "-Xclang", "-ast-dump").stdout))
    warnings = dump(text, "-Wimplicit-float-conversion").stderr
    complaints += lints.bfloat_conversions(warnings)
    assert not complaints, "\n".join(complaints)


# --------------------------------------------------------------------------------------
# What the front end and the lints must refuse
# --------------------------------------------------------------------------------------

PROBE = """
#include <metal_stdlib>
using namespace metal;
constant float table[2] = {{1, 2}};
METAL_FUNC float read(thread float* p) {{ return p[0]; }}
METAL_FUNC float read_unqualified(float* p) {{ return p[0]; }}
METAL_FUNC float refer(thread float& p) {{ return p; }}
struct Held {{
  float x;
  {member}
}};
template <typename T>
[[kernel]] void probe(
    device T* out [[buffer(0)]],
    constant float& scale [[buffer(1)]],
    uint lane [[thread_index_in_simdgroup]]) {{
  threadgroup float staged[32];
  staged[lane] = out[lane];
  Held held;
  held.x = scale;
  {statement}
  out[lane] = T(held.x);
}}
template [[host_name("p")]] [[kernel]] decltype(probe<float>) probe<float>;
"""
REFUSED = {
    "device pointer as thread's": "held.x = read(out);",
    "device pointer as one without a space": "held.x = read_unqualified(out);",
    "threadgroup pointer as thread's": "held.x = read(staged);",
    "thread reference to device memory": "held.x = refer(out[0]);",
    "constant reference as thread's": "held.x = refer(scale);",
    "write to constant memory": "scale = 1;",
    "write to a constant table": "table[0] = 1;",
    "device cast to threadgroup": "held.x = *(threadgroup float*)out;",
    "pointer kept without its space": "float* p = out; held.x = p[0];",
    "an array whose length varies": "float a[lane]; a[0] = 1; held.x = a[0];",
    "a pointer to a function": "float (*f)(thread float*) = read; held.x = f(&held.x);",
    "new": "thread float* p = new float; held.x = *p;",
    "try": "try {{ held.x = 1; }} catch (...) {{}}",
    "C++20's template arguments": "held.x = []<typename U>(U y) {{ return y; }}(1.0f);",
    "an unknown function": "held.x = metal::fast_exponential(held.x);",
    "a struct copied from device memory": "held = *(device Held*)out;",
}
MEMBERS = {
    "virtual": "virtual float f() { return 1; }",
    "a bit-field": "int bits : 3;",
    "MSL 4.1: a method without thread": "thread float& at() { return x; }",
}


def probe(statement="", member=""):
    statement = statement.replace("{{", "{").replace("}}", "}")
    return library.Text(PROBE.format(statement=statement, member=member), ())


def refusals(text):
    count = 0
    for regime in REGIMES:
        try:
            read_as(regime, text, "-Werror=c++20-extensions")
        except CompileError:
            count += 1
    return count


def test_the_probe_itself_is_accepted():
    assert refusals(probe()) == 0


@pytest.mark.parametrize("what", REFUSED)
def test_statement_is_refused(what):
    assert refusals(probe(REFUSED[what]))


@pytest.mark.parametrize("what", MEMBERS)
def test_member_is_refused(what):
    assert refusals(probe(member=MEMBERS[what]))


def test_signatures_are_refused():
    kernel = PROBE.format(statement="", member="")
    for change in (
        ("[[buffer(1)]]", "[[buffer(0)]]"),
        ("[[buffer(1)]]", "[[buffer(31)]]"),
        ("constant float& scale", "float& scale"),
        ("[[thread_index_in_simdgroup]]", "[[lane_number]]"),
    ):
        text = kernel.replace(*change)
        assert text != kernel
        with pytest.raises(translate.TranslationError):
            translate.translate(library.preprocess(library.Text(text, ()), "execute"))


LINTED = {
    "a dash that is not ASCII": (lints.ascii_only, "// 1 \u2013 2"),
    "double": (lints.forbidden_words, "double x = 1;"),
    "the standard library": (lints.forbidden_words, "float x = std::max(1, 2);"),
    "goto": (lints.forbidden_words, "goto end;"),
    "recursion": (
        lints.recursion,
        "METAL_FUNC int f(int n) { return n == 0 ? 1 : n * f(n - 1); }",
    ),
    "recursion of a template": (
        lints.recursion,
        "template <int n> int f(int x) {\n  return f<n - 1>(x);\n}",
    ),
    "static memory": (lints.mutable_globals, "void f() {\n  static int n = 0;\n}"),
    "a global": (lints.mutable_globals, "int counter = 0;\n"),
}


@pytest.mark.parametrize("what", LINTED)
def test_lint_refuses(what):
    lint, text = LINTED[what]
    assert list(lint(text))


def test_names_that_mlx_does_not_use():
    assert list(lints.known_names("metal::fast::exponent(x);", HEADERS))
    assert list(lints.known_names("uint x [[lane_number]]", HEADERS))
    assert not list(lints.known_names("metal::fast::exp2(x);", HEADERS))


def test_pointers_without_a_space_are_found():
    text = probe("held.x = read_unqualified(&held.x);")
    found = list(lints.address_spaces(dump(text, "-Xclang", "-ast-dump").stdout))
    assert any(re.match(r"p: .*float \*", line) for line in found)


def test_conversions_to_bfloat_are_found():
    text = probe("bfloat b = held.x; held.x = b;")
    warnings = dump(text, "-Wimplicit-float-conversion").stderr
    assert list(lints.bfloat_conversions(warnings))
    explicit = probe("bfloat b = bfloat(held.x); held.x = b;")
    warnings = dump(explicit, "-Wimplicit-float-conversion").stderr
    assert not list(lints.bfloat_conversions(warnings))
