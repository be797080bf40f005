"""Placement of labels, legends, fonts, and whole pictures; whether they are pleasant is for eyes to say."""

import itertools
import logging
import time

import cv2
import numpy as np
import pytest
from matplotlib import font_manager

from reference import reference_image
from spar_d2.visualization import class_colors, fonts
from spar_d2.visualization.fonts import Letters
from spar_d2.visualization.legend import lay_out, list_classes, percent
from spar_d2.visualization.overlay import draw_overlay
from spar_d2.visualization.placement import Box, Region, find_regions, place_labels

WHITE = (255, 255, 255)


def blobs(height, width, classes, size=40, seed=0):
    """Labels in round regions."""
    rng = np.random.default_rng(seed)
    coarse = rng.standard_normal((classes, max(1, height // size), max(1, width // size))).astype(np.float32)
    return np.stack([cv2.resize(layer, (width, height), interpolation=cv2.INTER_CUBIC) for layer in coarse]).argmax(0)


def picture_of(labels, names=None, **options):
    names = names or [f"class {number}" for number in range(labels.max() + 1)]
    return draw_overlay(reference_image(*labels.shape), labels, names, class_colors(names), **options)


@pytest.mark.parametrize("seed", range(30))
def test_labels_are_inside_the_picture_and_do_not_overlap(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(5, 400, 2)
    numbers = rng.integers(0, 25, 60)
    regions = [
        Region(int(k), *(rng.random(2) * (width, height)), depth=rng.random() * 60, area=rng.random() * 20_000)
        for k in numbers
    ]
    sizes = {k: tuple(rng.integers(1, (120, 30)).tolist()) for k in range(0, 25, 2)}
    boxes = place_labels(regions, sizes, (height, width))
    assert set(boxes) <= set(sizes)
    for number, box in boxes.items():
        assert (box.right - box.left, box.bottom - box.top) == sizes[number]
        assert 0 <= box.left and box.right <= width and 0 <= box.top and box.bottom <= height
    for one, other in itertools.combinations(boxes.values(), 2):
        assert not one.overlaps(other)
    fitting = {k for k, (w, h) in sizes.items() if w <= width and h <= height}
    possible = [r for r in regions if r.number in fitting and r.area >= np.prod(sizes[r.number])]
    assert bool(boxes) == bool(possible)


def test_boxes_overlap_where_they_share_a_pixel():
    box = Box(10, 10, 20, 20)
    assert box.overlaps(Box(19, 19, 30, 30))
    assert box.overlaps(Box(12, 12, 15, 15))
    assert not box.overlaps(Box(20, 10, 30, 20))


def test_the_larger_class_keeps_its_place_and_the_other_moves_or_goes():
    large, small = Region(0, 50, 50, 40, 9000), Region(1, 52, 50, 40, 8000)
    sizes = {0: (40, 10), 1: (40, 10)}
    boxes = place_labels([small, large], sizes, (100, 100))
    assert boxes[0] == Box(30, 45, 70, 55)
    assert not boxes[0].overlaps(boxes[1])
    shallow = Region(1, 52, 50, 3, 8000)
    assert set(place_labels([shallow, large], sizes, (100, 100))) == {0}
    elsewhere = Region(1, 20, 90, 3, 7000)
    assert place_labels([shallow, large, elsewhere], sizes, (100, 100))[1] == Box(0, 85, 40, 95)


def test_regions_are_found_at_their_deepest():
    labels = np.zeros((60, 100), dtype=np.int64)
    labels[10:31, 20:41] = 3
    labels[40:45, 60:65] = 3
    labels[50:, 90:] = 1
    regions = find_regions(labels)
    assert [region.number for region in regions] == [0, 3, 1, 3]
    square = regions[1]
    assert (square.x, square.y) == (30.5, 20.5)
    assert square.depth == pytest.approx(10, abs=0.5)
    assert find_regions(labels, smallest=30)[-1].number == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("height", "width"), [(16, 16), (1, 1), (1, 3000), (3000, 1), (48, 700), (700, 48), (213, 321), (700, 500)]
)
def test_any_size_keeps_the_whole_photo(height, width):
    labels = blobs(height, width, 4, size=30)
    plain = picture_of(labels, legend=False)
    assert plain.shape == (height, width, 3)
    whole = picture_of(labels)
    assert whole.dtype == np.uint8
    assert whole.shape[0] >= height and whole.shape[1] >= width
    left = (whole.shape[1] - width) // 2 if whole.shape[0] > height else 0
    places = {left, 0}
    assert any(np.array_equal(whole[:height, x : x + width], plain) for x in places)


def test_colors_are_blended_and_the_rest_of_a_narrow_picture_is_white():
    image = np.full((40, 40, 3), 100, dtype=np.uint8)
    picture = draw_overlay(image, np.zeros((40, 40), dtype=int), ["a long name"], [(200, 0, 0)], alpha=0.5)
    left = (picture.shape[1] - 40) // 2
    assert left > 0
    assert tuple(picture[39, left]) == (150, 50, 50)
    assert (picture[:40, :left] == WHITE).all()
    patch = (picture[40:] == (200, 0, 0)).all(-1)
    assert 60 < patch.sum() < 200, "a square of the full color in the legend"


def test_the_photo_shows_through_or_not():
    image, labels = reference_image(80, 90), blobs(80, 90, 3, seed=1)
    colors = np.array(class_colors(3), dtype=np.uint8)

    def drawn(alpha):
        return draw_overlay(image, labels, ["", "", ""], [tuple(c) for c in colors.tolist()], alpha, legend=False)

    assert (drawn(0) == image).all(-1).mean() > 0.9
    assert (drawn(1) == colors[labels]).all(-1).mean() > 0.7


def test_labels_are_written_on_large_regions_alone():
    labels = np.zeros((120, 160), dtype=np.int64)
    labels[:4, :4] = 1
    with_label = picture_of(labels, ["wide", "tiny"], legend=False, alpha=0.5)
    black_box = (with_label.max(-1) < 60).any(1)
    assert black_box[50:70].any(), "about the middle"
    assert not black_box[:30].any()


def test_other_pictures_stand_beside():
    labels = blobs(60, 80, 3)
    other = np.full((60, 50, 3), 7, dtype=np.uint8)
    picture = picture_of(labels, legend=False, beside=[other])
    assert picture.shape[0] == 60
    assert (picture[:, -50:] == 7).all()


def test_no_dollar_sign_blank_or_script_breaks_a_picture(caplog):
    labels = blobs(240, 320, 5, size=120)
    names = ["price $5 and $6", "$\\frac{$", "été\tà Noël", "Ωμέγα \U0001f469\u200d\U0001f469", "x" * 500]
    assert picture_of(labels, names).shape[1] == 320, "long names are shortened"
    assert not [record for record in caplog.records if record.name.startswith("matplotlib")]


def entries_of(count, name="class"):
    return list_classes([1 / count] * count, [f"{name} {n}" for n in range(count)], class_colors(count), range(count))


@pytest.mark.slow
@pytest.mark.parametrize("picture", [(16, 16), (480, 640), (640, 480), (1, 3000), (3000, 1), (4000, 6000)])
@pytest.mark.parametrize("count", [1, 7, 200])
def test_entries_of_a_legend_are_inside_and_do_not_overlap(picture, count):
    entries = entries_of(count, "a name")
    letters = Letters([entry.name for entry in entries], 12)
    legend = lay_out(entries, picture, letters)
    boxes = [Box(left, top, left + legend.share_ends_at, top + legend.line) for left, top in legend.places]
    assert len(boxes) == len(entries) == min(count, 60)
    assert all(0 <= box.left and box.right <= legend.width for box in boxes)
    assert all(0 <= box.top and box.bottom <= legend.height for box in boxes)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert legend.width <= picture[1] or legend.beside or len({left for left, _ in legend.places}) == 1


def test_a_legend_is_beside_tall_pictures():
    entries = entries_of(4)
    letters = Letters([entry.name for entry in entries], 12)
    assert lay_out(entries, (3000, 10), letters).beside
    assert not lay_out(entries, (480, 640), letters).beside


def test_very_many_classes_are_summed_up():
    entries = entries_of(100)
    assert len(entries) == 60
    assert (entries[-1].name, entries[-1].share, entries[-1].color) == ("41 more", "41.0%", None)


def test_shares_as_text():
    assert [percent(share) for share in (0, 1e-5, 0.0123, 1)] == ["0.0%", "<0.1%", "1.2%", "100.0%"]


def test_shortened_names_are_as_long_as_there_is_room_for():
    letters = Letters(["a name that is long"], 20)
    short = letters.shortened("a name that is long", 100)
    assert short.startswith("a name") and short.endswith("…")
    assert letters.width(short) <= 100
    assert letters.shortened("a name", 100) == "a name"


def test_letters_that_no_font_has_are_named_once(caplog):
    names = ["cat \U00013000", "\U00013001"]
    for _ in range(3):
        assert Letters(names, 12).readable(names[0]) == "cat □"
        picture_of(blobs(60, 80, 2, size=60), names)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "\U00013000" in warnings[0] and "\U00013001" in warnings[0]


@pytest.fixture
def other_font(tmp_path, monkeypatch):
    """An installed font of a single letter, a Chinese one, as a box."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    for move, point in zip((pen.moveTo, *[pen.lineTo] * 3), ((0, 0), (0, 700), (900, 700), (900, 0))):
        move(point)
    pen.closePath()
    glyph = pen.glyph()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "cat"])
    builder.setupCharacterMap({ord("猫"): "cat"})
    builder.setupGlyf({".notdef": glyph, "cat": glyph})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "cat": (1000, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "One Letter", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200, usWeightClass=400)
    builder.setupPost()
    builder.save(tmp_path / "one.ttf")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", font_manager.fontManager.ttflist[:])
    font_manager.fontManager.addfont(tmp_path / "one.ttf")
    fonts._fonts_for.cache_clear()
    yield "One Letter"
    fonts._fonts_for.cache_clear()


def test_installed_fonts_are_looked_through(other_font, caplog):
    letters = Letters(["猫 neko"], 20)
    assert letters.families == ["DejaVu Sans", other_font]
    assert letters.readable("猫 neko") == "猫 neko"
    assert letters.width("猫") == pytest.approx(20, abs=2)
    white = (picture_of(np.zeros((100, 200), int), ["猫猫猫"], legend=False, alpha=0) == WHITE).all(-1)
    assert white.sum() > 3 * 7 * 10, "three full boxes"
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((4, 5), np.uint8)}, "image must be"),
        ({"labels": np.zeros((4, 6), int)}, "labels must be"),
        ({"labels": np.zeros((4, 5))}, "labels must be integers"),
        ({"labels": np.full((4, 5), 2)}, r"labels .*0\.\.1, got 2\.\.2"),
        ({"colors": [(0, 0, 0)]}, "names and colors"),
        ({"alpha": 1.5}, "alpha must be"),
        ({"beside": [np.zeros((3, 5, 3), np.uint8)]}, "must be 4 pixels high"),
    ],
)
def test_mismatched_arguments_are_an_error(change, message):
    arguments = {
        "image": np.zeros((4, 5, 3), np.uint8),
        "labels": np.zeros((4, 5), int),
        "names": ["a", "b"],
        "colors": [(0, 0, 0), (9, 9, 9)],
    }
    with pytest.raises(ValueError, match=message):
        draw_overlay(**{**arguments, **change})


@pytest.mark.slow
def test_a_large_photo_takes_seconds_and_not_minutes():
    labels = blobs(768, 1024, 20, size=30).repeat(2, 0).repeat(2, 1)
    started = time.perf_counter()
    picture_of(labels)
    assert time.perf_counter() - started < 3


def test_a_background_keeps_the_photo():
    image = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    labels = np.zeros((200, 200), dtype=np.int64)
    labels[:, 150:] = 1
    picture = draw_overlay(image, labels, ["background", "x"], [(0, 0, 0), (255, 0, 0)], legend=False)
    assert (picture[120:, :140] == image[120:, :140]).all()
    assert (picture[120:, 160:] != image[120:, 160:]).any()
