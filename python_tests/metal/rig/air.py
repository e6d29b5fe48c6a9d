"""Kernels that Apple's compiler made, from a metallib onto the executor.

A metallib holds LLVM bitcode. Without its address spaces, and with Apple's
intrinsics sent to the executor, it runs like what Clang makes of the source.
"""

import functools
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path

from . import library, translate
from .library import BUILD, RUNTIME, digest, stored
from .toolchain import clang, run, tool

# Offsets in Index of runtime/executor.h.
VECTOR_OFFSETS = {name: 16 * i for i, name in enumerate(translate.VECTORS)}
SCALAR_OFFSETS = {
    "thread_index_in_simdgroup": 96,
    "simdgroup_index_in_threadgroup": 100,
    "thread_index_in_threadgroup": 104,
    "simdgroups_per_threadgroup": 108,
    "threads_per_simdgroup": 112,
    "thread_index_in_quadgroup": 116,
    "quadgroup_index_in_threadgroup": 120,
}
LLVM_TYPES = {"f32": "float", "f16": "half", "bf16": "bfloat"}
TYPE_BYTES = {"float": 4, "half": 2, "bfloat": 2, "i8": 1, "i16": 2, "i32": 4}


@functools.cache
def functions(metallib: Path) -> dict[str, tuple[int, int]]:
    """Where each function's bitcode lies: offset and size in the file."""
    data = metallib.read_bytes()
    if data[:4] != b"MTLB":
        raise ValueError(f"{metallib} is no metallib.")
    table, _, _, _, _, _, bitcode, _ = struct.unpack_from("<8Q", data, 24)
    (count,) = struct.unpack_from("<I", data, table)
    found, position = {}, table + 4
    for _ in range(count):
        (size,) = struct.unpack_from("<I", data, position)
        tags, at = {}, position + 4
        while data[at : at + 4] != b"ENDT":
            (length,) = struct.unpack_from("<H", data, at + 4)
            tags[data[at : at + 4]] = data[at + 6 : at + 6 + length]
            at += 6 + length
        offset = struct.unpack("<3Q", tags[b"OFFT"])[2]
        (length,) = struct.unpack("<Q", tags[b"MDSZ"])
        found[tags[b"NAME"].rstrip(b"\0").decode()] = (bitcode + offset, length)
        position += size
    return found


@dataclass
class Argument:
    kind: str  # "buffer", or the name of a position in the grid
    index: int = 0
    name: str = ""
    bytes: int = 0
    writable: bool = False
    is_reference: bool = False
    condition: str = ""


@dataclass
class AirKernel:
    """What the metadata says about a kernel."""

    function: str
    arguments: list[Argument]
    # Name: symbol in the bitcode, type in MSL, index.
    constants: dict[str, tuple[str, str, int]] = field(default_factory=dict)


def parse_argument(text: str, metadata: dict[str, str]) -> Argument:
    words = re.findall(r'!"([^"]*)"', text)
    if "air.buffer" not in words:
        kind = next(w for w in words if w.startswith("air.") and w != "air.arg_unused")
        return Argument(kind.removeprefix("air."))

    def number(name: str) -> int:
        return int(re.search(rf'!"{name}", i32 (\d+)', text)[1])

    condition = re.search(r'!"air.function_constant", !(\d+)', text)
    return Argument(
        "buffer",
        number("air.location_index"),
        words[words.index("air.arg_name") + 1],
        number("air.arg_type_size"),
        "air.read_write" in words or "air.write" in words,
        "air.buffer_size" in words,
        re.findall(r'!"([^"]*)"', metadata[condition[1]])[1] if condition else "",
    )


def parse(ll: str) -> AirKernel:
    lines = re.finditer(r"^!(\d+) = (?:distinct )?!\{(.*)\}$", ll, re.MULTILINE)
    metadata = {found[1]: found[2] for found in lines}
    root = metadata[re.search(r"^!air\.kernel = !\{!(\d+)\}", ll, re.MULTILINE)[1]]
    function, _, arguments = re.findall(r"@[\w.$]+|!\d+", root)[:3]
    kernel = AirKernel(
        function[1:],
        [
            parse_argument(metadata[number], metadata)
            for number in re.findall(r"!(\d+)", metadata[arguments[1:]])
        ],
    )
    listed = re.search(r"^!air\.function_constants = !\{(.*)\}", ll, re.MULTILINE)
    for number in re.findall(r"!(\d+)", listed[1]) if listed else ():
        text = metadata[number]
        type_, name = re.findall(r'!"([^"]*)"', text)
        index = int(re.search(r'!"[^"]*", i32 (\d+)', text)[1])
        symbol = re.search(r"@([\w.$]+)", text)[1]
        kernel.constants[name] = (symbol, type_, index)
    return kernel


