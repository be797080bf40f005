"""Distillation from any teacher: kinds by config, functions, teachers of users, and projections."""

import copy

import pytest
import torch
import torch.nn.functional as F

from reference import example_encoder, reference_image
from small_trainers import as_tensor, trainer_for
from spar_d2.comparison.methods import build_teacher_encode
from spar_d2.distillation import DistillationHook
from spar_d2.distillation.fill_cache import fill_cache
from spar_d2.encoders import build_encoder
from spar_d2.encoders.origin import read_origin
from spar_d2.engine.checks import check_config
from spar_d2.engine.dry_run import estimate
from spar_d2.engine.trainer import Trainer
from spar_d2.modeling.build import teacher_from_config
from spar_d2.refine import AnyUp, save_anyup
from spar_d2.teacher import (
    TEACHER_REGISTRY,
    EnsembleTeacher,
    MirroredTeacher,
    RescaledTeacher,
    SinglePassTeacher,
    SlidingWindowTeacher,
)
from spar_d2.teacher.keys import teacher_key
from spar_d2.user_modules import import_modules

IMAGES = [as_tensor(reference_image(h, w)) for h, w in ((64, 96), (100, 70))]


def pooled(image):
    """A teacher that is no network: pixel statistics of patches, with 6 channels."""
    mean = F.avg_pool2d(F.pad(image, (0, -image.shape[2] % 16, 0, -image.shape[1] % 16)), 16)
    return torch.cat([mean, mean.square()])


def expected_teachers(cfg):
    spar = cfg.MODEL.SPAR
    plain = build_encoder(spar.ENCODER, spar.PRETRAINED)
    similar = build_encoder(spar.ENCODER, spar.PRETRAINED, readout="self_correlation")
    sliding = SlidingWindowTeacher(plain)
    return {
        "sliding": ({}, sliding),
        "single pass": ({"SINGLE_PASS": True}, SinglePassTeacher(plain)),
        "self_correlation": ({"KIND": "self_correlation", "STRIDE": 32}, SlidingWindowTeacher(similar, stride=32)),
        "self_correlation, single pass": (
            {"KIND": "self_correlation", "SINGLE_PASS": True},
            SinglePassTeacher(similar),
        ),
        "ensemble": (
            {
                "KIND": "ensemble",
                "ENSEMBLE": ("sliding", "stride:48", "self_correlation+mirror+scale:1.5", " single_pass + mirror"),
            },
            EnsembleTeacher(
                [
                    sliding,
                    SlidingWindowTeacher(plain, stride=48),
                    MirroredTeacher(RescaledTeacher(SlidingWindowTeacher(similar), 1.5)),
                    MirroredTeacher(SinglePassTeacher(plain)),
                ]
            ),
        ),
    }


@pytest.mark.parametrize(
    "name", ["sliding", "single pass", "self_correlation", "self_correlation, single pass", "ensemble"]
)
def test_keys_of_the_config_choose_the_teacher(name, tiny_cfg):
    settings, expected = expected_teachers(tiny_cfg)[name]
    tiny_cfg.SPAR.TEACHER.merge_from_list([part for pair in settings.items() for part in pair])
    hooks = []
    for windows in (0, 2):
        tiny_cfg.SPAR.TEACHER.WINDOWS_PER_IMAGE = windows
        hooks.append(DistillationHook(tiny_cfg))
    x = torch.randn(3, 80, 112)
    target = hooks[0].teacher.targets([x])[0]
    torch.testing.assert_close(target, expected.targets([x])[0], rtol=1e-4, atol=1e-5)
    assert teacher_key(hooks[0].teacher) == teacher_key(expected)
    image = (x * 9 + 120).clamp(0, 255).byte()
    found = build_teacher_encode(tiny_cfg)(image)
    model_input = trainer_for(tiny_cfg, [], hooks[0]).model.encoder_input(image)[0]
    torch.testing.assert_close(found, expected.targets([model_input])[0][0], rtol=1e-4, atol=1e-5)
    for hook, windows in zip(hooks, (0, 2)):
        trainer = trainer_for(tiny_cfg, IMAGES, hook)
        trainer.train(0, 1)
        # The student starts with the features of the single pass.
        assert (trainer.losses[0] > 1e-9) == (name != "single pass")
        passes = sum(expected.cost(*image.shape[1:], windows) for image in IMAGES)
        assert hook.windows_encoded == passes


