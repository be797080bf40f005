"""Queries from the centers of things: heat maps to learn, their loss, and the choice of patches."""

import math

import pytest
import torch

from small_mask_transformers import SEMANTIC, image, panoptic_record, random_targets, semantic_record, small_model
from spar_d2.modeling.mask_transformer.blocks import grid_places
from spar_d2.modeling.mask_transformer.centers import CenterQueries, center_loss, center_targets
from spar_d2.modeling.mask_transformer.targets import Targets

WIDTH = 16


def queries(count: int, peaks=(), grid=(6, 8)) -> tuple[CenterQueries, torch.Tensor]:
    """Patches whose first channel is the heat map: logits of the peaks, and -5 elsewhere."""
    torch.manual_seed(0)
    patches = torch.randn(1, WIDTH, *grid)
    patches[:, 0] = -5
    for row, column, logit in peaks:
        patches[0, 0, row, column] = logit
    module = CenterQueries(WIDTH, count)
    module.heat = torch.nn.Conv2d(WIDTH, 1, 1, bias=False)
    torch.nn.init.zeros_(module.heat.weight).data[0, 0] = 1
    return module, patches


def test_the_best_peaks_come_first_whatever_is_beside_them():
    # The second best patch is beside the best one.
    module, patches = queries(3, [(1, 1, 3.0), (1, 2, 2.0), (4, 5, 1.0), (0, 7, -1.0)])
    logits, tokens, places = module(patches)
    assert torch.equal(logits, patches[:, 0])
    everywhere = grid_places((6, 8), torch.device("cpu")).view(6, 8, 2)
    assert torch.equal(places[0], torch.stack([everywhere[1, 1], everywhere[4, 5], everywhere[0, 7]]))
    chosen = torch.stack([patches[0, :, row, column] for row, column in ((1, 1), (4, 5), (0, 7))])
    torch.testing.assert_close(tokens[0], module.content(chosen))


def test_close_scores_beside_a_peak_keep_their_order():
    heat = -4 - torch.arange(30) * 1e-4
    module, patches = queries(30, grid=(1, 30))
    patches[0, 0] = heat
    places = grid_places((1, 30), torch.device("cpu"))
    assert torch.equal(module(patches).places[0], places)


def test_patches_beside_peaks_follow_when_there_are_no_more_peaks():
    module, patches = queries(4, [(0, 0, 3.0), (0, 1, 2.0), (0, 2, 1.0)], (1, 4))
    places = grid_places((1, 4), torch.device("cpu"))
    assert torch.equal(module(patches).places[0], places[[0, 1, 2, 3]])


@pytest.mark.parametrize("grid", [(1, 1), (1, 3), (2, 2)])
def test_a_small_image_gets_empty_patches(grid):
    module, patches = queries(7, grid=grid)
    count = grid[0] * grid[1]
    patches[:, 0] = torch.arange(count).float().view(grid)
    _, tokens, places = module(patches)
    assert tokens.shape == (1, 7, WIDTH) and places.shape == (1, 7, 2)
    found, expected = places[0, :count].tolist(), grid_places(grid, torch.device("cpu")).tolist()
    assert sorted(found) == sorted(expected)
    assert not places[0, count:].any() and torch.equal(tokens[0, count], module.content(torch.zeros(WIDTH)))


def test_a_constant_image_has_finite_queries():
    module = CenterQueries(WIDTH, 5)
    found = module(torch.ones(2, WIDTH, 3, 4))
    assert all(part.isfinite().all() for part in found)
    # At the start, the model hardly expects any center.
    assert ((found.logits.sigmoid() > 0.005) & (found.logits.sigmoid() < 0.02)).all()


def test_patches_get_gradients_of_both_their_heat_and_their_queries():
    module, patches = CenterQueries(WIDTH, 2), torch.randn(1, WIDTH, 3, 4).requires_grad_()
    logits, tokens, _ = module(patches)
    (tokens.square().sum() + logits.sum()).backward()
    assert patches.grad.any() and all(p.grad is not None and p.grad.any() for p in module.parameters())


def plain_targets(targets: Targets, things: int, grid, patch: int) -> torch.Tensor:
    """One patch and one segment after the other."""
    result = torch.zeros(grid, dtype=torch.float64)
    for number, mask in zip(targets.classes.tolist(), targets.masks):
        if number >= things or not mask.any():
            continue
        y, x = (float((positions.double() + 0.5).mean()) for positions in mask.nonzero(as_tuple=True))
        row, column = math.floor(y / patch), math.floor(x / patch)
        spread = max(0.5, math.sqrt(int(mask.sum())) / patch / 6)
        for i in range(grid[0]):
            for j in range(grid[1]):
                value = math.exp(-((i - row) ** 2 + (j - column) ** 2) / (2 * spread**2))
                result[i, j] = max(result[i, j], value)
    return result


