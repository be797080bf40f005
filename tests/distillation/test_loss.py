import pytest
import torch

from spar_d2.distillation import distillation_loss, sampled_distillation_loss
from spar_d2.teacher import SampledTarget


def test_mean_squared_difference():
    student, target = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(distillation_loss(student, target), torch.nn.functional.mse_loss(student, target))


def test_half_precision_features_give_a_float32_loss():
    assert distillation_loss(torch.ones(1, 2, 2, 2).half(), torch.zeros(1, 2, 2, 2).bfloat16()).dtype == torch.float32


def test_cells_without_windows_do_not_count_and_have_no_gradient():
    student = torch.randn(1, 3, 2, 2, requires_grad=True)
    weight = torch.tensor([[[[0.5, 0.0], [0.25, 0.0]]]])
    target = SampledTarget(torch.randn(1, 3, 2, 2) * (weight > 0), weight)
    loss = sampled_distillation_loss(student, target)
    loss.backward()
    assert loss.isfinite()
    assert (student.grad[..., 1] == 0).all()
    assert (student.grad[..., 0] != 0).all()


def test_full_weight_is_the_plain_loss():
    student, target = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    sampled = sampled_distillation_loss(student, SampledTarget(target, torch.ones(1, 1, 4, 4)))
    torch.testing.assert_close(sampled, distillation_loss(student, target))


@pytest.mark.parametrize("shape", [(1, 3, 4, 5), (2, 3, 4, 4)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="differ in shape"):
        distillation_loss(torch.zeros(1, 3, 4, 4), torch.zeros(shape))
