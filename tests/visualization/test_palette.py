import numpy as np
import pytest

from spar_d2.visualization import class_colors


def test_a_thousand_classes_have_colors_of_their_own():
    colors = class_colors(1000)
    assert len(set(colors)) == 1000
    assert all(len(color) == 3 and all(0 <= value <= 255 for value in color) for color in colors)
    assert all(type(value) is int for color in colors for value in color), "JSON takes them as they are"


def test_a_class_keeps_its_color_when_classes_are_added():
    assert class_colors(300)[:7] == class_colors(7) == class_colors([f"class {n}" for n in range(7)])


def test_the_first_thirty_are_far_apart():
    colors = np.array([*class_colors(30), (0, 0, 0), (255, 255, 255)], dtype=float)
    apart = np.linalg.norm(colors[:, None] - colors, axis=-1) + 1e6 * np.eye(len(colors))
    assert apart.min() > 40


@pytest.mark.parametrize("name", ["background", "Background"])
def test_a_background_is_black_and_shifts_the_others(name):
    assert class_colors([name, "cat", "dog"]) == [(0, 0, 0), *class_colors(2)]
    assert (0, 0, 0) not in class_colors(["cat", name])


@pytest.mark.slow
def test_no_class_and_very_many():
    assert class_colors(0) == class_colors([]) == []
    assert len(class_colors(6000)) == 6000
