"""Losses equal plain computations in float64 over all pixels; pixels without a label have no effect."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from small_mask_transformers import random_group, use_all_pixels
from spar_d2.modeling.mask_transformer import Criterion
from spar_d2.modeling.mask_transformer.losses import Group
from spar_d2.modeling.mask_transformer.matching import Weights
from spar_d2.modeling.mask_transformer.targets import Targets

NAMES = ["loss_class", "loss_mask", "loss_dice"]
DEFAULT = Weights()


@pytest.fixture
def all_pixels(monkeypatch):
    use_all_pixels(monkeypatch)


def plain_terms(logits, inside, valid):
    """Cross-entropy and dice of one mask, float64."""
    logits, inside = logits.double()[valid], inside.double()[valid]
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy(probability, inside, reduction="sum") / max(1, len(inside))
    dice = 1 - (2 * (probability * inside).sum() + 1) / (probability.sum() + inside.sum() + 1)
    return entropy, dice


def plain_losses(groups, weights=DEFAULT, no_object=0.1):
    """Losses in float64: all assignments are tried, and segments, queries, stages are visited one by one."""
    segments = sum(len(target.classes) for group in groups for target in group.targets)
    result = dict.fromkeys(NAMES, 0.0)
    for stage in range(len(groups[0].logits)):
        numerator = denominator = 0.0
        for group in groups:
            for index, target in enumerate(group.targets):
                logits, masks = group.logits[stage, index].double(), group.masks[stage, index]
                terms = [[plain_terms(mask, inside, target.valid) for inside in target.masks] for mask in masks]
                probability = logits.softmax(-1)
                cost = torch.zeros(len(masks), len(target.classes), dtype=torch.float64)
                for query, segment in itertools.product(range(len(masks)), range(len(target.classes))):
                    entropy, dice = terms[query][segment]
                    value = weights.mask * entropy + weights.dice * dice
                    cost[query, segment] = value - weights.classes * probability[query, target.classes[segment]]
                owners = cheapest(cost)
                for query, mask in enumerate(masks):
                    segment = owners.get(query)
                    if segment is not None:
                        wanted, weight = target.classes[segment], 1.0
                        result["loss_mask"] += weights.mask * terms[query][segment][0] / max(1, segments)
                        result["loss_dice"] += weights.dice * terms[query][segment][1] / max(1, segments)
                    else:
                        outside = mask.double().sigmoid()
                        is_unlabeled = outside[~target.valid].sum() > 0.5 * outside.sum()
                        wanted, weight = logits.shape[1] - 1, 0.0 if is_unlabeled else no_object
                    numerator += weight * -logits[query].log_softmax(0)[wanted]
                    denominator += weight
        result["loss_class"] += weights.classes * numerator / max(1e-6, denominator)
    return {name: float(value) for name, value in result.items()}


def cheapest(cost) -> dict[int, int]:
    """The segment of each query, by the cheapest of all assignments."""
    queries, segments = cost.shape
    if queries < segments:
        return {query: segment for segment, query in cheapest(cost.T).items()}
    orders = itertools.permutations(range(queries), segments)
    best = min(orders, key=lambda chosen: sum(float(cost[q, s]) for s, q in enumerate(chosen)))
    return {query: segment for segment, query in enumerate(best)}


def assert_close(found, expected):
    assert list(found) == NAMES
    for name in NAMES:
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=2e-5, abs=1e-6), name


@pytest.mark.parametrize("segments", [[3], [2, 0, 4], [5], [7, 1], [0], [0, 0]])
@pytest.mark.parametrize("unlabeled", [0.0, 0.3, 0.7])
def test_losses_equal_plain_ones(all_pixels, segments, unlabeled):
    group = random_group(segments, size=(5, 6), queries=5, stages=2, unlabeled=unlabeled)
    assert_close(Criterion()([group]), plain_losses([group]))


def test_weights_and_the_weight_of_no_object(all_pixels):
    weights = Weights(0.5, 2.0, 3.0)
    group = random_group([2, 3], size=(5, 6), queries=5)
    assert_close(Criterion(weights, 0.7)([group]), plain_losses([group], weights, 0.7))
    nothing = Criterion(weights, 0.0)([group])
    assert_close(nothing, plain_losses([group], weights, 0.0))
    assert nothing["loss_class"] > 0


def test_groups_of_two_sizes_are_averaged_together(all_pixels):
    first, second = random_group([2, 1], (5, 6), 5), random_group([4], (7, 3), 5, seed=9)
    found = Criterion()([first, second])
    assert_close(found, plain_losses([first, second]))
    separate = [Criterion()([group]) for group in (first, second)]
    for name in NAMES[1:]:
        assert found[name] == pytest.approx((3 * separate[0][name] + 4 * separate[1][name]) / 7)
    assert_close(Criterion()([second, first]), found)


def test_a_batch_equals_its_images(all_pixels):
    group = random_group([2, 0, 4], (5, 6), 5)
    alone = [
        Group(group.logits[:, [index]], group.masks[:, [index]], group.scale, [group.targets[index]])
        for index in range(3)
    ]
    assert_close(Criterion()([group]), Criterion()(alone))


def test_random_points_come_close_to_all_pixels(monkeypatch):
    """For masks whose logits are the same everywhere, so that no point is more uncertain than another."""
    torch.manual_seed(0)
    group = random_group([3, 2], (10, 12), 6, unlabeled=0.2)
    group = dataclasses.replace(group, masks=group.masks[..., :1, :1].expand_as(group.masks))
    found = Criterion(points=20000)([group])
    use_all_pixels(monkeypatch)
    expected = Criterion()([group])
    for name in NAMES:
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=0.02)


def test_images_with_part_of_a_patch(monkeypatch):
    """Cells of the mask beyond the image have no effect, and those within are where they belong."""
    use_all_pixels(monkeypatch)
    whole = random_group([3], (6, 8), 5)
    beyond = F.pad(whole.masks.flatten(0, 1), (0, 2, 0, 3), value=70.0).unflatten(0, whole.masks.shape[:2])
    beyond[..., :6, 8] = whole.masks[..., -1]  # bilinear sampling at the border
    beyond[..., 6, :8] = whole.masks[..., -1, :]
    scaled = dataclasses.replace(whole, masks=beyond, scale=(8 / 10, 6 / 9))
    assert_close(Criterion()([scaled]), Criterion()([whole]))


def test_pixels_without_a_label_have_no_effect(all_pixels):
    """Neither on losses nor on gradients; queries without a segment stay on the labeled pixels."""
    group = random_group([3, 2], (5, 6), 5, unlabeled=0.4)
    valid = torch.stack([target.valid for target in group.targets])[None, :, None]
    # In both, few of the pixels that a mask contains are unlabeled.
    masks = torch.where(valid, group.masks.abs(), group.masks - 9)
    changed = torch.where(valid, masks, group.masks * 5 - 30)
    losses, gradients = [], []
    for values in (masks, changed):
        values = values.clone().requires_grad_()
        losses.append(Criterion()([dataclasses.replace(group, masks=values)]))
        sum(losses[-1].values()).backward()
        gradients.append(values.grad)
    assert_close(*losses)
    # Points at the centers of pixels have other pixels' weights of the size of rounding errors.
    assert gradients[0][~valid.expand_as(masks)].abs().max() < 1e-6 < gradients[0].abs().max() / 1000
    torch.testing.assert_close(*gradients)


def test_labels_of_pixels_without_a_label_have_no_effect(all_pixels):
    group = random_group([3], (5, 6), 5, unlabeled=0.4)
    (target,) = group.targets
    more = dataclasses.replace(target, masks=target.masks | ~target.valid)
    assert_close(Criterion()([dataclasses.replace(group, targets=[more])]), Criterion()([group]))


def test_queries_on_unlabeled_pixels_are_not_told_to_be_no_object(all_pixels):
    size, logits = (6, 8), torch.randn(1, 1, 3, 5)
    logits[..., 2, -1] = -20  # the third query is sure to be an object
    valid = torch.ones(size, dtype=torch.bool)
    valid[:, 4:] = False
    inside = torch.zeros(1, *size, dtype=torch.bool)
    inside[0, :3, :4] = True
    masks = torch.full((1, 1, 3, *size), -9.0)
    masks[0, 0, 0] = torch.where(inside[0], 9.0, -9.0)
    masks[0, 0, 2, :, 4:] = 9.0
    found = {}
    for name, labeled in (("unlabeled", valid), ("labeled", torch.ones_like(valid))):
        target = Targets(torch.tensor([1]), inside, labeled)
        found[name] = float(Criterion()([Group(logits, masks, (1.0, 1.0), [target])])["loss_class"])
    assert found["labeled"] > found["unlabeled"] + 1
    without = Group(logits[:, :, :2], masks[:, :, :2], (1.0, 1.0), [Targets(torch.tensor([1]), inside, valid)])
    assert found["unlabeled"] == pytest.approx(float(Criterion()([without])["loss_class"]))


@pytest.mark.parametrize("unlabeled", [0.0, 1.0])
def test_an_image_without_segments_gives_gradients(unlabeled):
    group = random_group([0], unlabeled=unlabeled)
    logits, masks = group.logits.requires_grad_(), group.masks.requires_grad_()
    found = Criterion(points=50)([group])
    sum(found.values()).backward()
    assert found["loss_mask"] == found["loss_dice"] == 0
    assert (found["loss_class"] > 0) == (unlabeled == 0)
    # Processes exchange gradients of all parameters, so that none may be missing.
    assert not masks.grad.any() and logits.grad.isfinite().all()


def test_half_precision_is_computed_in_float32():
    torch.manual_seed(0)
    group = random_group([3, 2], seed=4)
    rough = dataclasses.replace(group, logits=group.logits.bfloat16(), masks=group.masks.bfloat16())
    again = dataclasses.replace(group, logits=rough.logits.float(), masks=rough.masks.float())
    losses = []
    for one in (rough, again):
        torch.manual_seed(1)
        losses.append(Criterion(points=300)([one]))
    assert_close(*losses)
    assert all(loss.dtype == torch.float32 for loss in losses[0].values())


def test_descent_finds_masks_and_classes():
    torch.manual_seed(0)
    group = random_group([3, 2], unlabeled=0.1, stages=1)
    logits, masks = group.logits.requires_grad_(), group.masks.requires_grad_()
    optimizer = torch.optim.Adam([logits, masks], lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        sum(Criterion(points=200)([group]).values()).backward()
        optimizer.step()
    for index, target in enumerate(group.targets):
        for number, inside in zip(target.classes, target.masks):
            found = [
                ((masks[0, index, query] > 0) == inside)[target.valid].float().mean()
                for query in range(7)
                if logits[0, index, query].argmax() == number
            ]
            assert max(found, default=0) > 0.95
    assert (logits[0].argmax(-1) == 5).sum() == 14 - 5