def without_address_spaces(ll: str) -> str:
    ll = re.sub(r"^@llvm\.(compiler\.used|used|global_ctors).*\n", "", ll, flags=re.M)
    ll = re.sub(r"^target .*\n", "", ll, flags=re.M)
    cast = r"addrspacecast \(ptr addrspace\(\d\) (@[\w.$]+) to ptr\)"
    ll = re.sub(cast, r"\1", ll)
    ll = re.sub(r" ?addrspace\(\d\)", "", ll)
    return re.sub(r"(@llvm\.\w+(?:\.\w+)?)((?:\.p\d)+)", without_space_suffix, ll)


def without_space_suffix(found: re.Match) -> str:
    return found[1] + re.sub(r"\d", "0", found[2])


def matrix_product(suffix: str) -> str:
    """A definition of Apple's 8 x 8 intrinsic; a lane has elements 0 and 1."""
    d, a, b, c = (LLVM_TYPES[t] for t in re.findall(r"v64(\w+)", suffix))
    pair = "<2 x i32> <i32 0, i32 1>"
    body = ""
    for name, type_ in (("a", a), ("b", b), ("c", c)):
        body += (
            f"  %{name}n = shufflevector <64 x {type_}> %{name}, "
            f"<64 x {type_}> poison, {pair}\n"
        )
        widen = f"fpext <2 x {type_}> %{name}n to <2 x float>"
        if type_ == "float":
            widen = f"bitcast <2 x float> %{name}n to <2 x float>"
        body += f"  %{name}w = {widen}\n"
        body += f"  %{name}d = bitcast <2 x float> %{name}w to double\n"
    narrow = f"fptrunc <2 x float> %rw to <2 x {d}>"
    if d == "float":
        narrow = "bitcast <2 x float> %rw to <2 x float>"
    rest = ", ".join(["i32 0", "i32 1", *["i32 poison"] * 62])
    return (
        f"define internal <64 x {d}> "
        f"@air.simdgroup_matrix_8x8_multiply_accumulate.{suffix}("
        f"<64 x {a}> %a, <64 x {b}> %b, <64 x {c}> %c) alwaysinline convergent {{\n"
        f"{body}  %rd = call double @msl_mma(double %ad, double %bd, double %cd)\n"
        f"  %rw = bitcast double %rd to <2 x float>\n  %r = {narrow}\n"
        f"  %v = shufflevector <2 x {d}> %r, <2 x {d}> poison, <64 x i32> <{rest}>\n"
        f"  ret <64 x {d}> %v\n}}\n"
    )


def with_matrix_products(ll: str) -> str:
    name = r"@air\.simdgroup_matrix_8x8_multiply_accumulate\.([\w.]+)\("
    suffixes = sorted(set(re.findall(name, ll)))
    ll = re.sub(rf"^declare <64 x \w+> {name}.*\n", "", ll, flags=re.M)
    if suffixes:
        ll += "declare double @msl_mma(double, double, double) convergent\n"
    return ll + "".join(matrix_product(suffix) for suffix in suffixes)


def parameter_types(ll: str, function: str) -> list[str]:
    head = re.search(rf"^define [^@\n]*@{re.escape(function)}\(", ll, re.M)
    end = translate.closing(ll, head.end())
    pieces = translate.split_arguments(ll[head.end() : end - 1])
    known = r"\s*(ptr|<\d x i\d+>|i\d+)"
    return [re.match(known, piece)[1] for piece in pieces]


def load_position(i: int, argument: Argument, type_: str) -> str:
    if argument.kind in SCALAR_OFFSETS:
        offset = SCALAR_OFFSETS[argument.kind]
    else:
        offset = VECTOR_OFFSETS[argument.kind]
    text = f"  %p{i} = getelementptr i8, ptr %index, i64 {offset}\n"
    if type_ == "i32":
        return text + f"  %a{i} = load i32, ptr %p{i}\n"
    if type_ == "i16":
        return text + f"  %a{i} = load i16, ptr %p{i}\n"
    count, element = re.match(r"<(\d) x (i\d+)>", type_).groups()
    order = ", ".join(f"i32 {j}" for j in range(int(count)))
    text += f"  %w{i} = load <4 x i32>, ptr %p{i}, align 4\n"
    text += (
        f"  %n{i} = shufflevector <4 x i32> %w{i}, <4 x i32> poison, "
        f"<{count} x i32> <{order}>\n"
    )
    cast = "trunc" if element == "i16" else "bitcast"
    return text + f"  %a{i} = {cast} <{count} x i32> %n{i} to {type_}\n"


