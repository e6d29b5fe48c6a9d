"""Loads compiled kernels and launches them over NumPy arrays."""

import ctypes
import functools
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from . import library
from .toolchain import Missing, tool

MAX_BUFFERS = 31
# Stale bytes around each buffer: huge in every float type, negative as integers.
GUARD_BYTES = 4096
GUARD_VALUE = 0xF9
NOTHING = np.zeros(4096, np.uint8)


class Failure(AssertionError):
    """The executor or the detector found a fault."""


class Buffer(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("begin", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
        ("written", ctypes.c_void_p),
        ("writable", ctypes.c_int32),
    ]


class Launch(ctypes.Structure):
    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("buffers", Buffer * MAX_BUFFERS),
        ("groups", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32 * 3),
        ("threadgroup_bytes", ctypes.c_uint32 * MAX_BUFFERS),
        ("seed", ctypes.c_uint32),
        ("order", ctypes.c_uint32),
        ("flush_denormals", ctypes.c_uint32),
        ("count_loads", ctypes.c_uint32),
    ]


class BufferCounts(ctypes.Structure):
    _fields_ = [
        ("lane_loads", ctypes.c_uint64),
        ("lane_load_bytes", ctypes.c_uint64),
        ("simdgroup_load_bytes", ctypes.c_uint64),
        ("distinct_load_bytes", ctypes.c_uint64),
        ("lane_stores", ctypes.c_uint64),
        ("lane_store_bytes", ctypes.c_uint64),
        ("loads_by_width", ctypes.c_uint64 * 5),
    ]


class Counts(ctypes.Structure):
    _fields_ = [
        ("simd_ops", ctypes.c_uint64),
        ("mma", ctypes.c_uint64),
        ("threadgroup_barriers", ctypes.c_uint64),
        ("simdgroup_barriers", ctypes.c_uint64),
        ("threadgroup_bytes", ctypes.c_uint64),
        ("threadgroup_loads", ctypes.c_uint64),
        ("threadgroup_stores", ctypes.c_uint64),
        ("threadgroup_load_bytes", ctypes.c_uint64),
        ("threadgroup_store_bytes", ctypes.c_uint64),
        ("buffers", BufferCounts * MAX_BUFFERS),
    ]


class CArgument(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("kind", ctypes.c_int),
        ("index", ctypes.c_int),
        ("bytes", ctypes.c_int),
        ("is_reference", ctypes.c_int),
        ("is_writable", ctypes.c_int),
        ("condition", ctypes.c_int),
    ]


class CKernel(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("entry", ctypes.c_void_p),
        ("n_arguments", ctypes.c_int),
        ("arguments", ctypes.POINTER(CArgument)),
    ]


class CConstant(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("type", ctypes.c_char_p),
        ("index", ctypes.c_int),
        ("bytes", ctypes.c_int),
        ("value", ctypes.c_void_p),
    ]


class CLibrary(ctypes.Structure):
    _fields_ = [
        ("n_kernels", ctypes.c_int),
        ("kernels", ctypes.POINTER(CKernel)),
        ("n_constants", ctypes.c_int),
        ("constants", ctypes.POINTER(CConstant)),
    ]


@functools.cache
def machine() -> ctypes.CDLL:
    """The executor, loaded for every library of kernels."""
    loaded = ctypes.CDLL(str(library.executor()), mode=ctypes.RTLD_GLOBAL)
    loaded.msl_report.restype = ctypes.c_char_p
    loaded.msl_counts.restype = ctypes.POINTER(Counts)
    return loaded


def source_lines(file: str, offsets: list[str]) -> list[str]:
    """Where instructions of a library of kernels stand in the kernels' text."""
    try:
        symbolizer = tool("llvm-symbolizer")
    except Missing:
        return [f"{file}+{offset}" for offset in offsets]
    command = [symbolizer, "--obj", file, "--functions=none"]
    run = subprocess.run(
        command, input="\n".join(offsets), capture_output=True, text=True
    )
    # An address has a line for each call that is inlined there, innermost first.
    lines = [found.split("\n")[0] for found in run.stdout.strip().split("\n\n")]
    assert len(lines) == len(offsets), (len(lines), len(offsets))
    return [re.sub(r".*/", "", line) for line in lines]


@functools.cache
def source_line(file: str, offset: str) -> str:
    return source_lines(file, [offset])[0]


def symbolise(report: str) -> str:
    return re.sub(
        r"\[\[([^\]]*?)\+(0x[0-9a-f]+)\]\]",
        lambda found: source_line(found[1], found[2]),
        report,
    )


CONSTANT_TYPES = {
    "bool": np.bool_,
    "int": np.int32,
    "int32_t": np.int32,
    "uint": np.uint32,
    "uint32_t": np.uint32,
    "float": np.float32,
    "short": np.int16,
    "ushort": np.uint16,
}


@dataclass
class Argument:
    name: str
    index: int
    bytes: int
    is_reference: bool
    is_writable: bool
    condition: int


