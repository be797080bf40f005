"""Teachers other than the sliding window, compared with plain computations."""

import pytest
import torch
import torch.nn.functional as F

from reference import example_encoder
from spar_d2.encoders import FAMILIES
from spar_d2.refine import AnyUp, imagenet_normalized
from spar_d2.teacher import (
    EnsembleTeacher,
    FunctionTeacher,
    MirroredTeacher,
    RescaledTeacher,
    SinglePassTeacher,
    SlidingWindowTeacher,
    SmoothedTeacher,
    TargetCache,
    UpsampledTeacher,
    as_teacher,
    sliding_window_features,
)
from spar_d2.teacher.keys import PixelStatistics, encoder_key, teacher_key

SIZES = [(70, 100), (64, 96)]


@pytest.fixture(params=sorted(FAMILIES))
def encoder(request):
    torch.manual_seed(0)
    return example_encoder(request.param)


@pytest.fixture
def images():
    return [torch.randn(3, *size, generator=torch.Generator().manual_seed(size[0])) for size in SIZES]


def padded(image, patch):
    return F.pad(image, (0, -image.shape[2] % patch, 0, -image.shape[1] % patch))[None]


def mirrored(encoder, image):
    x = padded(image, encoder.patch_size)
    return sliding_window_features(encoder, x.flip(-1)).flip(-1)


def rescaled(encoder, image, scale):
    x = padded(image, encoder.patch_size)
    grid = [side // encoder.patch_size for side in x.shape[2:]]
    size = [round(cells * scale) * encoder.patch_size for cells in grid]
    options = {"mode": "bilinear", "antialias": True}
    return F.interpolate(sliding_window_features(encoder, F.interpolate(x, size, **options)), grid, **options)


def test_targets_equal_plain_computations(encoder, images):
    base = SlidingWindowTeacher(encoder)
    teachers = {
        "single pass": (SinglePassTeacher(encoder), lambda image: encoder(image[None])),
        "mirrored": (MirroredTeacher(base), lambda image: mirrored(encoder, image)),
        "enlarged": (RescaledTeacher(base, 1.5), lambda image: rescaled(encoder, image, 1.5)),
        "reduced": (RescaledTeacher(base, 0.5), lambda image: rescaled(encoder, image, 0.5)),
        "mean": (
            EnsembleTeacher([base, SlidingWindowTeacher(encoder, stride=48), MirroredTeacher(base)]),
            lambda image: (
                sum(
                    [
                        sliding_window_features(encoder, image[None]),
                        sliding_window_features(encoder, image[None], stride=48),
                        mirrored(encoder, image),
                    ]
                )
                / 3
            ),
        ),
    }
    with torch.no_grad():
        for name, (teacher, plain) in teachers.items():
            for target, image in zip(teacher.targets(images), images):
                torch.testing.assert_close(target, plain(image), rtol=1e-4, atol=1e-5, msg=name)
                assert target.shape[2:] == encoder.grid(*image.shape[1:]) and not target.requires_grad


def example(**options):
    torch.manual_seed(0)
    return SlidingWindowTeacher(example_encoder("SigLIP"), **options)


def test_a_class_is_no_teacher():
    with pytest.raises(ValueError, match=r"got the class SlidingWindowTeacher: create one, SlidingWindowTeacher"):
        as_teacher(SlidingWindowTeacher)


CHANGES = {
    "mirrored": lambda base: (MirroredTeacher(base), (96, 128)),
    "enlarged": lambda base: (RescaledTeacher(base, 1.5), (144, 192)),
    "reduced": lambda base: (RescaledTeacher(base, 0.75), (64, 96)),
    "enlarged and mirrored": lambda base: (MirroredTeacher(RescaledTeacher(base, 1.25)), (128, 160)),
}


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_the_expected_sample_is_the_target(name):
    """The sum over all windows, times their probabilities."""
    base = example()
    teacher, size = CHANGES[name](base)
    image = torch.randn(3, 90, 120)
    plan = base.plan(*size)
    probability = plan.probability.view(*(len(side) for side in plan.starts))
    # The shift in the middle of the interval that belongs to each window.
    rows, columns = (part.cumsum(0) - part / 2 for part in (probability.sum(1), probability.sum(0)))
    shifts = torch.cartesian_prod(rows, columns)
    samples = teacher.samples([image] * len(shifts), 1, shifts)
    assert {sample.windows for sample in samples} == {1} == {teacher.cost(90, 120, 1)}
    (target,) = teacher.targets([image])
    for values, expected in (("weighted_sum", target), ("weight", torch.ones_like(target[:, :1]))):
        total = sum(p * getattr(sample, values) for p, sample in zip(plan.probability.float(), samples))
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)


