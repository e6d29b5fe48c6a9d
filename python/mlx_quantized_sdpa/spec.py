"""What a KV cache stores: a short text or :class:`CacheSpec` for each of K and V."""

import re
from dataclasses import dataclass, replace

import mlx.core as mx

from .rotation import check_rotation, rotate, unrotate
from .turbo import turbo_codebook, turbo_dequantize, turbo_quantize

Parts = tuple[mx.array, ...]

# How MLX's modes and the turbo formats are called in a spec.
_FORMAT = r"(?:(?:q|rot)?\d+(?:g\d+)?|(?:mxfp|nvfp|turbo)\d+)"
_PAIR = re.compile(rf"k-?({_FORMAT})v-?({_FORMAT})")
_SINGLE = re.compile(_FORMAT)
_PARTS = re.compile(r"([a-z]*)(\d+)(?:g(\d+))?")
_AFFINE = {"": False, "q": False, "rot": True}
_DENSE = "dense"
_HELP = (
    "a format such as q8, q4g32, rot4, mxfp8, mxfp4, nvfp4 or turbo4, or a pair such "
    "as k8v4 or k8v-turbo3"
)


@dataclass(frozen=True)
class Format:
    """How K or V is stored.

    Attributes:
        mode (str): ``"affine"``, ``"mxfp4"``, ``"mxfp8"``, ``"nvfp4"``, ``"turbo2"``,
          ``"turbo3"`` or ``"turbo4"``, as the op takes it.
        bits (int): Bits a value.
        group_size (int, optional): Values that share a scale. ``None``, of an affine
          format: the largest of 64 and 32 that divides the head dim.
        rotated (bool): Whether a Hadamard rotation comes before quantizing.
        split (int): Where a vector is two that are rotated each by itself: the size of
          the first.
    """

    mode: str
    bits: int
    group_size: int | None = None
    rotated: bool = False
    split: int = 0

    @property
    def is_turbo(self) -> bool:
        return self.mode.startswith("turbo")

    @property
    def is_dense(self) -> bool:
        return self.mode == _DENSE

    def for_head_dim(self, dim: int) -> "Format":
        """This format with its group size chosen.

        Raises:
            ValueError: If the format cannot hold vectors of ``dim`` values.
        """
        if self.is_dense:
            return self
        if self.rotated:
            for part in filter(None, (self.split, dim - self.split)):
                check_rotation(part)
        if (required := self._required(dim)) is not None:
            raise ValueError(
                f"[CacheSpec] {required}; got a head dim of {dim}.{_that_hold(dim)}"
            )
        if self.is_turbo or self.group_size is not None:
            return self
        return replace(self, group_size=32 if dim % 64 else 64)

    def _required(self, dim: int) -> str | None:
        """What a head dim must be, if this one is not."""
        if self.is_turbo:
            if dim * self.bits % 32:
                return f"the head dim times the bits of {self} must be a multiple of 32"
        elif dim % (self.group_size or 32):
            if self.group_size is not None:
                return f"the group size of {self} must divide the head dim"
            return f"a group of 32 must divide the head dim for {self}"
        return None

    def quantize(self, x: mx.array) -> Parts:
        """Codes, scales and, of an affine format, biases of ``x`` ``[..., D]``."""
        if self.is_dense:
            return (x,)
        if self.rotated:
            x = rotate(x, self.split)
        if self.is_turbo:
            return turbo_quantize(x, self.bits)
        parts = mx.quantize(
            x, group_size=self.group_size, bits=self.bits, mode=self.mode
        )
        return tuple(parts)

    def dequantize(self, parts: Parts, dtype: mx.Dtype) -> mx.array:
        """The values ``[..., D]`` that :meth:`quantize` stored, rotated back."""
        if self.is_dense:
            return parts[0]
        codes, scales, *biases = parts
        if self.is_turbo:
            x = turbo_dequantize(codes, scales, self.bits, dtype=dtype)
        else:
            x = mx.dequantize(
                codes,
                scales,
                biases[0] if biases else None,
                group_size=self.group_size,
                bits=self.bits,
                mode=self.mode,
            ).astype(dtype)
        return unrotate(x, self.split) if self.rotated else x

    def __str__(self) -> str:
        if self.mode != "affine":
            return self.mode
        group = "" if self.group_size is None else f"g{self.group_size}"
        return f"{'rot' if self.rotated else 'q'}{self.bits}{group}"


DENSE = Format(_DENSE, 0)


@dataclass(frozen=True)
class LayerRule:
    """Another pair of formats for some layers.

    Attributes:
        where (str): ``"first"``, ``"last"`` or ``"sliding"``.
        count (int): How many layers, counted from that end; 0 for ``"sliding"``.
        formats (tuple(Format, Format)): For K and V.
    """

    where: str
    count: int
    formats: tuple[Format, Format]

    def holds(self, layer: int, layers: int, sliding: bool) -> bool:
        if self.where == "sliding":
            return sliding
        return self.count > (layer if self.where == "first" else layers - 1 - layer)

    def __str__(self) -> str:
        count = self.count or ""
        return f"{self.where}{count}:{_pair_text(self.formats)}"


