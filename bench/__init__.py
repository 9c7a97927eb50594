"""Benchmarks: what is modelled and measured, each by one command."""

from pathlib import Path

DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"


def write(command: str, lines: list[str]) -> None:
    """Put a command's table where docs/performance.md names the command."""
    start, end = f"<!-- {command} -->\n", "<!-- end -->\n"
    before, rest = DOCUMENT.read_text().split(start)
    DOCUMENT.write_text(before + start + "".join(line + "\n" for line in lines) + end + rest.split(end, 1)[1])