def test_samples_of_an_ensemble_are_means_of_samples():
    base = example()
    members = [base, SinglePassTeacher(base.encoder), MirroredTeacher(example(stride=40)), RescaledTeacher(base, 0.75)]
    teacher, image, shifts = EnsembleTeacher(members), torch.randn(3, 96, 128), torch.rand(2, 2)
    assert teacher.linear
    parts = [member.samples([image] * 2, 2, (shifts + i / 4) % 1) for i, member in enumerate(members)]
    for sample, *own in zip(teacher.samples([image] * 2, 2, shifts), *parts):
        for name in ("weighted_sum", "weight"):
            torch.testing.assert_close(getattr(sample, name), sum(getattr(part, name) for part in own) / 4)
        assert sample.windows == sum(part.windows for part in own) == teacher.cost(96, 128, 2) == 7
    (whole,) = teacher.samples([image], 999, shifts[:1])
    torch.testing.assert_close(whole.weighted_sum, teacher.targets([image])[0])
    assert not EnsembleTeacher([base, FunctionTeacher(torch.relu)]).linear


def test_every_setting_changes_the_identity_and_the_cost_counts_passes():
    base, other = example(), example(stride=16)
    plan = len(base.plan(96, 128))
    teachers = {
        "sliding": (base, plan),
        "stride": (other, len(other.plan(96, 128))),
        "single pass": (SinglePassTeacher(base.encoder), 1),
        "mirrored": (MirroredTeacher(base), plan),
        "mirrored, stride": (MirroredTeacher(other), len(other.plan(96, 128))),
        "scale": (RescaledTeacher(base, 2), len(base.plan(192, 256))),
        "other scale": (RescaledTeacher(base, 0.5), len(base.plan(48, 64))),
        "mean": (EnsembleTeacher([base, MirroredTeacher(base)]), 2 * plan),
        "mean of one": (EnsembleTeacher([base]), plan),
        "function": (FunctionTeacher(torch.relu, "relu"), 1),
        "other function": (FunctionTeacher(torch.relu, "relu 2"), 1),
    }
    assert len({teacher_key(teacher) for teacher, _ in teachers.values()}) == len(teachers)
    assert {name: teacher.cost(96, 128) for name, (teacher, _) in teachers.items()} == {
        name: cost for name, (_, cost) in teachers.items()
    }
    members = [base, MirroredTeacher(base)]
    assert teacher_key(EnsembleTeacher(members)) == teacher_key(EnsembleTeacher(members[::-1]))


def test_the_key_of_the_sliding_window_is_that_of_existing_caches(encoder):
    teacher = SlidingWindowTeacher(encoder, stride=40)
    assert teacher_key(teacher) == encoder_key(teacher.encoder, teacher.window, 40)
    if encoder.__class__.__name__ in ("OpenCLIPEncoder", "SigLIPEncoder"):
        assert "readout" not in vars(encoder), "attributes of the instance are part of the key"


