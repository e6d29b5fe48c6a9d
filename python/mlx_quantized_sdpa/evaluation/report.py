"""The results as a table for a terminal and as one HTML page."""

import json
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from .charts import Bar, Line, bars, grid, lines, short

Record = dict[str, Any]

# Its head, and what it shows of one kind of cache.
Column = tuple[str, Callable[[Record], str]]

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --faint: #ddd; --page: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #eee; --faint: #444; --page: #181818 }
  svg { filter: brightness(1.3) }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--page); max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem }
.wide { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--faint);
  white-space: nowrap }
th:first-child, td:first-child { text-align: left }
dl { display: grid; grid-template-columns: max-content auto; gap: 0 1rem }
dd { margin: 0 }
figure { margin: 1rem 0 } figcaption { font-size: .9rem }
svg { width: 100%; max-width: 44rem; height: auto }
svg text { font: 13px system-ui, sans-serif; fill: var(--ink) }
.axis { stroke: var(--ink) } .grid { stroke: var(--faint) }
.cross { stroke: var(--page); stroke-width: 2; fill: none }
"""

_MEANING = """
Perplexity: a token, on the text; every key and value is read back from the cache.
Divergence: Kullback-Leibler, of the next-token distribution from that of the dense
cache. Same top: share of positions with the same likeliest token. Greedy same: tokens
of greedy text until it first differs from that of the dense cache, the least and the
median of the prompts. Same choices: share of that text's tokens that are the likeliest
ones here too, after the same text. Needles: lines found again, of all depths. Peak:
bytes beyond the model at most during prefill. Step: decoding one token by the whole
model, in turns with the dense cache; its share of the dense one's time is below 1 where
it is faster.
"""


def table(report: Record) -> str:
    """The results in Markdown, one line a kind of cache."""
    return markdown(*_cells(report, [*_quality(report), *_cost(report)]))


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown that is one in a terminal too."""
    widths = [max(map(len, column)) for column in zip(heads, *rows)]

    def line(cells: Sequence[str]) -> str:
        aligned = (cell.rjust(width) for cell, width in zip(cells, widths))
        return "| " + " | ".join(aligned) + " |"

    rule = "| " + " | ".join("-" * (width - 1) + ":" for width in widths) + " |"
    return "\n".join([line(heads), rule, *map(line, rows)])


def html(report: Record) -> str:
    """One page with tables and charts, and the record itself in it."""
    tables = "".join(
        _html_table(*_cells(report, columns))
        for columns in (_quality(report), _cost(report))
        if columns
    )
    about = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
        for name, value in report["about"].items()
    )
    figures = "".join(
        f"<h2>{escape(title)}</h2><figure>{chart}</figure>"
        for title, chart in _charts(report["results"])
    )
    record = json.dumps(report).replace("</", "<\\/")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Quantized KV caches</title><style>{STYLE}</style></head><body>"
        "<h1>What quantized KV caches change</h1>"
        f"<dl>{about}</dl>{tables}<p>{escape(_MEANING)}</p>{figures}"
        f'<script type="application/json" id="record">{record}</script>'
        "</body></html>\n"
    )


def _html_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        inside = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{inside}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return (
        f'<div class="wide"><table><thead>{line(heads, "th")}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cells(
    report: Record, columns: Sequence[Column]
) -> tuple[list[str], list[list[str]]]:
    """Heads and lines of a table: the cache's name, and the columns."""
    rows = [
        [result["spec"], *(show(result) for _, show in columns)]
        for result in report["results"]
    ]
    return ["cache", *(head for head, _ in columns)], rows


def _quality(report: Record) -> list[Column]:
    results, columns = report["results"], []
    if any("perplexity" in result for result in results):
        columns += _PREDICTED
    if any(result["continuations"] for result in results):
        columns += _CONTINUED
    lengths = [str(length) for length in report["sizes"]["lengths"]]
    if lengths:
        head = f"needles {_names(lengths)}"
        columns.append((head, lambda r: _by_length(r, lengths, _found)))
    return columns


def _cost(report: Record) -> list[Column]:
    columns: list[Column] = []
    lengths = [str(length) for length in report["sizes"]["lengths"]]
    if lengths:
        columns += [
            ("KV bytes", lambda r: _last(r, lengths, "kv_bytes", "{:,}")),
            (f"peak MiB {_names(lengths)}", lambda r: _by_length(r, lengths, _peak)),
        ]
    timed = [str(length) for length in report["sizes"]["speed_lengths"]]
    if timed:
        names = _names(timed)
        columns += [
            (f"step ms {names}", lambda r: _speeds(r, timed, "step_ms", ".1f")),
            (f"of dense {names}", lambda r: _speeds(r, timed, "of_dense", ".2f")),
        ]
    return columns


