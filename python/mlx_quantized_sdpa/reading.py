"""What one attention reads of a KV cache, and what a cache hands to a model for it.

A model passes K, V and the mask from its cache to attention without looking at them, so
they need not be arrays: K and V stand for quantized tokens, and the mask is a word.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

import mlx.core as mx

from .dense import dense_attention, join_masks, visible_keys
from .merge import merge_attention
from .store import QuantizedStore, Tokens, attend

_View = TypeVar("_View", bound=mx.array)


class CausalMask(str):
    """``"causal"``, as MLX's attention takes it, that may carry a window.

    Attributes:
        window_size (int, optional): A query sees its own position and the
          ``window_size - 1`` before it.
    """

    window_size: int | None

    def __new__(cls, window_size: int | None = None) -> "CausalMask":
        made = super().__new__(cls, "causal")
        made.window_size = window_size
        return made

    def of_dense(self, queries: int, keys: int) -> mx.array | str | None:
        """The same for attention that knows no windows: an array where one hides keys.

        Args:
            queries (int): How many there are, the last of all tokens.
            keys (int): How many there are.
        """
        if self.window_size is None or keys <= self.window_size:
            return "causal"
        return visible_keys((queries, keys), True, self.window_size, None)


@dataclass
class Reading:
    """Quantized tokens, perhaps the newest ones dense, and which of them are seen.

    Attributes:
        store (QuantizedStore): Where the tokens are from.
        tokens (tuple): Parts of K and V, ``[B, N_kv, T_kv, ...]``.
        left_padding (array, optional): int32 ``[B]``: rows before do not exist.
        window_size (int, optional): Of a rotating cache whose rows are in order.
        visible (array, optional): bool, broadcastable to ``[B, N_q, 1, T_kv]``: of a
          rotating cache whose rows are not in order.
        recent (tuple, optional): Dense K and V of the tokens after these.
    """

    store: QuantizedStore
    tokens: Tokens
    left_padding: mx.array | None = None
    window_size: int | None = None
    visible: mx.array | None = None
    recent: tuple[mx.array, mx.array] | None = None

    @property
    def length(self) -> int:
        """How many tokens there are."""
        return self.quantized + (self.recent[0].shape[2] if self.recent else 0)

    @property
    def quantized(self) -> int:
        return self.tokens[0][0].shape[2] if self.tokens[0] else 0

    def attend(
        self,
        q: mx.array,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
        force_fused: bool = False,
        softcap: float | None = None,
    ) -> mx.array:
        """Attention of ``q`` ``[B, N_q, T_q, D]``, the last ``T_q`` tokens' queries.

        Args:
            q (array): The queries.
            scale (float): Of the scores.
            mask (str or array, optional): ``"causal"``, perhaps with a window, or an
              array as the op takes it.
            sinks (array, optional): ``[N_q]``.
            force_fused (bool): Raise where the op has no fused kernel.
            softcap (float, optional): Of the scores.

        Returns:
            array: ``[B, N_q, T_q, D_v]``.
        """
        arguments = self._arguments(scale, mask, force_fused) | {"softcap": softcap}
        if self.recent is None:
            out: mx.array = self.store.attend(q, self.tokens, sinks=sinks, **arguments)
            return out
        return _WithRecent(self, q, sinks, arguments).attend()

    def attend_dense(
        self,
        q: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """:meth:`attend`, over what a model made of all tokens' K and V."""
        arguments = self._arguments(scale, mask, False)
        out: mx.array = dense_attention(q, keys, values, sinks=sinks, **arguments)
        return out

    def _arguments(
        self, scale: float, mask: mx.array | str | None, force_fused: bool
    ) -> dict[str, Any]:
        """Of the op: which tokens are seen, and how."""
        arguments: dict[str, Any] = {"scale": scale, "force_fused": force_fused}
        if isinstance(mask, str):
            arguments["causal"] = True
            window = getattr(mask, "window_size", None)
            arguments["window_size"] = _least(window, self.window_size)
        else:
            arguments["mask"] = mask
        if self.visible is not None:
            # One query, the newest: no row that it must not see but the hidden ones.
            array = mask if isinstance(mask, mx.array) else None
            arguments = {**arguments, "mask": join_masks(array, self.visible)}
            arguments.pop("causal", None)
            arguments.pop("window_size", None)
        if self.left_padding is not None:
            arguments["left_padding"] = self.left_padding
        return arguments

    def dequantize(self) -> tuple[mx.array, mx.array]:
        """Dense K and V ``[B, N_kv, T_kv, D]``, for what cannot read codes."""
        parts = [self.store.dequantize(self.tokens)] if self.quantized else []
        parts += [self.recent] if self.recent else []
        k, v = (mx.concatenate(list(each), axis=2) for each in zip(*parts))
        return k, v


