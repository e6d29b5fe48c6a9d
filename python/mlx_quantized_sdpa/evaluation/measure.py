"""Runs a model over dense and quantized caches and takes the figures."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from .. import hook
from ..cache import PackedCache
from .metrics import (
    Continuation,
    Predictions,
    compare_continuations,
    log_probabilities,
)
from .needles import make_haystack
from .speed import Speed, StepTimer, kv_members

DENSE = "dense"

# Tokens that a question may need beyond the context's length.
SPARE = 64

# The least that each size may be.
_LEAST = {
    "windows": 0,
    "window_length": 2,
    "prompts": 0,
    "prompt_length": 1,
    "generated": 2,
    "lengths": 1,
    "needles": 1,
    "longest_dense": 0,
    "speed_lengths": 1,
    "steps": 1,
    "chunk": 1,
}


@dataclass(frozen=True)
class Sizes:
    """How much is run; lengths in tokens.

    Attributes:
        windows, window_length: Stretches of text for perplexity.
        prompts, prompt_length, generated: Greedy continuations.
        lengths: Contexts for needles and memory.
        needles: Needles in each context.
        longest_dense: Longest of these for the dense cache; ``None``: all.
        speed_lengths: Tokens in the caches whose decode steps are timed.
        steps: Decode steps timed.
        chunk: Tokens a prefill step.

    Raises:
        ValueError: If one is too small to measure anything.
    """

    windows: int = 4
    window_length: int = 1024
    prompts: int = 4
    prompt_length: int = 256
    generated: int = 256
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    needles: int = 10
    longest_dense: int | None = None
    speed_lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    steps: int = 16
    chunk: int = 512

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            for each in value if isinstance(value, tuple) else (value,):
                if each is not None and each < least:
                    raise ValueError(
                        f"[eval] {name} must be at least {least}; got {each}."
                    )


@dataclass
class AtLength:
    """Figures at one length of the context.

    Attributes:
        right: Whether each needle was found, by depth.
        kv_bytes: Of the cache after prefill.
        prefill_peak: Bytes beyond the model at most, during prefill.
    """

    right: list[bool]
    kv_bytes: int
    prefill_peak: int


@dataclass
class Result:
    """What was found for one kind of cache."""

    spec: str
    predictions: Predictions = field(default_factory=Predictions)
    continuations: list[Continuation] = field(default_factory=list)
    lengths: dict[int, AtLength] = field(default_factory=dict)
    speeds: dict[int, Speed] = field(default_factory=dict)

    def as_record(self, dense: "Result") -> dict[str, Any]:
        """Plain figures, for JSON."""
        found = self.predictions
        record: dict[str, Any] = {"spec": self.spec}
        if found.losses:
            record |= {
                "perplexity": found.perplexity,
                "perplexity_change": (
                    found.perplexity / dense.predictions.perplexity - 1
                ),
                "mean_divergence": found.mean_divergence,
                "divergence_99": found.divergence_quantile(0.99),
                "same_top_token": found.agreement,
                "positions": found.positions,
            }
        record["continuations"] = [asdict(each) for each in self.continuations]
        record["lengths"] = {str(n): asdict(at) for n, at in self.lengths.items()}
        record["speeds"] = {str(n): asdict(at) for n, at in self.speeds.items()}
        return record


class Measurement:
    """A model, its text and the kinds of cache to compare with the dense one.

    Args:
        model (nn.Module): Of mlx-lm.
        encode (callable): Tokens of a text.
        text (str): To predict, continue and hide needles in.
        specs (sequence of str): Kinds of cache.
        sizes (Sizes): How much is run.
        progress (callable, optional): Is called with what is done next.
    """

    def __init__(
        self,
        model: Any,
        encode: Callable[[str], list[int]],
        text: str,
        specs: Sequence[str],
        sizes: Sizes,
        progress: Callable[[str], None] = lambda what: None,
    ):
        self.model = model
        self.encode = encode
        self.text = text
        self.tokens = encode(text)
        self.names = [DENSE, *specs]
        self.sizes = sizes
        self.progress = progress
        self.results = {name: Result(name) for name in self.names}

    def check(self) -> None:
        """Take nothing for granted that would end the run later.

        Raises:
            ValueError: If the text is too short, needles do not fit, or a kind of cache
              cannot hold this model's keys and values.
        """
        sizes = self.sizes
        self._windows(sizes.windows, sizes.window_length)
        self._windows(sizes.prompts, sizes.prompt_length)
        for length in sizes.lengths:
            make_haystack(self.text, length, sizes.needles, self.encode)
        if not self.tokens:
            raise ValueError("[eval] a text with tokens is required; got none.")
        for name in self.names[1:]:
            cache = self.make_cache(name, 1)
            if not any(isinstance(each, PackedCache) for each in kv_members(cache)):
                raise ValueError(
                    "[eval] a model whose KV caches can be quantized is required; with "
                    f"{name} all of them stay as they are."
                )
            mx.eval(self.model(mx.array([self.tokens[:1]]), cache=cache))

    @property
    def pieces(self) -> int:
        """How often ``progress`` is called."""
        sizes, kinds = self.sizes, len(self.names)
        chunks = -(-(sizes.window_length - 1) // sizes.chunk)
        return (
            sizes.windows * chunks * kinds
            + sizes.prompts * kinds
            + sum(1 for _ in self._contexts())
            + len(sizes.speed_lengths) * kinds
        )

    def run(self) -> dict[str, Result]:
        """Everything; results by kind of cache, the dense one first."""
        self.predict()
        self.continue_greedily()
        for name, length in self._contexts():
            self.progress(f"{name}: {length} tokens")
            self.results[name].lengths[length] = self.at_length(name, length)
        self.time_steps()
        return self.results

    def _contexts(self) -> Iterator[tuple[str, int]]:
        longest = self.sizes.longest_dense
        for length in self.sizes.lengths:
            for name in self.names:
                if name != DENSE or longest is None or length <= longest:
                    yield name, length

    def make_cache(self, name: str, length: int) -> list[Any]:
        """An empty cache for each layer."""
        from mlx_lm.models.cache import make_prompt_cache

        if name == DENSE:
            return make_prompt_cache(self.model)
        # Questions and timed steps come after the context.
        capacity = length + self.sizes.steps + SPARE
        return hook.make_prompt_cache(self.model, name, capacity=capacity)

    def predict(self) -> None:
        """Perplexity, divergence and agreement; every key and value is read back."""
        sizes = self.sizes
        for window in self._windows(sizes.windows, sizes.window_length):
            caches = {n: self.make_cache(n, sizes.window_length) for n in self.names}
            for begin in range(0, len(window) - 1, sizes.chunk):
                targets = mx.array(window[begin + 1 : begin + 1 + sizes.chunk])
                asked = mx.array([window[begin : begin + len(targets)]])
                dense = None
                for name, cache in caches.items():
                    self.progress(f"{name}: predicting text")
                    logits = self.model(asked, cache=cache)[0]
                    dense = logits if dense is None else dense
                    self.results[name].predictions.add(logits, targets, dense)

    def continue_greedily(self) -> None:
        """Greedy text, and where it leaves that of the dense cache."""
        sizes = self.sizes
        length = sizes.prompt_length + sizes.generated
        for window in self._windows(sizes.prompts, sizes.prompt_length):
            tokens, margins = [], []
            for name in self.names:
                self.progress(f"{name}: generating text")
                cache = self.make_cache(name, length)
                found, lead = self._greedy(window, cache)
                if name == DENSE:
                    tokens, margins = found, lead
                choices = self._choices(window, tokens, self.make_cache(name, length))
                self.results[name].continuations.append(
                    compare_continuations(found, tokens, margins, choices)
                )

    def at_length(self, name: str, length: int) -> AtLength:
        """Needles, bytes and peak memory in one long context."""
        stack = make_haystack(self.text, length, self.sizes.needles, self.encode)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        cache = self.make_cache(name, length)
        self._prefill(stack.context, cache)
        peak = mx.get_peak_memory() - before
        kv_bytes = sum(layer.nbytes for layer in cache)
        right = [self._finds(needle, cache) for needle in stack.needles]
        return AtLength(right, kv_bytes, peak)

    def time_steps(self) -> None:
        """Decode steps over each kind of cache, in turns with the dense one's."""
        lengths = self.sizes.speed_lengths
        if not lengths:
            return
        chunk = self.tokens[: min(self.sizes.chunk, *lengths)]
        timer = StepTimer(self.model, chunk, self.make_cache(DENSE, len(chunk)))
        for length in lengths:
            dense = timer.filled(self.make_cache(DENSE, length), length)
            for name in self.names:
                self.progress(f"{name}: steps after {length} tokens")
                cache = timer.filled(self.make_cache(name, length), length)
                speed = timer.compare(cache, dense, self.sizes.steps)
                self.results[name].speeds[length] = speed

    def _windows(self, count: int, length: int) -> list[list[int]]:
        """Stretches of the text at even distances."""
        if not count:
            return []
        if len(self.tokens) < length + count:
            raise ValueError(
                f"[eval] a text of at least {length + count} tokens is required; got "
                f"{len(self.tokens)}."
            )
        last = len(self.tokens) - length
        begins = [last * index // max(1, count - 1) for index in range(count)]
        return [self.tokens[begin : begin + length] for begin in begins]

    def _prefill(self, tokens: Sequence[int], cache: list[Any]) -> mx.array:
        """Logits of the last token, ``[vocabulary]``."""
        last: mx.array | None = None
        for begin in range(0, len(tokens), self.sizes.chunk):
            chunk = mx.array([tokens[begin : begin + self.sizes.chunk]])
            last = self.model(chunk, cache=cache)[0, -1]
            mx.eval(last, [layer.state for layer in cache])
        assert last is not None
        return last

    def _greedy(
        self, prompt: Sequence[int], cache: list[Any]
    ) -> tuple[list[int], list[float]]:
        """Greedy tokens, and by how many nats each beats the second choice."""
        tokens, margins = [], []
        logits = self._prefill(prompt, cache)
        for _ in range(self.sizes.generated):
            best = mx.sort(log_probabilities(logits))[-2:]
            token = mx.argmax(logits)
            tokens.append(int(token.item()))  # type: ignore[arg-type]
            margins.append(float((best[1] - best[0]).item()))  # type: ignore[arg-type]
            logits = self.model(token[None, None], cache=cache)[0, -1]
        return tokens, margins

    def _choices(
        self, prompt: Sequence[int], tokens: Sequence[int], cache: list[Any]
    ) -> list[int]:
        """The likeliest token at each place of ``tokens`` after ``prompt``."""
        first = self._prefill(prompt, cache)
        rest = self.model(mx.array([tokens[:-1]]), cache=cache)[0]
        logits = mx.concatenate([first[None], rest])
        choices: Any = mx.argmax(logits, axis=-1).tolist()
        return list(choices)

    def _finds(self, needle: Any, cache: list[Any]) -> bool:
        """Whether greedy decoding would write every token of the answer."""
        asked = needle.question + needle.answer[:-1]
        logits = self._asked(asked, cache)
        guesses = np.array(mx.argmax(logits[-len(needle.answer) :], axis=-1))
        return bool(guesses.tolist() == needle.answer)

    def _asked(self, tokens: Sequence[int], cache: list[Any]) -> mx.array:
        """Logits ``[T, vocabulary]`` after the cache, which is left as it was."""
        if all(layer.is_trimmable() for layer in cache):
            logits: mx.array = self.model(mx.array([tokens]), cache=cache)[0]
            mx.eval(logits)
            for layer in cache:
                layer.trim(len(tokens))
            return logits
        logits = self.model(mx.array([tokens]), cache=copy.deepcopy(cache))[0]
        return logits
