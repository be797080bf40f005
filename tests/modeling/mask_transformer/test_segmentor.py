"""The model by its config: outputs in Detectron2's forms, images of any sizes, and losses."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.utils.events import EventStorage
from detectron2.utils.visualizer import Visualizer
from torch import nn

from reference import reference_image
from small_mask_transformers import (
    QUERIES,
    SEMANTIC,
    STUFF,
    TEXT,
    THINGS,
    centers,
    image,
    panoptic_record,
    semantic_record,
    small_config,
    small_model,
    use_all_pixels,
)
from spar_d2.modeling.mask_transformer.points import placed, sample

ALL = ["MODEL.MASK_TRANSFORMER.OUTPUTS", "('panoptic_seg', 'sem_seg', 'instances')"]
SCORES = ["MODEL.SPAR.OUTPUT", "scores"]
SIZES = [(64, 96), (51, 77), (64, 96), (5, 3), (8, 8)]


@pytest.fixture(scope="module")
def model():
    return small_model(*ALL)


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        if name == "panoptic_seg":
            (ids, segments), (others, other_segments) = value, second[name]
            assert (ids == others).float().mean() > 0.999
            kinds = [[(s["id"], s["isthing"], s["category_id"]) for s in one] for one in (segments, other_segments)]
            assert kinds[0] == kinds[1]
        elif name == "instances":
            torch.testing.assert_close(value.scores, second[name].scores, rtol=1e-4, atol=1e-5)
            assert (value.pred_masks == second[name].pred_masks).float().mean() > 0.999
        elif name == "sem_seg_labels":
            assert (value == second[name]).float().mean() > 0.999
        else:
            torch.testing.assert_close(value, second[name], rtol=1e-4, atol=1e-5)


def test_the_default_output_is_panoptic():
    output = small_model()([{"image": image((51, 77)), "height": 90, "width": 60}])[0]
    assert list(output) == ["panoptic_seg"]
    ids, segments = output["panoptic_seg"]
    assert ids.shape == (90, 60) and ids.dtype == torch.int32 and segments
    assert {int(number) for number in ids.unique()} - {0} == {segment["id"] for segment in segments}
    for segment in segments:
        least, most = (0, THINGS - 1) if segment["isthing"] else (1, STUFF)
        assert least <= segment["category_id"] <= most
        assert segment["area"] == int((ids == segment["id"]).sum())
    stuff = [segment["category_id"] for segment in segments if not segment["isthing"]]
    assert len(stuff) == len(set(stuff))


@pytest.mark.parametrize("keys", [ALL, SEMANTIC, [*SEMANTIC, *SCORES], [*ALL, *TEXT], [*SEMANTIC, *TEXT]])
def test_a_batch_of_several_sizes_equals_single_images(keys):
    model = small_model(*keys)
    records = [{"image": image(size, index), "height": 40 + index} for index, size in enumerate(SIZES)]
    together = model(records)
    assert len(together) == len(records)
    for record, output in zip(records, together):
        assert_same(output, model([record])[0])
        for name in ("sem_seg", "sem_seg_labels"):
            if name in output:
                assert output[name].shape[-2:] == (record["height"], record["image"].shape[2])


def test_no_images_give_no_results(model):
    assert model([]) == []


def test_semantic_scores_number_things_as_class_0(model):
    record = {"image": image((51, 77))}
    output = model([record])[0]
    assert output["sem_seg"].shape == (1 + STUFF, 51, 77)
    probabilities, masks = plain_queries(model, record["image"])
    scores = torch.einsum("qk,qhw->khw", probabilities[:, :-1], masks)
    torch.testing.assert_close(output["sem_seg"][0], scores[:THINGS].sum(0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(output["sem_seg"][1:], scores[THINGS:], rtol=1e-3, atol=1e-4)


def plain_queries(model, pixels):
    """Class probabilities and mask probabilities at full resolution; patches that stick out are cut off."""
    encoder = model.backbone.encoder
    x = model.encoder_input(pixels)
    with torch.no_grad():
        features = [*encoder.intermediates(x, model.laterals), encoder(x)]
        prediction = model.head(features)[-1]
        probabilities = model.classifier(prediction.embeddings)[0].softmax(-1)
    height, width = (side * encoder.patch_size for side in features[-1].shape[2:])
    masks = F.interpolate(prediction.masks, (height, width), mode="bilinear")[0].sigmoid()
    return probabilities, masks[:, : pixels.shape[1], : pixels.shape[2]]


def test_label_maps_are_the_best_classes():
    labels, scores = small_model(*SEMANTIC), small_model(*SEMANTIC, *SCORES)
    record = {"image": image((51, 77)), "height": 60}
    found, expected = labels([record])[0], scores([record])[0]
    assert list(found) == ["sem_seg_labels"] and list(expected) == ["sem_seg"]
    assert expected["sem_seg"].shape == (13, 60, 77)
    assert torch.equal(found["sem_seg_labels"], expected["sem_seg"].argmax(0))


def test_detections_are_limited(model):
    instances = model([{"image": image((51, 77))}])[0]["instances"]
    assert len(instances) == 30 and instances.image_size == (51, 77)
    assert instances.pred_classes.max() < THINGS
    assert len(small_model(*ALL, "TEST.DETECTIONS_PER_IMAGE", 3)([{"image": image((9, 9))}])[0]["instances"]) == 3


@pytest.mark.parametrize("things", [0, 3])
@pytest.mark.parametrize("stuff", [0, 2])
def test_models_without_things_or_without_stuff(things, stuff):
    counts = ["MODEL.ROI_HEADS.NUM_CLASSES", things, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", stuff + 1]
    if not things + stuff:
        with pytest.raises(ValueError, match=r"NUM_CLASSES.*at least one class"):
            small_model(*counts)
        return
    model = small_model(*ALL, *counts)
    output = model([{"image": image((30, 40))}])[0]
    assert output["sem_seg"].shape == (1 + stuff, 30, 40)
    assert {segment["isthing"] for segment in output["panoptic_seg"][1]} <= {True} & {things > 0} | {False} & {
        stuff == 0
    }
    assert (len(output["instances"]) > 0) == (things > 0)
    losses = model.train()([panoptic_record((30, 40), things=min(things, 1), stuff=min(stuff, 1))])
    assert all(loss.isfinite() for loss in losses.values())


def test_wrong_images_are_an_error(model):
    for wrong in (torch.zeros(1, 8, 8), torch.zeros(8, 8), torch.zeros(3, 0, 8)):
        with pytest.raises(ValueError, match=r"\(3, H, W\)|at least one pixel"):
            model([{"image": wrong}])


def test_default_predictor_and_visualizer(tmp_path, monkeypatch):
    cfg = small_config(*ALL)
    trained = small_model(*ALL)
    torch.save({"model": trained.state_dict()}, tmp_path / "model.pth")
    cfg.MODEL.WEIGHTS, cfg.INPUT.MIN_SIZE_TEST = str(tmp_path / "model.pth"), 64
    pixels = reference_image(50, 80)
    output = DefaultPredictor(cfg)(pixels)
    ids, segments = output["panoptic_seg"]
    assert ids.shape == (50, 80) and segments
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    for drawn in (
        Visualizer(pixels, metadata).draw_panoptic_seg_predictions(ids, segments),
        Visualizer(pixels, metadata).draw_instance_predictions(output["instances"]),
        Visualizer(pixels, metadata).draw_sem_seg(output["sem_seg"].argmax(0)),
    ):
        assert drawn.get_image().shape == (50, 80, 3)
        assert not np.array_equal(drawn.get_image(), pixels)


@pytest.mark.parametrize("keys", [ALL, TEXT])
def test_the_encoder_is_used_once_per_image(monkeypatch, keys):
    model, calls = small_model(*keys), []
    embed = model.backbone.encoder._embed
    monkeypatch.setattr(model.backbone.encoder, "_embed", lambda x: calls.append(len(x)) or embed(x))
    model([{"image": image(size)} for size in ((64, 96), (64, 96), (40, 40))])
    assert calls == [2, 1]


@pytest.mark.parametrize(("keys", "make"), [((), panoptic_record), (SEMANTIC, semantic_record)])
def test_losses_of_two_sizes_are_averaged_over_segments(monkeypatch, keys, make):
    use_all_pixels(monkeypatch)
    model = small_model(*keys).train()
    records = [make((40, 56), 0), make((33, 30), 1), make((40, 56), 2)]
    together, alone = model(records), [model([record]) for record in records]
    targets = [model._targets(record) for record in records]
    of_center = {} if keys else {"loss_center": [int((target.classes < THINGS).sum()) for target in targets]}
    assert list(together) == ["loss_class", "loss_mask", "loss_dice", *of_center]
    segments = [len(target.classes) for target in targets]
    for name, counts in ({"loss_mask": segments, "loss_dice": segments} | of_center).items():
        expected = sum(count * losses[name] for count, losses in zip(counts, alone)) / sum(counts)
        torch.testing.assert_close(together[name], expected, rtol=1e-4, atol=1e-5)
    of_class = [losses["loss_class"] for losses in alone]
    assert min(of_class) <= together["loss_class"] <= max(of_class)


def test_masks_in_training_are_where_they_are_in_inference(model):
    """Pixels of an image whose last patches stick out, of which the losses choose some."""
    record, size = panoptic_record((33, 30)), (33, 30)
    with torch.no_grad():
        group = copy.deepcopy(model).train()._group([0], [model._normalize(record["image"])], [record])
    points = placed(centers(size), group.scale)
    found = sample(group.masks[-1], points[None])[0].sigmoid().view(QUERIES, *size)
    torch.testing.assert_close(found, plain_queries(model, record["image"])[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("keys", [(), TEXT, ["MODEL.SPAR.CHECKPOINTING", True]])
def test_all_parameters_of_the_head_learn_and_none_of_the_encoder(keys):
    model = small_model(*keys).train()
    with EventStorage(0):
        sum(model([panoptic_record((40, 56)), panoptic_record((33, 30), 1)]).values()).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("backbone"):
            assert parameter.grad is None and not parameter.requires_grad, name
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("record", [{"things": 0, "stuff": 0, "crowd": False}, {"things": 0, "stuff": 0}])
@pytest.mark.parametrize("keys", [(), TEXT])
def test_images_without_a_segment_can_be_trained_on(record, keys):
    model = small_model(*keys).train()
    losses = model([panoptic_record((40, 56), **record)])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is not None for n, p in model.named_parameters() if not n.startswith("backbone"))
    mixed = model([panoptic_record((40, 56), **record), panoptic_record((40, 56)), panoptic_record((24, 24), 1)])
    assert all(loss.isfinite() for loss in mixed.values()) and mixed["loss_mask"] > 0


def test_more_segments_than_queries_can_be_trained_on():
    model = small_model("MODEL.MASK_TRANSFORMER.QUERIES", 2).train()
    losses = model([panoptic_record((40, 56), things=5, stuff=3)])
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())


def test_missing_labels_are_an_error(model):
    with pytest.raises(ValueError, match="no instances and no sem_seg"):
        copy.deepcopy(model).train()([{"image": image((40, 40))}])


@pytest.mark.parametrize("keys", [(), TEXT])
def test_mixed_precision_comes_close(monkeypatch, keys):
    use_all_pixels(monkeypatch)
    model = small_model(*keys).train()
    exact = model([panoptic_record((40, 56))])
    with torch.autocast("cpu", torch.bfloat16):
        rough = model([panoptic_record((40, 56))])
    sum(rough.values()).backward()
    for name, loss in exact.items():
        assert rough[name].dtype == torch.float32
        torch.testing.assert_close(rough[name], loss, rtol=0.1, atol=0.1)


def test_masked_attention_ends_block_by_block():
    model = small_model("SOLVER.MAX_ITER", 100, "MODEL.MASK_TRANSFORMER.BLOCKS", 4).train()
    shares = []
    for iteration in (0, 10, 30, 50, 79, 80, 99):
        with EventStorage(iteration):
            shares.append(torch.tensor([model._masked(4) for _ in range(100)]).float().mean(0).tolist())
    assert shares[0] == [1] * 4 and shares[-1] == shares[-2] == [0] * 4
    assert 0.2 < shares[1][0] < 0.8 and shares[1][1:] == [1] * 3
    assert shares[2][0] == 0 and 0.2 < shares[2][1] < 0.8 and shares[2][2:] == [1] * 2
    assert shares[4][:3] == [0] * 3 and shares[4][3] < 0.3
    assert model._masked(4) == [], "outside of a training there is no progress"
    without = small_model("MODEL.MASK_TRANSFORMER.MASKED_ATTENTION", 0.0).train()
    with EventStorage(0):
        assert not any(without._masked(4))


def test_weights_are_those_of_encoder_head_and_classifier(model):
    names = {name.split(".")[0] for name in model.state_dict()}
    assert names == {"backbone", "head", "classifier"}
    assert {name.split(".")[0] for name in small_model(*TEXT).state_dict()} == names
    assert model.head.queries.shape == (QUERIES - model.head.centers.count, 32)
    assert sum(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()) == 0
    record = {"image": image((40, 56))}
    assert_same(copy.deepcopy(model)([record])[0], model([record])[0])