def _names(lengths: Sequence[str]) -> str:
    return "/".join(short(int(length)) for length in lengths)


def _shown(name: str, form: str) -> Callable[[Record], str]:
    return lambda result: form.format(result[name]) if name in result else "-"


_PREDICTED: list[Column] = [
    ("perplexity", _shown("perplexity", "{:.4f}")),
    ("change", _shown("perplexity_change", "{:+.3%}")),
    ("divergence", _shown("mean_divergence", "{:.2e}")),
    ("99 %", _shown("divergence_99", "{:.2e}")),
    ("same top", _shown("same_top_token", "{:.2%}")),
]


def _greedy_same(result: Record) -> str:
    same = sorted(each["same"] for each in result["continuations"])
    length = result["continuations"][0]["length"]
    return f"{same[0]}/{same[len(same) // 2]} of {length}"


def _same_choices(result: Record) -> str:
    shares = [each["same_choices"] for each in result["continuations"]]
    return f"{sum(shares) / len(shares):.2%}"


_CONTINUED: list[Column] = [
    ("greedy same", _greedy_same),
    ("same choices", _same_choices),
]


def _by_length(
    result: Record, lengths: Sequence[str], show: Callable[[Record], str]
) -> str:
    found = result["lengths"]
    return "/".join(show(found[n]) if n in found else "-" for n in lengths)


def _speeds(result: Record, lengths: Sequence[str], name: str, form: str) -> str:
    found = result["speeds"]
    return "/".join(f"{found[n][name]:{form}}" if n in found else "-" for n in lengths)


def _last(result: Record, lengths: Sequence[str], name: str, form: str) -> str:
    at = result["lengths"].get(lengths[-1])
    return "-" if at is None else form.format(at[name])


def _found(at: Record) -> str:
    return f"{sum(at['right']) / len(at['right']):.0%}"


def _peak(at: Record) -> str:
    return f"{at['prefill_peak'] / 2**20:.1f}"


def _charts(results: Sequence[Record]) -> list[tuple[str, str]]:
    quantized = results[1:]
    charts = []
    if quantized and "perplexity" in quantized[0]:
        charts += [_change(quantized), _divergence(quantized)]
    if any(result["continuations"] for result in quantized):
        charts.append(_continued(quantized))
    for result in results:
        if result["lengths"]:
            title = f"Needles found, {result['spec']}"
            rows = [short(int(length)) for length in result["lengths"]]
            cells = [at["right"] for at in result["lengths"].values()]
            charts.append((title, grid(title, rows, cells)))
    if any(result["lengths"] for result in results):
        charts += [
            _over_length(
                "Bytes of the cache", "bytes", ("lengths", "kv_bytes"), results
            ),
            _over_length(
                "Peak memory of prefill", "bytes", ("lengths", "prefill_peak"), results
            ),
        ]
    if any(result["speeds"] for result in results):
        charts.append(
            _over_length("A decode step", "ms", ("speeds", "step_ms"), results)
        )
    return charts


def _change(results: Sequence[Record]) -> tuple[str, str]:
    title = "Change of perplexity against the dense cache"
    rows = [
        Bar(r["spec"], r["perplexity_change"], f"{r['perplexity_change']:+.3%}", i)
        for i, r in enumerate(results, 1)
    ]
    return title, bars(title, rows)


def _divergence(results: Sequence[Record]) -> tuple[str, str]:
    title = "Mean divergence from the dense cache, in nats"
    rows = [
        Bar(r["spec"], r["mean_divergence"], f"{r['mean_divergence']:.2e}", i)
        for i, r in enumerate(results, 1)
    ]
    return title, bars(title, rows)


def _continued(results: Sequence[Record]) -> tuple[str, str]:
    title = "Greedy tokens until the text first differs"
    rows = []
    for colour, result in enumerate(results, 1):
        for index, each in enumerate(result["continuations"]):
            text = f"{each['same']} of {each['length']}"
            if each["margin"] is not None:
                text += f", led by {each['margin']:.3f}"
            label = f"{result['spec']}, prompt {index + 1}"
            rows.append(Bar(label, each["same"], text, colour))
    return title, bars(title, rows)


def _over_length(
    title: str, unit: str, where: tuple[str, str], results: Sequence[Record]
) -> tuple[str, str]:
    part, name = where
    drawn = [
        Line(
            result["spec"],
            [(int(n), max(at[name], 1e-9)) for n, at in result[part].items()],
        )
        for result in results
        if result[part]
    ]
    return title, lines(title, unit, drawn)
