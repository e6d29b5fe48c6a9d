"""Charts as SVG text, without a script or a file beside them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Okabe and Ito's colours, which people who see few colours tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")

_WIDTH = 640
_LABELS = 120
_ROW = 26


@dataclass(frozen=True)
class Bar:
    """A bar of a chart: its label, its length, the text at its end, its colour."""

    label: str
    value: float
    text: str
    colour: int = 0


def bars(title: str, rows: Sequence[Bar]) -> str:
    """Horizontal bars from zero; bars below zero go to the left."""
    low = min(0.0, *(row.value for row in rows))
    high = max(0.0, *(row.value for row in rows))
    span = (high - low) or 1.0
    # Texts stand to the right of the longest bar.
    room = _WIDTH - _LABELS - 110
    zero = _LABELS - low / span * room
    parts = []
    for index, row in enumerate(rows):
        y = 8 + index * _ROW
        width = abs(row.value) / span * room
        x = zero if row.value >= 0 else zero - width
        parts += [
            _text(_LABELS - 10, y + 14, row.label, "end"),
            f'<rect x="{x:.1f}" y="{y}" width="{max(width, 1):.1f}" height="18" '
            f'fill="{COLOURS[row.colour % len(COLOURS)]}"/>',
            _text(max(zero, x + width) + 6, y + 14, row.text, "start"),
        ]
    parts.append(_line(zero, 2, zero, 8 + len(rows) * _ROW, "axis"))
    return _svg(title, 16 + len(rows) * _ROW, parts)


@dataclass(frozen=True)
class Line:
    """A line of a chart: its name and its points, ordered."""

    label: str
    points: Sequence[tuple[float, float]]


def lines(title: str, unit: str, all_lines: Sequence[Line]) -> str:
    """Lines over lengths, both axes logarithmic."""
    height, left, right, bottom = 300, 70, 150, 36
    xs = [x for line in all_lines for x, _ in line.points]
    ys = [y for line in all_lines for _, y in line.points]
    x_at = _log_scale(xs, left, _WIDTH - right)
    y_at = _log_scale(ys, height - bottom, 16)
    parts = [_line(left, height - bottom, _WIDTH - right, height - bottom, "axis")]
    for x in sorted(set(xs)):
        parts += [
            _text(x_at(x), height - bottom + 18, short(x), "middle"),
            _line(x_at(x), 16, x_at(x), height - bottom, "grid"),
        ]
    for y in _ticks(ys):
        parts += [
            _text(left - 8, y_at(y) + 4, short(y), "end"),
            _line(left, y_at(y), _WIDTH - right, y_at(y), "grid"),
        ]
    parts.append(_text(left - 8, 12, unit, "end"))
    ends = _spread([y_at(line.points[-1][1]) for line in all_lines], height - 6)
    for index, (line, end) in enumerate(zip(all_lines, ends)):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in line.points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" '
            'stroke-width="2"/>'
        )
        parts += [
            f'<circle cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="3" fill="{colour}"/>'
            for x, y in line.points
        ]
        last = x_at(line.points[-1][0])
        parts.append(_text(last + 8, end + 4, line.label, "start", colour))
    return _svg(title, height, parts)


def grid(title: str, rows: Sequence[str], cells: Sequence[Sequence[bool]]) -> str:
    """Right and wrong by row and depth; right is a full cell, wrong a crossed one."""
    columns = max(map(len, cells))
    size = min(36.0, (_WIDTH - _LABELS) / columns)
    parts = []
    for index, (label, row) in enumerate(zip(rows, cells)):
        y = 4 + index * _ROW
        parts.append(_text(_LABELS - 10, y + 16, label, "end"))
        for column, right in enumerate(row):
            x = _LABELS + column * size
            fill = COLOURS[2] if right else COLOURS[1]
            what = "found" if right else "missed"
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{size - 3:.1f}" height="22" '
                f'fill="{fill}"><title>{escape(label)}, depth '
                f"{column / len(row):.0%}: {what}</title></rect>"
            )
            if not right:
                parts.append(_cross(x, y, size - 3, 22))
    bottom = 4 + len(rows) * _ROW + 14
    parts += [
        _text(_LABELS, bottom, "start", "start"),
        _text(_LABELS + columns * size, bottom, "end", "end"),
    ]
    return _svg(title, bottom + 8, parts)


def short(value: float) -> str:
    """A number for an axis: 8K, 1.5M, 0.02."""
    for size, suffix in ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")):
        if value >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def _log_scale(values: Sequence[float], begin: float, end: float):  # type: ignore[no-untyped-def]
    low, high = math.log(min(values)), math.log(max(values))

    def at(value: float) -> float:
        if high == low:
            return (begin + end) / 2
        return begin + (math.log(value) - low) / (high - low) * (end - begin)

    return at


def _ticks(values: Sequence[float]) -> list[float]:
    """Powers of two within the values, at most six; both ends where that are few."""
    low = math.ceil(math.log2(min(values)))
    high = math.floor(math.log2(max(values)))
    step = max(1, (high - low) // 6 + 1)
    powers = [2.0**power for power in range(low, high + 1, step)]
    if len(powers) > 1:
        return powers
    return sorted({min(values), max(values)})


def _spread(
    positions: Sequence[float], lowest: float, least: float = 15.0
) -> list[float]:
    """Positions moved until none is nearer than ``least`` to another.

    They go down, and up again where they would pass ``lowest``.
    """
    order = sorted(range(len(positions)), key=positions.__getitem__)
    moved = list(positions)
    for above, index in zip(order, order[1:]):
        moved[index] = max(moved[index], moved[above] + least)
    limit = lowest
    for index in reversed(order):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - least
    return moved


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str, colour: str = "") -> str:
    style = f' style="fill:{colour}"' if colour else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>'
        f"{escape(text)}</text>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
        f'class="{kind}"/>'
    )


def _cross(x: float, y: float, width: float, height: float) -> str:
    return (
        f'<path d="M{x:.1f} {y:.1f}l{width:.1f} {height:.1f}m{-width:.1f} 0'
        f'l{width:.1f} {-height:.1f}" class="cross"/>'
    )
