"""Wrong keys give one error that names the key; blocks of the encoder whose outputs are used."""

import pytest
import torch
from detectron2.modeling import build_model

from reference import ROOT, example_encoder
from small_mask_transformers import SEMANTIC, TEXT, image, small_config
from spar_d2.modeling.mask_transformer.settings import lateral_blocks

NODE = "MODEL.MASK_TRANSFORMER"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["TASK", "instance"], r"TASK must be one of panoptic, semantic; got 'instance'"),
        (["CLASSIFIER", "words"], r"CLASSIFIER must be one of learned, text; got 'words'"),
        (["OUTPUTS", "('panoptic',)"], r"OUTPUTS .*panoptic_seg, sem_seg, instances; got \('panoptic',\)"),
        (["OUTPUTS", "('sem_seg', 'boxes')"], r"OUTPUTS "),
        (["QUERIES", 0], r"QUERIES must be at least 1, got 0"),
        (["BLOCKS", 0], r"BLOCKS must be at least 1, got 0"),
        (["HEADS", 0], r"HEADS must be at least 1, got 0"),
        (["WIDTH", 36], r"WIDTH must be a multiple of 8, .*got 36"),
        (["WIDTH", 0], r"WIDTH "),
        (["LATERAL_BLOCKS", "(0, 4)"], r"LATERAL_BLOCKS .*0\.\.3.*got \(0, 4\)"),
        (["LATERAL_BLOCKS", "(-1,)"], r"LATERAL_BLOCKS "),
        (["LATERAL_BLOCKS", "(1, 1)"], r"LATERAL_BLOCKS "),
        (["LATERAL_BLOCKS", "(0.5,)"], r"LATERAL_BLOCKS "),
        (["LATERAL_BLOCKS", "(0, 1, 2)"], r"BLOCKS must be at least 3, .*got 2"),
        (["MASKED_ATTENTION", 1.5], r"MASKED_ATTENTION must be in 0\.\.1, got 1\.5"),
        (["OBJECT_THRESHOLD", -0.1], r"OBJECT_THRESHOLD must be in 0\.\.1"),
        (["DUPLICATE_THRESHOLD", 1.1], r"DUPLICATE_THRESHOLD must be in 0\.\.1"),
        (["OVERLAP_THRESHOLD", 2.0], r"OVERLAP_THRESHOLD must be in 0\.\.1"),
        (["NO_OBJECT_WEIGHT", float("nan")], r"NO_OBJECT_WEIGHT must be in 0\.\.1"),
        (["SEEN_WEIGHT", 1.1], r"SEEN_WEIGHT must be in 0\.\.1"),
        (["UNSEEN_WEIGHT", -1.0], r"UNSEEN_WEIGHT must be in 0\.\.1"),
        (["POINTS", 0], r"POINTS must be in 1\.\."),
        (["CLASS_WEIGHT", -2.0], r"CLASS_WEIGHT must be in 0\.\."),
        (["MASK_WEIGHT", -2.0], r"MASK_WEIGHT must be in 0\.\."),
        (["CENTER_WEIGHT", -1.0], r"CENTER_WEIGHT must be in 0\.\."),
        (["TEST_CENTERS", -1], r"TEST_CENTERS must be in 0\.\..*got -1"),
        (["TEST_CENTERS", 5, f"{NODE}.CENTER_SHARE", 0.0], r"TEST_CENTERS .*0 if CENTER_SHARE is 0; got 5 and 0\.0"),
        (["CENTER_SHARE", 1.5, f"{NODE}.ENCODER_BLOCKS", 1], r"CENTER_SHARE must be in 0\.\.1"),
        (["CENTER_SHARE", 1.5], r"CENTER_SHARE must be in 0\.\.1, got 1\.5"),
        (["DICE_WEIGHT", float("inf")], r"DICE_WEIGHT must be in 0\.\."),
        (["UNSEEN", "('circle',)"], r"UNSEEN .*CLASSIFIER text"),
        (["TASK", "semantic", f"{NODE}.OUTPUTS", "('panoptic_seg',)"], r"OUTPUTS must be a list out of sem_seg"),
    ],
)
def test_wrong_keys_are_named(keys, message):
    with pytest.raises(ValueError, match=rf"^MODEL\.MASK_TRANSFORMER\.{message}"):
        build_model(small_config(f"{NODE}.{keys[0]}", *keys[1:]))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["MODEL.BACKBONE.NAME", "SPARPyramid"], r"MODEL\.BACKBONE\.NAME must be SPARViT.*got SPARPyramid"),
        (["MODEL.SPAR.OUTPUT", "features"], r"MODEL\.SPAR\.OUTPUT must be labels or scores"),
        (["MODEL.SPAR.REFINE", "lposs"], r"MODEL\.SPAR\.REFINE is not supported by MaskTransformer; got 'lposs'"),
        (["TEST.AUG.ENABLED", True], r"TEST\.AUG\.ENABLED is not supported by MaskTransformer"),
        (["TEST.DETECTIONS_PER_IMAGE", -1], r"TEST\.DETECTIONS_PER_IMAGE must be at least 0, got -1"),
        (["MODEL.SPAR.INFERENCE", "windows"], r"MODEL\.SPAR\.INFERENCE must be one of"),
        (["MODEL.SPAR.REFERENCE_COMPAT", True], r"MODEL\.SPAR\.REFERENCE_COMPAT must be False for MaskTransformer"),
        (["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 0], r"MODEL\.SEM_SEG_HEAD\.NUM_CLASSES"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", -1], r"MODEL\.ROI_HEADS\.NUM_CLASSES"),
        ([*SEMANTIC, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 0], r"MODEL\.SEM_SEG_HEAD\.NUM_CLASSES"),
    ],
)
def test_wrong_keys_of_other_parts_are_named(keys, message):
    with pytest.raises(ValueError, match=message):
        build_model(small_config(*keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["DATASETS.TRAIN", "()"], r"CLASSIFIER text: DATASETS\.TRAIN"),
        ([f"{NODE}.UNSEEN", "('dog',)"], r"UNSEEN must be some of the training classes circle, .*dog"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", 7], r"NUM_CLASSES .* 8 things and 5 stuff classes plus one"),
        (["MODEL.SPAR.VOCABULARY", "cat; dog"], r'headings "things:" and "stuff:"'),
        (["MODEL.SPAR.ENCODER", "vit_nano_patch8_dinov3", "MODEL.SPAR.PRETRAINED", ""], "no text tower"),
    ],
)
def test_wrong_keys_of_words_are_named(keys, message):
    with pytest.raises(ValueError, match=message):
        build_model(small_config(*TEXT, *keys))


