"""How long a decode step takes, in turns with one over the dense cache."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

# One for the caches to be read once, one for what is compiled or allocated at first.
WARM_UP = 2


@dataclass(frozen=True)
class Speed:
    """Of decode steps of the whole model.

    Attributes:
        step_ms: Median of a step.
        dense_ms: Median of a step over the dense cache, taken in turns with these.
        of_dense: Median of a step's share of the dense one of the same turn.
    """

    step_ms: float
    dense_ms: float
    of_dense: float


class StepTimer:
    """Times steps over caches of any length, which are filled and not computed.

    K and V of a short prompt are written over and over, because what a step costs
    depends on how many tokens there are and not on which.

    Args:
        model (nn.Module): Of mlx-lm.
        tokens (sequence of int): The prompt.
        cache (list): Empty dense caches.
    """

    def __init__(self, model: Any, tokens: Sequence[int], cache: list[Any]):
        self.model = model
        self.token = mx.array([tokens[:1]])
        self.written: list[tuple[mx.array, mx.array]] = []
        for member in kv_members(cache):
            self._record(member)
        mx.eval(model(mx.array([tokens]), cache=cache), self.written)

    def _record(self, member: Any) -> None:
        own: Callable[..., Any] = member.update_and_fetch
        place = len(self.written)
        self.written.append((mx.array(0), mx.array(0)))

        def update_and_fetch(keys: mx.array, values: mx.array) -> Any:
            self.written[place] = keys, values
            return own(keys, values)

        member.update_and_fetch = update_and_fetch

    def filled(self, cache: list[Any], length: int) -> list[Any]:
        """The cache, with ``length`` tokens written to it."""
        for member, (keys, values) in zip(kv_members(cache), self.written):
            left = length
            while left:
                count = min(left, keys.shape[2])
                member.update_and_fetch(keys[:, :, :count], values[:, :, :count])
                mx.eval(member.state)
                left -= count
        return cache

    def compare(self, cache: list[Any], dense: list[Any], steps: int) -> Speed:
        """Steps over two caches of one length, which are trimmed where they can be."""
        times: list[tuple[float, float]] = []
        for turn in range(WARM_UP + steps):
            # The second of a pair may find more in the processor's caches.
            if turn % 2:
                other = self._step(dense)
                times.append((self._step(cache), other))
            else:
                times.append((self._step(cache), self._step(dense)))
        times = times[WARM_UP:]
        ours, theirs = zip(*times)
        return Speed(
            statistics.median(ours) * 1e3,
            statistics.median(theirs) * 1e3,
            statistics.median(a / b for a, b in times),
        )

    def _step(self, cache: list[Any]) -> float:
        begin = time.perf_counter()
        mx.eval(self.model(self.token, cache=cache))
        taken = time.perf_counter() - begin
        if all(layer.is_trimmable() for layer in cache):
            for layer in cache:
                layer.trim(1)
        return taken


def kv_members(cache: list[Any]) -> Iterator[Any]:
    """The caches that K and V are written to, also those in lists of several."""
    for layer in cache:
        if hasattr(layer, "caches"):
            yield from kv_members(layer.caches)
        elif hasattr(layer, "update_and_fetch"):
            yield layer
