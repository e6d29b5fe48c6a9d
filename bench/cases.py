"""What is timed against what: shapes, storage formats and the groups of entries."""

from dataclasses import dataclass

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Operand:
    """Storage of one cached operand, in the terms of ``mx.quantize``."""

    mode: str
    bits: int
    group_size: int


@dataclass(frozen=True)
class KVFormat:
    name: str
    k: Operand
    v: Operand


def _same(name, mode, bits, group_size):
    operand = Operand(mode, bits, group_size)
    return KVFormat(name, operand, operand)


AFFINE8 = _same("affine8", "affine", 8, 64)
AFFINE4 = _same("affine4", "affine", 4, 64)
FORMATS = {
    f.name: f
    for f in (
        AFFINE8,
        AFFINE4,
        KVFormat("k8v4", AFFINE8.k, AFFINE4.v),
        _same("mxfp8", "mxfp8", 8, 32),
        _same("mxfp4", "mxfp4", 4, 32),
        _same("nvfp4", "nvfp4", 4, 16),
        _same("turbo4", "turbo4", 4, 128),
    )
}
MAIN_FORMATS = ("affine8", "affine4")


@dataclass(frozen=True)
class Shape:
    """One attention call of a single sequence; causal where it has several rows."""

    q_len: int = 1
    kv_len: int = 4096
    dtype: str = "bfloat16"
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def causal(self):
        return self.q_len > 1

    @property
    def scale(self):
        return self.head_dim**-0.5

    @property
    def repeats(self):
        return self.q_heads // self.kv_heads

    @property
    def flops(self):
        """Multiplications and additions of both products over visible keys."""
        hidden = (self.q_len - 1) / 2 if self.causal else 0
        return 4 * self.q_heads * self.head_dim * self.q_len * (self.kv_len - hidden)

    def __str__(self):
        return (
            f"T_q {self.q_len}, T_kv {self.kv_len}, {self.dtype}, "
            f"heads {self.q_heads}/{self.kv_heads}, D {self.head_dim}"
        )


@dataclass(frozen=True)
class Entry:
    """One line of a group: a rival on a shape, and how its cache is stored."""

    rival: str
    shape: Shape
    format: str
    one_call: bool = False  # wake-up of MLX's threads included

    def __str__(self):
        return f"{self.rival} {self.format}" + (" (one call)" * self.one_call)


@dataclass(frozen=True)
class Group:
    """Entries that are timed in turns, so that their ratios mean something."""

    name: str
    entries: tuple


OUTSIDE = (
    ("torch_sdpa", "dense"),
    ("onnxruntime_gqa", "int8"),
    ("llama_cpp", "q8_0"),
    ("llama_cpp", "q4_0"),
    ("llama_cpp", "f16"),
)
PROBES = ("read_bandwidth", "fma_peak")


def _fused(shape, formats=MAIN_FORMATS):
    return [Entry("fused", shape, name) for name in formats]


def _stock(shape, formats=MAIN_FORMATS):
    """Every way that MLX and mlx-lm offer without the op."""
    entries = [Entry("mlx_sdpa", shape, "dense")]
    for name in formats:
        by_mlx_lm = name in MAIN_FORMATS
        if not name.startswith("turbo"):
            rival = "mlx_lm_quantized" if by_mlx_lm else "mlx_quantized_matmul"
            entries.append(Entry(rival, shape, name))
        entries.append(Entry("mlx_dequantize_sdpa", shape, name))
    return entries


def _outside(shape):
    return [Entry(rival, shape, name) for rival, name in OUTSIDE]


def decode_group(dtype, kv_len):
    shape = Shape(kv_len=kv_len, dtype=dtype)
    # Stock MLX takes seconds a call on long caches: the main formats stand for all.
    stock_formats = FORMATS if kv_len <= 4096 else MAIN_FORMATS
    entries = _fused(shape, FORMATS) + _stock(shape, stock_formats) + _outside(shape)
    entries += [Entry("fused", shape, name, one_call=True) for name in MAIN_FORMATS]
    entries.append(Entry("mlx_add", shape, "none", one_call=True))
    return Group(f"decode-{dtype}-{kv_len}", tuple(entries))


def verify_group(kv_len, q_lens=(1, 2, 8, 32)):
    entries = []
    for q_len in q_lens:
        shape = Shape(q_len=q_len, kv_len=kv_len)
        entries += _fused(shape)
        entries += _stock(shape) if kv_len <= 4096 else _stock(shape, ())
        entries += _outside(shape) if q_len in (8, 32) else []
    return Group(f"verify-{kv_len}", tuple(entries))


def heads_group(kv_len):
    entries = []
    for q_heads in (32, 64, 128):
        shape = Shape(kv_len=kv_len, q_heads=q_heads)
        entries += _fused(shape) + _stock(shape, MAIN_FORMATS if kv_len <= 4096 else ())
    return Group(f"heads-{kv_len}", tuple(entries))


def head_dim_group(head_dim):
    shape = Shape(head_dim=head_dim)
    entries = _fused(shape) + _stock(shape) + _outside(shape)
    return Group(f"head-dim-{head_dim}", tuple(entries))


def prefill_group(dtype, q_len=512, kv_len=4096):
    shape = Shape(q_len=q_len, kv_len=kv_len, dtype=dtype)
    entries = _fused(shape) + _stock(shape) + _outside(shape)
    return Group(f"prefill-{dtype}-{kv_len}", tuple(entries))


def with_probes(group):
    """The machine's own limits are timed in turns with every group."""
    shape = group.entries[0].shape
    probes = tuple(Entry(name, shape, "none") for name in PROBES)
    return Group(group.name, group.entries + probes)


def groups(quick=False):
    return [with_probes(group) for group in _groups(quick)]


def _groups(quick):
    if quick:
        return [
            decode_group("bfloat16", 4096),
            verify_group(4096, q_lens=(1, 8)),
            prefill_group("float32", q_len=64, kv_len=1024),
        ]
    found = [decode_group(d, n) for n in (4096, 16384, 32768) for d in DTYPES]
    found += [verify_group(4096), verify_group(16384)]
    found += [heads_group(4096), heads_group(16384)]
    found += [head_dim_group(64), head_dim_group(256)]
    found += [prefill_group(d) for d in DTYPES]
    return found