@dataclass(frozen=True)
class CacheSpec:
    """What the KV cache of a model stores.

    Attributes:
        k (Format): Of K.
        v (Format): Of V.
        recent (int): The newest tokens that stay dense; 0: every token is quantized
          as it is written. Windows that slide quantize every token, with a warning;
          MLA and ``max_kv_size`` refuse it.
        rules (tuple(LayerRule, ...)): Layers that differ; the first that holds counts.
    """

    k: Format
    v: Format
    recent: int = 0
    rules: tuple[LayerRule, ...] = ()

    @classmethod
    def parse(cls, text: "str | CacheSpec") -> "CacheSpec":
        """The spec that a text says; a spec is given back.

        A format is ``q8`` (affine, 8 bits), ``q4g32`` (in groups of 32), ``rot4``
        (affine after a Hadamard rotation), ``mxfp8``, ``mxfp4``, ``nvfp4``, ``turbo4``,
        ``turbo3`` or ``turbo2`` (rotated too). ``k8v4`` and ``k8v-turbo3`` name one for
        K and one for V. After it, any of ``+recent64`` (the newest 64 tokens stay
        dense), ``+first2:q8``, ``+last2:q8`` and ``+sliding:dense`` (other formats, or
        none, for some layers).

        Raises:
            ValueError: If the text says something else.
        """
        if isinstance(text, cls):
            return text
        if not isinstance(text, str):
            raise ValueError(
                f"[CacheSpec] a spec must be a text or a CacheSpec; got {text!r}."
            )
        head, *options = text.strip().lower().split("+")
        formats = _parse_pair(head, text)
        recent, rules = 0, []
        for option in options:
            if found := re.fullmatch(r"recent(\d+)", option):
                recent = int(found[1])
            else:
                rules.append(_parse_rule(option, text))
        return cls(*formats, recent, tuple(rules))

    def formats_for(
        self, layer: int, layers: int, sliding: bool = False
    ) -> tuple[Format, Format]:
        """K's and V's format in one of ``layers`` layers."""
        for rule in self.rules:
            if rule.holds(layer, layers, sliding):
                return rule.formats
        return self.k, self.v

    def __str__(self) -> str:
        recent = [f"recent{self.recent}"] if self.recent else []
        return "+".join([_pair_text((self.k, self.v)), *recent, *map(str, self.rules)])


def _pair_text(formats: tuple[Format, Format]) -> str:
    k, v = formats
    return str(k) if k == v else f"k-{k}v-{v}"


def _parse_pair(text: str, whole: str) -> tuple[Format, Format]:
    if pair := _PAIR.fullmatch(text):
        return _parse_format(pair[1], whole), _parse_format(pair[2], whole)
    if _SINGLE.fullmatch(text) and not text[0].isdigit():
        both = _parse_format(text, whole)
        return both, both
    raise ValueError(
        f"[CacheSpec] a spec must begin with {_HELP}; got {text!r} in {whole!r}."
    )


def _parse_format(text: str, whole: str) -> Format:
    name, bits, group = _PARTS.fullmatch(text).groups()  # type: ignore[union-attr]
    if name == "turbo":
        made = Format(text, int(bits), rotated=True)
    elif name in _AFFINE:
        made = Format(
            "affine", int(bits), int(group) if group else None, rotated=_AFFINE[name]
        )
    else:
        made = Format(text, int(bits), 16 if name == "nvfp" else 32)
    try:
        _try(made)
    except ValueError as error:
        raise ValueError(
            f"[CacheSpec] {text!r} in {whole!r} must be a format that MLX has; got: "
            f"{error}"
        ) from None
    return made


def _try(made: Format) -> None:
    """MLX itself knows which bits, groups and modes there are."""
    if made.is_turbo:
        turbo_codebook(made.bits)
    else:
        group = made.group_size or 64
        mx.quantize(
            mx.zeros((1, 4 * group)), group_size=group, bits=made.bits, mode=made.mode
        )


def _parse_rule(text: str, whole: str) -> LayerRule:
    found = re.fullmatch(r"(?:(first|last)([1-9]\d*)|(sliding)):(.+)", text)
    if not found:
        raise ValueError(
            "[CacheSpec] an option must be recentN, firstN:FORMAT, lastN:FORMAT or "
            f"sliding:FORMAT; got {text!r} in {whole!r}."
        )
    end, count, sliding, formats = found.groups()
    pair = (DENSE, DENSE) if formats == _DENSE else _parse_pair(formats, whole)
    return LayerRule(end or sliding, int(count or 0), pair)


def _that_hold(dim: int) -> str:
    """Which formats can store such a head dim, as a sentence."""
    found = []
    for name in ("q8", "mxfp8", "nvfp4", "turbo4", "turbo3", "turbo2"):
        made = _parse_format(name, name)
        if made._required(dim) is None and not (made.is_turbo and _unrotatable(dim)):
            found.append(name)
    return f" Of such ones there can be {', '.join(found)}." if found else ""


def _unrotatable(dim: int) -> bool:
    try:
        check_rotation(dim)
    except ValueError:
        return True
    return False
