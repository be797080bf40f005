import numpy as np
import pytest

from spar_d2.visualization import class_colours


def test_a_thousand_classes_have_colours_of_their_own():
    colours = class_colours(1000)
    assert len(set(colours)) == 1000
    assert all(len(colour) == 3 and all(0 <= value <= 255 for value in colour) for colour in colours)
    assert all(type(value) is int for colour in colours for value in colour), "JSON takes them as they are"


def test_a_class_keeps_its_colour_whatever_follows():
    assert class_colours(300)[:7] == class_colours(7) == class_colours([f"class {n}" for n in range(7)])


def test_the_first_thirty_are_far_apart():
    colours = np.array([*class_colours(30), (0, 0, 0), (255, 255, 255)], dtype=float)
    apart = np.linalg.norm(colours[:, None] - colours, axis=-1) + 1e6 * np.eye(len(colours))
    assert apart.min() > 40


@pytest.mark.parametrize("name", ["background", "Background"])
def test_a_background_is_black_and_shifts_the_others(name):
    assert class_colours([name, "cat", "dog"]) == [(0, 0, 0), *class_colours(2)]
    assert (0, 0, 0) not in class_colours(["cat", name])


def test_no_class_and_very_many():
    assert class_colours(0) == class_colours([]) == []
    assert len(class_colours(6000)) == 6000