def test_members_of_an_ensemble_share_one_encoder_for_each_read_out(tiny_cfg):
    tiny_cfg.SPAR.TEACHER.KIND = "ensemble"
    tiny_cfg.SPAR.TEACHER.ENSEMBLE = ("sliding", "stride:48", "mirror", "self_correlation", "self_correlation+scale:2")
    members = teacher_from_config(tiny_cfg).members
    assert [members.index(next(m for m in members if m.encoder is member.encoder)) for member in members] == [
        0,
        0,
        0,
        3,
        3,
    ]


def test_refined_kinds_distill_and_cannot_be_sampled(tiny_cfg, tmp_path):
    teacher = tiny_cfg.SPAR.TEACHER
    torch.manual_seed(0)
    save_anyup(AnyUp(), tmp_path / "anyup.safetensors")
    teacher.ANYUP, teacher.NEIGHBOURS, teacher.UPSAMPLING = str(tmp_path / "anyup.safetensors"), 9, 2
    x = torch.randn(3, 64, 80)
    for kind, base in (("smoothed", "self_correlation"), ("upsampled", "sliding")):
        teacher.KIND, teacher.BASE, teacher.WINDOWS_PER_IMAGE = kind, base, 0
        hook = DistillationHook(tiny_cfg)
        trainer = trainer_for(tiny_cfg, IMAGES[:1], hook, lr=1e-3)
        trainer.train(0, 2)
        assert 0 < trainer.losses[-1] < trainer.losses[0]
        teacher.KIND = base
        refined, plain = hook.teacher.targets([x])[0], DistillationHook(tiny_cfg).teacher.targets([x])[0]
        assert F.cosine_similarity(refined, plain, dim=1).mean() > 0.3 and not torch.allclose(refined, plain)
        teacher.KIND, teacher.WINDOWS_PER_IMAGE = kind, 4
        with pytest.raises(ValueError, match=rf"WINDOWS_PER_IMAGE.*{kind.capitalize()}Teacher"):
            DistillationHook(tiny_cfg)
    for base in ("smoothed", "nothing"):
        teacher.BASE = base
        with pytest.raises(ValueError, match=r"SPAR\.TEACHER\.BASE"):
            DistillationHook(tiny_cfg)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("KIND", "slidng"),
        ("PROJECTION", "linear"),
        *(
            ("ENSEMBLE", (entry,))
            for entry in (
                "",
                "stride",
                "stride:x",
                "scale:",
                "scale:9",
                "scale:inf",
                "flip",
                "mirror+sliding",
                "ensemble",
                "mirror+mirror",
                "stride:16+stride:24",
            )
        ),
        ("ENSEMBLE", ("sliding", "mirror", "sliding+mirror")),
        ("ENSEMBLE", ()),
        ("KIND", "upsampled"),
        ("BASE", "ensemble"),
    ],
)
def test_wrong_keys_are_named(key, value, tiny_cfg):
    tiny_cfg.SPAR.TEACHER.KIND = "ensemble"
    if key == "BASE":
        tiny_cfg.SPAR.TEACHER.ENSEMBLE = ("sliding", "smoothed")
    setattr(tiny_cfg.SPAR.TEACHER, key, value)
    with pytest.raises(ValueError, match=rf"SPAR\.TEACHER\.({'ANYUP' if value == 'upsampled' else key})"):
        DistillationHook(tiny_cfg)


def test_messages_of_an_ensemble_name_the_member(tiny_cfg):
    tiny_cfg.SPAR.TEACHER.KIND = "ensemble"
    for members, message in (
        (("sliding", "mirror+flip"), r"ENSEMBLE, member 'mirror\+flip': .*got 'flip'"),
        (("mirror", "stride:24", "sliding + mirror"), "'mirror' and 'sliding \\+ mirror' are the same"),
        (("scale:2+mirror+scale:3",), "member 'scale:2.*: scale must stand once"),
    ):
        tiny_cfg.SPAR.TEACHER.ENSEMBLE = members
        with pytest.raises(ValueError, match=message):
            teacher_from_config(tiny_cfg)


