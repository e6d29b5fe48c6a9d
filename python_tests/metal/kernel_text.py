"""The kernels' text as the host compiles it, and the instances that it can ask for."""

import sys
from dataclasses import dataclass
from functools import cache
from itertools import product

from rig import library
from rig.toolchain import ROOT

sys.path.insert(0, str(ROOT / "cmake"))

import flatten_metal  # noqa: E402

OVERLAY = ROOT / "overlay"
KERNELS = OVERLAY / "mlx/backend/metal/kernels"
COMMON = OVERLAY / "mlx/backend/common"
HEADER = "mlx/backend/metal/kernels/quantized_sdpa.h"
TYPES = ("float", "half", "bfloat")
# Codec, whether its scales are bytes.
AFFINE = [
    f"Affine<{bits}, {g}>" for bits in (1, 2, 3, 4, 5, 6, 8) for g in (32, 64, 128)
]
BYTE_SCALES = ["Mxfp4", "Mxfp8", "Nvfp4"]
TURBO = ["Turbo<2>", "Turbo<3>", "Turbo<4>"]
CODECS = AFFINE + BYTE_SCALES + TURBO


@cache
def kernels() -> str:
    return flatten_metal.flatten(OVERLAY, HEADER)


def operand(codec: str, dim: int, scales: str = "half") -> str:
    if codec in BYTE_SCALES:
        scales = "uint8_t"
    return (
        f"mlx::core::quantized_sdpa::KVOperand<mlx::core::kv::{codec}, "
        f"{scales}, {scales}, {dim}>"
    )


@dataclass(frozen=True)
class Instance:
    kernel: str  # "vector" or "steel"
    type: str
    k: str
    v: str
    # Rows of the vector kernel; simdgroups and keys of the other.
    sizes: tuple[int, ...]

    @property
    def function(self) -> str:
        numbers = ", ".join(map(str, self.sizes))
        return (
            f"quantized_sdpa_{self.kernel}<{self.type}, {self.k}, {self.v}, {numbers}>"
        )


def fits(codec: str, dim: int) -> bool:
    group = int(codec.split(",")[1][:-1]) if codec in AFFINE else 16
    return dim % group == 0 and dim % 32 == 0


def instances(dims=(64, 96, 128, 256)) -> list[Instance]:
    """Every format in every type, some of the sizes that plans choose."""
    found = []
    for codec, type_, dim in product(CODECS, TYPES, dims):
        if fits(codec, dim):
            x = operand(codec, dim, type_)
            found.append(Instance("vector", type_, x, x, (1 if dim > 128 else 4,)))
            found.append(Instance("steel", type_, x, x, (4, 16 if dim < 256 else 8)))
    return found


def merges() -> list[str]:
    return [
        f"quantized_sdpa_merge<{t}, {d}>" for t in TYPES for d in (64, 96, 128, 512)
    ]


def instantiate(functions: list[str]) -> library.Text:
    lines = [
        f'template [[host_name("{i}")]] [[kernel]] decltype({f}) {f};\n'
        for i, f in enumerate(functions)
    ]
    return library.Text(kernels() + "\n" + "".join(lines), ())
