"""Key-value lines hidden in text, for the model to remember.

A line reads ``# recall KEYS: 123456``. The first line of a key states its value; each
later line of that key can be completed only by looking the value up in the context.
"""

from dataclasses import dataclass

import numpy as np

KEY_LETTERS = 4
VALUE_DIGITS = 6
_PREFIX = b"# recall "
_SEPARATOR = b": "
_NEWLINE = 10

QUESTION_BYTES = len(_PREFIX) + KEY_LETTERS + len(_SEPARATOR)
LINE_BYTES = QUESTION_BYTES + VALUE_DIGITS + 1

# What a byte is to training: not predictable, ordinary text, or a looked-up answer.
IGNORED, TEXT, ANSWER = 0, 1, 2


@dataclass(frozen=True)
class Pair:
    """A key of capital letters and its value, both as bytes."""

    key: bytes
    value: bytes

    @property
    def question(self) -> bytes:
        """The line up to where the value starts."""
        return _PREFIX + self.key + _SEPARATOR

    @property
    def line(self) -> bytes:
        """The whole line, newline included."""
        return self.question + self.value + b"\n"


def random_pairs(count: int, rng: np.random.Generator) -> list[Pair]:
    """``count`` pairs with keys and values drawn at random."""
    keys = rng.integers(ord("A"), ord("Z") + 1, (count, KEY_LETTERS), np.uint8)
    values = rng.integers(ord("0"), ord("9") + 1, (count, VALUE_DIGITS), np.uint8)
    return [Pair(k.tobytes(), v.tobytes()) for k, v in zip(keys, values, strict=True)]


def line_starts(text: np.ndarray) -> np.ndarray:
    """Positions in ``text`` (uint8 ``[bytes]``) right after a newline."""
    return np.flatnonzero(text == _NEWLINE) + 1


def _kinds_of_line(repeated: bool) -> np.ndarray:
    """uint8 ``[LINE_BYTES]``: the kind of each byte of a recall line."""
    kinds = np.full(LINE_BYTES, IGNORED, np.uint8)
    if repeated:
        kinds[QUESTION_BYTES:] = ANSWER
    return kinds


_STATED = _kinds_of_line(repeated=False)
_ASKED = _kinds_of_line(repeated=True)


def _draw_lines(count: int, rng: np.random.Generator) -> list[tuple[bytes, np.ndarray]]:
    """``count`` lines and their kinds; about half ask for a pair stated before.

    Old pairs are asked for more often: chance alone makes long distances rare.
    """
    fresh = random_pairs(count, rng)
    ask = rng.random(count) < 0.5
    known: list[Pair] = []
    lines = []
    for pair, wants_old in zip(fresh, ask, strict=True):
        if wants_old and known:
            old = known[int(len(known) * rng.random() ** 2)]
            lines.append((old.line, _ASKED))
        else:
            known.append(pair)
            lines.append((pair.line, _STATED))
    return lines


def lines_only(length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A sequence of nothing but recall lines: bytes and kinds, uint8 ``[length]``."""
    lines = _draw_lines(-(-length // LINE_BYTES), rng)
    text = np.frombuffer(b"".join(line for line, _ in lines), np.uint8)
    kinds = np.concatenate([kinds for _, kinds in lines])
    return text[:length], kinds[:length]


def mixed_with_text(
    text: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Up to ``count`` recall lines between the lines of ``text`` (uint8 ``[length]``).

    Returns bytes and kinds, both uint8 ``[length]``: the text's tail gives way.
    """
    starts = line_starts(text)
    count = min(count, len(starts))
    cuts = np.sort(rng.choice(starts, count, replace=False)) if count else []
    pieces, kinds, begin = [], [], 0
    for cut, (line, line_kinds) in zip(cuts, _draw_lines(count, rng), strict=True):
        pieces += [text[begin:cut], np.frombuffer(line, np.uint8)]
        kinds += [np.full(cut - begin, TEXT, np.uint8), line_kinds]
        begin = cut
    pieces.append(text[begin:])
    kinds.append(np.full(len(text) - begin, TEXT, np.uint8))
    return np.concatenate(pieces)[: len(text)], np.concatenate(kinds)[: len(text)]


@dataclass(frozen=True)
class Probe:
    """A context that states pairs at even depths, to be asked for after its end.

    ``context`` is uint8 ``[bytes]``; ``pairs[i]`` stands about ``i / len(pairs)`` of
    the way into it.
    """

    context: np.ndarray
    pairs: list[Pair]


def make_probe(
    text: np.ndarray, length: int, count: int, rng: np.random.Generator
) -> Probe:
    """``count`` pairs in a random stretch of ``text``.

    The context and one asked line together are ``length`` bytes.
    """
    body = length - (count + 1) * LINE_BYTES
    if body < count:
        raise ValueError(f"{count} pairs do not fit in {length} bytes")
    begin = rng.integers(len(text) - body + 1)
    stretch = text[begin : begin + body]
    wanted = np.arange(count) * body // count
    starts = np.concatenate([[0], line_starts(stretch)])
    cuts = starts[np.searchsorted(starts, wanted, side="right") - 1]
    pairs = random_pairs(count, rng)
    pieces, begin = [], 0
    for cut, pair in zip(cuts, pairs, strict=True):
        pieces += [stretch[begin:cut].tobytes(), pair.line]
        begin = cut
    pieces.append(stretch[begin:].tobytes())
    context = np.frombuffer(b"".join(pieces), np.uint8)
    return Probe(_close_last_line(context), pairs)


def _close_last_line(context: np.ndarray) -> np.ndarray:
    """The context with a newline as its last byte, so that a question may follow."""
    closed = context.copy()
    closed[-1] = _NEWLINE
    return closed
