"""The legend of a picture: how it is laid out, and where."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from spar_d2.visualization.fonts import Letters

# More entries than this are summed up in the last.
_MOST_ENTRIES = 60
# Longer names are shortened; in heights of the font.
_LONGEST_NAME = 14
_WIDEST_SHARE = "100.0%"


@dataclass(frozen=True)
class Entry:
    """A class in a legend, its share of the picture as text; what sums up several has no color."""

    name: str
    share: str
    color: tuple[int, int, int] | None


@dataclass(frozen=True)
class Legend:
    """A legend that is laid out; all in pixels.

    Attributes:
        entries: with names as long as there is room for.
        places: left and top of each entry.
        patch: side of a color patch.
        name_at, share_ends_at: offsets of the two texts from an entry's left.
        line: height of an entry.
        width, height: of the whole.
        beside: whether it goes to the right of the picture rather than below.
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
    """A share in 0..1 as text."""
    return "<0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def list_classes(
    shares: Sequence[float], names: Sequence[str], colors: Sequence[tuple[int, int, int]], listed: Sequence[int]
) -> list[Entry]:
    """Entries of a legend.

    Args:
        shares: of the picture, 0..1, for every class.
        names, colors: of every class.
        listed: numbers of the classes to list, in this order; of very many the last are summed up.
    """
    shown = listed if len(listed) <= _MOST_ENTRIES else listed[: _MOST_ENTRIES - 1]
    entries = [Entry(names[number], percent(shares[number]), colors[number]) for number in shown]
    rest = listed[len(shown) :]
    if rest:
        share = percent(sum(shares[number] for number in rest))
        entries.append(Entry(f"{len(rest)} more", share, None))
    return entries


def lay_out(entries: Sequence[Entry], picture: tuple[int, int], letters: Letters) -> Legend:
    """Put entries into rows and columns below or beside a picture, whichever keeps the whole more compact.

    Args:
        entries: at least one.
        picture: (H, W).
        letters: fonts for all of their texts.
    """
    height, width = picture
    unit = letters.pixels
    names = [letters.shortened(letters.readable(entry.name), _LONGEST_NAME * unit) for entry in entries]
    patch, line = math.ceil(0.9 * unit), math.ceil(1.5 * unit)
    name_at = math.ceil(1.4 * unit)
    share_ends_at = math.ceil(name_at + max(map(letters.width, names)) + 0.7 * unit + letters.width(_WIDEST_SHARE))
    margin, between = math.ceil(0.6 * unit), math.ceil(1.6 * unit)
    cell = share_ends_at + between

    def size(columns: int, rows: int) -> tuple[int, int]:
        return 2 * margin + columns * cell - between, 2 * margin + rows * line

    count = len(entries)
    columns = min(max((width - 2 * margin + between) // cell, 1), count)
    below = (columns, math.ceil(count / columns))
    rows = min(max((height - 2 * margin) // line, 1), count)
    aside = (math.ceil(count / rows), rows)
    # Half the way round the whole.
    length_below = max(width, size(*below)[0]) + height + size(*below)[1]
    length_beside = width + size(*aside)[0] + max(height, size(*aside)[1])
    beside = length_beside < length_below
    columns, rows = aside if beside else below
    # Column by column beside the picture, where it has few, and row by row below.
    grid = [(n // rows, n % rows) if beside else (n % columns, n // columns) for n in range(count)]
    places = [(margin + column * cell, margin + row * line) for column, row in grid]
    entries = [Entry(name, entry.share, entry.color) for name, entry in zip(names, entries)]
    return Legend(entries, places, patch, name_at, share_ends_at, line, *size(columns, rows), beside)