@pytest.mark.parametrize("segments", [0, 1, 4, 9])
@pytest.mark.parametrize(("size", "patch"), [((12, 20), 4), ((13, 21), 4), ((40, 5), 8), ((3, 3), 16)])
def test_heat_maps_equal_plain_ones(segments, size, patch):
    grid = tuple(-(-side // patch) for side in size)
    several = [random_targets(segments, size, 6, seed) for seed in range(3)]
    if segments:  # a thing without a pixel
        several[1].masks[0] = False
    found, labeled = center_targets(several, 4, grid, patch)
    assert found.shape == (3, *grid) and labeled.all()
    for targets, heat in zip(several, found):
        torch.testing.assert_close(heat.double(), plain_targets(targets, 4, grid, patch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_does_not_move_centers(dtype):
    masks = torch.zeros(3, 640, 640, dtype=torch.bool)
    masks[0, 100:200, 300:400] = masks[1, 400:600, 400:630] = masks[2, 20:30, 40:55] = True
    targets = [Targets(torch.tensor([0, 1, 2]), masks, torch.ones(640, 640, dtype=torch.bool))]
    expected, _ = center_targets(targets, 3, (40, 40), 16)
    with torch.autocast("cpu", dtype):
        found, _ = center_targets(targets, 3, (40, 40), 16)
    assert (expected[0] == 1).nonzero().tolist() == [[1, 2], [9, 21], [31, 32]]
    assert torch.equal(found, expected)


def test_patches_without_a_label_have_no_effect():
    (targets,) = (random_targets(2, (10, 13), 4, 0),)
    targets.valid[:, :4] = targets.valid[8:] = False
    targets.valid[9, 12] = True
    _, labeled = center_targets([targets], 4, (3, 4), 4)
    assert labeled[0].int().tolist() == [[0, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]]
    logits = torch.randn(1, 3, 4).requires_grad_()
    center_loss(logits, torch.rand(1, 3, 4), labeled).backward()
    assert torch.equal(logits.grad != 0, labeled)


def test_the_loss_equals_the_formula():
    torch.manual_seed(0)
    logits, targets = 3 * torch.randn(2, 3, 4), torch.rand(2, 3, 4)
    targets[0, 1, 2] = targets[1, 0, 0] = 1
    expected = 0.0
    for logit, target in zip(logits.flatten().tolist(), targets.flatten().tolist()):
        p = 1 / (1 + math.exp(-logit))
        expected -= (1 - p) ** 2 * math.log(p) if target == 1 else (1 - target) ** 4 * p**2 * math.log(1 - p)
    everything = torch.ones_like(targets).bool()
    assert float(center_loss(logits, targets, everything)) == pytest.approx(expected, rel=1e-5)
    assert center_loss(
        torch.tensor([[[-300.0, 300.0]]]), torch.tensor([[[1.0, 0.0]]]), everything[:1, :1, :2]
    ).isfinite()


def test_the_model_learns_the_centers_of_things():
    model = small_model("MODEL.MASK_TRANSFORMER.CENTER_SHARE", 0.5).train()
    assert model.head.centers.count == 6 and len(model.head.queries) == 6
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=3e-3)
    record, values = panoptic_record((48, 64)), []
    for _ in range(40):
        losses = model([record])
        values.append(float(losses["loss_center"].detach()))
        optimizer.zero_grad()
        losses["loss_center"].backward()
        optimizer.step()
    assert values[-1] < 0.1 * values[0]
    wanted, known = center_targets([model._targets(record)], 8, (6, 8), 8)
    wanted, known = wanted[0], known[0]
    logits = model._predictions(model._normalize(record["image"])[None])[1][0].centers[0]
    assert (logits[wanted == 1] > 0).all() and (logits[(wanted < 0.1) & known] < 0).all()


def test_images_without_things_have_no_center():
    model = small_model().train()
    losses = model([panoptic_record((48, 64), things=0)])
    assert losses["loss_center"].isfinite() and losses["loss_center"] < 1


def test_semantic_models_have_no_center_queries():
    model = small_model(*SEMANTIC).train()
    assert model.head.centers is None
    assert set(model([semantic_record((48, 64))])) == {"loss_class", "loss_mask", "loss_dice"}


def test_all_queries_may_be_center_queries():
    model = small_model("MODEL.MASK_TRANSFORMER.CENTER_SHARE", 1.0)
    assert model([{"image": image((8, 8))}])[0]["panoptic_seg"][0].shape == (8, 8)


def test_inference_may_have_other_numbers_of_center_queries():
    half = ("MODEL.MASK_TRANSFORMER.CENTER_SHARE", 0.5)
    model = small_model(*half, "MODEL.MASK_TRANSFORMER.TEST_CENTERS", 30)
    x = model._normalize(image((40, 56)))[None]
    assert model._predictions(x)[1][-1].masks.shape[1] == 6 + 30
    assert model.train()._predictions(x)[1][-1].masks.shape[1] == 6 + 6
    model.eval().head.centers.test_count = 6
    same = small_model(*half)
    assert torch.equal(model._predictions(x)[1][-1].masks, same._predictions(x)[1][-1].masks)
