"""Tables of the reports: for the page, whose template takes them as they are, and as Markdown."""

from typing import NamedTuple


class Table(NamedTuple):
    """What stands under it: weak, as ("weakest in ...", the lowest rows), then notes, as (column or row, what it means)."""

    caption: str
    head: list[str]
    rows: list[list[str]]
    notes: list[tuple[str, str]] = []
    weak: list[tuple[str, str]] = []


def markdown(table: Table) -> str:
    """Columns as wide as their widest cell, so that it reads well in a terminal, too."""
    caption, head, rows, notes, weak = table
    # A name from outside may hold the sign that ends a cell.
    lines = [[cell.replace("|", "\\|") for cell in line] for line in [head, *rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    lines.insert(1, ["-" * w for w in widths])
    padded = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines)
    legend = "".join(f"\n* {name}: {meaning}" for name, meaning in [*weak, *notes])
    return f"{caption}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in padded) + (f"\n{legend}" if legend else "")
