"""The mask head: any size of image, batches, positions, masked attention, and plain attention in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from spar_d2.modeling.mask_transformer import MaskTransformerHead
from spar_d2.modeling.mask_transformer.blocks import PlaceEmbedding, QueryBlock, grid_places, rotations
from spar_d2.modeling.mask_transformer.predictor import MaskExtent

QUERIES, WIDTH = 5, 16
GRIDS = [(1, 1), (3, 5), (1, 9), (8, 7)]


def rotated_grid(grid, width, queries=0):
    places = torch.cat([torch.rand(queries, 2) * 2 - 1, grid_places(grid, torch.device("cpu"))])
    return rotations(places, width)


def head(blocks=3, widths=(6, 4, 10), patch=16, **more) -> MaskTransformerHead:
    torch.manual_seed(0)
    made = MaskTransformerHead(widths, patch, QUERIES, WIDTH, blocks, 2, **more)
    torch.nn.init.normal_(made.queries)
    return made.eval()


def features(grid, count=2, widths=(6, 4, 10), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, c, *grid, generator=generator) for c in widths]


@pytest.mark.parametrize("center_share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("patch", "cells"), [(4, 1), (8, 2), (14, 4), (16, 4), (32, 8)])
def test_masks_of_any_size(grid, patch, cells, center_share):
    (prediction,) = head(patch=patch, center_share=center_share)(features(grid))
    assert prediction.embeddings.shape == (2, QUERIES, WIDTH)
    assert prediction.masks.shape == (2, QUERIES, grid[0] * cells, grid[1] * cells)
    assert prediction.masks.isfinite().all() and prediction.embeddings.isfinite().all()


def test_a_larger_image_after_a_small_one_and_back():
    model = head()
    first, _, again = (model(features(grid))[0].masks for grid in ((2, 3), (9, 11), (2, 3)))
    assert torch.equal(first, again)


@pytest.mark.parametrize("center_share", [0.0, 0.4])
@pytest.mark.parametrize("training", [False, True])
def test_a_batch_equals_its_images(training, center_share):
    model, maps = head(center_share=center_share).train(training), features((4, 6), 3)
    masked = [True, False, True] if training else []
    together = model(maps, masked)
    for index in range(3):
        for one, several in zip(model([x[index : index + 1] for x in maps], masked), together, strict=True):
            torch.testing.assert_close(one.masks[0], several.masks[index], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(one.embeddings[0], several.embeddings[index], rtol=1e-4, atol=1e-5)


def test_training_predicts_after_each_block_and_inference_once():
    model, maps = head(), features((3, 4))
    last = model(maps)
    every = model.train()(maps)
    assert len(last) == 1 and len(every) == 4
    torch.testing.assert_close(every[-1].masks, last[0].masks)
    assert all(not torch.equal(a.masks, b.masks) for a, b in zip(every, every[1:]))


def test_inference_is_never_masked():
    model, maps = head(), features((3, 4))
    assert torch.equal(model(maps, [True] * 3)[0].masks, model(maps)[0].masks)


def test_every_parameter_and_every_feature_map_gets_a_gradient():
    model, maps = head(center_share=0.4).train(), [x.requires_grad_() for x in features((3, 4))]
    predictions = model(maps)
    total = sum((p.masks.square().sum() + p.embeddings.sum() for p in predictions), torch.zeros(()))
    (total + predictions[0].centers.sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert all(x.grad.any() for x in maps)


def test_feature_maps_beyond_the_blocks_are_an_error():
    with pytest.raises(ValueError, match=r"MODEL\.MASK_TRANSFORMER\.BLOCKS must be at least 2.*got 1"):
        head(blocks=1)
    assert len(head(blocks=2)(features((2, 2)))) == 1


def test_positions_of_a_grid_are_relative_to_its_center():
    cosines, sines = rotated_grid((4, 6), 8)
    assert cosines.shape == (24, 4) and cosines.dtype == torch.float32
    torch.testing.assert_close(cosines.square() + sines.square(), torch.ones(24, 4))
    cosines, sines = cosines.view(4, 6, 4), sines.view(4, 6, 4)
    # Mirrored places have the opposite angle. Rows use the first half of the channels, columns the second.
    torch.testing.assert_close(cosines, cosines.flip(0, 1))
    torch.testing.assert_close(sines, -sines.flip(0, 1))
    assert torch.equal(cosines[:, 0, :2], cosines[:, 5, :2]) and torch.equal(cosines[0, :, 2:], cosines[3, :, 2:])
    assert not torch.allclose(sines[0, 0, :2], sines[3, 0, :2])
    torch.testing.assert_close(rotated_grid((1, 1), 8)[1], torch.zeros(1, 4))


def test_places_and_their_angles_do_not_depend_on_the_number_of_patches():
    """A place at a quarter of the longer side has the same angle in grids of any size."""
    small, large = (rotated_grid(grid, 12).view(2, *grid, 6) for grid in ((2, 2), (6, 6)))
    torch.testing.assert_close(small[:, 0, 1], large[:, 1, 4])
    again = rotated_grid((6, 6), 12).view(2, 6, 6, 6)
    assert torch.equal(large, again)


def test_embedded_places_do_not_depend_on_the_number_of_patches():
    torch.manual_seed(0)
    embedding = PlaceEmbedding(12)
    small, large = (embedding(grid_places(grid, torch.device("cpu"))).view(*grid, 12) for grid in ((2, 2), (6, 6)))
    torch.testing.assert_close(small[0, 1], large[1, 4])
    assert not torch.allclose(small[0, 1], small[1, 0])


def test_attention_depends_on_differences_of_positions():
    """Products of rotated vectors are the same wherever two patches at the same distance are."""
    cosines, sines = rotated_grid((5, 7), 8)
    query, key = torch.randn(2, 8).unbind()

    def rotated(x):
        first, second = x.chunk(2)
        return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=1).view(5, 7, 8)

    products = torch.einsum("abd,hwd->abhw", rotated(query), rotated(key))
    for dy, dx in ((0, 0), (1, 2), (-2, 3), (0, -4)):
        found = [
            products[y, x, y + dy, x + dx] for y in range(5) for x in range(7) if 0 <= y + dy < 5 and 0 <= x + dx < 7
        ]
        torch.testing.assert_close(torch.stack(found), found[0].expand(len(found)), rtol=1e-4, atol=1e-5)


def plain_block(block: QueryBlock, tokens, rotation, allowed):
    """The block in float64, one head, one image and one pair of tokens after the other."""
    batch, count, width = tokens.shape
    size, first = width // block.heads, 0 if allowed is None else allowed.shape[1]
    result = tokens.clone()
    for image in range(batch):
        qkv = block.qkv(block.norm1(tokens[image])).view(count, 3, block.heads, size)
        mixed = torch.zeros(count, block.heads, size, dtype=tokens.dtype)
        for number in range(block.heads):
            parts = []
            for part in (qkv[:, 0, number].clone(), qkv[:, 1, number].clone()):
                for token in range(count):
                    complex_ = torch.complex(*part[token].view(2, size // 2).unbind())
                    turned = complex_ * torch.complex(*rotation[:, token].unbind())
                    part[token] = torch.cat([turned.real, turned.imag])
                parts.append(part)
            for token in range(count):
                scores = torch.tensor([math.fsum((parts[0][token] * key).tolist()) for key in parts[1]])
                scores = scores.double() / math.sqrt(size)
                if allowed is not None and token < first:
                    scores[first:][~allowed[image, token]] = -math.inf
                mixed[token, number] = scores.softmax(0) @ qkv[:, 2, number]
        result[image] = tokens[image] + block.proj(mixed.flatten(1))
    return result + block.mlp(block.norm2(result))


@pytest.mark.parametrize("is_masked", [False, True])
def test_a_block_equals_plain_attention_in_float64(is_masked):
    torch.manual_seed(0)
    block = QueryBlock(WIDTH, 2).double()
    tokens, rotation = torch.randn(2, 3 + 6, WIDTH).double(), rotated_grid((2, 3), 8, 3).double()
    allowed = torch.rand(2, 3, 6) < 0.5 if is_masked else None
    with torch.no_grad():
        found, expected = block(tokens, rotation, allowed), plain_block(block, tokens, rotation, allowed)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        rough = block.float()(tokens.float(), rotation.float(), allowed)
        torch.testing.assert_close(rough.double(), expected, rtol=1e-4, atol=1e-5)


def test_queries_see_only_the_allowed_patches():
    torch.manual_seed(0)
    block, rotation = QueryBlock(WIDTH, 2), rotated_grid((2, 3), 8, 3)
    tokens = torch.randn(1, 3 + 6, WIDTH)
    allowed = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]]).bool()[None]
    changed = tokens.clone()
    changed[:, 3 + 3] += 5  # allowed for the second and third query
    before, after = block(tokens, rotation, allowed), block(changed, rotation, allowed)
    assert torch.equal(before[:, 0], after[:, 0])
    assert not torch.equal(before[:, 1], after[:, 1]) and not torch.equal(before[:, 2], after[:, 2])
    assert not torch.equal(before[:, 3], after[:, 3]), "patches see each other"
    everything = block(tokens, rotation, torch.ones(1, 3, 6).bool())
    torch.testing.assert_close(everything, block(tokens, rotation), rtol=1e-5, atol=1e-6)


def test_patches_outside_of_a_mask_do_not_reach_its_query():
    """In a single masked block, a patch that is not in the mask of a query has no effect on it."""
    model = head(blocks=1, widths=(10,)).train()
    (maps,) = features((3, 4), 1, (10,))
    inside = model._allowed(model([maps])[0].masks)[0]
    query, patch = next((q, int((~row).nonzero()[0])) for q, row in enumerate(inside) if row.any() and not row.all())
    changed = maps.clone()
    # Not enough to change the mask.
    changed.flatten(2)[..., patch] += 0.01 * torch.randn(10)
    assert torch.equal(model._allowed(model([changed])[0].masks)[0], inside)
    before, after, free, free_after = (
        model([x], masked)[1].embeddings[0, query]
        for x, masked in ((maps, [True]), (changed, [True]), (maps, []), (changed, []))
    )
    assert torch.equal(before, after)
    assert not torch.equal(before, free) and not torch.equal(free, free_after)


def test_empty_masks_attend_to_everything():
    model = head(patch=16)
    masks = torch.full((1, 3, 8, 12), -1.0)
    masks[0, 1, :4, :4] = 1
    masks[0, 2, 4:, 4:8] = torch.tensor([[9.0, -1, -1, -1], [-1] * 4, [-1] * 4, [-1] * 4])
    allowed = model._allowed(masks)[0]
    assert allowed[0].all()
    assert allowed[1].tolist() == [True] + [False] * 5
    assert allowed[2].all(), "less than half of its patch is inside, on average"


def test_checkpointing_gives_the_same_gradients_with_fewer_saved_tensors():
    gradients, saved = [], []
    for checkpointing in (False, True):
        model, numbers = head(patch=4, checkpointing=checkpointing, center_share=0.4).train(), []
        pack = lambda t, numbers=numbers: numbers.append(t.numel()) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            predictions = model(features((6, 6)), [True, True, False])
        loss = sum(p.masks.sigmoid().mean() + p.embeddings.square().mean() for p in predictions)
        loss.backward()
        saved.append(sum(numbers))
        gradients.append([p.grad for p in model.parameters()])
    assert saved[1] < 0.7 * saved[0]
    for first, second in zip(*gradients):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-7)


def test_the_mask_is_a_product_of_query_and_upsampled_patches_plus_its_extent():
    model, maps = head(center_share=0.4), features((3, 4))
    tokens = []
    model.predictor.norm.register_forward_hook(lambda module, args, output: tokens.append(output))
    extents = []
    model.predictor.extent.register_forward_hook(lambda module, args, output: extents.append(output))
    (prediction,) = model(maps)
    pixels = model.predictor.upsampling(tokens[0][:, QUERIES:].transpose(1, 2).unflatten(2, (3, 4)))
    expected = F.conv2d(pixels[:1], model.predictor.mask_embedding(tokens[0][0, :QUERIES])[:, :, None, None])
    torch.testing.assert_close(prediction.masks[:1], expected + extents[0][:1], rtol=1e-4, atol=1e-4)
    assert torch.equal(prediction.embeddings, tokens[0][:, :QUERIES])


@pytest.mark.parametrize(
    ("keys", "name"),
    [({"queries": 0}, "QUERIES"), ({"blocks": 0}, "BLOCKS"), ({"heads": 0}, "HEADS"), ({"width": 30}, "WIDTH")],
)
def test_wrong_sizes_are_named(keys, name):
    with pytest.raises(ValueError, match=rf"MODEL\.MASK_TRANSFORMER\.{name} "):
        MaskTransformerHead([4], 16, **{"width": 32, **keys})


def test_only_a_training_returns_centers():
    model, maps = head(center_share=0.4), features((3, 4))
    assert model(maps)[0].centers is None
    first, *others = model.train()(maps)
    assert first.centers.shape == (2, 3, 4) and all(prediction.centers is None for prediction in others)


def test_the_extent_is_a_quadratic_function_of_the_distance_to_the_place():
    """It has the same values, moved, for a query at another place, and is the same function on grids of any size."""
    torch.manual_seed(0)
    extent, embeddings = MaskExtent(WIDTH), torch.randn(1, 1, WIDTH)
    torch.nn.init.normal_(extent.terms.weight)
    places = grid_places((8, 8), torch.device("cpu")).view(8, 8, 2)
    first, second = (extent(embeddings, places[at][None, None], (8, 8))[0, 0] for at in ((2, 3), (4, 6)))
    torch.testing.assert_close(first[:6, :5], second[2:, 3:])
    assert first[2, 3] == 0
    terms = extent.terms(embeddings)[0, 0]
    squares = -F.softplus(terms[2:])
    for y, x in ((0, 0), (7, 1), (2, 4)):
        dy, dx = 4 * (places[y, x] - places[2, 3])
        expected = terms[0] * dy + squares[0] * dy**2 + terms[1] * dx + squares[1] * dx**2
        torch.testing.assert_close(first[y, x], expected)
    large = extent(embeddings, places[2, 3][None, None], (24, 24))[0, 0]
    torch.testing.assert_close(large[1::3, 1::3], first)
