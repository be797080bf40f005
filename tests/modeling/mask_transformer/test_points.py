"""Points on masks agree with pixels: sampling, labels and places in images that are not whole patches."""

import pytest
import torch

from small_mask_transformers import centers
from spar_d2.modeling.mask_transformer.points import look_up, placed, sample, uncertain_points

SIZES = [(5, 7), (1, 1), (1, 9), (16, 16)]


@pytest.mark.parametrize("size", SIZES)
def test_centers_of_pixels_are_their_values(size):
    maps = torch.randn(2, 3, *size)
    points = centers(size).expand(2, -1, -1)
    torch.testing.assert_close(sample(maps, points), maps.flatten(2), rtol=1e-5, atol=1e-5)


def test_between_pixels_is_bilinear():
    maps = torch.tensor([[[[0.0, 4.0], [8.0, 16.0]]]])
    points = torch.tensor([[[0.5, 0.25], [0.25, 0.5], [0.5, 0.5], [0.0, 0.0], [1.0, 1.0]]])
    assert sample(maps, points)[0, 0].tolist() == [2, 4, 7, 0, 16]


@pytest.mark.parametrize("size", SIZES)
def test_labels_at_centers(size):
    labels = torch.randint(0, 9, size)
    assert torch.equal(look_up(labels, centers(size)), labels.flatten())
    many = torch.randint(0, 9, (4, *size))
    assert torch.equal(look_up(many, centers(size)), many.flatten(1))


def test_labels_of_numbered_maps():
    labels, number = torch.randint(0, 99, (3, 6, 8)), torch.tensor([2, 0, 0, 1, 2])
    points = torch.rand(5, 40, 2)
    found = look_up(labels, points, number)
    for index, map_number in enumerate(number.tolist()):
        for place, (x, y) in enumerate(points[index].tolist()):
            assert found[index, place] == labels[map_number, int(y * 6), int(x * 8)]


def test_the_far_border_belongs_to_the_last_pixel():
    labels = torch.arange(12).view(3, 4)
    points = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.9999999, 0.9999999]])
    assert look_up(labels, points).tolist() == [11, 0, 3, 11]


def test_points_of_an_image_with_part_of_a_patch():
    """An image of 20 x 13 pixels is covered by 2 x 3 patches of 8 pixels, with a mask cell in every 4 pixels."""
    height, width, patch = 13, 20, 8
    grid = 2, 3
    cells = torch.randn(1, 1, grid[0] * 2, grid[1] * 2)
    scale = width / (grid[1] * patch), height / (grid[0] * patch)
    found = sample(cells, placed(centers((height, width))[None], scale))[0, 0].view(height, width)
    whole = torch.nn.functional.interpolate(cells, scale_factor=4, mode="bilinear")[0, 0]
    torch.testing.assert_close(found, whole[:height, :width], rtol=1e-5, atol=1e-5)


def test_most_points_are_where_masks_are_uncertain():
    torch.manual_seed(0)
    masks = torch.linspace(-9, 9, 64).expand(2, 16, 64).clone()
    masks[1] -= 6  # the border moves to the right
    points = uncertain_points(masks, 400, (1.0, 1.0))
    assert points.shape == (2, 400, 2) and points.min() >= 0 and points.max() < 1
    distances = sample(masks[:, None], points)[:, 0].abs()
    candidates = sample(masks[:, None], torch.rand(2, 4000, 2))[:, 0].abs()
    # A quarter of three candidates for each point: three quarters of the points are in the nearest 25 %.
    limit = candidates.quantile(0.27, dim=1, keepdim=True)
    near = (distances <= limit).float().mean(1)
    assert (near > 0.75).all() and (near < 0.92).all()
    assert (points[1, :, 0].median() - points[0, :, 0].median()) > 0.2


def test_uncertainty_is_looked_up_within_the_image():
    torch.manual_seed(0)
    masks = torch.full((1, 8, 8), 5.0)
    masks[..., 2] = 0.0  # in the middle of an image that covers 5 of 8 columns
    points = uncertain_points(masks, 300, (5 / 8, 1.0))
    assert (points[0, :225, 0] - 0.5).abs().max() < 0.25


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_points_and_masks(count):
    assert uncertain_points(torch.randn(3, 4, 4), count, (1.0, 1.0)).shape == (3, count, 2)
    assert uncertain_points(torch.randn(0, 4, 4), count, (1.0, 1.0)).shape == (0, count, 2)


def test_points_have_no_gradient():
    masks = torch.randn(2, 4, 4, requires_grad=True)
    assert not uncertain_points(masks, 9, (1.0, 1.0)).requires_grad
