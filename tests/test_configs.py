"""Every config file loads, fits its encoder, and has its documented values."""

import inspect
from pathlib import Path

import open_clip
import pytest
import timm

from reference import ROOT
from spar_d2.data.transforms import build_augmentations
from spar_d2.encoders.precision import PRECISIONS, resolve_precision
from spar_d2.encoders.registry import describe_encoder
from spar_d2.engine.setup import load_config
from spar_d2.teacher.sliding import check_window

CONFIGS = ROOT / "configs"
FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if not path.name.startswith("Base-"))
RECIPES = ("paper", "sampled", "all_2560")
ENCODERS = ("siglip2_vit_b_16_512", "openclip_vit_b_16", "dinotxt_vit_l_16", "dinov3_vit_l_16")
DISTILL = [CONFIGS / "distill" / f"{encoder}_{recipe}.yaml" for encoder in ENCODERS for recipe in RECIPES]

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
every_recipe = pytest.mark.parametrize("path", DISTILL, ids=lambda path: path.stem)


def load(path: Path):
    return load_config(str(path), ["MODEL.DEVICE", "cpu"])


def describe(cfg):
    return describe_encoder(cfg.MODEL.SPAR.ENCODER, cfg.MODEL.SPAR.PRETRAINED)


def recipe_of(path: Path) -> str:
    return next(recipe for recipe in RECIPES if path.stem.endswith(recipe))


def leading_comment(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    return lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]


@every_file
def test_is_short_and_begins_with_a_comment(path):
    lines = path.read_text().splitlines()
    assert 3 <= len(lines) <= 30
    assert max(map(len, lines)) <= 120
    assert leading_comment(path)


@pytest.mark.slow
@every_file
def test_weights_are_a_file_or_a_tag_that_the_library_knows(path):
    spar = load(path).MODEL.SPAR
    tags = open_clip.list_pretrained_tags_by_model(spar.ENCODER)
    tags += [name.split(".", 1)[1] for name in timm.list_pretrained(f"{spar.ENCODER}.*")]
    assert not spar.PRETRAINED or Path(spar.PRETRAINED).is_file() or spar.PRETRAINED in tags


@pytest.mark.slow
@every_file
def test_sides_and_windows_fit_the_encoder(path):
    cfg = load(path)
    encoder, data, teacher = describe(cfg), cfg.SPAR.DATA, cfg.SPAR.TEACHER
    assert data.SIDE_MULTIPLE % encoder.patch_size == 0
    build_augmentations(**{key: data[key.upper()] for key in inspect.signature(build_augmentations).parameters})
    window, _, _ = check_window(encoder, teacher.WINDOW, teacher.STRIDE, teacher.BATCH_SIZE)
    # A smaller image would be padded to a window, and the teacher would see mostly padding.
    assert min(data.MIN_SHORT_SIDE, data.CROP_MIN_SIDE) >= window
    assert resolve_precision(cfg.MODEL.SPAR.PRECISION, cfg.MODEL.DEVICE) in PRECISIONS


def test_each_encoder_has_each_recipe():
    others = {ROOT / "configs/distill/dinov2_vit_s_14_small.yaml"}
    assert sorted(DISTILL) == [path for path in FILES if path.parent.name == "distill" and path not in others]


@every_recipe
def test_recipes_state_time_memory_and_disk_space(path):
    comment = leading_comment(path)
    told = ["hours", "GPU", "GB"] + ["on disk"] * (recipe_of(path) == "paper")
    for word in told:
        lines = [line for line in comment if word in line]
        assert lines and all("estimated" in line or "measured" in line for line in lines), word


@pytest.mark.slow
@every_recipe
def test_shares_the_schedule(path):
    cfg = load(path)
    assert cfg.SPAR.DISTILL.ENABLED and cfg.SPAR.OPTIMIZER == "AdamW" and cfg.SPAR.TEACHER.STRIDE == 24
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS) == (1, 250_000, (), 0)
    assert (solver.BASE_LR, solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM) == (2e-5, 1e-4, 1e-4)
    assert (cfg.SPAR.KEEP_CHECKPOINTS, cfg.SPAR.PICTURE_PERIOD) == (3, 5000)
    assert cfg.OUTPUT_DIR == f"output/distill/{path.stem}"


@pytest.mark.slow
@every_recipe
def test_inherits_its_recipe(path):
    cfg, recipe = load(path), recipe_of(path)
    spar, teacher, data = cfg.MODEL.SPAR, cfg.SPAR.TEACHER, cfg.SPAR.DATA
    if recipe == "paper":
        assert (teacher.WINDOWS_PER_IMAGE, teacher.CACHE_DIR, data.FROZEN) == (0, "output/teacher_cache", True)
    else:
        assert (teacher.WINDOWS_PER_IMAGE, teacher.CACHE_DIR, data.FROZEN) == (16, "", False)
        assert spar.PRECISION == "bfloat16"
    extended = recipe == "all_2560"
    assert spar.TRAINABLE == ("all" if extended else "last_blocks:2")
    assert (data.SCALE_BOX, data.SCALE_RANGE) == (
        ((2560, 2560), (0.2, 1.0)) if extended else ((2048, 1024), (0.5, 1.0))
    )


@pytest.mark.slow
@every_recipe
def test_output_fits_the_text_side(path):
    cfg = load(path)
    assert (cfg.MODEL.SPAR.OUTPUT == "features") == (describe(cfg).family == "DINOv3")


def test_toy_configs_write_no_extra_checkpoints_pictures_or_caches():
    for path in (CONFIGS / "toy").glob("distill*.yaml"):
        cfg = load(path)
        assert (cfg.SPAR.KEEP_CHECKPOINTS, cfg.SPAR.PICTURE_PERIOD, cfg.SPAR.TEACHER.CACHE_DIR) == (0, 0, "")
