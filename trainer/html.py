"""A page in one file: text, style, data and script. It loads nothing from the network, and its own policy forbids it.

The colours follow the reader's system, light or dark, and the text stays readable on a phone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from math import ceil, floor, log10

COLOURS = ("#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#edc948", "#b07aa1")
"""Colours of lines and bars in figures: neighbours differ most."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
STYLE = """\
:root { color-scheme: light dark; --text: #1b1f24; --ground: #fff; --panel: #f4f5f7; --line: #c9ced6; --quiet: #59616d;
  --accent: #1f5fbf; --good: #1a7f37; --fair: #8a5a00; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ee; --ground: #14171c; --panel: #1f242c; --line: #3d4551;
  --quiet: #a3acb9; --accent: #7db0ff; --good: #57c273; --fair: #e3b341; --bad: #ff8a80; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em; color: var(--text);
  background: var(--ground); }
table { border-collapse: collapse; margin: 1em 0; } td, th { border-bottom: 1px solid var(--line); padding: .3em .7em; }
td { text-align: right; } td:first-child, th { text-align: left; } img, svg { max-width: 100%; height: auto; }
.problem { color: var(--bad); } code { background: var(--panel); overflow-wrap: anywhere; }"""


def page(title: str, body: str, *, style: str = "", script: str = "", data: object = None, mark: str = "") -> str:
    """The file's text.

    body: HTML. style: added to `STYLE`. data: JSON that the script reads from the element #data. mark: an HTML comment
    by which a program recognises its own page.
    """
    parts = [
        f'<!doctype html>{mark}\n<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>\n<style>{STYLE}\n{style}</style></head>\n<body>\n{body}",
    ]
    if data is not None:
        # Inside a script only its end tag is special.
        text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
        parts.append(f'<script type="application/json" id="data">{text}</script>')
    if script:
        parts.append(f"<script>\n{script}</script>")
    return "\n".join([*parts, "</body></html>\n"])


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}</table>"


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from `low` to `high`, about `count`: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** floor(log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(number * step, 10) for number in range(ceil(low / step), floor(high / step) + 1)]
