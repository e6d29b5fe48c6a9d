"""Float64 NumPy oracle of mx.fast.quantized_scaled_dot_product_attention, and cases.

The formats are decoded here from their definitions, with nothing taken from the op or
from mx.dequantize. `reference` takes the arguments of the op and returns its outputs.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import mlx.core as mx
import numpy as np

# --------------------------------------------------------------------------------------
# Formats
# --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    mode: str
    bits: int
    group_size: int = 0  # 0: one scale for the whole row

    @property
    def is_turbo(self):
        return self.mode.startswith("turbo")

    def keywords(self, side):
        """The op's keywords that name this format for side "k" or "v"."""
        if self.is_turbo:
            return {f"{side}_mode": self.mode}
        return {
            f"{side}_mode": self.mode,
            f"{side}_bits": self.bits,
            f"{side}_group_size": self.group_size,
        }

    def fits(self, dim):
        return dim % (self.group_size or 1) == 0 and dim * self.bits % 32 == 0

    def __str__(self):
        size = f"g{self.group_size}" if self.group_size else ""
        return f"{self.mode}-{self.bits}{size}"


def affine(bits, group_size=64):
    return Format("affine", bits, group_size)


MXFP4 = Format("mxfp4", 4, 32)
MXFP8 = Format("mxfp8", 8, 32)
NVFP4 = Format("nvfp4", 4, 16)
TURBO2, TURBO3, TURBO4 = (Format(f"turbo{b}", b) for b in (2, 3, 4))
AFFINE = tuple(affine(b, g) for b in (1, 2, 3, 4, 5, 6, 8) for g in (32, 64, 128))
FORMATS = AFFINE + (MXFP4, MXFP8, NVFP4, TURBO2, TURBO3, TURBO4)


def unpack(words, bits):
    """Codes of a dense LSB-first stream of uint32 words along the last axis."""
    count = words.shape[-1] * 32 // bits
    stream = np.ascontiguousarray(words, "<u4").view(np.uint8)
    ones = np.unpackbits(stream, axis=-1, bitorder="little")
    ones = ones.reshape(*words.shape[:-1], count, bits)
    return np.packbits(ones, axis=-1, bitorder="little")[..., 0]


def pack(codes, bits):
    """Inverse of unpack."""
    words = codes.shape[-1] * bits // 32
    ones = np.unpackbits(codes[..., None].astype(np.uint8), axis=-1, bitorder="little")
    ones = ones[..., :bits].reshape(*codes.shape[:-1], words * 32)
    return np.packbits(ones, axis=-1, bitorder="little").view("<u4")


def minifloat_values(exponent_bits, mantissa_bits, bias):
    """Value of every code of a small float without infinities."""
    code = np.arange(2 ** (1 + exponent_bits + mantissa_bits))
    mantissa = code % 2**mantissa_bits / 2.0**mantissa_bits
    exponent = (code >> mantissa_bits) % 2**exponent_bits
    sign = np.where(code >> (exponent_bits + mantissa_bits), -1.0, 1.0)
    normal = (1 + mantissa) * 2.0 ** (exponent - bias)
    return sign * np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), normal)


E2M1 = minifloat_values(2, 1, 1)
E4M3 = minifloat_values(4, 3, 7)
E4M3[[0x7F, 0xFF]] = np.nan
E8M0 = 2.0 ** np.minimum(np.arange(256) - 127.0, 127)
E8M0[255] = np.inf


@lru_cache
def lloyd_max(bits, sweeps=4000):
    """Levels of the scalar quantizer of N(0, 1) with the least mean squared error."""

    def mass(x):
        return 0.5 * math.erf(x / math.sqrt(2))

    def density(x):
        return math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)

    levels = np.linspace(-2.5, 2.5, 2**bits)
    for _ in range(sweeps):
        edges = [-math.inf, *(levels[1:] + levels[:-1]) / 2, math.inf]
        masses = np.diff([mass(x) for x in edges])
        levels = -np.diff([density(x) for x in edges]) / masses
    return levels


def decode(fmt, codes, scales, biases=None, codebook=None):
    """Float64 values of packed codes. Arguments are NumPy arrays."""
    codes = unpack(codes, fmt.bits)
    if fmt.is_turbo:
        table = lloyd_max(fmt.bits).astype(np.float32) if codebook is None else codebook
        if scales.ndim < codes.ndim:
            scales = scales[..., None]
        return table.astype(np.float64)[codes] * scales
    group = fmt.group_size
    if fmt.mode == "affine":
        return codes * np.repeat(scales, group, -1) + np.repeat(biases, group, -1)
    values = (E4M3 if fmt.bits == 8 else E2M1)[codes]
    scale_values = E4M3 if fmt.mode == "nvfp4" else E8M0
    return values * np.repeat(scale_values[scales], group, -1)


