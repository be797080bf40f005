import itertools

import pytest
import torch
import torch.nn.functional as F

from reference import cells_of, example_encoder, golden_input, golden_names, load_golden, reference_encoder
from spar_d2.distillation import distillation_loss, sampled_distillation_loss
from spar_d2.encoders import FAMILIES
from spar_d2.teacher import SlidingWindowTeacher, WindowPlan, sliding_window_features


@pytest.mark.slow
@pytest.mark.parametrize("compat", [True, False])
@pytest.mark.parametrize("name", golden_names("D_openclip-tiny") + golden_names("D_siglip-tiny"))
def test_target_of_the_reference(name, compat):
    arrays, meta = load_golden(name)
    encoder = reference_encoder(meta["model"], reference_compat=compat)
    teacher = SlidingWindowTeacher(encoder, window=meta["window"], stride=meta["stride"], batch_size=7)
    target = teacher(golden_input(arrays, encoder))
    expected = torch.from_numpy(arrays["target"]).permute(0, 3, 1, 2)
    torch.testing.assert_close(target, expected, rtol=0, atol=1e-4)
    plan = teacher.plan(*meta["image"])
    assert plan.counts.tolist() == arrays["count"][0, 0].tolist()
    assert plan.factor == meta["upsample_factor"]
    assert len(plan) == meta["n_windows"]


@pytest.fixture(params=sorted(FAMILIES))
def encoder(request):
    torch.manual_seed(0)
    return example_encoder(request.param)


def stitched_by_hand(encoder, x, plan: WindowPlan) -> torch.Tensor:
    """Window by window, for one image of whole patches."""
    total = torch.zeros(encoder.embed_dim, *plan.mosaic_size)
    count = torch.zeros(plan.mosaic_size)
    cells = plan.window_cells
    for top, left in plan.origins.tolist():
        features = encoder(x[..., top : top + plan.window, left : left + plan.window])
        fine = F.interpolate(features, size=(cells, cells), mode="bilinear", align_corners=False)[0]
        place = (slice(top // plan.cell, top // plan.cell + cells), slice(left // plan.cell, left // plan.cell + cells))
        total[:, place[0], place[1]] += fine
        count[place] += 1
    size = (plan.height // plan.patch, plan.width // plan.patch)
    return F.interpolate((total / count)[None], size=size, mode="bilinear", align_corners=False)


@pytest.mark.slow
@pytest.mark.parametrize("stride", [5, 12, 24, 64])
def test_equals_stitching_window_by_window(encoder, stride):
    window = 4 * encoder.patch_size
    x = torch.randn(2, 3, 6 * encoder.patch_size, 7 * encoder.patch_size)
    teacher = SlidingWindowTeacher(encoder, window, stride, batch_size=5)
    with torch.no_grad():
        expected = torch.cat([stitched_by_hand(encoder, image[None], teacher.plan(*x.shape[-2:])) for image in x])
    torch.testing.assert_close(teacher(x), expected, rtol=1e-4, atol=1e-4)


SIZES = [(30, 200), (64, 64), (70, 100), (203, 71)]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "compat"), [((1, 1), False), *itertools.product(SIZES, (True, False))])
def test_any_size_gives_the_students_grid(encoder, size, compat):
    encoder.reference_compat = compat
    target = SlidingWindowTeacher(encoder, stride=24)(torch.randn(1, 3, *size))
    # The authors' teacher drops partial patches, even where their student pads them.
    grid = tuple(side // encoder.patch_size for side in size) if compat else encoder.grid(*size)
    assert target.shape == (1, encoder.embed_dim, *grid)
    assert target.isfinite().all()


@pytest.mark.slow
def test_memory_does_not_hold_all_windows(encoder):
    """No more than a batch of windows is ever encoded at once."""
    batches = []
    encoder.register_forward_hook(lambda module, inputs, output: batches.append(len(inputs[0])))
    sliding_window_features(encoder, torch.randn(2, 3, 128, 160), stride=16, batch_size=6)
    assert max(batches) == 6
    assert sum(batches) == 2 * 5 * 7


def test_frozen_and_independent_of_the_student(encoder):
    teacher = SlidingWindowTeacher(encoder, stride=24)
    x = torch.randn(1, 3, 64, 96)
    before = teacher(x)
    assert not before.requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in encoder.parameters())
    assert not teacher.train().training
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(1)
    assert torch.equal(teacher(x), before)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"window": 8}, "WINDOW"),
        ({"window": 40}, "WINDOW"),
        ({"window": -64}, "WINDOW"),
        ({"stride": 0}, "STRIDE"),
        ({"stride": -3}, "STRIDE"),
        ({"stride": 65, "window": 64}, "STRIDE"),
        ({"batch_size": -1}, "BATCH_SIZE"),
    ],
)
def test_wrong_windows_are_named(encoder, arguments, key):
    with pytest.raises(ValueError, match=rf"SPAR\.TEACHER\.{key}"):
        SlidingWindowTeacher(encoder, **arguments)


