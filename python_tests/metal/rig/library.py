"""Compiles a text of Metal kernels: to execute it, or to accept or refuse it."""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import translate
from .toolchain import BUILD, METAL, ROOT, CompileError, clang, run

INCLUDE = METAL / "include"
RUNTIME = METAL / "runtime"
OVERLAY = ROOT / "overlay"

COMMON = [
    "-nostdinc",
    "-Wno-unknown-attributes",
    "-Wno-ignored-attributes",
    "-Wno-user-defined-literals",
]
# Half and bfloat round after each operation, as on the GPU.
EXECUTE = [
    "-x",
    "c++",
    "-std=c++17",
    "-march=x86-64-v3",
    "-fPIC",
    "-shared",
    "-g",
    "-ffp-contract=on",
    "-fno-math-errno",
    "-Xclang",
    "-ffloat16-excess-precision=none",
    "-Xclang",
    "-fbfloat16-excess-precision=none",
    # The executor is loaded before the library.
    "-Wl,--allow-shlib-undefined",
    "-Wl,-z,undefs",
]
MODES = {
    "plain": ["-O2"],
    # Every load and store is reported to runtime/detector.cpp.
    "checked": [
        "-O1",
        "-fsanitize=thread",
        "-fno-sanitize-link-runtime",
        "-mllvm",
        "-tsan-instrument-func-entry-exit=0",
        "-mllvm",
        "-tsan-instrument-read-before-write=1",
        "-fno-vectorize",
        "-fno-slp-vectorize",
        "-ftrivial-auto-var-init=pattern",
    ],
    "sanitized": [
        "-O1",
        "-fno-omit-frame-pointer",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-shared-libsan",
    ],
    # Without optimisation every branch of the text is one of the code.
    "coverage": [
        "-O0",
        "-fsanitize-coverage=inline-bool-flag,bb,pc-table",
        "-mllvm",
        "-sanitizer-coverage-prune-blocks=0",
        "-fno-sanitize-link-runtime",
    ],
}
KEYWORDS = {
    "execute": """\
#define device __attribute__((opencl_global))
#define threadgroup __attribute__((opencl_local))
#define constant __attribute__((opencl_constant))
#define thread
#define kernel
#define MSL_SYMBOL(name) __asm__(name)
""",
    "strict": """\
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define device __global
#define threadgroup __local
#define constant __constant
#define thread
#define MSL_SYMBOL(name)
""",
}
KEYWORDS["strict_generic"] = KEYWORDS["strict"].replace(
    "#define thread\n", "#define thread __private\n"
)
# Address spaces up to MSL 4.0, and from 4.1 on.
STRICT = {
    "strict": "-__opencl_c_generic_address_space,-__opencl_c_pipes,"
    "-__opencl_c_device_enqueue,-__opencl_c_program_scope_global_variables",
    "strict_generic": "+__opencl_c_generic_address_space,-__opencl_c_pipes,"
    "-__opencl_c_device_enqueue",
}


@dataclass(frozen=True)
class Text:
    """Metal text and where its includes are found, first the shim's own."""

    text: str
    includes: tuple[Path, ...] = (OVERLAY,)
    version: int = 310