def entry(ll: str, kernel: AirKernel, initialise: bool) -> str:
    body = "  call void @air_initialise()\n" if initialise else ""
    values = []
    types = parameter_types(ll, kernel.function)
    for i, (argument, type_) in enumerate(zip(kernel.arguments, types)):
        if argument.kind == "buffer":
            body += f"  %g{i} = getelementptr ptr, ptr %buffers, i64 {argument.index}\n"
            body += f"  %a{i} = load ptr, ptr %g{i}\n"
        else:
            body += load_position(i, argument, type_)
        values.append(f"{type_} %a{i}")
    return (
        f"define void @air_entry(ptr %buffers, ptr %index) {{\n{body}"
        f"  call void @{kernel.function}({', '.join(values)})\n  ret void\n}}\n"
    )


def threadgroup_bytes(ll: str) -> int:
    arrays = re.findall(r"addrspace\(3\) global \[(\d+) x (\w+)\]", ll)
    return sum(int(n) * TYPE_BYTES[type_] for n, type_ in arrays)


def lower(ll: str) -> tuple[str, AirKernel]:
    """Text for Clang of one kernel's disassembled bitcode."""
    kernel = parse(ll)
    ll = without_address_spaces(ll)
    for symbol, _, index in kernel.constants.values():
        ll = re.sub(
            rf"^@{re.escape(symbol)} = .*? (?:constant|global) (\w+) undef.*$",
            rf"@msl_constant_{index} = global \1 0, align 16",
            ll,
            flags=re.M,
        )
        ll = re.sub(rf"@{re.escape(symbol)}(?![\w.$])", f"@msl_constant_{index}", ll)
    initialise = r'@_GLOBAL__sub_I[\w.$]*\(\)(.*?) section "air\.static_init"'
    found = re.search(rf"define internal void {initialise}", ll)
    if found:
        ll = re.sub(
            rf"define internal void {initialise}",
            r"define internal void @air_initialise()\1",
            ll,
        )
    ll = with_matrix_products(ll)
    return ll + entry(ll, kernel, bool(found)), kernel


def table(name: str, kernel: AirKernel) -> str:
    indices = {name: index for name, (_, _, index) in kernel.constants.items()}
    arguments = [
        f'{{"{a.name}", 0, {a.index}, {a.bytes}, {int(a.is_reference)}, '
        f"{int(a.writable)}, "
        f"{indices[a.condition] if a.condition else -1}}}"
        for a in kernel.arguments
        if a.kind == "buffer"
    ]
    constants = [
        f'{{"{name}", "{type_}", {index}, sizeof({type_}), msl_constant_{index}}}'
        for name, (_, type_, index) in kernel.constants.items()
    ]
    symbols = "".join(
        f'extern "C" char msl_constant_{index}[];\n' for index in indices.values()
    )
    row = f'{{"{name}", air_entry, {len(arguments)}, msl_arguments}}'
    return (
        '#include "library.h"\ntypedef unsigned int uint;\n'
        'extern "C" void air_entry(void* const*, const void*);\n'
        + symbols
        + library.array("Argument", "msl_arguments", arguments)
        + library.array("Kernel", "msl_kernels", [row])
        + library.array("FunctionConstant", "msl_constants", constants)
        + 'extern "C" const msl_library::Library msl_library_table = '
        f"{{1, msl_kernels, {len(constants)}, msl_constants}};\n"
    )


def disassemble(metallib: Path, name: str) -> str:
    offset, size = functions(metallib)[name]
    bitcode = metallib.read_bytes()[offset : offset + size]
    file = BUILD / "texts" / f"{digest(bitcode)}.air"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(bitcode)
    return run([tool("llvm-dis"), file, "-o", "-"], f"llvm-dis refused {name}")


def compile_kernel(metallib: Path, name: str) -> Path:
    """A library, as of library.compile_library, with one kernel of a metallib."""
    ll, kernel = lower(disassemble(metallib, name))
    sources = [stored(ll, ".ll"), stored(table(name, kernel), ".cpp")]
    flags = ["-O2", "-march=x86-64-v3", "-fPIC", "-shared", "-ffp-contract=on"]
    flags += ["-Wno-override-module", "-Wl,-z,undefs", f"-I{RUNTIME}"]
    target = BUILD / "libraries" / f"{digest(sources, flags, clang())}.air.so"
    return library.build([clang(), *flags, *sources], target, f"Clang refused {name}")
