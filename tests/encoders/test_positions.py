import pytest
import torch

from spar_d2.encoders.positions import resample_positions

TABLE = torch.randn(16, 6)


def test_native_grid_is_the_table_itself():
    assert resample_positions(TABLE, (4, 4), (4, 4)) is TABLE


@pytest.mark.parametrize("grid", [(1, 1), (2, 8), (7, 3), (13, 40), (1, 100)])
def test_any_grid_and_constants_stay_constant(grid):
    assert resample_positions(TABLE, (4, 4), grid).shape == (grid[0] * grid[1], 6)
    constant = resample_positions(torch.full((16, 6), 2.5), (4, 4), grid)
    torch.testing.assert_close(constant, torch.full_like(constant, 2.5))


def test_an_equal_number_of_positions_is_resampled_except_in_reference_mode():
    assert not torch.equal(resample_positions(TABLE, (4, 4), (2, 8)), TABLE)
    assert resample_positions(TABLE, (4, 4), (2, 8), raster_if_same_count=True) is TABLE


def test_half_precision_tables_work():
    assert resample_positions(TABLE.half(), (4, 4), (5, 6)).dtype == torch.float16


@pytest.mark.parametrize("margin", [0.0, 0.1])
@pytest.mark.parametrize("grid", [(7, 3), (4, 5), (1, 33), (13, 40)])
def test_equals_the_librarys_interpolation(grid, margin):
    table = torch.randn(6 * 4, 5, requires_grad=True)
    image = table.reshape(1, 6, 4, 5).permute(0, 3, 1, 2)
    factors = ((grid[0] + margin) / 6, (grid[1] + margin) / 4)
    wanted = {"scale_factor": factors} if margin else {"size": grid}
    expected = torch.nn.functional.interpolate(image, mode="bicubic", **wanted).flatten(2)[0].T
    with torch.autocast("cpu", torch.bfloat16):
        ours = resample_positions(table, (6, 4), grid, margin)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(ours)
    (gradient,) = torch.autograd.grad((ours * direction).sum(), table)
    (reference,) = torch.autograd.grad((expected * direction).sum(), table)
    torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)
