"""Fonts for class names in any script, and text measurement."""

from __future__ import annotations

import functools
import logging
import unicodedata
from collections.abc import Iterable

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, FontProperties, findfont, fontManager, get_font

logger = logging.getLogger(__name__)

# Comes with matplotlib, and covers Latin, Greek, Cyrillic and more.
_BASE = "DejaVu Sans"
_NO_GLYPH = "□"
# Placeholder fonts, which show the script of a letter instead of the letter.
_PLACEHOLDER_FONT = "Last Resort"
_REGULAR = (400, "normal", "regular", "book")
_warned: set[str] = set()


class Letters:
    """Fonts and sizes for texts in an image.

    Args:
        texts: all texts that will be drawn.
        pixels: font size.

    Attributes:
        families: font names for ``matplotlib.text.Text``; later fonts are fallbacks for missing letters.
        height: line height in pixels.
    """

    def __init__(self, texts: Iterable[str], pixels: float) -> None:
        shown = {letter for text in texts for letter in _clean(text)}
        families, self._missing = _fonts_for(frozenset(shown - _letters_of(_path_of(_BASE))))
        self.families = [_BASE, *families]
        self.pixels = pixels
        self._properties = FontProperties(family=self.families, size=pixels)
        # matplotlib's line height.
        self.height = self._measure("lp")[1]

    def readable(self, text: str) -> str:
        """Replace letters that cannot be drawn."""
        return "".join(_NO_GLYPH if letter in self._missing else letter for letter in _clean(text))

    def width(self, text: str) -> float:
        """Width of a readable text in pixels."""
        return self._measure(text)[0]

    def shortened(self, text: str, room: float) -> str:
        """Truncate a readable text to ``room`` pixels, with an ellipsis."""
        if self.width(text) <= room:
            return text
        low, high = 0, len(text)
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.width(f"{text[:middle].rstrip()}…") <= room
            low, high = (middle, high) if fits else (low, middle - 1)
        return f"{text[:low].rstrip()}…"

    def _measure(self, text: str) -> tuple[float, float]:
        width, height, _ = _renderer().get_text_width_height_descent(text, self._properties, ismath=False)
        return width, height


@functools.lru_cache(maxsize=1)
def _renderer():
    # At 72 dpi, points equal pixels.
    return FigureCanvasAgg(Figure((1, 1), dpi=72)).get_renderer()


def _clean(text: str) -> str:
    """Remove control characters and invisible formatting characters."""
    text = unicodedata.normalize("NFC", text)
    letters = (" " if letter.isspace() else letter for letter in text)
    return "".join(letter for letter in letters if not _is_invisible(letter))


def _is_invisible(letter: str) -> bool:
    return unicodedata.category(letter) in ("Cc", "Cf", "Cs") or "\ufe00" <= letter <= "\ufe0f"


@functools.lru_cache(maxsize=64)
def _fonts_for(letters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Find installed fonts for letters. Returns font names and the letters that no font has, which are logged."""
    families, missing = [], set(letters)
    for entry in sorted(fontManager.ttflist, key=_preference):
        if not missing:
            break
        if entry.name in families or entry.name.startswith(_PLACEHOLDER_FONT) or not missing & _letters_of(entry.fname):
            continue
        # matplotlib looks fonts up by name, and may choose another file of the same name.
        covered = missing & _letters_of(_path_of(entry.name))
        if covered:
            families.append(entry.name)
            missing -= covered
    if missing - _warned:
        _warned.update(missing)
        shown = "".join(sorted(missing)[:20]) + ("..." if len(missing) > 20 else "")
        logger.warning("No installed font has %s: drawn as %s. The Noto fonts cover all scripts.", shown, _NO_GLYPH)
    return tuple(families), frozenset(missing)


def _preference(entry: FontEntry) -> tuple:
    """Sort key of fonts: upright, regular sans-serif fonts first."""
    regular = entry.style == "normal" and entry.variant == "normal" and entry.weight in _REGULAR
    return not regular, "sans" not in entry.name.lower(), entry.name, entry.fname


def _path_of(family: str) -> str:
    try:
        return findfont(FontProperties(family=family), fallback_to_default=False)
    except ValueError:
        return ""


@functools.cache
def _letters_of(path: str) -> frozenset[str]:
    """Return the letters of a font; empty if it cannot be loaded or is a bitmap font, such as many emoji fonts."""
    try:
        font = get_font(path)
        return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()
    except (OSError, RuntimeError, ValueError, TypeError):
        return frozenset()