def digest(*parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def stored(text: str, suffix: str) -> Path:
    """A file of that text, the same for equal texts."""
    path = BUILD / "texts" / (digest(text) + suffix)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(text)
        os.replace(draft, path)
    return path


def preprocess(text: Text, front_end: str) -> str:
    """Expands the macros of a text that keeps Metal's own keywords."""
    file = stored(text.text, ".metal")
    # In OpenCL mode Clang knows __global; the preprocessor needs no mode for that.
    command = [clang(), "-E", "-x", "c++", "-std=c++17", *COMMON, "-D__METAL__=1"]
    command += [f"-D__METAL_VERSION__={text.version}", f"-I{INCLUDE}"]
    if front_end != "execute":
        command.append("-D__OPENCL_CPP_VERSION__=202100")
    command += [f"-I{folder}" for folder in text.includes]
    return run([*command, file], "the preprocessor refused the text")


def entry(number: int, callee: str, kernel: translate.Kernel) -> str:
    """The function through which the executor calls a kernel."""
    values = []
    for p in kernel.parameters:
        if p.kind == "buffer":
            values.append(f"msl_pointer{{buffers[{p.index}]}}")
        elif p.kind == "threadgroup":
            values.append(f"msl_pointer{{msl_threadgroup_argument({p.index})}}")
        elif p.attribute in translate.SCALARS:
            field = p.attribute.replace("execution_width", "s_per_simdgroup")
            values.append(f"msl_position{{&index->{field}}}")
        else:
            values.append(f"msl_position{{index->{p.attribute}}}")
    return (
        f"MSL_ENTRY void msl_entry_{number}"
        "(void* const* buffers, const msl_index* index) "
        f"{{ {callee}({', '.join(values)}); }}\n"
    )


def argument_rows(source: translate.Source, callee: str) -> list[str]:
    kernel = source.kernels[re.match(r"\w+", callee)[0]]
    rows = []
    for i, p in enumerate(kernel.parameters):
        if p.kind == "index":
            continue
        at = f"<msl_signature<decltype({callee})>::at<{i}>>()"
        writable = f"msl_is_writable{at}" if p.in_device else "0"
        condition = source.constants[p.condition][1] if p.condition else -1
        rows.append(
            f'{{"{p.name}", {int(p.kind == "threadgroup")}, {p.index}, '
            f"msl_target_bytes{at}, msl_is_reference{at}, {writable}, {condition}}}"
        )
    return rows


def array(type_: str, name: str, rows: list[str]) -> str:
    """An array in C++; where it has no row, one of zeros."""
    rows = rows or ["{}"]
    return f"static const msl_library::{type_} {name}[] = {{{', '.join(rows)}}};\n"


def table(source: translate.Source) -> str:
    """The table of runtime/library.h that a library of kernels has about itself."""
    text = (INCLUDE / "entries.h").read_text()
    text += (RUNTIME / "library.h").read_text().replace("#pragma once", "")
    kernels, constants = [], []
    for number, (name, callee) in enumerate(source.instances.items()):
        rows = argument_rows(source, callee)
        text += entry(number, callee, source.kernels[re.match(r"\w+", callee)[0]])
        text += array("Argument", f"msl_arguments_{number}", rows)
        kernels.append(
            f'{{"{name}", (void (*)(void* const*, const void*))msl_entry_{number}, '
            f"{len(rows)}, msl_arguments_{number}}}"
        )
    for name, (type_, index) in source.constants.items():
        symbol = f"msl_constant_{index}"
        text += f'extern "C" char {symbol}[];\n'
        text += (
            f'asm(".bss; .balign 16; .globl {symbol}; {symbol}: .zero 16; .text");\n'
        )
        constants.append(f'{{"{name}", "{type_}", {index}, sizeof({type_}), {symbol}}}')
    text += array("Kernel", "msl_kernels", kernels)
    text += array("FunctionConstant", "msl_constants", constants)
    return (
        text + 'extern "C" const msl_library::Library msl_library_table;\n'
        f"const msl_library::Library msl_library_table = {{{len(kernels)}, "
        f"msl_kernels, {len(constants)}, msl_constants}};\n"
    )


def compile_library(text: Text, mode: str = "plain") -> Path:
    """Path of a shared library with the kernels of a text; equal texts share one."""
    source = translate.translate(preprocess(text, "execute"))
    if not source.instances:
        raise CompileError("the text instantiates no kernel.")
    whole = KEYWORDS["execute"] + source.text + table(source)
    flags = [*COMMON, *EXECUTE, *MODES[mode]]
    target = BUILD / "libraries" / f"{digest(whole, flags, clang())}.{mode}.so"
    command = [clang(), *flags, stored(whole, ".cpp")]
    return build(command, target, "Clang refused the kernels")


def check_strictly(text: Text, regime: str, flags: Iterable[str] = ()) -> None:
    """Lets Clang judge the text as C++ for OpenCL.

    regime is "strict", where pointers without an address space are private, or
    "strict_generic", where they are generic as from MSL 4.1 on.
    """
    source = translate.translate(preprocess(text, regime))
    text_ = KEYWORDS[regime] + source.text
    command = [clang(), "-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", *COMMON]
    command += ["-Xclang", f"-cl-ext={STRICT[regime]}", "-fsyntax-only", *flags]
    run([*command, stored(text_, ".cl")], f"refused with address spaces {regime}")


def build(command: list, target: Path, what: str) -> Path:
    """Runs a compiler unless its output is there; several processes may do so."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            draft = Path(folder) / target.name
            run([*command, "-o", draft], what)
            os.replace(draft, target)
    return target


def executor() -> Path:
    """The shared library that runs kernels."""
    names = ("executor", "detector", "coverage", "air")
    sources = [RUNTIME / f"{name}.cpp" for name in names]
    parts = [path.read_text() for path in [*sources, RUNTIME / "executor.h"]]
    command = [clang(), "-std=c++20", "-O2", "-march=x86-64-v3", "-g", "-fPIC"]
    command += ["-shared", "-Wall", "-Wextra", "-Werror", *sources]
    target = BUILD / "libraries" / f"executor-{digest(parts, command)}.so"
    return build(command, target, "Clang refused the executor")
