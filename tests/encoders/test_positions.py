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


def test_same_count_is_resampled_unless_compatibility_is_asked_for():
    assert not torch.equal(resample_positions(TABLE, (4, 4), (2, 8)), TABLE)
    assert resample_positions(TABLE, (4, 4), (2, 8), raster_if_same_count=True) is TABLE


def test_half_precision_tables_work():
    assert resample_positions(TABLE.half(), (4, 4), (5, 6)).dtype == torch.float16