@dataclass
class Device:
    """How launches are scheduled and checked.

    seed: 0 runs threads in order, another number in a random order of its own.
    order: how sums over lanes are ordered: 0 tree, 1 sequential, 2 random.
    """

    seed: int = 0
    order: int = 0
    flush_denormals: bool = True
    count_loads: bool = False
    counts: list[Counts] = field(default_factory=list)
    # For each array that a kernel wrote: which bytes hold a value.
    written: dict[int, np.ndarray] = field(default_factory=dict)


class Library:
    """Kernels by the names that the host knows them by."""

    def __init__(self, path: Path):
        machine()
        self.path = path
        self.loaded = ctypes.CDLL(str(path))
        table = CLibrary.in_dll(self.loaded, "msl_library_table")
        self.kernels = {
            table.kernels[i].name.decode(): table.kernels[i]
            for i in range(table.n_kernels)
        }
        self.constants = {
            table.constants[i].name.decode(): table.constants[i]
            for i in range(table.n_constants)
        }

    def arguments(self, kernel: str) -> list[Argument]:
        row = self.kernels[kernel]
        return [
            Argument(
                a.name.decode(),
                a.index,
                a.bytes,
                bool(a.is_reference),
                bool(a.is_writable),
                a.condition,
            )
            for a in row.arguments[: row.n_arguments]
            if a.kind == 0
        ]

    def set_constants(self, values: dict) -> None:
        if set(values) != set(self.constants):
            raise Failure(
                f"function constants must be {sorted(self.constants)}; "
                f"got {sorted(values)}."
            )
        for name, value in values.items():
            constant = self.constants[name]
            data = CONSTANT_TYPES[constant.type.decode()](value).tobytes()
            ctypes.memmove(constant.value, data, len(data))

    def launch(
        self,
        kernel: str,
        buffers: dict[int, np.ndarray],
        groups: tuple[int, int, int],
        threads: tuple[int, int, int],
        constants: dict | None = None,
        threadgroup_bytes: dict[int, int] | None = None,
        device: Device | None = None,
    ) -> Counts:
        """Runs a kernel; writable buffers hold their results afterwards."""
        device = device or Device()
        self.set_constants(constants or {})
        launch = Launch(ctypes.cast(self.kernels[kernel].entry, ctypes.c_void_p))
        held = self.bind(launch, kernel, buffers, device)
        launch.groups[:] = groups
        launch.threads[:] = threads
        for index, size in (threadgroup_bytes or {}).items():
            launch.threadgroup_bytes[index] = size
        launch.seed = device.seed
        launch.order = device.order
        launch.flush_denormals = device.flush_denormals
        launch.count_loads = device.count_loads
        errors = machine().msl_launch(ctypes.byref(launch))
        report = machine().msl_report().decode()
        for argument, array, guarded in held:
            if not guarded.intact():
                errors += 1
                report += f"OUT OF BOUNDS: write beside buffer {argument.index}\n"
            if argument.is_writable:
                guarded.copy_to(array)
        if errors:
            raise Failure(f"{kernel}:\n{symbolise(report)}")
        counts = Counts.from_buffer_copy(machine().msl_counts().contents)
        device.counts.append(counts)
        return counts

    def bind(
        self,
        launch: Launch,
        kernel: str,
        buffers: dict[int, np.ndarray],
        device: Device,
    ) -> list[tuple[Argument, np.ndarray, "Guarded"]]:
        held = []
        for argument in self.arguments(kernel):
            if argument.index not in buffers and argument.is_reference:
                # A compiler may read through a reference before it is sure to.
                row = launch.buffers[argument.index]
                row.data = row.begin = NOTHING.ctypes.data
                row.bytes = NOTHING.nbytes
            if argument.index not in buffers:
                continue
            array = buffers[argument.index]
            guarded = Guarded(array)
            held.append((argument, array, guarded))
            row = launch.buffers[argument.index]
            row.data = row.begin = guarded.address
            row.bytes = array.nbytes
            row.writable = argument.is_writable
            if argument.is_writable or id(array) in device.written:
                nothing = np.zeros(array.nbytes, np.uint8)
                written = device.written.setdefault(id(array), nothing)
                row.written = written.ctypes.data
        unknown = set(buffers) - {argument.index for argument, *_ in held}
        if unknown:
            raise Failure(f"{kernel} has no buffers {sorted(unknown)}.")
        return held


class Guarded:
    """A copy of an array with stale values on both sides."""

    def __init__(self, array: np.ndarray):
        size = array.nbytes
        whole = np.full(size + 2 * GUARD_BYTES + 256, GUARD_VALUE, np.uint8)
        start = GUARD_BYTES + (-whole.ctypes.data - GUARD_BYTES) % 256
        self.whole, self.start, self.size = whole, start, size
        self.address = whole.ctypes.data + start
        inside = whole[start : start + size]
        inside[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def intact(self) -> bool:
        end = self.start + self.size
        sides = (self.whole[: self.start], self.whole[end:])
        return all((side == GUARD_VALUE).all() for side in sides)

    def copy_to(self, array: np.ndarray) -> None:
        inside = self.whole[self.start : self.start + self.size]
        array[...] = inside.view(array.dtype).reshape(array.shape)
