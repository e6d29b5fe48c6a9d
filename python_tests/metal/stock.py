"""MLX's own attention kernels on the executor, from source and from its metallib."""

import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from rig import air, apple, executor, library

INCLUDE = Path(mx.__file__).parent / "include"
UTILS = '#include "mlx/backend/metal/kernels/utils.h"\n'
VECTOR = UTILS + '#include "mlx/backend/metal/kernels/sdpa_vector.h"\n'
# Clang's built-in += on pointers takes no class that converts to an integer.
STEEL = UTILS + """
namespace mlx { namespace steel {
template <typename T, T v> struct integral_constant;
#define ADVANCE(space, op) \\
  template <typename E, typename T, T v> \\
  METAL_FUNC space E*& operator op( \\
      space E*& p, const thread integral_constant<T, v>&) { return p op v; }
ADVANCE(device, +=) ADVANCE(device, -=) ADVANCE(threadgroup, +=)
ADVANCE(threadgroup, -=) ADVANCE(constant, +=) ADVANCE(thread, +=)
}}
#include "mlx/backend/metal/kernels/steel/attn/kernels/steel_attention.h"
"""
QUANTIZED = UTILS + """
#include "mlx/backend/metal/kernels/steel/gemm/gemm.h"
#include "mlx/backend/metal/kernels/quantized_utils.h"
#include "mlx/backend/metal/kernels/quantized.h"
"""
VECTOR_CONSTANTS = {
    "has_mask": False,
    "query_transposed": False,
    "do_causal": False,
    "bool_mask": False,
    "float_mask": False,
    "has_sinks": False,
    "blocks": 32,
}
NAMES = {"half": "float16", "bfloat": "bfloat16", "float": "float32"}
TYPES = {"half": np.float16, "float": np.float32}


@cache
def from_source(head: str, name: str, function: str, mode: str = "plain"):
    """The kernel as Clang compiles it from the headers in MLX's wheel."""
    text = f'{head}instantiate_kernel("{name}", {function})\n'
    path = library.compile_library(library.Text(text, (INCLUDE,)), mode)
    return executor.Library(path)


@cache
def from_apple(name: str):
    """The kernel as Apple's compiler left it in MLX's wheel for macOS."""
    return executor.Library(air.compile_kernel(apple.metallib(), name))


