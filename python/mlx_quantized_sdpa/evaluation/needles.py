"""Lines hidden in a long text that a model must repeat when asked."""

import random
import string
from collections.abc import Callable
from dataclasses import dataclass

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Needle:
    """A line that gives a key a value.

    Attributes:
        depth (float): Where it stands in the context, 0: at its start.
        question (list of int): Tokens of the line up to the value.
        answer (list of int): Tokens of the value.
    """

    depth: float
    question: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Haystack:
    """A context with needles at even depths, to be asked for after its end."""

    context: list[int]
    needles: list[Needle]


def make_haystack(
    text: str, length: int, count: int, encode: Encode, seed: int = 0
) -> Haystack:
    """``count`` needles among the lines of ``text``.

    Args:
        text (str): Taken from its start, over again where it is too short.
        length (int): Tokens of the context and one line together, at most.
        count (int): Needles.
        encode (callable): Tokens of a text, none added at its ends.
        seed (int): Of the keys and values.

    Raises:
        ValueError: If they do not fit, or the text has no line.
    """
    rng = random.Random(f"{seed} {length}")
    lines = [_Line.draw(rng) for _ in range(count)]
    encoded = [encode(line.text) for line in lines]
    room = length - sum(map(len, encoded)) - max(map(len, encoded), default=0)
    if room < count:
        raise ValueError(
            f"[make_haystack] {count} needles must fit in the length; got {length} "
            "tokens."
        )
    straw = _whole_lines(text, room, encode)
    context: list[int] = []
    needles = []
    for position, (line, tokens) in enumerate(zip(lines, encoded)):
        begin = len(straw) * position // count
        end = len(straw) * (position + 1) // count
        needles.append(_needle(position / count, line, tokens, encode))
        context += tokens
        for piece in straw[begin:end]:
            context += piece
    return Haystack(context, needles)


@dataclass(frozen=True)
class _Line:
    question: str
    text: str

    @classmethod
    def draw(cls, rng: random.Random) -> "_Line":
        key = "".join(rng.choices(string.ascii_uppercase, k=4))
        value = "".join(rng.choices(string.digits, k=6))
        question = f"# recall {key}:"
        return cls(question, f"{question} {value}\n")


def _needle(depth: float, line: _Line, tokens: list[int], encode: Encode) -> Needle:
    # A tokenizer may join the end of the question with the value's beginning.
    asked = encode(line.question + " ")
    begin = 0
    while begin < len(asked) and asked[begin] == tokens[begin]:
        begin += 1
    newline = encode(line.text[:-1])
    return Needle(depth, tokens[:begin], newline[begin:])


def _whole_lines(text: str, room: int, encode: Encode) -> list[list[int]]:
    """Tokens of the first lines of ``text``, together at most ``room``."""
    lines = text.splitlines(keepends=True)
    if not lines:
        raise ValueError("[make_haystack] a text with lines is required; got none.")
    lines[-1] = lines[-1].rstrip("\n") + "\n"
    pieces: list[list[int]] = []
    index = 0
    while True:
        piece = encode(lines[index % len(lines)])
        room -= len(piece)
        if room < 0 or not piece:
            return pieces
        pieces.append(piece)
        index += 1
