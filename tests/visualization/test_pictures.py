import numpy as np
import pytest
import torch
from PIL import Image

from spar_d2.visualization import draw_panels, shared_pca_colors


def test_equal_features_have_equal_colors_in_all_maps():
    one = torch.randn(8, 5, 6)
    colors = shared_pca_colors([one, one[:, :2], torch.randn(8, 3, 3)])
    assert [tuple(c.shape) for c in colors] == [(5, 6, 3), (2, 6, 3), (3, 3, 3)]
    torch.testing.assert_close(colors[0][:2], colors[1])
    assert 0 <= colors[0].min() <= colors[0].max() <= 1


def test_the_first_color_is_the_main_direction():
    features = torch.randn(4, 10, 10) * torch.tensor([10.0, 3.0, 1.0, 0.1]).view(4, 1, 1)
    red = shared_pca_colors([features])[0][..., 0].flatten()
    correlation = torch.corrcoef(torch.stack([red, features[0].flatten()]))[0, 1]
    assert correlation.abs() > 0.95


def test_constant_features_are_no_crash():
    assert shared_pca_colors([torch.ones(4, 2, 2)])[0].isfinite().all()


def test_images_without_three_channels_are_an_error():
    with pytest.raises(ValueError, match="D >= 3"):
        shared_pca_colors([torch.ones(2, 2, 2)])


def test_panels_of_different_sizes_become_one_picture(tmp_path):
    red, blue = np.full((20, 40, 3), (255, 0, 0), np.uint8), np.zeros((30, 30, 3))
    blue[..., 2] = 1
    path = tmp_path / "new" / "panels.png"
    draw_panels([[red, blue], [blue, red]], ["one", "été"], path, {"red": (255, 0, 0), "blue": (0, 0, 255)})
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    for color in ((255, 0, 0), (0, 0, 255)):
        assert (pixels == color).all(1).mean() > 0.1
    assert [p.name for p in path.parent.iterdir()] == ["panels.png"]


def test_rows_must_fit_the_titles(tmp_path):
    with pytest.raises(ValueError, match="every row must have 2"):
        draw_panels([[np.zeros((2, 2, 3))]], ["a", "b"], tmp_path / "p.png")
