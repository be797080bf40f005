"""Tables as text."""

from collections.abc import Sequence

from tabulate import tabulate


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, style: str = "pipe") -> str:
    """Format a Markdown table, or a text table with the style "plain". Columns after ``left`` are right-aligned."""
    sides = ["left" if number < left else "right" for number in range(len(columns))]
    # Cells are formatted already: "1.0" must not become "1".
    return tabulate(rows, columns, style, colalign=sides, disable_numparse=True)
