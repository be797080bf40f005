"""Queries among the tokens of an encoder's last blocks."""

import pytest
import torch
from detectron2.utils.events import EventStorage

from reference import example_encoder
from small_mask_transformers import TEXT, image, panoptic_record, small_model
from spar_d2.encoders import FAMILIES
from spar_d2.encoders.joined_queries import run_joined
from spar_d2.modeling.mask_transformer.exported import exported_mask_transformer

JOINED = ["MODEL.MASK_TRANSFORMER.ENCODER_BLOCKS", 2]
# Its blocks are those of the dinov3 repository.
FAMILY_NAMES = sorted(set(FAMILIES) - {"DINOv3.txt"})


@pytest.fixture(params=FAMILY_NAMES)
def encoder(request):
    torch.manual_seed(0)
    return example_encoder(request.param)


def test_without_queries_tokens_are_those_of_the_encoder(encoder):
    patch, blocks = encoder.patch_size, len(encoder.blocks)
    for size in ((3 * patch, 5 * patch - 1), (encoder.native_size, encoder.native_size)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            joined, grid = run_joined(encoder, x, torch.zeros(0, encoder.width), 2)
            maps = encoder.intermediates(x, [blocks - 3, blocks - 2, blocks - 1])
        assert grid == encoder.grid(*size) and len(joined) == 3
        for tokens, expected in zip(joined, maps):
            assert tokens.queries.shape == (2, 0, encoder.width)
            torch.testing.assert_close(tokens.patches, expected.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_queries_and_patches_attend_to_each_other(encoder):
    x, queries = torch.randn(1, 3, 3 * encoder.patch_size, 4 * encoder.patch_size), torch.randn(3, encoder.width)
    queries.requires_grad_()
    encoder.requires_grad_(False)
    (_, last), _ = run_joined(encoder, x, queries, 1)
    (_, other), _ = run_joined(encoder, x.flip(-1), queries, 1)
    (_, alone), _ = run_joined(encoder, x, queries[:0], 1)
    assert not torch.allclose(last.queries, other.queries) and not torch.allclose(last.patches, alone.patches)
    # Without positions, the order of queries has no effect.
    (_, turned), _ = run_joined(encoder, x, queries.flip(0), 1)
    torch.testing.assert_close(turned.queries.flip(1), last.queries, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(turned.patches, last.patches, rtol=1e-4, atol=1e-5)
    last.patches.sum().backward()
    assert queries.grad.abs().sum() > 0


@pytest.mark.parametrize("more", [[], TEXT])
def test_the_model_learns_and_segments_any_size(more):
    model = small_model(*JOINED, *more, "MODEL.SPAR.TRAINABLE", "last_blocks:2").train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    records, totals = [panoptic_record((48, 64)), panoptic_record((51, 40))], []
    with EventStorage():
        for _ in range(8):
            torch.manual_seed(0)
            losses = model(records)
            totals.append(float(sum(losses.values()).detach()))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
    assert totals[-1] < 0.9 * totals[0]
    model.eval()
    inputs = [{"image": image(size)} for size in ((48, 64), (51, 77), (8, 8))]
    together = model(inputs)
    for single, output in zip(inputs, together):
        ids, _ = output["panoptic_seg"]
        assert ids.shape == single["image"].shape[1:]
        assert (ids == model([single])[0]["panoptic_seg"][0]).float().mean() > 0.999


@pytest.mark.parametrize("blocks", [-1, 99])
def test_numbers_of_blocks_out_of_range_are_named(blocks):
    with pytest.raises(ValueError, match=rf"MODEL\.MASK_TRANSFORMER\.ENCODER_BLOCKS must be in 0\.\..*got {blocks}"):
        small_model("MODEL.MASK_TRANSFORMER.ENCODER_BLOCKS", blocks)


def test_encoders_of_the_dinov3_repository_are_refused():
    with pytest.raises(ValueError, match=r"ENCODER_BLOCKS must be 0 for DINOtxtEncoder"):
        run_joined(example_encoder("DINOv3.txt"), torch.zeros(1, 3, 32, 32), torch.zeros(1, 8), 1)


@pytest.mark.parametrize(("trainable", "count"), [("none", 1), ("last_blocks:2", 0), ("last_blocks:1", 0)])
def test_blocks_that_are_not_trained_are_told(trainable, count, caplog):
    small_model(*JOINED, "MODEL.SPAR.TRAINABLE", trainable)
    assert sum("ENCODER_BLOCKS: the last 2 blocks do not know queries" in text for text in caplog.messages) == count


@pytest.mark.slow
def test_it_is_exported_for_any_size():
    module = exported_mask_transformer(small_model(*JOINED, "MODEL.SPAR.TRAINABLE", "last_blocks:2"))
    sizes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        program = torch.export.export(module, (torch.rand(2, 3, 33, 41) * 255,), dynamic_shapes=(sizes,)).module()
        for shape in ((4, 3, 16, 16), (3, 3, 40, 96), (2, 3, 65, 17)):
            x = torch.rand(shape) * 255
            for found, expected in zip(program(x), module(x), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
