"""Refined labels and probabilities of the segmentor equal plain computations with full maps of all classes."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model

import spar_d2
from live_memory import LiveMemory
from plain import labels_of_scores
from plain_anyup import reference_anyup
from pretended_cuda import PretendedCuda
from reference import TINY_CONFIG, reference_image
from spar_d2.encoders import build_encoder
from spar_d2.modeling import pixel_scores
from spar_d2.modeling.example_embeddings import ClassVectors
from spar_d2.modeling.postprocessing import cosine_scores
from spar_d2.modeling.refinement import EncodedImage, Refinement, parse_refine
from spar_d2.modeling.test_time_augmentation import SegmentorWithTTA
from spar_d2.refine import imagenet_normalized, lposs, lposs_plus, pixel_propagation, save_anyup
from spar_d2.text import Vocabulary

WORDS, MORE_WORDS = "cat, kitten; dog; sky; grass", "tree; sea; car, van"
SIZE = (70, 101)
# All values, without blanks.
REFINEMENTS = ["lposs", "anyup", "lposs+", "lposs,anyup", "lposs,lposs+", "anyup,lposs+", "lposs,anyup,lposs+"]
NEIGHBORS = 9


@pytest.fixture(scope="module")
def anyup():
    return reference_anyup()


def built(cfg, *more_words):
    """Segmentor whose class vectors tell the patches of images apart, which random weights and words do not."""
    cfg.MODEL.SPAR.VOCABULARY = WORDS
    model = build_model(cfg).eval()
    images = [record(size, index)["image"] for index in range(3) for size in (SIZE, (64, 48), (80, 48), (64, 96))]
    cells = [F.normalize(model.encode(image).flatten(1).T, dim=1) for image in images]
    # Without the means of the images, no class is the best everywhere.
    means, _ = torch.linalg.qr(torch.stack([of_image.mean(0) for of_image in cells]).T)
    cells = torch.cat(cells)
    cells = cells - cells @ means @ means.T
    for number, words in enumerate([WORDS, *more_words]):
        vocabulary = Vocabulary.of(words)
        of_queries = [index for index, names in enumerate(vocabulary.classes) for _ in names]
        chosen = torch.linspace(number, len(cells) - 3, len(of_queries)).long()
        vectors = F.normalize(cells[chosen], dim=1)
        model._text[vocabulary, 0] = ClassVectors(vectors, torch.tensor(of_queries))
    return model


@pytest.fixture
def model(tiny_cfg):
    return built(tiny_cfg, MORE_WORDS)


def record(size=SIZE, index=0, **more):
    image = torch.from_numpy(reference_image(*size, index)).permute(2, 0, 1)
    return {"image": image, **more}


def plain_scores(model, inputs, refine, anyup=None, vocabulary=None, normalized=False):
    """Scores (Q, height, width) with full maps, one step after the other."""
    steps, pixels = refine.split(","), inputs["image"]
    height, width = pixels.shape[1:]
    classes = model.class_vectors(vocabulary or model.vocabulary)
    encoder, features = model.backbone.encoder, model.encode(pixels)
    covered = [cells * encoder.patch_size for cells in features.shape[1:]]
    scores = torch.einsum("dhw,qd->qhw", F.normalize(features, dim=0), classes.vectors)
    values = features
    if "lposs" in steps:

        def propagate(columns):
            return lposs(columns.permute(1, 2, 0), features, encoder.patch_size, NEIGHBORS).permute(2, 0, 1)

        scores = propagate(scores) / (propagate(torch.ones_like(scores)) if normalized else 1)
        values = scores
    if anyup is not None and "anyup" in steps:
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.pixel_mean, encoder.pixel_std))
        padded = encoder.size_policy.apply(model.encoder_input(pixels))
        guidance = imagenet_normalized(padded * std + mean)
        upsampled = anyup.prepare(guidance, features[None], covered).rows(values[None], slice(None))[0]
        if values is features:
            upsampled = torch.einsum("dhw,qd->qhw", F.normalize(upsampled, dim=0), classes.vectors)
        scores = upsampled
    elif "lposs+" in steps:
        scores = F.interpolate(scores[None], size=covered, mode="bilinear")[0]
    else:
        # At once to the result. Images of tests with another size of the result have no padding.
        size = (inputs["height"], inputs["width"]) if "height" in inputs else covered
        upsampled = F.interpolate(scores[None], size=size, mode="bilinear")[0]
        return upsampled[:, : inputs.get("height", height), : inputs.get("width", width)]
    scores, factor = scores[:, :height, :width], None
    if "lposs+" in steps:
        scores, factor = (lposs_plus(one, pixels / 255) for one in (scores, torch.ones_like(scores[:1])))
    size = (inputs.get("height", height), inputs.get("width", width))
    scores = F.interpolate(scores[None], size, mode="bilinear")[0]
    if normalized and factor is not None:
        scores = scores / F.interpolate(factor[None], size, mode="bilinear")[0]
    return scores


def assert_same_labels(found, scores, classes, **thresholds):
    settings = {"logit_scale": 1.0, "prob_threshold": 0.0, "area_threshold": None, **thresholds}
    expected = labels_of_scores(scores, classes, **settings)
    assert found.shape == expected.shape and found.dtype == torch.int64
    # Rounding decides between equal scores.
    assert (found == expected).float().mean() > 0.997
    assert len(expected.unique()) > 1


@pytest.mark.parametrize("refine", REFINEMENTS)
def test_labels_are_those_of_full_maps_at_any_size(model, anyup, refine, monkeypatch):
    monkeypatch.setattr(pixel_scores, "_BAND_BYTES", 1 << 22)  # several bands, groups and chunks
    monkeypatch.setattr(pixel_scores, "_GROUP_BYTES", 1 << 15)
    monkeypatch.setattr(pixel_propagation, "_CLASS_BYTES", 1 << 18)
    model.refinement = Refinement(parse_refine(refine), NEIGHBORS, anyup)
    inputs = [record(), record((64, 48), 1, height=90, width=40), record((64, 48), 2, vocabulary=MORE_WORDS)]
    classes = model.class_vectors(model.vocabulary).query_class
    for one, output in zip(inputs, model(inputs)):
        own = Vocabulary.of(one["vocabulary"]) if "vocabulary" in one else None
        of_queries = model.class_vectors(own).query_class if own else classes
        assert_same_labels(output["sem_seg_labels"], plain_scores(model, one, refine, anyup, own), of_queries)


@pytest.mark.parametrize("refine", REFINEMENTS)
def test_thresholds_and_probabilities_are_those_of_normalized_scores(model, anyup, refine):
    model.refinement = Refinement(parse_refine(refine), NEIGHBORS, anyup)
    one = record((64, 48), 1, height=70, width=40)
    classes = model.class_vectors(model.vocabulary).query_class
    scores = plain_scores(model, one, refine, anyup, normalized=True)
    best = (40 * scores).softmax(0).amax(0)
    # About half of the pixels are below the one threshold, and some classes below the other.
    shares = torch.bincount(classes[scores.argmax(0)].flatten(), minlength=4)[1:].double()
    areas = float((shares / shares.sum()).sort().values[:2].mean())
    model.prob_threshold, model.area_threshold = float(best.median()), areas
    thresholds = {"logit_scale": 40.0, "prob_threshold": model.prob_threshold, "area_threshold": areas}
    assert_same_labels(model([one])[0]["sem_seg_labels"], scores, classes, **thresholds)
    model.output = "scores"
    found = model([one])[0]["sem_seg"]
    queries = (40 * scores).softmax(0)
    expected = torch.stack([queries[classes == number].amax(0) for number in range(4)])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_refinement_is_no_part_of_the_weights(tiny_cfg, model):
    assert tiny_cfg.MODEL.SPAR.REFINE == "" and model.refinement.steps == ()
    before = set(model.state_dict())
    model.refinement = Refinement(("lposs",), NEIGHBORS, guide=copy.deepcopy(model.backbone.encoder))
    model([record()])
    assert set(model.state_dict()) == before


def test_the_sliding_window_is_refined(tiny_cfg, anyup):
    tiny_cfg.MODEL.SPAR.INFERENCE = "sliding_window"
    model, one = built(tiny_cfg), record((80, 48), 1)
    classes = model.class_vectors(model.vocabulary).query_class
    for refine in ("lposs,lposs+", "anyup"):
        model.refinement = Refinement(parse_refine(refine), NEIGHBORS, anyup)
        assert_same_labels(model([one])[0]["sem_seg_labels"], plain_scores(model, one, refine, anyup), classes)


@pytest.mark.parametrize("normalized", [False, True])
def test_centers_of_classes_by_example_are_subtracted_before_upsampling(model, anyup, normalized):
    classes, one = model.class_vectors(model.vocabulary), record((64, 48))
    features = model.encode(one["image"])
    center = 0.1 * F.normalize(torch.ones(len(features)), dim=0)
    centered = ClassVectors(classes.vectors, classes.query_class, center)
    image = EncodedImage(model.backbone.encoder, lambda: model.encoder_input(one["image"]), features)
    found = Refinement(("anyup",), anyup=anyup).pixel_scores(image, centered, (64, 48), normalized)
    attention = anyup.prepare(imagenet_normalized(image.rgb()), features[None], (64, 48))
    upsampled = attention.rows(centered.centered(features)[None], slice(None))[0]
    scores = torch.einsum("dhw,qd->qhw", F.normalize(upsampled, dim=0), classes.vectors)
    assert_same_labels(found.labels(1.0, 0.0, None), scores, classes.query_class)


def test_features_of_a_second_encoder_guide_the_patches(tiny_cfg, tiny_model, tmp_path):
    # Another patch size: the features are resampled to the grid of the scores.
    config = {**TINY_CONFIG, "vision_cfg": {**TINY_CONFIG["vision_cfg"], "patch_size": 8}}
    other = tmp_path / "other.json"
    other.write_text(json.dumps(config))
    spar = tiny_cfg.MODEL.SPAR
    spar.REFINE, spar.REFINE_NEIGHBOURS = "lposs", NEIGHBORS
    spar.REFINE_ENCODER, spar.REFINE_READOUT = str(other), "self_correlation"
    model, one = built(tiny_cfg), record((64, 96))
    guide = build_encoder(str(other), readout="self_correlation").freeze()
    features = F.interpolate(guide(model.encoder_input(one["image"])), (4, 6), mode="bilinear")[0]
    image = EncodedImage(model.backbone.encoder, lambda: model.encoder_input(one["image"]), model.encode(one["image"]))
    classes = model.class_vectors(model.vocabulary)
    refined = lposs(cosine_scores(image.features, classes.vectors), features, 16, NEIGHBORS)
    torch.testing.assert_close(model.refinement.patch_scores(image, classes, False), refined, rtol=1e-4, atol=1e-4)
    scores = F.interpolate(refined.permute(2, 0, 1)[None], (64, 96), mode="bilinear")[0]
    assert_same_labels(model([one])[0]["sem_seg_labels"], scores, classes.query_class)


def test_the_views_of_test_time_augmentation_are_refined_by_patches_only(tiny_cfg, anyup):
    tiny_cfg.MODEL.SPAR.OUTPUT = "scores"
    tiny_cfg.TEST.AUG.MIN_SIZES, tiny_cfg.TEST.AUG.FLIP = (64,), False
    model, one = built(tiny_cfg), record((64, 96))
    model.refinement = Refinement(("lposs",), NEIGHBORS)
    found = SegmentorWithTTA(tiny_cfg, model)([one])[0]["sem_seg"]
    torch.testing.assert_close(found, model([one])[0]["sem_seg"], rtol=1e-4, atol=1e-5)
    model.refinement = Refinement(("lposs", "anyup"), NEIGHBORS, anyup)
    with pytest.raises(ValueError, match=r"MODEL\.SPAR\.REFINE"):
        SegmentorWithTTA(tiny_cfg, model)


@pytest.mark.parametrize("refine", ["lposs", "anyup,lposs+"])
def test_one_call_refines_as_the_segmentor_does(tiny_model, tiny_cfg, anyup, refine, tmp_path):
    file = tmp_path / "anyup.safetensors"
    save_anyup(anyup, file)
    tiny_cfg.MODEL.SPAR.VOCABULARY, tiny_cfg.MODEL.SPAR.OUTPUT = WORDS, "scores"
    tiny_cfg.MODEL.SPAR.REFINE, tiny_cfg.MODEL.SPAR.ANYUP = refine, str(file)
    model = build_model(tiny_cfg).eval()
    best = model([record()])[0]["sem_seg"].amax(0)
    model.output, model.prob_threshold = "labels", float(best.median())
    options = {"templates": "simple", "refine": refine, "anyup": file, "prob_threshold": model.prob_threshold}
    labels = spar_d2.segment(reference_image(*SIZE), WORDS, *tiny_model, logit_scale=40.0, **options).labels
    assert (torch.from_numpy(labels) == model([record()])[0]["sem_seg_labels"]).float().mean() > 0.997
    assert 0.4 < (labels == 0).mean() < 0.6


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"REFINE": "crf"}, r"MODEL\.SPAR\.REFINE"),
        ({"REFINE": "lposs+,lposs"}, r"MODEL\.SPAR\.REFINE"),
        ({"REFINE": "lposs,,lposs+"}, r"MODEL\.SPAR\.REFINE"),
        ({"REFINE": "anyup"}, r"MODEL\.SPAR\.ANYUP"),
        ({"REFINE": "lposs", "REFINE_NEIGHBOURS": 0}, r"MODEL\.SPAR\.REFINE_NEIGHBOURS"),
        ({"REFINE": "lposs", "REFINE_PRETRAINED": "x"}, r"MODEL\.SPAR\.REFINE_ENCODER"),
        ({"REFINE": "lposs", "REFINE_ENCODER": "ViT-B-17"}, r"MODEL\.SPAR\.REFINE_ENCODER"),
        ({"REFINE": "lposs", "REFINE_ENCODER": "ViT-B-16", "REFINE_READOUT": "value"}, r"MODEL\.SPAR\.REFINE_READOUT"),
        ({"REFINE": "lposs+", "REFERENCE_COMPAT": True}, r"MODEL\.SPAR\.REFERENCE_COMPAT"),
    ],
)
def test_wrong_keys_are_named(tiny_cfg, keys, message):
    tiny_cfg.MODEL.SPAR.VOCABULARY = WORDS
    for key, value in keys.items():
        tiny_cfg.MODEL.SPAR[key] = value
    with pytest.raises(ValueError, match=message):
        build_model(tiny_cfg)


def test_missing_weights_of_anyup_are_named(tiny_cfg, tmp_path):
    tiny_cfg.MODEL.SPAR.REFINE, tiny_cfg.MODEL.SPAR.ANYUP = "anyup", str(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match=r"MODEL\.SPAR\.ANYUP"):
        build_model(tiny_cfg)


def test_images_of_one_row_of_patches_are_refused_by_anyup_only(model, anyup):
    model.refinement = Refinement(("lposs", "lposs+"))
    assert model([record((16, 64))])[0]["sem_seg_labels"].shape == (16, 64)
    model.refinement = Refinement(("anyup",), anyup=anyup)
    with pytest.raises(ValueError, match=r"MODEL\.SPAR\.REFINE.*1x4"):
        model([record((16, 64))])


@pytest.mark.slow
@pytest.mark.parametrize("refine", ["lposs+", "anyup,lposs+"])
def test_memory_does_not_grow_with_the_classes(model, anyup, refine):
    features = torch.randn(16, 2, 3, generator=torch.Generator().manual_seed(0))
    image = EncodedImage(model.backbone.encoder, lambda: torch.zeros(1, 3, 32, 48), features)
    peaks = []
    for queries in (13, 52):
        vectors = F.normalize(torch.randn(queries, 16, generator=torch.Generator().manual_seed(1)), dim=1)
        classes = ClassVectors(vectors, torch.arange(queries))
        with LiveMemory() as memory, pytest.MonkeyPatch.context() as patch:
            patch.setattr(pixel_scores, "_GROUP_BYTES", 1 << 15)
            patch.setattr(pixel_propagation, "_CLASS_BYTES", 1 << 18)
            Refinement(parse_refine(refine), anyup=anyup).pixel_scores(image, classes, (32, 48), True).labels(
                40, 0.1, 0
            )
        peaks.append(memory.peak)
    # All scores of 39 more classes are 240 kB; the chunk before may still be alive, depending on garbage collection.
    assert peaks[1] < peaks[0] + 62_500, peaks


@pytest.mark.parametrize("refine", ["lposs", "anyup", "lposs,lposs+", "lposs,anyup,lposs+"])
def test_the_host_waits_at_most_twice_for_an_image_on_a_gpu(tiny_cfg, anyup, refine):
    tiny_cfg.MODEL.SPAR.VOCABULARY, tiny_cfg.MODEL.DEVICE = WORDS, "cuda"
    tiny_cfg.MODEL.SPAR.PROB_THRESHOLD, tiny_cfg.MODEL.SPAR.AREA_THRESHOLD = 0.1, 0.05
    with PretendedCuda() as gpu:
        model, one = build_model(tiny_cfg).eval(), record((48, 64))
        model.refinement = Refinement(parse_refine(refine), NEIGHBORS, copy.deepcopy(anyup))
        model([one])  # class names are encoded once, models are moved
        gpu.reset()
        labels = model([one])[0]["sem_seg_labels"]
        assert labels.is_cuda and gpu.waits_in("spar_d2") <= 2, gpu.report()