def encode_single_bits(x, fmt, dtype):
    """As encode, for the width that the quantize of MLX 0.32.2 does not take."""
    x = np.asarray(x, np.float32)
    groups = x.reshape(*x.shape[:-1], -1, fmt.group_size)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    codes = (groups > (low + high) / 2).reshape(x.shape)
    scales, biases = (mx.array(part[..., 0]) for part in (high - low, low))
    return mx.array(pack(codes, 1)), scales.astype(dtype), biases.astype(dtype)


def encode(x, fmt, dtype=mx.float32):
    """(codes, scales, biases or None) of float data, as the op takes them."""
    if fmt.bits == 1:
        return encode_single_bits(x, fmt, dtype)
    if not fmt.is_turbo:
        x = mx.array(x, mx.float32).astype(dtype)
        # Twice, since mx.quantize takes only even numbers of nvfp4 groups.
        parts = mx.quantize(mx.stack([x, x]), fmt.group_size, fmt.bits, fmt.mode)
        parts = [part[0] for part in parts]
        return (*parts, None)[:3]
    scales = np.sqrt(np.mean(np.square(x), -1, keepdims=True))
    levels = lloyd_max(fmt.bits)
    codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, x / scales)
    return mx.array(pack(codes, fmt.bits)), mx.array(scales).astype(dtype), None


# --------------------------------------------------------------------------------------
# Oracle
# --------------------------------------------------------------------------------------


def to_numpy(x):
    """NumPy copy; floats become float64."""
    if x is None or isinstance(x, np.ndarray):
        return x
    if mx.issubdtype(x.dtype, mx.floating):
        return np.array(x.astype(mx.float32)).astype(np.float64)
    return np.array(x)


def resolve_format(side, has_biases, kwargs):
    """Format of one operand from the op's keywords, with mx.quantize's defaults."""

    def pick(name):
        own = kwargs.get(f"{side}_{name}")
        return kwargs.get(name) if own is None else own

    mode = pick("mode") or ("affine" if has_biases else "mxfp4")
    if mode.startswith("turbo"):
        return Format(mode, int(mode[-1]))
    default = {"affine": affine(4), "mxfp4": MXFP4, "mxfp8": MXFP8, "nvfp4": NVFP4}
    bits = pick("bits") or default[mode].bits
    return Format(mode, bits, pick("group_size") or default[mode].group_size)


def from_pages(pool, table):
    """[n_blocks, N, block, D] and [B, max_blocks] to [B, N, max_blocks * block, D]."""
    pages = pool[np.clip(table, 0, pool.shape[0] - 1)].swapaxes(1, 2)
    return pages.reshape(*pages.shape[:2], -1, pool.shape[-1])


def operand_values(side, parts, kwargs):
    """Float64 values ``[B, N_kv, T_kv, D]`` of the op's three arrays of one operand."""
    fmt = resolve_format(side, parts[2] is not None, kwargs)
    codebook, table = (
        to_numpy(kwargs.get(name)) for name in (f"{side}_codebook", "block_table")
    )
    x = decode(fmt, *map(to_numpy, parts), codebook)
    return x if table is None else from_pages(x, table)


def visible_keys(batch, T_q, T_kv, kwargs):
    """(which keys exist [B, T_kv], which of them each query sees [B, T_q, T_kv])."""
    lengths, padding = (to_numpy(kwargs.get(n)) for n in ("lengths", "left_padding"))
    end = np.full(batch, T_kv) if lengths is None else np.clip(lengths, 0, T_kv)
    start = np.zeros(batch, int) if padding is None else np.clip(padding, 0, end)
    key = np.arange(T_kv)
    exists = (key >= start[:, None]) & (key < end[:, None])
    visible = np.repeat(exists[:, None], T_q, 1)
    mask = kwargs.get("mask")
    if kwargs.get("causal") or (isinstance(mask, str) and mask == "causal"):
        position = end[:, None, None] - T_q + np.arange(T_q)[:, None]
        visible &= key <= position
        if kwargs.get("window_size") is not None:
            visible &= key > position - kwargs["window_size"]
    return exists, visible


