"""Layout of legends. Those of matplotlib have one text per entry, and their size is known only when they are drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from spar_d2.visualization.fonts import Letters

# If there are more entries, the last one summarizes the rest.
_MAX_ENTRIES = 60
# Maximum width of names, as a multiple of the font size. Longer names are truncated.
_MAX_NAME_WIDTH = 14
_WIDEST_PERCENTAGE = "100.0%"


@dataclass(frozen=True)
class Entry:
    """An entry of a legend: class name, area as text, and color. A summary of several classes has no color."""

    name: str
    share: str
    color: tuple[int, int, int] | None


@dataclass(frozen=True)
class Legend:
    """A legend with its layout in pixels.

    Attributes:
        entries: entries, with truncated names.
        places: left and top of each entry.
        patch: side of the color patches.
        name_at, share_ends_at: horizontal offsets of the name's left and the area's right end.
        line: height of an entry.
        width, height: size of the legend.
        beside: whether the legend goes to the right of the image rather than below.
    """

    entries: Sequence[Entry]
    places: Sequence[tuple[int, int]]
    patch: int
    name_at: int
    share_ends_at: int
    line: int
    width: int
    height: int
    beside: bool


def percent(share: float) -> str:
    """Format a fraction in 0..1."""
    return "<0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def list_classes(
    shares: Sequence[float], names: Sequence[str], colors: Sequence[tuple[int, int, int]], listed: Sequence[int]
) -> list[Entry]:
    """Create the entries of a legend.

    Args:
        shares: fraction of the image, 0..1, of every class.
        names, colors: name and color of every class.
        listed: classes to list, in order. If there are too many, the last ones are summarized.
    """
    shown = listed if len(listed) <= _MAX_ENTRIES else listed[: _MAX_ENTRIES - 1]
    entries = [Entry(names[number], percent(shares[number]), colors[number]) for number in shown]
    rest = listed[len(shown) :]
    if rest:
        share = percent(sum(shares[number] for number in rest))
        entries.append(Entry(f"{len(rest)} more", share, None))
    return entries


def lay_out(entries: Sequence[Entry], picture: tuple[int, int], letters: Letters) -> Legend:
    """Arrange entries in rows and columns below or beside an image, whichever is more compact.

    Args:
        entries: one or more entries.
        picture: (H, W) of the image.
        letters: fonts for the texts of all entries.
    """
    height, width = picture
    unit = letters.pixels
    names = [letters.shortened(letters.readable(entry.name), _MAX_NAME_WIDTH * unit) for entry in entries]
    patch, line = math.ceil(0.9 * unit), math.ceil(1.5 * unit)
    name_at = math.ceil(1.4 * unit)
    share_ends_at = math.ceil(name_at + max(map(letters.width, names)) + 0.7 * unit + letters.width(_WIDEST_PERCENTAGE))
    margin, between = math.ceil(0.6 * unit), math.ceil(1.6 * unit)
    cell = share_ends_at + between

    def size(columns: int, rows: int) -> tuple[int, int]:
        return 2 * margin + columns * cell - between, 2 * margin + rows * line

    count = len(entries)
    columns = min(max((width - 2 * margin + between) // cell, 1), count)
    below = (columns, math.ceil(count / columns))
    rows = min(max((height - 2 * margin) // line, 1), count)
    aside = (math.ceil(count / rows), rows)
    # Half of the perimeter of the result.
    length_below = max(width, size(*below)[0]) + height + size(*below)[1]
    length_beside = width + size(*aside)[0] + max(height, size(*aside)[1])
    beside = length_beside < length_below
    columns, rows = aside if beside else below
    # Beside the image, entries are ordered by column; below it, by row.
    grid = [(n // rows, n % rows) if beside else (n % columns, n // columns) for n in range(count)]
    places = [(margin + column * cell, margin + row * line) for column, row in grid]
    entries = [Entry(name, entry.share, entry.color) for name, entry in zip(names, entries)]
    return Legend(entries, places, patch, name_at, share_ends_at, line, *size(columns, rows), beside)