def test_a_kind_that_an_encoder_does_not_support_is_named(tiny_cfg):
    tiny_cfg.SPAR.TEACHER.KIND = "self_correlation"
    tiny_cfg.MODEL.SPAR.ENCODER = "dinov3_vitl16_dinotxt_tet1280d20h24l"
    with pytest.raises(ValueError, match=r"SPAR\.TEACHER\.KIND.*open_clip ViT"):
        teacher_from_config(tiny_cfg)


def test_a_student_learns_from_a_function(tiny_cfg):
    """Here from mirror images of its own features, which it can approach."""
    encoder = build_encoder(*[tiny_cfg.MODEL.SPAR[key] for key in ("ENCODER", "PRETRAINED")])
    hook = DistillationHook(lambda image: encoder(image[None].flip(-1))[0].flip(-1))
    trainer = trainer_for(tiny_cfg, [IMAGES[0]], hook, lr=1e-3)
    trainer.train(0, 8)
    assert trainer.losses[-1] < 0.8 * trainer.losses[0]
    assert hook.windows_encoded == 8


def test_functions_cannot_be_sampled_and_targets_must_fit(tiny_cfg):
    with pytest.raises(ValueError, match=r"SPAR\.TEACHER\.WINDOWS_PER_IMAGE.*FunctionTeacher"):
        DistillationHook(pooled, windows_per_image=4)
    with pytest.raises(ValueError, match=r"SPAR\.TEACHER\.PROJECTION.*6 channels.*64"):
        trainer_for(tiny_cfg, IMAGES, DistillationHook(pooled)).train(0, 1)
    for projection in ("", "least_squares"):
        hook = DistillationHook(lambda image: pooled(image)[:, 1:], projection=projection)
        with pytest.raises(ValueError, match=r"\(1, D, 4, 6\).*got \(1, 6, 3, 6\)"):
            trainer_for(tiny_cfg, IMAGES, hook).train(0, 1)


USER_MODULE = """
import torch
from spar_d2.teacher import TEACHER_REGISTRY, DenseTeacher

@TEACHER_REGISTRY.register()
class pixels_of_patches(DenseTeacher):
    def __init__(self, cfg):
        self.channels = 64

    def targets(self, images):
        pooled = [torch.nn.functional.avg_pool2d(image, 16, ceil_mode=True) for image in images]
        return [part.repeat(1, 22, 1, 1)[:, :64] for part in (each[None] for each in pooled)]

    def identity(self):
        return "pixels of patches, version 1"
"""


def test_a_teacher_of_a_module_of_the_user_fills_a_cache_and_distills(photo_cfg, tmp_path, monkeypatch):
    (tmp_path / "my_teachers.py").write_text(USER_MODULE)
    monkeypatch.setenv("SPAR_D2_IMPORTS", "")
    import_modules([str(tmp_path / "my_teachers.py")])
    spar = photo_cfg.SPAR
    spar.TEACHER.KIND, spar.TEACHER.CACHE_DIR = "pixels_of_patches", str(tmp_path / "cache")
    spar.DATA.FROZEN, spar.TEACHER.WINDOWS_PER_IMAGE, spar.PICTURE_PERIOD = True, 0, 4
    try:
        assert fill_cache(photo_cfg, show=False).computed == 3
        trainer = Trainer(photo_cfg)
        trainer.train()
        costs = estimate(photo_cfg)
    finally:
        TEACHER_REGISTRY._obj_map.pop("pixels_of_patches")
    hook = next(hook for hook in trainer._hooks if isinstance(hook, DistillationHook))
    assert (hook.cache.misses, hook.windows_encoded, hook.teacher.channels) == (0, 0, 64)
    assert (costs.windows, costs.planned) == (1, 1)
    origin = read_origin(f"{photo_cfg.OUTPUT_DIR}/student.safetensors")
    assert (origin.teacher, origin.window, origin.stride) == ("pixels_of_patches", None, None)
    assert len(list((tmp_path / "output" / "pictures").iterdir())) == 1