def attend(q, k, v, exists, visible, scale, mask, sinks, softcap):
    """Float64 attention and log-sum-exp; keys that do not exist are not read."""
    B, N_q, T_q, _ = q.shape
    N_kv, T_kv = k.shape[1:3]
    k, v = (np.where(exists[:, None, :, None], x, 0.0) for x in (k, v))
    grouped = q.reshape(B, N_kv, N_q // N_kv * T_q, q.shape[-1])
    scores = scale * (grouped @ k.swapaxes(-1, -2)).reshape(B, N_q, T_q, T_kv)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    if mask is not None:
        scores = (
            np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
        )
    scores = np.where(visible[:, None], scores, -np.inf)

    peak = scores.max(-1, initial=-np.inf, keepdims=True)
    sink = np.full((N_q, 1, 1), -np.inf) if sinks is None else sinks[:, None, None]
    peak = np.maximum(peak, sink)
    peak = np.where(np.isneginf(peak), 0.0, peak)
    weights = np.exp(scores - peak)
    total = weights.sum(-1, keepdims=True) + np.exp(sink - peak)
    values = weights.reshape(B, N_kv, N_q // N_kv * T_q, T_kv) @ v
    values = values.reshape(B, N_q, T_q, v.shape[-1])
    with np.errstate(divide="ignore"):
        lse = np.log(total[..., 0]) + peak[..., 0]
    return values / np.where(total == 0, 1.0, total), lse


def reference(q, k, k_scales, k_biases, v, v_scales, v_biases, *, scale, **kwargs):
    """(out, lse) in float64 of the op called with the same arguments."""
    q = to_numpy(q)
    k = operand_values("k", (k, k_scales, k_biases), kwargs)
    v = operand_values("v", (v, v_scales, v_biases), kwargs)
    exists, visible = visible_keys(q.shape[0], q.shape[2], k.shape[2], kwargs)
    mask = kwargs.get("mask")
    mask = None if isinstance(mask, str) else to_numpy(mask)
    sinks = to_numpy(kwargs.get("sinks"))
    return attend(q, k, v, exists, visible, scale, mask, sinks, kwargs.get("softcap"))


# --------------------------------------------------------------------------------------
# Comparison
# --------------------------------------------------------------------------------------

NMSE_BOUND = {mx.float32: 1e-10, mx.float16: 1e-6, mx.bfloat16: 1e-5}
# Relative where the log-sum-exp exceeds one; q of half precision may be rounded anew.
LSE_BOUND = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 1e-3}
# Half the least subnormal; of the other dtypes it does not matter.
ROUNDING_OF_TINY = {mx.float16: 2.0**-25}
# An error far below that of rounding turns some values the other way.
ROUNDING_SLACK = 1.1
# One row has few values, so its error scatters more than that of the whole.
ROW_SLACK = 4


def nmse(out, expected):
    return float(np.sum((out - expected) ** 2) / np.sum(expected**2))


def rounding_nmse(expected, dtype):
    """What is left of the exact result by rounding it to the dtype."""
    rounded = mx.array(expected.astype(np.float32)).astype(dtype)
    return nmse(to_numpy(rounded), expected)


def check_output(out, expected, dtype=None, score_nmse=lambda: 0.0):
    """Raise AssertionError unless out is expected within the bound of its dtype.

    score_nmse is asked where the bound is not kept: see Case.score_nmse.
    """
    dtype = dtype or out.dtype
    bound = NMSE_BOUND[dtype]
    out = to_numpy(out)
    assert out.shape == expected.shape, f"shape {out.shape}, want {expected.shape}"
    assert np.isfinite(out).all(), "non-finite output"
    power = np.sum(expected**2, -1)
    assert not out[power == 0].any(), "a row without keys is not zero"
    if not power.any():
        return
    error = np.maximum(np.abs(out - expected) - ROUNDING_OF_TINY.get(dtype, 0), 0)
    error = np.sum(error**2, -1)
    total = error.sum() / power.sum()
    worst = np.max(error[power > 0] / power[power > 0])
    if total > bound:
        # Few values, each near the middle between two of the dtype.
        least = max(ROUNDING_SLACK * rounding_nmse(expected, dtype), score_nmse())
        assert total <= least, f"NMSE {total:.3g} > {bound:.0e}"
    bound *= ROW_SLACK
    if worst > bound:
        assert worst <= score_nmse(), f"NMSE of a row {worst:.3g} > {bound:.0e}"


def check_lse(lse, expected, dtype=mx.float32, score_nmse=lambda: 0.0):
    """Raise AssertionError unless the log-sum-exp is right for q of the dtype.

    score_nmse is asked where the bound is not kept: see Case.score_nmse.
    """
    bound = LSE_BOUND[dtype]
    assert lse.dtype == mx.float32, f"lse is {lse.dtype}"
    lse = to_numpy(lse)
    assert lse.shape == expected.shape, f"shape {lse.shape}, want {expected.shape}"
    empty = np.isneginf(expected)
    assert np.array_equal(np.isneginf(lse), empty), "-inf at other rows"
    lse, expected = lse[~empty], expected[~empty]
    error = np.abs(lse - expected)
    share = error / np.maximum(1, np.abs(expected))
    far = ~(share <= bound)
    if far.any():
        # The log-sum-exp is as far off as its largest score may be.
        least = score_nmse() ** 0.5
        assert np.all(error[far] <= least), f"lse error {share.max():.3g} > {bound:.0e}"


# --------------------------------------------------------------------------------------
# Cases
# --------------------------------------------------------------------------------------


def stale_value(dtype):
    """Huge, yet finite in every format."""
    huge = {mx.uint32: 0x77777777, mx.uint8: 0x7E, mx.float16: 6e4}
    return huge.get(dtype, 1e30)


def full_like_stale(x, shape):
    return mx.full(shape, stale_value(x.dtype), x.dtype)


def in_longer_cache(x, front=3, back=13):
    """View of the middle rows of a buffer whose other rows are stale."""
    shape = list(x.shape)
    rows = [full_like_stale(x, shape[:2] + [n] + shape[3:]) for n in (front, back)]
    return mx.concatenate([rows[0], x, rows[1]], 2)[:, :, front : front + shape[2]]


def token_major(x):
    """View of [B, T, N, ...] storage."""
    return mx.contiguous(x.swapaxes(1, 2)).swapaxes(1, 2)


def every_second_row(x):
    """View with stale rows between its rows."""
    stale = full_like_stale(x, x.shape)
    return mx.stack([x, stale], 3).flatten(2, 3)[:, :, ::2]


def reversed_rows(x):
    """View of rows stored in the opposite order: a negative stride."""
    return mx.contiguous(x[:, :, ::-1])[:, :, ::-1]


def padded_columns(x):
    """View whose rows are longer in memory than they are in shape."""
    return mx.concatenate([x, full_like_stale(x, x.shape)], -1)[..., : x.shape[-1]]


def strided_columns(x):
    """View whose last axis is not contiguous."""
    stale = full_like_stale(x, x.shape)
    return mx.stack([x, stale], -1).flatten(-2, -1)[..., ::2]


ROW_LAYOUTS = (
    in_longer_cache,
    token_major,
    every_second_row,
    reversed_rows,
    padded_columns,
)
LAYOUTS = ROW_LAYOUTS + (strided_columns,)


@dataclass(frozen=True)
class Case:
    """A call of the op: q, the three arrays of K and of V, keywords."""

    q: mx.array
    k: tuple
    v: tuple
    kwargs: dict

    @property
    def args(self):
        return (self.q, *self.k, *self.v)

    @property
    def keys(self):
        """T_kv, also of a paged cache."""
        table = self.kwargs.get("block_table")
        return self.k[0].shape[2] * (1 if table is None else table.shape[1])

    @property
    def head_dims(self):
        fmt = resolve_format("v", self.v[2] is not None, self.kwargs)
        return self.q.shape[-1], self.v[0].shape[-1] * 32 // fmt.bits

    def run(self, **changes):
        op = mx.fast.quantized_scaled_dot_product_attention
        return op(*self.args, **{**self.kwargs, **changes})

    def reference(self, **changes):
        return reference(*self.args, **{**self.kwargs, **changes})

    def score_nmse(self):
        """The square of two ulps of the largest sum of a score's terms, unsigned.

        Terms that cancel leave such an error of a float32 score, and it is that of
        the weight of a single key beside a sink.
        """
        k = operand_values("k", self.k, self.kwargs)
        exists, _ = visible_keys(k.shape[0], 1, k.shape[2], self.kwargs)
        k = np.where(exists[:, None, :, None], np.abs(k), 0.0)
        B, N_q, T_q, D = self.q.shape
        q = np.abs(to_numpy(self.q)).reshape(B, k.shape[1], -1, D)
        terms = np.max(q @ k.swapaxes(-1, -2), initial=0) * self.kwargs["scale"]
        return (terms * 2.0**-22) ** 2

    def having(self, **changes):
        """The case with other keywords."""
        return replace(self, kwargs={**self.kwargs, **changes})

    def map_kv(self, f):
        """The case with f applied to every array of K and V."""
        k, v = (
            tuple(None if x is None else f(x) for x in parts)
            for parts in (self.k, self.v)
        )
        return replace(self, k=k, v=v)

    def row(self, b):
        """The case of one sequence of the batch alone."""
        per_row = ("lengths", "left_padding", "block_table")
        kwargs = dict(self.kwargs)
        for name in per_row:
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name][b : b + 1]
        mask = kwargs.get("mask")
        if isinstance(mask, mx.array) and mask.ndim == 4 and mask.shape[0] > 1:
            kwargs["mask"] = mask[b : b + 1]
        one = replace(self, q=self.q[b : b + 1], kwargs=kwargs)
        if self.kwargs.get("block_table") is not None:
            return one
        return one.map_kv(lambda x: x[b : b + 1])


