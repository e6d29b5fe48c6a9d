"""llama.cpp's attention, through the ggml libraries that llama-cpp-python installs."""

import ctypes
import weakref
from ctypes import c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from rivals.prepared import Absent, Prepared, calls_over, copies_for, to_heads

BLOCK = 32
TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}
SCRATCH_BYTES = 8 << 20
# It rounds q to 8 bits for quantized caches and sums f16 values in float16.
TOLERANCE = 1e-3


class InitParams(ctypes.Structure):
    _fields_ = [
        ("mem_size", c_size_t),
        ("mem_buffer", c_void_p),
        ("no_alloc", c_bool),
    ]


SIGNATURES = {
    "base": {
        "ggml_init": (c_void_p, [InitParams]),
        "ggml_free": (None, [c_void_p]),
        "ggml_row_size": (c_size_t, [c_int, c_int64]),
        "ggml_new_tensor_4d": (c_void_p, [c_void_p, c_int, *[c_int64] * 4]),
        "ggml_get_data": (c_void_p, [c_void_p]),
        "ggml_nbytes": (c_size_t, [c_void_p]),
        "ggml_quantize_chunk": (
            c_size_t,
            [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p],
        ),
        "ggml_flash_attn_ext": (c_void_p, [c_void_p] * 5 + [c_float] * 3),
        "ggml_new_graph": (c_void_p, [c_void_p]),
        "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
        "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    },
    "cpu": {
        "ggml_backend_cpu_init": (c_void_p, []),
        "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    },
}


class Ggml:
    """The functions of ggml that are needed, with their C signatures."""

    def __init__(self, folder):
        for part, functions in SIGNATURES.items():
            library = ctypes.CDLL(str(library_file(folder, part)), ctypes.RTLD_GLOBAL)
            for name, (result, arguments) in functions.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name.removeprefix("ggml_"), function)


def library_file(folder, part):
    for suffix in (".so", ".dylib"):
        file = folder / f"libggml-{part}{suffix}"
        if file.exists():
            return file
    raise Absent(f"llama-cpp-python without libggml-{part}")


@lru_cache(maxsize=1)
def ggml():
    spec = find_spec("llama_cpp")  # finds the package without running it
    if spec is None:
        raise Absent("llama-cpp-python")
    return Ggml(Path(spec.submodule_search_locations[0]) / "lib")


class Graph:
    """One attention call over its own copy of the cache."""

    def __init__(self, shape, kind, arrays):
        self.shape, self.kind = shape, TYPES[kind]
        self.context = ggml().init(InitParams(self.bytes_needed(), None, False))
        weakref.finalize(self, ggml().free, self.context)
        self.q = self.tensor(TYPES["f32"], shape.q_len, shape.q_heads, arrays.q)
        self.k, self.v = (
            self.tensor(self.kind, shape.kv_len, shape.kv_heads, x)
            for x in (arrays.k, arrays.v)
        )
        self.out = ggml().flash_attn_ext(
            self.context, self.q, self.k, self.v, self.mask(), shape.scale, 0.0, 0.0
        )
        self.graph = ggml().new_graph(self.context)
        ggml().build_forward_expand(self.graph, self.out)

    def bytes_needed(self):
        shape = self.shape
        row = ggml().row_size(self.kind, shape.head_dim)
        cache = 2 * row * shape.kv_heads * shape.kv_len
        rows = 2 * 4 * shape.head_dim * shape.q_heads * shape.q_len
        return cache + rows + 2 * shape.q_len * shape.kv_len + SCRATCH_BYTES

    def tensor(self, kind, length, heads, array):
        dim = self.shape.head_dim
        made = ggml().new_tensor_4d(self.context, kind, dim, length, heads, 1)
        data = ggml().get_data(made)
        source = np.ascontiguousarray(array, dtype=np.float32)
        ggml().quantize_chunk(
            kind, source.ctypes.data, data, 0, heads * length, dim, None
        )
        return made

    def mask(self):
        """Float16 ``[q_len, kv_len]``, added to the scores."""
        q_len, kv_len = self.shape.q_len, self.shape.kv_len
        if not self.shape.causal:
            return None
        made = ggml().new_tensor_4d(self.context, TYPES["f16"], kv_len, q_len, 1, 1)
        hidden = np.arange(kv_len) > np.arange(kv_len - q_len, kv_len)[:, None]
        rows = np.where(hidden, -np.inf, 0.0).astype(np.float16)
        ctypes.memmove(ggml().get_data(made), rows.ctypes.data, rows.nbytes)
        return made

    def raw(self, tensor):
        size = ggml().nbytes(tensor)
        return np.frombuffer(ctypes.string_at(ggml().get_data(tensor), size), np.uint8)


def decode(raw, kind):
    """The float32 values of a tensor's bytes."""
    if kind == "f32":
        return raw.view(np.float32)
    if kind == "f16":
        return raw.view(np.float16).astype(np.float32)
    code_bytes = BLOCK if kind == "q8_0" else BLOCK // 2
    blocks = raw.view([("scale", "<f2"), ("codes", "u1", code_bytes)])
    if kind == "q8_0":
        codes = blocks["codes"].view(np.int8).astype(np.float32)
    else:
        halves = (blocks["codes"] & 15, blocks["codes"] >> 4)
        codes = np.concatenate(halves, axis=-1).astype(np.float32) - 8
    return (codes * blocks["scale"].astype(np.float32)[:, None]).ravel()


def prepare(entry, inputs, threads, cold):
    shape, kind = entry.shape, entry.format
    backend = ggml().backend_cpu_init()
    ggml().backend_cpu_set_n_threads(backend, threads)
    first = Graph(shape, kind, inputs)
    kv_bytes = 2 * ggml().nbytes(first.k)
    extra = copies_for(kv_bytes, cold) - 1
    graphs = [first] + [Graph(shape, kind, inputs) for _ in range(extra)]

    def call(graph):
        if ggml().backend_graph_compute(backend, graph.graph):
            raise RuntimeError("ggml_backend_graph_compute failed")

    def output():
        call(first)
        return to_heads(first.raw(first.out).view(np.float32), shape)

    def values():
        size = (shape.kv_heads, shape.kv_len, shape.head_dim)
        k, v = (decode(first.raw(x), kind).reshape(size) for x in (first.k, first.v))
        return inputs.q, k, v

    run = calls_over(call, graphs)
    return Prepared(run, output, values, kv_bytes, TOLERANCE)


RIVALS = {"llama_cpp": prepare}