class _WithRecent:
    """Attention over quantized tokens and dense newer ones, merged."""

    def __init__(
        self,
        reading: Reading,
        q: mx.array,
        sinks: mx.array | None,
        arguments: dict[str, Any],
    ):
        self.reading = reading
        self.q = q
        self.sinks = sinks
        self.arguments = arguments

    def attend(self) -> mx.array:
        reading, first = self.reading, self.reading.length - self.q.shape[2]
        if not reading.quantized:
            assert reading.recent is not None
            out: mx.array = dense_attention(
                self.q, *reading.recent, sinks=self.sinks, **self.arguments
            )
            return out
        # Queries among the quantized tokens see no newer ones.
        old = max(0, reading.quantized - first) if self.causal else 0
        outputs = []
        if old:
            outputs.append(
                reading.store.attend(
                    self.q[:, :, :old],
                    reading.tokens,
                    sinks=self.sinks,
                    **self.arguments,
                )
            )
        if old < self.q.shape[2]:
            outputs.append(self._attend_both(self.q[:, :, old:]))
        return mx.concatenate(outputs, axis=2) if len(outputs) > 1 else outputs[0]

    @property
    def causal(self) -> bool:
        return bool(self.arguments.get("causal"))

    def _attend_both(self, q: mx.array) -> mx.array:
        reading, count = self.reading, self.reading.quantized
        assert reading.recent is not None
        old, new = dict(self.arguments), dict(self.arguments)
        old.pop("causal", None)
        window = old.pop("window_size", None)
        if window is not None:
            position = mx.arange(reading.length - q.shape[2], reading.length)
            old["mask"] = mx.arange(count) > position[:, None] - window
        elif isinstance(mask := self.arguments.get("mask"), mx.array):
            old["mask"], new["mask"] = mask[..., :count], mask[..., count:]
        if reading.left_padding is not None:
            new["left_padding"] = reading.left_padding - count
        parts = [
            reading.store.attend(
                q, reading.tokens, sinks=self.sinks, return_lse=True, **old
            ),
            dense_attention(q, *reading.recent, return_lse=True, **new),
        ]
        return merge_attention(*zip(*parts))[0]


class KVView:
    """Stands for K or V of a quantized cache; used as an array, it is dequantized."""

    __slots__ = ("reading", "operand", "cast")

    def __init__(self, reading: Reading, operand: int, cast: mx.Dtype | None = None):
        self.reading = reading
        self.operand = operand
        self.cast = cast

    @property
    def shape(self) -> tuple[int, ...]:
        reading = self.reading
        parts = reading.tokens[0] or reading.recent
        assert parts is not None
        dim = reading.store.dims[self.operand]
        return (*parts[0].shape[:2], reading.length, dim)

    @property
    def dtype(self) -> mx.Dtype:
        store = self.reading.store
        found = self.cast or (store.dtype_v if self.operand else store.dtype)
        assert found is not None
        return found

    @property
    def ndim(self) -> int:
        return 4

    def goes_with(self, values: Any) -> bool:
        """Whether this is K and the other V of the same tokens."""
        if not isinstance(values, KVView) or values.reading is not self.reading:
            return False
        return values.operand > self.operand

    def array(self) -> mx.array:
        """The values, dense."""
        return self.reading.dequantize()[self.operand].astype(self.dtype)

    def astype(self, dtype: mx.Dtype, **others: Any) -> "KVView":
        """The same tokens: attention computes in the queries' type in any case."""
        return type(self)(self.reading, self.operand, dtype)

    def __getitem__(self, key: Any) -> mx.array:
        return self.array()[key]

    def __getattr__(self, name: str) -> Any:
        if name in KVView.__slots__:
            raise AttributeError(name)
        return getattr(self.array(), name)