def random(type_: str, *shape: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    if type_ == "bfloat":
        return (x.view(np.uint32) >> 16).astype(np.uint16)
    return x.astype(TYPES[type_])


def values(x: np.ndarray) -> np.ndarray:
    if x.dtype == np.uint16:
        x = (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float64)


def attend(q, k, v, scale, causal=False, mask=None):
    """Attention in float64."""
    q, k, v = values(q), values(k), values(v)
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = np.einsum("bhld,bhnd->bhln", q, k) * scale
    if mask is not None:
        scores = scores + mask
    if causal:
        queries, keys = scores.shape[-2:]
        seen = np.arange(keys) <= np.arange(keys - queries, keys)[:, None]
        scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhln,bhnd->bhld", weights / weights.sum(-1, keepdims=True), v)


@dataclass
class Shape:
    type: str
    dim: int
    queries: int
    keys: int
    n_q: int = 4
    n_kv: int = 2
    batch: int = 1
    causal: bool = False

    def arrays(self):
        q = random(self.type, self.batch, self.n_q, self.queries, self.dim, seed=1)
        k = random(self.type, self.batch, self.n_kv, self.keys, self.dim, seed=2)
        v = random(self.type, self.batch, self.n_kv, self.keys, self.dim, seed=3)
        return q, k, v

    @property
    def scale(self):
        return self.dim**-0.5


def known(lib, constants: dict) -> dict:
    """Those that the library has: Apple's have no more than the kernel needs."""
    return {name: constants[name] for name in lib.constants}


def strides(shape: Shape) -> list[np.ndarray]:
    sizes = (shape.keys * shape.dim, shape.dim) * 2
    return [np.uint64([size]) for size in sizes]


def run_vector(lib, name, shape: Shape, device=None):
    """sdpa_vector; its result."""
    q, k, v = shape.arrays()
    out = np.zeros_like(q)
    buffers = {0: q, 1: k, 2: v, 3: out, 4: np.int32([shape.n_q // shape.n_kv])}
    buffers[5] = np.int32([shape.keys])
    buffers.update(zip(range(6, 10), strides(shape)))
    buffers[10] = np.float32([shape.scale])
    lib.launch(
        name,
        buffers,
        groups=(shape.batch * shape.n_q, shape.queries, 1),
        threads=(1024, 1, 1),
        constants=known(lib, {**VECTOR_CONSTANTS, "do_causal": shape.causal}),
        device=device,
    )
    return [out]


def run_split(libs, names, shape: Shape, blocks=64, device=None):
    """Both passes of sdpa_vector; all partial results too."""
    q, k, v = shape.arrays()
    rows = shape.batch * shape.n_q
    partials = np.zeros((rows, blocks, shape.dim), q.dtype)
    sums, maxima = np.zeros((2, rows, blocks), np.float32)
    sums, maxima, out = sums.copy(), maxima.copy(), np.zeros_like(q)
    buffers = {0: q, 1: k, 2: v, 3: partials, 4: sums, 5: maxima}
    buffers[7] = np.int32([shape.keys])
    buffers.update(zip(range(8, 12), strides(shape)))
    buffers[12] = np.float32([shape.scale])
    device = device or executor.Device()
    heads = shape.n_q // shape.n_kv
    constants = {**VECTOR_CONSTANTS, "blocks": blocks}
    libs[0].launch(
        names[0],
        buffers,
        groups=(shape.n_kv, shape.batch, blocks),
        threads=(32, heads, 1),
        constants=known(libs[0], constants),
        device=device,
    )
    libs[1].launch(
        names[1],
        {0: partials, 1: sums, 2: maxima, 3: out, 4: np.int32([blocks])},
        groups=(rows, 1, 1),
        threads=(1024, 1, 1),
        constants=known(libs[1], constants),
        device=device,
    )
    return [partials, sums, maxima, out]


def steel_params(shape: Shape, block_q: int, block_k: int) -> np.ndarray:
    q, k = shape.queries, shape.keys
    numbers = struct.pack(
        "<6if7i",
        shape.batch,
        shape.n_q,
        shape.dim,
        q,
        k,
        shape.n_q // shape.n_kv,
        shape.scale,
        -(-q // block_q),
        -(-k // block_k),
        q // block_q,
        k // block_k,
        q % block_q,
        k % block_k,
        k - q,
    )
    of_q = (shape.n_q * q * shape.dim, q * shape.dim, shape.dim)
    of_k = (shape.n_kv * k * shape.dim, k * shape.dim, shape.dim)
    packed = numbers + struct.pack("<12q", *of_q, *of_k, *of_k, *of_q)
    return np.frombuffer(packed, np.uint8).copy()


def steel_constants(shape: Shape, blocks, has_mask: bool) -> dict:
    return {
        "align_Q": shape.queries % blocks[0] == 0,
        "align_K": shape.keys % blocks[1] == 0,
        "has_mask": has_mask,
        "do_causal": shape.causal,
        "has_sinks": False,
        "save_lse": True,
    }


def run_steel(lib, name, shape: Shape, blocks, mask=None, device=None):
    """steel_attention of 4 simdgroups; its result and log-sum-exp."""
    q, k, v = shape.arrays()
    out = np.zeros_like(q)
    lse = np.zeros((shape.batch, shape.n_q, shape.queries), np.float32)
    buffers = {0: q, 1: k, 2: v, 3: out, 4: steel_params(shape, *blocks), 8: lse}
    if mask is not None:
        packed = struct.pack("<3q", 0, 0, shape.keys)
        buffers[5] = np.frombuffer(packed, np.uint8).copy()
        buffers[6] = mask
    counts = lib.launch(
        name,
        buffers,
        groups=(-(-shape.queries // blocks[0]), shape.n_q, shape.batch),
        threads=(32, 4, 1),
        constants=known(lib, steel_constants(shape, blocks, mask is not None)),
        device=device,
    )
    return [out, lse], counts