@pytest.mark.slow
def test_sampled_targets_average_to_the_full_one_over_all_draws(encoder):
    """Exact, over all pairs of windows by their chance: the target, its weight, and the gradient of the loss."""
    p = encoder.patch_size
    teacher = SlidingWindowTeacher(encoder, window=4 * p, stride=p + p // 2)
    x = torch.randn(1, 3, 6 * p, 7 * p)
    chance = teacher.plan(*x.shape[-2:]).probability
    student = torch.randn(1, encoder.embed_dim, 6, 7, requires_grad=True)
    full = torch.autograd.grad(distillation_loss(student, target := teacher(x)), student)[0]

    gradient, target_mean, weight_mean = torch.zeros_like(full), torch.zeros_like(full), 0
    for pair in itertools.product(range(len(chance)), repeat=2):
        picks = torch.tensor([pair])
        sample = teacher.encode_windows(x, picks, 1 / (2 * chance[picks]))
        share = float(chance[pair[0]] * chance[pair[1]])
        gradient += share * torch.autograd.grad(sampled_distillation_loss(student, sample), student)[0]
        target_mean += share * sample.weighted_sum
        weight_mean = weight_mean + share * sample.weight
    torch.testing.assert_close(gradient, full, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(target_mean, target, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weight_mean, torch.ones_like(weight_mean), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("windows", [1, 3, 8])
def test_gradients_of_many_samples_average_to_the_full_one(windows):
    """The same for randomly drawn windows, within the remaining noise."""
    torch.manual_seed(0)
    encoder = example_encoder(sorted(FAMILIES)[0])
    teacher = SlidingWindowTeacher(encoder, window=64, stride=24)
    x = torch.randn(1, 3, 112, 160)
    # Every window is encoded once; the draws are put together from them.
    plan = teacher.plan(112, 160)
    single = [teacher.encode_windows(x, torch.tensor([[w]]), torch.ones(1, 1)) for w in range(len(plan))]
    draws = plan.spread(windows, torch.rand(20000, 2, generator=torch.Generator().manual_seed(1)))
    often = draws.flatten().bincount(minlength=len(plan)) / draws.numel()
    torch.testing.assert_close(often.double(), plan.probability, rtol=0.1, atol=2e-3)
    mean = sum(share * sample.weighted_sum / chance for share, sample, chance in zip(often, single, plan.probability))
    target = teacher(x)
    assert (mean - target).square().mean().sqrt() < 0.03 * target.std()


def test_windows_are_spread_over_the_image():
    plan = WindowPlan(height=256, width=256, window=64, stride=12, patch=8)
    generator = torch.Generator().manual_seed(0)
    spread = plan.spread(16, torch.rand(200, 2, generator=generator))
    apart = torch.multinomial(plan.probability.expand(200, -1), 16, replacement=True, generator=generator)

    def share_seen(picks: torch.Tensor) -> float:
        return sum(len(cells_of(plan, p).unique()) for p in picks) / len(picks) / plan.counts.numel()

    assert share_seen(spread) > share_seen(apart) + 0.1


def test_chances_are_the_share_of_cells_and_favor_the_border():
    for plan in (WindowPlan(112, 176, 64, 24, 16), WindowPlan(64, 64, 64, 24, 16), WindowPlan(256, 192, 64, 12, 8)):
        expected = (1 / plan.counts.flatten())[cells_of(plan, torch.arange(len(plan)))].sum(1) / plan.counts.numel()
        torch.testing.assert_close(plan.probability, expected.double(), rtol=1e-5, atol=1e-8)
        assert plan.probability.sum() == pytest.approx(1)


def test_sampling_all_windows_is_the_full_target(encoder):
    teacher = SlidingWindowTeacher(encoder, stride=24)
    x = torch.randn(2, 3, 100, 120)
    sample = teacher.sample(x, 10_000)
    torch.testing.assert_close(sample.weighted_sum, teacher(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sample.weight, torch.ones_like(sample.weight))


def test_samples_follow_their_generator(encoder):
    teacher = SlidingWindowTeacher(encoder, stride=24)
    x = torch.randn(2, 3, 100, 120)
    first, again, other = (teacher.sample(x, 2, torch.Generator().manual_seed(seed)).weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1]), "every image draws its own windows"


def test_a_sample_needs_a_window(encoder):
    with pytest.raises(ValueError, match="windows"):
        SlidingWindowTeacher(encoder).sample(torch.randn(1, 3, 64, 64), 0)


def test_no_images_are_refused():
    teacher = SlidingWindowTeacher(example_encoder(sorted(FAMILIES)[0]))
    for ask in (teacher.targets, lambda images: teacher.samples(images, 2, torch.rand(0, 2))):
        with pytest.raises(ValueError, match=r"images .*\(3, H, W\), got none"):
            ask([])
