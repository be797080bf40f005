import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model

from reference import reference_image
from spar_d2.modeling.banded_upsampling import ScoreMap, UpsampledScores
from spar_d2.modeling.postprocessing import cosine_scores
from spar_d2.modeling.test_time_augmentation import SegmentorWithTTA


@pytest.fixture
def cfg(tiny_cfg):
    tiny_cfg.MODEL.SPAR.VOCABULARY = "cat, kitten; dog; sky"
    tiny_cfg.TEST.AUG.MIN_SIZES, tiny_cfg.TEST.AUG.MAX_SIZE, tiny_cfg.TEST.AUG.FLIP = (64,), 400, False
    return tiny_cfg


def picture(height=70, width=101):
    return torch.from_numpy(reference_image(height, width)).permute(2, 0, 1)


def test_a_mirrored_map_is_the_mirror_image_of_the_whole():
    low = torch.randn(3, 4, 2)
    size, padded = (45, 61), (48.0, 64.0)

    def whole(mirrored):
        parts = UpsampledScores([ScoreMap(low, padded, mirrored)], size).bands()
        return torch.cat([band for _, band in parts])

    assert torch.equal(whole(True), whole(False).flip(1))


def test_one_augmentation_equals_the_plain_model(cfg):
    model = build_model(cfg).eval()
    cfg.TEST.AUG.MIN_SIZES = (70,)
    inputs = [{"image": picture()}, {"image": picture(), "height": 35, "width": 50}]
    for plain, augmented in zip(model(inputs), SegmentorWithTTA(cfg, model)(inputs)):
        assert torch.equal(plain["sem_seg_labels"], augmented["sem_seg_labels"])


@pytest.mark.parametrize("output", ["labels", "scores"])
def test_augmented_scores_are_averaged_after_upsampling_and_flipping_back(cfg, output):
    """By whole maps: each view's cosines, upsampled, cropped, flipped back, and averaged."""
    cfg.MODEL.SPAR.OUTPUT = output
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.FLIP = (64, 90), True
    model = build_model(cfg).eval()
    image, size = picture(), (50, 72)
    augmented = SegmentorWithTTA(cfg, model)
    record = {"image": image, "height": size[0], "width": size[1]}
    views = augmented.tta_mapper(record)
    assert len(views) == 4
    text, query_class = model.embeddings(model.vocabulary)
    total = 0
    for number, view in enumerate(views):
        low = cosine_scores(model.encode(view["image"]), text).permute(2, 0, 1)[None]
        h, w = view["image"].shape[1:]
        # The padded view at 8 pixels for each of its own, then resized as a whole: exact up to the resizing.
        padded = (low.shape[2] * 16, low.shape[3] * 16)
        full = F.interpolate(low, padded, mode="bilinear")[..., :h, :w]
        full = F.interpolate(full, size, mode="bilinear")[0]
        total = total + (full.flip(2) if number % 2 else full)
    expected = (model.logit_scale * total / 4).softmax(0)
    expected = torch.stack([expected[query_class == k].amax(0) for k in range(3)])
    result = augmented([record])[0]
    if output == "scores":
        assert (result["sem_seg"] - expected).abs().mean() < 0.01
    else:
        assert (result["sem_seg_labels"] == expected.argmax(0)).float().mean() > 0.97


def test_the_vocabulary_of_an_image_is_used_for_all_its_augmentations(cfg):
    cfg.TEST.AUG.FLIP = True
    augmented = SegmentorWithTTA(cfg, build_model(cfg).eval())
    assert (augmented([{"image": picture(), "vocabulary": ["one"]}])[0]["sem_seg_labels"] == 0).all()


def test_models_without_support_for_augmentation_are_named(cfg):
    with pytest.raises(ValueError, match=r"TEST\.AUG\.ENABLED: .* got Linear"):
        SegmentorWithTTA(cfg, torch.nn.Linear(1, 1))
    cfg.MODEL.SPAR.OUTPUT = "features"
    with pytest.raises(ValueError, match=r"TEST\.AUG\.ENABLED: .*MODEL\.SPAR\.OUTPUT"):
        SegmentorWithTTA(cfg, build_model(cfg).eval())


@pytest.mark.parametrize("sizes", [(), (400, 0), (-1,)])
def test_invalid_sizes_are_named(cfg, sizes):
    cfg.TEST.AUG.MIN_SIZES = sizes
    with pytest.raises(ValueError, match=r"TEST\.AUG\.MIN_SIZES .*at least one short side in pixels"):
        SegmentorWithTTA(cfg, build_model(cfg).eval())


def test_absurd_sizes_are_named(cfg):
    cfg.TEST.AUG.MIN_SIZES = (400, 10**8)
    with pytest.raises(ValueError, match=r"TEST\.AUG\.MIN_SIZES .*0\.\.16384 pixels, got 100000000"):
        SegmentorWithTTA(cfg, build_model(cfg).eval())