def test_targets_of_a_function_are_cached_under_its_identity(tmp_path, images):
    statistics = PixelStatistics((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    calls = []

    def function(image):
        calls.append(torch.is_grad_enabled())
        return F.avg_pool2d(image, 16, ceil_mode=True)

    caches = [TargetCache(tmp_path, FunctionTeacher(function, "mean of pixels"), statistics) for _ in range(2)]
    targets = [cache.target(images[0]) for cache in caches]
    assert torch.equal(*targets) and calls == [False]
    assert targets[0].shape == (1, 3, 5, 7)
    others = [
        TargetCache(tmp_path, FunctionTeacher(function, "another"), statistics),
        TargetCache(tmp_path, FunctionTeacher(function, "mean of pixels"), statistics._replace(pixel_std=(1, 1, 1))),
    ]
    assert len({cache.folder for cache in [caches[0], *others]}) == 3
    with pytest.raises(ValueError, match=r"SPAR\.TEACHER\.CACHE_DIR.*identity"):
        TargetCache(tmp_path, FunctionTeacher(function), statistics)
    with pytest.raises(ValueError, match="normalization"):
        TargetCache(tmp_path, FunctionTeacher(function, "mean of pixels"))


@pytest.mark.parametrize("result", [torch.zeros(1, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.long), "features"])
def test_a_function_must_return_a_feature_map(result, images):
    with pytest.raises(ValueError, match=r"teacher: .*\(D, h, w\)"):
        FunctionTeacher(lambda image: result).targets(images)


def test_wrong_teachers_are_named(images):
    base = example()

    class NoIdentity:
        def targets(self, images):
            return images

    with pytest.raises(ValueError, match=r"teacher must be.*NoIdentity without identity, cost, linear"):
        as_teacher(NoIdentity())
    with pytest.raises(ValueError, match="teacher must be"):
        as_teacher("sliding")
    with pytest.raises(ValueError, match=r"SPAR\.TEACHER\.ENSEMBLE"):
        EnsembleTeacher([])
    for scale in (0, -1, 9, float("nan")):
        with pytest.raises(ValueError, match=r"scale \(SPAR\.TEACHER\.ENSEMBLE\)"):
            RescaledTeacher(base, scale)
    with pytest.raises(ValueError, match=r"same shape.*\(1, 2, 4, 4\)"):
        EnsembleTeacher([base, FunctionTeacher(lambda image: torch.zeros(2, 4, 4))]).targets(images[:1])


def propagated(guide, columns, patch, neighbours):
    """LPOSS with a dense matrix in float64: at most 10 steps of conjugate gradients for each column."""
    height, width = guide.shape[1:]
    unit = F.normalize(guide.double().flatten(1).T, dim=1)
    cosine = unit @ unit.T
    place = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()
    affinity = cosine.clamp(min=0) ** 3 * (-0.01 * patch * torch.cdist(place, place)).exp()
    chosen = torch.zeros_like(cosine).scatter(1, cosine.topk(min(neighbours, len(cosine)), dim=1).indices, 1.0)
    weights = (affinity * chosen).fill_diagonal_(0)
    weights = weights + weights.T
    scale = weights.sum(1).rsqrt()
    system = torch.eye(len(weights)).double() - 0.95 * scale[:, None] * weights * scale
    result = []
    for target in columns.double().T:
        solution, residual = torch.zeros_like(target), target.clone()
        direction, square = residual.clone(), residual.square().sum()
        for _ in range(10):
            image = system @ direction
            step = square / (direction @ image)
            solution, residual = solution + step * direction, residual - step * image
            before, square = square, residual.square().sum()
            if square.sqrt() <= 1e-6 * target.norm():
                break
            direction = residual + square / before * direction
        result.append(solution)
    return torch.stack(result, dim=1)


@pytest.mark.parametrize("neighbours", [5, 400])
def test_smoothed_targets_are_means_of_similar_patches(neighbours, images):
    base = example()
    teacher = SmoothedTeacher(base, neighbours)
    for smoothed, target in zip(teacher.targets(images), base.targets(images)):
        columns = target[0].flatten(1).T
        spread = propagated(target[0], torch.cat([columns, torch.ones(len(columns), 1)], dim=1), 16, neighbours)
        expected = (spread[:, :-1] / spread[:, -1:]).T.reshape(target.shape).float()
        torch.testing.assert_close(smoothed, expected, rtol=1e-3, atol=1e-4)
        # Smoother, at the same scale.
        assert 0.2 * target.norm() < smoothed.norm() < target.norm()
        assert smoothed.var((2, 3)).mean() < target.var((2, 3)).mean()


@pytest.fixture
def anyup():
    torch.manual_seed(0)
    return AnyUp().requires_grad_(False).eval()


def test_upsampled_targets_are_means_of_upsampled_features(images, anyup):
    base = example()
    teacher = UpsampledTeacher(base, anyup, 2)
    images = [images[0], torch.randn(3, 150, 30)]
    for found, target, image in zip(teacher.targets(images), base.targets(images), images):
        # The encoder's statistics are 0.5 and 0.5, and padding is gray.
        pixels = F.pad(image, (0, -image.shape[2] % 16, 0, -image.shape[1] % 16))[None] * 0.5 + 0.5
        grid = target.shape[2:]
        finer = anyup(imagenet_normalized(pixels), target, (2 * grid[0], 2 * grid[1]))
        torch.testing.assert_close(found, F.avg_pool2d(finer, 2), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, target, atol=1e-3)
    row = torch.randn(3, 16, 96)
    assert torch.equal(teacher.targets([row])[0], base.targets([row])[0])


def test_refined_targets_have_identities_and_cannot_be_sampled(anyup):
    base, other = example(), example(stride=40)
    changed = AnyUp()
    teachers = [SmoothedTeacher(base), SmoothedTeacher(base, 10), SmoothedTeacher(other)]
    teachers += [UpsampledTeacher(base, anyup), UpsampledTeacher(base, anyup, 2), UpsampledTeacher(base, changed)]
    assert len({teacher_key(teacher) for teacher in teachers}) == 6
    assert not any(teacher.linear for teacher in [*teachers, EnsembleTeacher([base, teachers[0]])])
    assert teachers[0].cost(96, 128) == base.cost(96, 128)
    with pytest.raises(ValueError, match=r"SPAR\.TEACHER\.NEIGHBOURS"):
        SmoothedTeacher(base, 0)
    with pytest.raises(ValueError, match=r"SPAR\.TEACHER\.UPSAMPLING"):
        UpsampledTeacher(base, anyup, 1)