def random_mask(rng, kind, shape, dtype=mx.float32):
    """A mask that hides about a third of the keys. kind: bool, additive or bias."""
    keep = rng.random(shape) > 0.35
    if kind == "bool":
        return mx.array(keep)
    noise = rng.standard_normal(shape).astype(np.float32)
    if kind == "additive":
        noise = np.where(keep, noise, -np.inf)
    return mx.array(noise.astype(np.float32)).astype(dtype)


def make_stale(x, lengths, left_padding):
    """x with stale rows wherever a sequence has no key."""
    T = x.shape[2]
    exists, _ = visible_keys(
        x.shape[0], 1, T, {"lengths": lengths, "left_padding": left_padding}
    )
    exists = exists.reshape(exists.shape[0], 1, T, *[1] * (x.ndim - 3))
    return mx.where(mx.array(exists), x, mx.array(stale_value(x.dtype), x.dtype))


def make_case(
    B=1,
    N_q=4,
    N_kv=2,
    T_q=1,
    T_kv=65,
    D=64,
    D_v=None,
    k=None,
    v=None,
    dtype=mx.float32,
    scale_dtype=None,
    layout=in_longer_cache,
    sharpness=2.0,
    q_outliers=1.0,
    k_outliers=1.0,
    seed=0,
    **kwargs,
):
    """Random case. K and V lie in views made by layout; absent keys are stale.

    q_outliers and k_outliers scale a few channels, other ones of K than of q.
    """
    rng = np.random.default_rng(seed)
    k, v = k or affine(4), v or k or affine(4)
    scale_dtype = scale_dtype or dtype
    normal = [
        rng.standard_normal(shape).astype(np.float32)
        for shape in (
            (B, N_q, T_q, D),
            (B, N_kv, T_kv, D),
            (B, N_kv, T_kv, D_v or D),
        )
    ]
    normal[0][..., 3::61] *= q_outliers
    normal[1][..., 5::67] *= k_outliers
    q = mx.array(sharpness * normal[0]).astype(dtype)
    case = Case(
        q,
        encode(normal[1], k, scale_dtype),
        encode(normal[2], v, scale_dtype),
        {"scale": D**-0.5, **k.keywords("k"), **v.keywords("v"), **kwargs},
    )
    lengths, padding = kwargs.get("lengths"), kwargs.get("left_padding")
    if lengths is not None or padding is not None:
        case = case.map_kv(lambda x: make_stale(x, lengths, padding))
    return case.map_kv(layout) if layout else case


def to_pages(case, block, spare_blocks=3, seed=0):
    """The same keys in a paged cache: shuffled blocks among stale ones."""
    rng = np.random.default_rng(seed)
    B, _, T_kv = case.k[0].shape[:3]
    per_row = -(-T_kv // block)
    n_blocks = B * per_row + spare_blocks
    table = rng.permutation(n_blocks)[: B * per_row].reshape(B, per_row)

    def paged(x):
        shape = [*x.shape[:2], per_row * block, *x.shape[3:]]
        tail = full_like_stale(x, [*shape[:2], shape[2] - T_kv, *shape[3:]])
        x = mx.concatenate([x, tail], 2).reshape(*shape[:2], per_row, block, *shape[3:])
        pool = full_like_stale(x, [n_blocks, shape[1], block, *shape[3:]])
        pool[mx.array(table.flatten())] = x.swapaxes(1, 2).flatten(0, 1)
        return pool

    kwargs = {"block_table": mx.array(table.astype(np.int32))}
    if case.kwargs.get("lengths") is None:
        kwargs["lengths"] = mx.full((B,), T_kv, mx.int32)
    return case.map_kv(paged).having(**kwargs)
