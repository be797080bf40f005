"""Matching of queries and segments equals a search of all assignments, and costs equal those of single pairs."""

import itertools
import math

import numpy as np
import pytest
import torch

from spar_d2.modeling.mask_transformer.matching import Weights, costs, match


def least_cost(cost: np.ndarray) -> float:
    """The least sum of all assignments of the smaller side."""
    if cost.shape[0] < cost.shape[1]:
        cost = cost.T
    queries, segments = cost.shape
    return min(
        sum(cost[query, segment] for segment, query in enumerate(chosen))
        for chosen in itertools.permutations(range(queries), segments)
    )


@pytest.mark.parametrize(("queries", "segments"), [(5, 3), (4, 4), (3, 5), (6, 1), (1, 3), (1, 1)])
def test_the_assignment_is_the_cheapest_of_all(queries, segments):
    generator = torch.Generator().manual_seed(queries * 10 + segments)
    parts = [torch.randn(3, queries, segments, generator=generator) for _ in range(4)]
    for part, assigned in zip(parts, match(parts)):
        assert len(assigned) == len(part)
        for cost, (of_queries, of_segments) in zip(part.numpy().astype(float), assigned):
            assert len(set(of_queries)) == len(set(of_segments)) == len(of_queries) == min(queries, segments)
            assert cost[of_queries, of_segments].sum() == pytest.approx(least_cost(cost))


def test_images_with_different_numbers_of_segments():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 4, count, generator=generator) for count in (3, 0, 4, 6, 0, 1)]
    together = match(parts)
    assert together == [match([part])[0] for part in parts]
    assert together[1] == [([], [])] * 2
    assert match([]) == []


def test_ties_and_equal_costs_still_give_an_assignment():
    ((queries, segments),) = match([torch.zeros(1, 5, 3)])[0]
    assert len(set(queries)) == 3 and sorted(segments) == [0, 1, 2]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_costs_that_are_no_numbers_are_avoided(value):
    cost = torch.zeros(1, 3, 2)
    cost[0, 1] = value
    ((queries, segments),) = match([cost])[0]
    assert len(segments) == 2 and 1 not in queries


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_costs_of_which_none_is_a_number_still_give_an_assignment(value):
    ((queries, segments),) = match([torch.full((1, 3, 2), value)])[0]
    assert len(set(queries)) == 2 and sorted(segments) == [0, 1]


def test_half_precision_and_gradients():
    cost = torch.tensor([[[0.0, 3.0], [1.0, 0.5]]], dtype=torch.bfloat16, requires_grad=True)
    assert match([cost]) == [[([0, 1], [0, 1])]]


def naive_cost(probabilities, number, logits, inside, valid, weights) -> float:
    """Cost of one pair in float64, pixel by pixel."""
    entropy = dice_inside = dice_sum = 0.0
    for logit, wanted, weight in zip(logits.tolist(), inside.tolist(), valid.tolist()):
        if not weight:
            continue
        probability = 1 / (1 + math.exp(-logit))
        entropy -= math.log(probability if wanted else 1 - probability)
        dice_inside += probability * wanted
        dice_sum += probability + wanted
    dice = 1 - (2 * dice_inside + 1) / (dice_sum + 1)
    count = max(1.0, sum(valid.tolist()))
    return weights.mask * entropy / count + weights.dice * dice - weights.classes * float(probabilities[number])


@pytest.mark.parametrize("labeled", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("weights", [Weights(), Weights(1.5, 0.5, 0.0)])
def test_costs_equal_those_of_single_pairs(labeled, weights):
    generator = torch.Generator().manual_seed(1)
    probabilities = torch.randn(2, 4, 6, generator=generator).softmax(-1)
    masks = 3 * torch.randn(2, 4, 30, generator=generator)
    targets = (torch.rand(3, 30, generator=generator) < 0.4).float()
    valid = (torch.rand(30, generator=generator) < labeled).float()
    classes = torch.tensor([4, 0, 4])
    found = costs(probabilities, classes, masks, targets, valid, weights)
    assert found.shape == (2, 4, 3)
    for stage, query, segment in itertools.product(range(2), range(4), range(3)):
        expected = naive_cost(
            *(probabilities[stage, query], classes[segment], masks[stage, query], targets[segment], valid, weights)
        )
        assert found[stage, query, segment] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_points_without_a_label_do_not_change_costs():
    generator = torch.Generator().manual_seed(2)
    valid = (torch.rand(40, generator=generator) < 0.5).float()
    probabilities, classes = torch.rand(3, 4, generator=generator), torch.tensor([1, 2])
    masks, targets = torch.randn(3, 40, generator=generator), torch.ones(2, 40)
    changed = torch.where(valid > 0, masks, 50 * torch.randn(3, 40, generator=generator))
    more = torch.where(valid > 0, targets, 0)
    found = [costs(probabilities, classes, *pair, valid, Weights()) for pair in ((masks, targets), (changed, more))]
    torch.testing.assert_close(*found)


def test_large_logits_give_finite_costs():
    masks = torch.tensor([[1e4, -1e4, 0.0]])
    found = costs(torch.ones(1, 1), torch.tensor([0]), masks, torch.tensor([[0.0, 1, 1]]), torch.ones(3), Weights())
    assert found.isfinite().all() and found > 1e4