def student_features(cfg):
    model = trainer_for(cfg, [], DistillationHook(cfg)).model
    with torch.no_grad():
        return [(x, model.backbone.encoder(x)[0]) for x in map(model.encoder_input, IMAGES)]


@pytest.mark.parametrize("parts", [1, 2])
def test_the_projection_is_fitted_by_least_squares_on_the_first_images(parts, tiny_cfg, tmp_path):
    before = student_features(tiny_cfg)
    hook = DistillationHook(pooled, projection="least_squares", projection_images=2)
    trainer = trainer_for(tiny_cfg, IMAGES, hook, lr=1e-3)
    if parts == 2:  # one image a step, interrupted after the first
        trainer._data_loader_iter_obj = iter([[{"image": image}] for image in (*IMAGES, *IMAGES)])
        trainer.train(0, 1)
        assert not hook.projection.fitted and hook.target(before[0][0][0]) is None
        torch.save(hook.state_dict(), tmp_path / "state.pt")
        hook.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    trainer.train(parts - 1, 4)
    assert [loss == 0 for loss in trainer.losses] == [True] * parts + [False] * (4 - parts)
    assert trainer.losses[-1] < trainer.losses[parts] or parts == 2
    inputs = torch.cat([pooled(x[0]).flatten(1).T for x, _ in before])
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1).double()
    outputs = torch.cat([features.flatten(1).T for _, features in before]).double()
    matrix = torch.linalg.lstsq(inputs, outputs).solution
    expected = (inputs[:24] @ matrix).float().T.view(1, 64, 4, 6)
    # The weight decay of a step with a loss of 0 changes the second image's features very slightly.
    torch.testing.assert_close(hook.target(before[0][0][0]), expected, rtol=1e-3, atol=1e-4)
    # A resumed run keeps it.
    resumed = DistillationHook(pooled, projection="least_squares")
    resumed.load_state_dict(copy.deepcopy(hook.state_dict()))
    assert torch.equal(resumed.target(before[0][0][0]), hook.target(before[0][0][0]))
    other = DistillationHook(lambda image: pooled(image)[:3], projection="least_squares")
    other.load_state_dict(hook.state_dict())
    with pytest.raises(ValueError, match=r"SPAR\.TEACHER\.PROJECTION.*6 channels.*3"):
        other.target(before[0][0][0])


def test_samples_are_projected_without_bias(tiny_cfg):
    """Sampled windows have the same projection as the full target, with the constant in proportion to their weight."""
    torch.manual_seed(0)
    hook = DistillationHook(
        SlidingWindowTeacher(example_encoder("SigLIP")),
        windows_per_image=2,
        projection="least_squares",
        projection_images=1,
    )
    trainer = trainer_for(tiny_cfg, [IMAGES[0]], hook)
    trainer.train(0, 2)
    assert trainer.losses[0] == 0 < trainer.losses[1]
    x = torch.randn(3, 96, 128)
    shifts = torch.rand(1, 2)
    whole = hook.projection(hook.teacher.samples([x], 999, shifts)[0])
    torch.testing.assert_close(whole.weighted_sum, hook.target(x), rtol=1e-4, atol=1e-5)
    part = hook.projection(hook.teacher.samples([x], 1, shifts)[0])
    assert torch.equal(part.weighted_sum[:, :, part.weight[0, 0] == 0].abs().max(), torch.tensor(0.0))


def test_a_training_that_only_fits_the_projection_is_refused(tiny_cfg):
    cfg = tiny_cfg.clone()
    cfg.SPAR.TEACHER.PROJECTION, cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH = "least_squares", 8, 4
    with pytest.raises(
        ValueError, match=r"SPAR\.TEACHER\.PROJECTION_IMAGES must be less than .* got 32 of 32 \(SOLVER"
    ):
        check_config(cfg)
    cfg.SOLVER.MAX_ITER = 9
    check_config(cfg)


def test_wrong_projections_are_named():
    with pytest.raises(ValueError, match=r"SPAR\.TEACHER\.PROJECTION\)"):
        DistillationHook(pooled, projection="linear")
    with pytest.raises(ValueError, match=r"SPAR\.TEACHER\.PROJECTION_IMAGES"):
        DistillationHook(pooled, projection="least_squares", projection_images=0)
