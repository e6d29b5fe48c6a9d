"""Shapes and storage formats that are timed on a GPU, the table of targets first."""

from dataclasses import dataclass

from cases import FORMATS, MAIN_FORMATS, KVFormat, Operand


@dataclass(frozen=True)
class Shape:
    """With ``shortest``, sequences of different lengths from there to kv_len."""

    batch: int = 1
    q_len: int = 1
    kv_len: int = 32768
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    shortest: int | None = None

    @property
    def scale(self):
        return self.head_dim**-0.5

    @property
    def mask(self):
        return "causal" if self.q_len > 1 else None

    def __str__(self):
        lengths = f"{self.shortest}-" * (self.shortest is not None)
        return (
            f"B {self.batch}, T_q {self.q_len}, T_kv {lengths}{self.kv_len}, "
            f"heads {self.q_heads}/{self.kv_heads}, D {self.head_dim}"
        )


LONG = 131072


def shapes(quick=False):
    if quick:
        return [Shape(kv_len=1024), Shape(kv_len=512, q_len=8), Shape(2, kv_len=256)]
    found = [Shape(kv_len=LONG), Shape(8), Shape(), Shape(kv_len=4096)]
    found += [Shape(q_len=8), Shape(q_len=8, kv_len=LONG)]
    found += [Shape(kv_len=LONG, kv_heads=32 // gqa) for gqa in (1, 8, 16)]
    found += [
        Shape(kv_len=LONG, q_heads=q, kv_heads=q // 4, head_dim=d)
        for d, q in ((64, 64), (96, 32), (256, 16), (512, 8))
    ]
    # Of the second, a dense batch, the first reads about as many bytes.
    found += [Shape(32, kv_len=65536, shortest=1024), Shape(8, kv_len=LONG)]
    found += [Shape(q_len=512)]
    others = [Shape(b, kv_len=n) for n in (32768, 4096, 1024) for b in (1, 8, 32)]
    return found + [shape for shape in others if shape not in found]


def selected(every, text):
    """(number, shape) of those that ``I:J`` or ``I`` names, as slices of lists do."""
    numbered = list(enumerate(every))
    try:
        ends = [int(end) if end else None for end in (text or ":").split(":")]
        start, end = ends if len(ends) > 1 else (ends[0], ends[0] + 1)
        found = numbered[start:end]
    except ValueError:
        found = []
    if not found:
        raise ValueError(f"shapes must be I or I:J of 0 to {len(every)}; got {text}")
    return found


def formats(shape):
    if shape.shortest is not None:
        return [FORMATS[name] for name in MAIN_FORMATS]
    found = list(FORMATS.values())
    others = []
    if shape == Shape(kv_len=LONG):
        others = [("affine", 6, 64), ("turbo3", 3, 128)]
        others += [("affine", bits, group) for bits in (4, 8) for group in (32, 128)]
    elif shape.head_dim % 64:
        others = [("affine", bits, 32) for bits in (8, 4)]
    for mode, bits, group in others:
        operand = Operand(mode, bits, group)
        found.append(KVFormat(f"{mode}_{bits}_{group}", operand, operand))
    return [fmt for fmt in found if holds(fmt.k, shape) and holds(fmt.v, shape)]


def holds(operand, shape):
    if operand.mode.startswith("turbo"):
        return shape.head_dim == operand.group_size
    return shape.head_dim % operand.group_size == 0
