"""Targets: each thing and each stuff class is a segment; what has no label, or an excluded class, is not learned."""

import numpy as np
import pytest
import torch
from detectron2.structures import Instances, PolygonMasks

from small_mask_transformers import panoptic_record, semantic_record
from spar_d2.modeling.mask_transformer.targets import panoptic_targets, semantic_targets

SIZE = (24, 40)


def test_things_come_first_and_stuff_is_numbered_after_them():
    record = panoptic_record(SIZE, things=3, stuff=2)
    targets = panoptic_targets(record, 8, 255)
    labels = record["sem_seg"]
    assert targets.classes.tolist() == [0, 3, 6, 8, 9]
    assert torch.equal(targets.masks[:3], record["instances"].gt_masks.tensor)
    for mask, label in zip(targets.masks[3:], (1, 2)):
        assert torch.equal(mask, labels == label)
    assert targets.masks.sum(0).max() == 1
    assert torch.equal(targets.valid, targets.masks.any(0))


def test_crowds_and_pixels_without_a_segment_are_not_valid():
    record = panoptic_record(SIZE, things=1)
    targets = panoptic_targets(record, 8, 255)
    crowd = (record["sem_seg"] == 0) & ~record["instances"].gt_masks.tensor.any(0)
    assert crowd.any() and (record["sem_seg"] == 255).any()
    assert torch.equal(~targets.valid, crowd | (record["sem_seg"] == 255))


@pytest.mark.parametrize(("things", "stuff"), [(0, 2), (2, 0), (0, 0)])
def test_images_without_things_or_stuff(things, stuff):
    targets = panoptic_targets(panoptic_record(SIZE, things=things, stuff=stuff), 8, 255)
    assert len(targets.classes) == things + stuff == len(targets.masks)
    assert targets.masks.shape[1:] == targets.valid.shape == SIZE
    assert targets.classes.dtype == torch.int64 and targets.masks.dtype == targets.valid.dtype == torch.bool


def test_polygons_of_detectron2s_mapper():
    size = (20, 30)
    boxes = [(2, 3, 12, 15), (14, 5, 28, 18)]
    polygons = [[np.array([x0, y0, x1, y0, x1, y1, x0, y1], dtype=float)] for x0, y0, x1, y1 in boxes]
    instances, labels = Instances(size), torch.ones(size, dtype=torch.int64)
    instances.gt_classes, instances.gt_masks = torch.tensor([4, 1]), PolygonMasks(polygons)
    for x0, y0, x1, y1 in boxes:
        labels[y0:y1, x0:x1] = 0
    targets = panoptic_targets({"instances": instances, "sem_seg": labels}, 8, 255)
    assert targets.classes.tolist() == [4, 1, 8] and targets.valid.all()
    for mask, (x0, y0, x1, y1) in zip(targets.masks, boxes):
        assert mask[y0:y1, x0:x1].all() and mask.sum() == (y1 - y0) * (x1 - x0)
    # It leaves out masks where there are no instances.
    nothing = Instances(size)
    nothing.gt_classes = torch.zeros(0, dtype=torch.int64)
    targets = panoptic_targets({"instances": nothing, "sem_seg": labels}, 8, 255)
    assert targets.classes.tolist() == [8] and torch.equal(targets.valid, labels == 1)


def test_label_maps():
    record = semantic_record(SIZE, 3)
    targets = semantic_targets(record, 255)
    assert targets.classes.tolist() == [3, 4, 5, 6, 7]
    for number, mask in zip(targets.classes, targets.masks):
        assert torch.equal(mask, record["sem_seg"] == number)
    assert torch.equal(targets.valid, record["sem_seg"] != 255)
    nothing = semantic_targets({"sem_seg": torch.full(SIZE, 255)}, 255)
    assert len(nothing.classes) == 0 and nothing.masks.shape == (0, *SIZE) and not nothing.valid.any()


def test_excluded_classes_are_unlabeled():
    record = panoptic_record(SIZE, things=3)
    whole, less = (panoptic_targets(record, 8, 255, excluded) for excluded in ((), {3, 9}))
    assert whole.classes.tolist() == [0, 3, 6, 8, 9] and less.classes.tolist() == [0, 6, 8]
    assert torch.equal(less.masks, whole.masks[[0, 2, 3]])
    assert torch.equal(less.valid, whole.valid & ~whole.masks[1] & ~whole.masks[4])
    of_map = semantic_targets(semantic_record(SIZE), 255, {0, 1, 2, 3, 4})
    assert len(of_map.classes) == 0 and not of_map.valid.any()


def test_missing_labels_are_named():
    record = panoptic_record(SIZE)
    for key in ("instances", "sem_seg"):
        with pytest.raises(ValueError, match=f"the inputs have no {key}$"):
            panoptic_targets({name: value for name, value in record.items() if name != key}, 8, 255)
    with pytest.raises(ValueError, match="no instances and no sem_seg"):
        panoptic_targets({"image": record["image"]}, 8, 255)
    with pytest.raises(ValueError, match="no sem_seg"):
        semantic_targets({"image": record["image"]}, 255)
