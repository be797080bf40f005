"""Letters for names in any script: fonts that have them, and how much room they take."""

from __future__ import annotations

import functools
import logging
import unicodedata
from collections.abc import Iterable

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, FontProperties, findfont, fontManager, get_font

logger = logging.getLogger(__name__)

# It comes with matplotlib: Latin, Greek, Cyrillic and more.
_BASE = "DejaVu Sans"
_NO_GLYPH = "□"
# Fonts that show which script a letter is of, in place of the letter.
_STAND_INS = "Last Resort"
_REGULAR = (400, "normal", "regular", "book")
_warned: set[str] = set()


class Letters:
    """How texts are written in a picture.

    Args:
        texts: all that will be written; fonts are chosen for them.
        pixels: size of the font.

    Attributes:
        families: names of fonts for ``matplotlib.text.Text``; each is asked for what those before it do not have.
        height: of a line, in pixels.
    """

    def __init__(self, texts: Iterable[str], pixels: float) -> None:
        shown = {letter for text in texts for letter in _clean(text)}
        families, self._missing = _fonts_for(frozenset(shown - _letters_of(_path_of(_BASE))))
        self.families = [_BASE, *families]
        self.pixels = pixels
        self._properties = FontProperties(family=self.families, size=pixels)
        # What matplotlib takes for the height of any line.
        self.height = self._measure("lp")[1]

    def readable(self, text: str) -> str:
        """A text without what cannot be drawn."""
        return "".join(_NO_GLYPH if letter in self._missing else letter for letter in _clean(text))

    def width(self, text: str) -> float:
        """Width in pixels of a text that is readable."""
        return self._measure(text)[0]

    def shortened(self, text: str, room: float) -> str:
        """A readable text that is no wider than ``room`` pixels, or else its beginning and an ellipsis."""
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
    # At 72 dots per inch a point is a pixel.
    return FigureCanvasAgg(Figure((1, 1), dpi=72)).get_renderer()


def _clean(text: str) -> str:
    """A text without control characters and marks that only say how others are to be joined or shown."""
    text = unicodedata.normalize("NFC", text)
    kept = (" " if letter.isspace() else letter for letter in text)
    return "".join(letter for letter in kept if not _is_unseen(letter))


def _is_unseen(letter: str) -> bool:
    return unicodedata.category(letter) in ("Cc", "Cf", "Cs") or "\ufe00" <= letter <= "\ufe0f"


@functools.lru_cache(maxsize=64)
def _fonts_for(letters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Names of installed fonts that together have the letters, and the letters that none has, with a warning."""
    families, missing = [], set(letters)
    for entry in sorted(fontManager.ttflist, key=_preference):
        if not missing:
            break
        if entry.name in families or entry.name.startswith(_STAND_INS) or not missing & _letters_of(entry.fname):
            continue
        # matplotlib looks a font up by its name, and may find another file.
        found = missing & _letters_of(_path_of(entry.name))
        if found:
            families.append(entry.name)
            missing -= found
    if missing - _warned:
        _warned.update(missing)
        shown = "".join(sorted(missing)[:20]) + ("..." if len(missing) > 20 else "")
        logger.warning("No installed font has %s: drawn as %s. Noto has fonts for all scripts.", shown, _NO_GLYPH)
    return tuple(families), frozenset(missing)


def _preference(entry: FontEntry) -> tuple:
    """Upright and regular fonts without serifs first."""
    regular = entry.style == "normal" and entry.variant == "normal" and entry.weight in _REGULAR
    return not regular, "sans" not in entry.name.lower(), entry.name, entry.fname


def _path_of(family: str) -> str:
    try:
        return findfont(FontProperties(family=family), fallback_to_default=False)
    except ValueError:
        return ""


@functools.cache
def _letters_of(path: str) -> frozenset[str]:
    """What a font can draw; nothing where it cannot be loaded or, as many of emoji, holds pictures."""
    try:
        font = get_font(path)
        return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()
    except (OSError, RuntimeError, ValueError, TypeError):
        return frozenset()