def attend_views(
    q: mx.array,
    keys: KVView | mx.array,
    values: KVView | mx.array,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention where a model has made an array of K or V alone, or has mixed them.

    Raises:
        ValueError: If K and V are of a cache in blocks, whose rows end anywhere.
    """
    view = keys if isinstance(keys, KVView) else values
    assert isinstance(view, KVView)
    if not isinstance(view.reading, Reading):
        raise ValueError(
            "[mlx_quantized_sdpa] K and V of a cache in blocks must reach attention as "
            f"they are; got {type(keys).__name__} and {type(values).__name__}."
        )
    k, v = (x.array() if isinstance(x, KVView) else x for x in (keys, values))
    return view.reading.attend_dense(q, k, v, scale, mask, sinks)


class LatentView(mx.array):
    """The latents of an MLA cache: their values, unless attention knows better.

    The values are computed only where something other than attention asks for them.
    """

    reading: Reading


class RopeView(mx.array):
    """The rotary parts of an MLA cache. ``q @ this.swapaxes(-1, -2)`` remembers q."""

    reading: Reading

    def swapaxes(self, *axes: Any, **keywords: Any) -> "RopeView":
        return _view(RopeView, super().swapaxes(*axes, **keywords), self.reading)

    def __rmatmul__(self, q: mx.array) -> "RopeScores":
        made = _view(RopeScores, mx.matmul(q, self), self.reading)
        made.queries = q
        return made


class RopeScores(mx.array):
    """Scores of the rotary parts, which a model hands to attention as its mask."""

    reading: Reading
    queries: mx.array


class Projected(mx.array):
    """Latents that a model has projected to heads; attention projects q instead."""

    reading: Reading
    module: Any


def _view(kind: type[_View], values: mx.array, reading: Reading) -> _View:
    made: Any = kind(values)
    made.reading = reading
    found: _View = made
    return found


def kv_views(reading: Reading) -> tuple[KVView, KVView]:
    """K and V as models get them."""
    return KVView(reading, 0), KVView(reading, 1)


def latent_views(reading: Reading) -> tuple[LatentView, RopeView]:
    """Latents and rotary parts as models with MLA get them."""
    latents, rope = reading.dequantize()
    return _view(LatentView, latents, reading), _view(RopeView, rope, reading)


def project(module: Any, latents: LatentView, values: mx.array) -> Projected:
    """``values``, which ``module`` made of ``latents``, with a note of that."""
    made = _view(Projected, values, latents.reading)
    made.module = module
    return made


def attend_latents(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    scores: RopeScores,
    force_fused: bool = False,
) -> mx.array:
    """MLA's attention on the latents themselves, however the model meant to do it.

    Args:
        q (array): Queries without their rotary part, ``[B, N_q, T_q, D]``.
        keys (LatentView or Projected): The latents, or K made of them.
        values (LatentView or Projected): The latents, or V made of them.
        scale (float): Of the scores.
        scores (RopeScores): Those of the rotary parts, scaled.
        force_fused (bool): Raise where the op has no fused kernel.

    Returns:
        array: ``[B, N_q, T_q, D_v]``, of latents where ``values`` are.
    """
    if isinstance(keys, Projected):
        q = keys.module(q)
    whole = mx.concatenate([q, scores.queries / scale], axis=-1).astype(q.dtype)
    out = scores.reading.attend(whole, scale, CausalMask(), force_fused=force_fused)
    if isinstance(values, Projected):
        projected: mx.array = values.module(out)
        return projected
    return out


def attend_masked_latents(
    q: mx.array, keys: LatentView, scale: float, mask: Any, force_fused: bool
) -> mx.array:
    """Attention on the latents with the rotary parts' scores in an array mask."""
    reading = keys.reading
    latents = reading.tokens[1]
    made = reading.store.formats[1]
    out: mx.array = attend(
        q,
        latents,
        latents,
        (made, made),
        scale=scale,
        mask=join_masks(mask, reading.visible),
        left_padding=reading.left_padding,
        force_fused=force_fused,
    )
    return out


def _least(a: int | None, b: int | None) -> int | None:
    return min((x for x in (a, b) if x is not None), default=None)