def test_all_classes_cannot_be_unseen():
    names = "('grass', 'sand', 'water', 'brick', 'snow', 'circle', 'square', 'triangle', 'star', 'cross', 'ring', "
    names += "'heart', 'moon')"
    with pytest.raises(ValueError, match=r"UNSEEN "):
        build_model(small_config(*TEXT, *SEMANTIC, f"{NODE}.UNSEEN", names))


def test_an_encoder_without_words_has_learned_classes():
    keys = ["MODEL.SPAR.ENCODER", "vit_nano_patch8_dinov3", "MODEL.SPAR.PRETRAINED", ""]
    model = build_model(small_config(*keys)).eval()
    ids, _ = model([{"image": image((50, 61))}])[0]["panoptic_seg"]
    assert ids.shape == (50, 61)


@pytest.mark.parametrize(
    ("count", "limit", "expected"),
    [(12, 4, [2, 5, 8]), (24, 4, [5, 11, 17]), (12, 2, [3, 7]), (5, 3, [0, 1, 3]), (3, 4, [0, 1]), (1, 4, [])],
)
def test_default_blocks_are_spread_evenly(count, limit, expected):
    encoder = example_encoder("open_clip ViT")
    encoder.visual.transformer.resblocks = torch.nn.ModuleList(torch.nn.Identity() for _ in range(count))
    found = lateral_blocks(encoder, (), limit)
    assert len(found) == len(set(found)) == min(3, count - 1, limit) and all(0 <= n < count - 1 for n in found)
    assert found == sorted(found) == expected


def test_chosen_blocks_keep_their_order():
    assert lateral_blocks(example_encoder("open_clip ViT"), (1, 0), 4) == [1, 0]


def test_the_toy_config_is_complete():
    text = (ROOT / "configs/toy/mask_transformer.yaml").read_text()
    assert "META_ARCHITECTURE: MaskTransformer" in text
    assert build_model(small_config()).laterals == (1, 2)
