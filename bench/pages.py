"""Blocks of a report, as Markdown and as one HTML page that holds everything."""

import base64
import html
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Block:
    """A heading with a text, a table or a figure under it."""

    heading: str
    text: str = ""
    head: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] = field(default_factory=list)
    figure: Path | None = None


def markdown(found: list[Block]) -> str:
    """Every block, pictures by name."""
    lines = ["# Benchmark report", ""]
    for block in found:
        lines += [f"## {block.heading}", ""]
        lines += [block.text, ""] if block.text else []
        if block.head:
            lines += [_row(block.head), "|---" * len(block.head) + "|", *map(_row, block.rows), ""]
        if block.figure:
            lines += [f"![{block.heading}]({block.figure.name})", ""]
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


STYLE = """:root{color-scheme:light dark}
body{font:15px sans-serif;margin:2em auto;max-width:90em;padding:0 1em}table{border-collapse:collapse;
font-size:13px}td,th{border:1px solid #ccc;padding:3px 7px;text-align:right}td:first-child,th{text-align:left}
img{max-width:100%}div{overflow-x:auto}"""


def page(found: list[Block]) -> str:
    """Every block as one HTML page, pictures inside."""
    parts = [f"<!doctype html><meta charset=utf-8><title>Benchmark report</title><style>{STYLE}</style>"]
    parts.append("<h1>Benchmark report</h1>")
    for block in found:
        parts.append(f"<h2>{html.escape(block.heading)}</h2><p>{html.escape(block.text)}</p>")
        if block.head:
            rows = ["".join(f"<th>{html.escape(cell)}</th>" for cell in block.head)]
            rows += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in block.rows]
            parts.append("<div><table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table></div>")
        if block.figure:
            picture = base64.b64encode(block.figure.read_bytes()).decode()
            parts.append(f'<img alt="{html.escape(block.heading)}" src="data:image/png;base64,{picture}">')
    return "\n".join(parts) + "\n"
