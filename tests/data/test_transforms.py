import numpy as np
import pytest
from detectron2.data import transforms as T

from reference import reference_image
from spar_d2.data.transforms import build_augmentations

PAPER = {
    "scale_box": (2048, 1024),
    "scale_range": (0.5, 1.0),
    "min_short_side": 512,
    "crop_prob": 0.5,
    "crop_min_fraction": 0.4,
    "crop_min_side": 512,
    "side_multiple": 16,
    "flip_prob": 0.5,
}
EXTENDED = {**PAPER, "scale_box": (2560, 2560), "scale_range": (0.2, 1.0)}
SMALL = {**PAPER, "scale_box": (128, 64), "min_short_side": 32, "crop_min_side": 32, "side_multiple": 4}


class Blank:
    """An image of a size and no pixels: sizes are drawn from it alone."""

    def __init__(self, height: int, width: int) -> None:
        self.shape = (height, width, 3)


def drawn(settings: dict, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Sizes (height, width) as scaled and as cropped, without making pixels."""
    transform = build_augmentations(**settings)[0].get_transform(Blank(height, width))
    resize, crop = transform.transforms[-2:]
    # Every step fits to the one before it.
    size = height, width
    for step in transform.transforms:
        if isinstance(step, T.CropTransform):
            assert 0 <= step.y0 <= size[0] - step.h
            assert 0 <= step.x0 <= size[1] - step.w
            size = step.h, step.w
        else:
            assert (step.h, step.w) == size
            size = step.new_h, step.new_w
    return (resize.new_h, resize.new_w), (crop.h, crop.w)


def sizes(count: int, most: float = 6000, ratio: float = 3.9) -> list[tuple[int, int]]:
    """Random sizes from thumbnails to large photos, of proportions up to ``ratio`` to 1."""
    rng = np.random.default_rng(0)
    areas, ratios = np.exp(rng.uniform(2, np.log(most), count)), ratio ** rng.uniform(-0.5, 0.5, count)
    return [(max(int(area * r), 1), max(int(area / r), 1)) for area, r in zip(areas, ratios)]


@pytest.mark.parametrize("settings", [PAPER, EXTENDED], ids=["paper", "extended"])
def test_sizes_keep_the_rules(settings):
    np.random.seed(0)
    (long_box, short_box), least = settings["scale_box"], settings["min_short_side"]
    results = set()
    for height, width in sizes(1500):
        scaled, kept = drawn(settings, height, width)
        results.add(kept)
        assert all(side % 16 == 0 for side in kept)
        assert all(part <= side for part, side in zip(kept, scaled))
        assert min(scaled) >= least
        assert min(kept) >= 512, "512 is whole patches"
        assert max(kept) <= long_box
        assert min(scaled) == least or (max(scaled) <= long_box and min(scaled) <= short_box)
        if min(height, width) > 100:
            assert max(scaled) / min(scaled) == pytest.approx(max(height, width) / min(height, width), rel=0.02)
    assert len(results) > 700


def test_the_box_is_scaled_evenly_over_its_range():
    np.random.seed(0)
    settings = {**PAPER, "crop_prob": 0.0, "min_short_side": 1}
    wide = [drawn(settings, 100, 300)[0] for _ in range(2000)]
    factors = np.array([width / 2048 for _, width in wide])
    assert 0.5 <= factors.min() < 0.51 < 0.99 < factors.max() <= 1
    assert factors.mean() == pytest.approx(0.75, abs=0.01)
    assert factors.std() == pytest.approx(0.5 / 12**0.5, rel=0.05)
    square = [drawn(settings, 300, 300)[0] for _ in range(500)]
    assert all(512 <= height == width <= 1024 for height, width in square), "the box's short side is the bound"
    upright = drawn(settings, 3000, 1000)[0]
    assert upright[0] == pytest.approx(3 * upright[1], abs=2), "up or down, wide or upright"


def test_small_images_are_enlarged_by_the_box():
    np.random.seed(1)
    assert all(min(drawn(PAPER, 8, 12)[0]) >= 512 for _ in range(50))


def test_enlarged_images_are_not_cropped_at_random():
    np.random.seed(0)
    settings = {**PAPER, "crop_prob": 1.0, "scale_range": (0.5, 0.5)}
    # 3:1 in a box of 1024 x 512 has a short side of 341.
    assert {drawn(settings, 1000, 3000) for _ in range(50)} == {((512, 1536), (512, 1536))}
    # 3:2 fits with a short side of 512.
    assert {drawn(settings, 683, 1024)[0] for _ in range(50)} == {(512, 768)}
    assert len({drawn(settings, 683, 1024)[1] for _ in range(50)}) > 10


@pytest.mark.slow
def test_chances_of_crop_and_flip():
    np.random.seed(0)
    for prob in (0.0, 0.3, 1.0):
        settings = {**PAPER, "scale_range": (1.0, 1.0), "crop_prob": prob, "side_multiple": 1, "flip_prob": prob}
        cropped = [drawn(settings, 1000, 1500)[1] != (1024, 1536) for _ in range(1000)]
        assert np.mean(cropped) == pytest.approx(prob, abs=0.04)
        flip = build_augmentations(**settings)[1]
        flipped = [isinstance(flip.get_transform(np.zeros((4, 4, 3))), T.HFlipTransform) for _ in range(1000)]
        assert np.mean(flipped) == pytest.approx(prob, abs=0.04)


@pytest.mark.slow
def test_sides_of_crops_are_drawn_evenly_and_on_their_own():
    np.random.seed(0)
    settings = {**PAPER, "scale_range": (1.0, 1.0), "crop_prob": 1.0, "side_multiple": 1}
    heights, widths = np.array([drawn(settings, 1000, 1500)[1] for _ in range(3000)]).T
    assert 512 <= heights.min() < 520 < 1016 < heights.max() <= 1024
    assert 615 <= widths.min() < 625 < 1525 < widths.max() <= 1536, "0.4 of 1536 is 614.4"
    assert heights.mean() == pytest.approx((512 + 1024) / 2, rel=0.02)
    assert widths.mean() == pytest.approx((615 + 1536) / 2, rel=0.02)
    assert abs(np.corrcoef(heights, widths)[0, 1]) < 0.06
    tiny = {**settings, "scale_box": (40, 20), "min_short_side": 4}
    assert {drawn(tiny, 10, 20)[1] for _ in range(20)} == {(20, 40)}, "a side below CROP_MIN_SIDE is kept whole"
    exact = {**tiny, "scale_box": (10, 10), "crop_min_fraction": 0.7, "crop_min_side": 1}
    assert {drawn(exact, 10, 10)[1][0] for _ in range(200)} == {7, 8, 9, 10}


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (1, 1), (3, 100000), (17, 1000), (900, 9000), (2, 9)])
@pytest.mark.parametrize("settings", [PAPER, EXTENDED, SMALL], ids=["paper", "extended", "small"])
def test_extreme_proportions_stay_within_bounds(size, settings):
    np.random.seed(0)
    longest, least = settings["scale_box"][0], settings["min_short_side"]
    for _ in range(20):
        scaled, kept = drawn(settings, *size)
        assert 1 <= min(kept) <= max(kept) <= longest
        assert min(scaled) >= least
        assert max(scaled) <= longest + least, "what is scaled is bounded too"
        if max(size) > longest / least * min(size):
            assert kept == ((longest, least) if size[0] > size[1] else (least, longest))


def test_long_images_are_cut_at_places_all_over():
    np.random.seed(0)
    image = np.zeros((10, 1000, 3), np.uint8)
    image[..., 0] = np.linspace(0, 255, 1000).round()
    means = [build_augmentations(**SMALL)[0](T.AugInput(image)).apply_image(image)[..., 0].mean() for _ in range(300)]
    assert min(means) < 15
    assert max(means) > 240
    assert np.mean(means) == pytest.approx(127, abs=12)


@pytest.mark.parametrize("size", [(40, 60), (300, 140), (90, 90), (1, 300), (700, 20)])
def test_images_are_augmented(size):
    np.random.seed(0)
    augmentations = T.AugmentationList(build_augmentations(**SMALL))
    image = reference_image(*size)
    for _ in range(30):
        sample = T.AugInput(image)
        transform = augmentations(sample)
        height, width = sample.image.shape[:2]
        assert sample.image.dtype == np.uint8
        assert height % 4 == width % 4 == 0
        assert 32 <= min(height, width) <= max(height, width) <= 128
        assert np.array_equal(transform.apply_image(image), sample.image), "the transform can be applied again"
    assert np.array_equal(image, reference_image(*size))


def test_crops_are_parts_of_the_scaled_image_from_all_over():
    np.random.seed(0)
    image = np.zeros((64, 128, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(64)[:, None], np.arange(128)[None]
    settings = {**SMALL, "scale_range": (1.0, 1.0), "crop_prob": 1.0, "flip_prob": 0.0}
    corners = []
    for _ in range(200):
        sample = T.AugInput(image)
        T.AugmentationList(build_augmentations(**settings))(sample)
        (height, width), (top, left) = sample.image.shape[:2], sample.image[0, 0, :2].astype(int)
        assert np.array_equal(sample.image, image[top : top + height, left : left + width])
        corners.append((top, left))
    assert (np.max(corners, 0) > (24, 50)).all()
    assert (np.min(corners, 0) == 0).all()


def test_the_same_seed_gives_the_same_image_and_another_another():
    augmentations = T.AugmentationList(build_augmentations(**SMALL))
    results = []
    for seed in (5, 5, 6):
        np.random.seed(seed)
        samples = [T.AugInput(reference_image(50, 70)) for _ in range(4)]
        for sample in samples:
            augmentations(sample)
        results.append([sample.image for sample in samples])
    assert all(np.array_equal(one, two) for one, two in zip(results[0], results[1]))
    assert [image.shape for image in results[0]] != [image.shape for image in results[2]]


def test_sides_below_the_multiple_are_kept():
    settings = {**SMALL, "scale_box": (40, 10), "scale_range": (1.0, 1.0), "min_short_side": 1, "crop_prob": 0.0}
    assert drawn({**settings, "side_multiple": 16}, 10, 40) == ((10, 40), (10, 32))


@pytest.mark.parametrize("kind", [tuple, list])
def test_pairs_may_be_tuples_or_lists(kind):
    pairs = {"scale_box": kind((64, 64)), "scale_range": kind((1, 2))}
    build_augmentations(**{**SMALL, **pairs})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scale_box", (1024, 2048)),
        ("scale_box", (2048, 0)),
        ("scale_box", (2048,)),
        ("scale_box", (2048, 1024, 512)),
        ("scale_box", (2048.5, 1024)),
        ("scale_box", ("2048", "1024")),
        ("scale_box", (True, True)),
        ("scale_box", 2048),
        ("scale_box", "ab"),
        ("scale_range", (0, 1.0)),
        ("scale_range", (1.0, 0.5)),
        ("scale_range", (0.5,)),
        ("scale_range", (0.5, float("nan"))),
        ("scale_range", (0.5, float("inf"))),
        ("scale_range", (0.5, None)),
        ("scale_range", 1.0),
        ("min_short_side", 0),
        ("min_short_side", 1025),
        ("min_short_side", 512.0),
        ("crop_prob", 1.5),
        ("crop_prob", "0.5"),
        ("crop_prob", float("nan")),
        ("flip_prob", -1),
        ("flip_prob", None),
        ("crop_min_fraction", 2),
        ("crop_min_side", -4),
        ("crop_min_side", (512,)),
        ("side_multiple", 0),
        ("side_multiple", 1.5),
    ],
)
def test_wrong_numbers_are_named(name, value):
    with pytest.raises(ValueError, match=rf"SPAR\.DATA\.{name.upper()} must be .*got "):
        build_augmentations(**{**PAPER, name: value})
