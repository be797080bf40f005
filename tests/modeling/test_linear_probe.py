"""The linear probe beside plain torch and a slow loop, in Detectron2's segmentor and in ours, for every family."""

import itertools
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import LazyCall, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import SemanticSegmentor, build_model
from torch import nn

from reference import ROOT, example_encoder
from spar_d2.encoders import FAMILIES, build_encoder
from spar_d2.engine.setup import load_config
from spar_d2.modeling.backbone import SPARViT
from spar_d2.modeling.linear_probe import LinearProbe
from spar_d2.modeling.probe_segmentor import ProbeSegmentor
from spar_d2.teacher import SlidingWindowTeacher

CLASSES = 5
IGNORED = 255


def head(channels=64, stride=4, **options) -> LinearProbe:
    torch.manual_seed(0)
    probe = LinearProbe({"dense": ShapeSpec(channels=channels, stride=stride)}, num_classes=CLASSES, **options)
    # Larger than a beginner's, so that classes differ.
    nn.init.normal_(probe.predictor.weight)
    nn.init.normal_(probe.predictor.bias)
    return probe


def segmentor(encoder, kind=ProbeSegmentor, trainable="none", **options):
    # With the encoder's pixel mean, Detectron2's padding equals the encoder's.
    pixels = {f"pixel_{name}": [255 * value for value in getattr(encoder, f"pixel_{name}")] for name in ("mean", "std")}
    backbone = SPARViT(encoder, **pixels, input_format="RGB", trainable=trainable)
    probe = head(encoder.embed_dim, encoder.patch_size)
    return kind(backbone=backbone, sem_seg_head=probe, **pixels, **options)


def labeled(height, width, seed=0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (height, width), generator=generator)
    labels[0, : width // 2] = IGNORED
    return {"image": image, "sem_seg": labels}


def plain(probe, features):
    """Logits (B, C, h, w) by torch's own modules, as new ones."""
    norm = nn.BatchNorm2d(features.shape[1]).train(probe.training)
    return F.conv2d(norm(features), probe.predictor.weight, probe.predictor.bias)


@pytest.mark.parametrize("sides", [(12, 20), (9, 17), (1, 1)])
def test_equals_batch_norm_convolution_and_interpolation(sides):
    probe = head()
    grid = [math.ceil(side / probe.stride) for side in sides]
    features = torch.randn(3, 64, *grid)
    labels = torch.randint(0, CLASSES, (3, *sides))
    labels[:, 0, : sides[1] // 2] = IGNORED

    def whole():
        return F.interpolate(plain(probe, features), scale_factor=probe.stride, mode="bilinear")

    expected = F.cross_entropy(whole()[..., : sides[0], : sides[1]], labels, ignore_index=IGNORED)
    wanted = torch.autograd.grad(expected, list(probe.predictor.parameters()))
    results, losses = probe.train()({"dense": features}, labels)
    assert results is None and list(losses) == ["loss_sem_seg"]
    torch.testing.assert_close(losses["loss_sem_seg"], expected)
    found = torch.autograd.grad(losses["loss_sem_seg"], list(probe.predictor.parameters()))
    torch.testing.assert_close(found, wanted)
    probe = head().eval()
    logits, losses = probe({"dense": features})
    assert losses == {}
    torch.testing.assert_close(logits, whole())


def test_the_norm_learns_and_counts_as_torchs():
    probe, norm = head().train(), nn.BatchNorm2d(64)
    features = torch.randn(2, 64, 3, 5) * 3 + 1
    labels = torch.randint(0, CLASSES, (2, 12, 20))
    logits = F.conv2d(norm(features), probe.predictor.weight, probe.predictor.bias)
    F.cross_entropy(F.interpolate(logits, scale_factor=4, mode="bilinear"), labels).backward()
    probe({"dense": features}, labels)[1]["loss_sem_seg"].backward()
    assert norm.state_dict().keys() == probe.norm.state_dict().keys()
    for name, value in norm.state_dict().items():
        torch.testing.assert_close(probe.norm.state_dict()[name], value)
    torch.testing.assert_close(probe.norm.weight.grad, norm.weight.grad)
    torch.testing.assert_close(probe.norm.bias.grad, norm.bias.grad)


def slow_logits(logits, y, x, cell=(4.0, 4.0)):
    """Logits (C,) of one pixel, between the centers of cells of so many pixels, clamped at the border."""
    places = []
    for place, pixels, count in zip((y, x), cell, logits.shape[1:]):
        position = min(max((place + 0.5) / pixels - 0.5, 0), count - 1)
        before = math.floor(position)
        places.append((before, min(before + 1, count - 1), position - before))
    (top, bottom, down), (left, right, across) = places
    upper = logits[:, top, left] * (1 - across) + logits[:, top, right] * across
    lower = logits[:, bottom, left] * (1 - across) + logits[:, bottom, right] * across
    return upper * (1 - down) + lower * down


def slow_loss(logits, labels, stride) -> tuple[float, int]:
    """Sum and number, pixel by pixel."""
    losses = []
    for y, x in itertools.product(*map(range, labels.shape)):
        if labels[y, x] != IGNORED:
            scores = slow_logits(logits, y, x, (stride, stride))
            losses.append(float(scores.logsumexp(0) - scores[labels[y, x]]))
    return sum(losses), len(losses)


@pytest.mark.parametrize("stride", [1, 3, 4])
def test_the_loss_of_images_of_several_sizes_is_that_of_a_slow_loop(stride):
    sizes = [(7, 10), (1, 1), (12, 5)]
    generator = torch.Generator().manual_seed(stride)
    logits, labels = [], []
    for height, width in sizes:
        grid = (math.ceil(height / stride), math.ceil(width / stride))
        logits.append(torch.randn(CLASSES, *grid, generator=generator, dtype=torch.float64))
        labels.append(torch.randint(0, CLASSES, (height, width), generator=generator))
        labels[-1][-1, 1:] = IGNORED
    sums, counts = zip(*map(slow_loss, logits, labels, [stride] * 3))
    loss = head(stride=stride, loss_weight=2.0).losses(logits, [numbers.byte() for numbers in labels])["loss_sem_seg"]
    assert loss.item() == pytest.approx(2 * sum(sums) / sum(counts), rel=1e-5)


def test_images_without_labels_have_no_loss_and_no_gradient():
    probe = head().train()
    loss = probe({"dense": torch.randn(1, 64, 2, 2)}, torch.full((1, 8, 8), IGNORED))[1]["loss_sem_seg"]
    loss.backward()
    assert loss.item() == 0 and not probe.predictor.weight.grad.any()


def test_batch_norm_uses_exactly_the_cells_of_all_images():
    probe = head().train()
    maps = [torch.randn(64, 2, 3) + 1, torch.randn(64, 5, 1), torch.randn(64, 1, 1)]
    found = probe.classify(maps)
    cells = torch.cat([features.flatten(1).T for features in maps])
    wanted = F.linear(F.batch_norm(cells, None, None, training=True), probe.predictor.weight[..., 0, 0])
    wanted = (wanted + probe.predictor.bias).T.split([6, 5, 1], dim=1)
    for logits, expected, features in zip(found, wanted, maps):
        torch.testing.assert_close(logits, expected.reshape(CLASSES, *features.shape[1:]))


def test_no_tensor_of_full_resolution_is_saved_for_backward():
    probe = head(stride=16).train()
    features, labels = torch.randn(4, 64, 8, 8), torch.randint(0, CLASSES, (4, 128, 128))
    alive = weakref.WeakSet()

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor
            alive.add(self)

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        loss = probe({"dense": features}, labels)[1]["loss_sem_seg"]
    assert 0 < sum(kept.tensor.nbytes for kept in alive) < 4 * features.nbytes < CLASSES * labels.numel() * 4
    loss.backward()


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(203, 331), (1, 1), (64, 64)])
def test_labels_are_aligned_like_those_of_detectron2s_segmentor(height, width):
    encoder = build_encoder("vit_nano_patch8_dinov3")
    ours, theirs = (segmentor(encoder, kind).eval() for kind in (ProbeSegmentor, SemanticSegmentor))
    theirs.load_state_dict(ours.state_dict())
    inputs = labeled(height, width)
    with torch.no_grad():
        (labels,), (scores,) = ours([inputs]), theirs([inputs])
    labels, scores = labels["sem_seg_labels"], scores["sem_seg"]
    assert labels.shape == scores.shape[1:] == (height, width)
    first, second = scores.topk(2, dim=0).values
    clear = (first - second) > 1e-3
    assert clear.float().mean() > 0.9
    assert torch.equal(labels[clear], scores.argmax(0)[clear])
    ours.output = "scores"
    (found,) = ours([inputs])
    torch.testing.assert_close(found["sem_seg"], scores.softmax(0), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("size", [(97, 131), (20, 33), (41, 66), (300, 7)])
def test_labels_of_another_size_are_those_of_a_slow_loop(size):
    encoder = build_encoder("vit_nano_patch8_dinov3")
    model = segmentor(encoder).eval()
    inputs = {**labeled(41, 66), "height": size[0], "width": size[1]}
    labels = model([inputs])[0]["sem_seg_labels"]
    (logits,) = model.sem_seg_head.classify(model.dense_maps(model.encoder_input(inputs["image"])))
    cell = [encoder.patch_size * wanted / given for wanted, given in zip(size, (41, 66))]
    compared = 0
    for y, x in itertools.product(range(0, size[0], 5), range(0, size[1], 3)):
        first, second = slow_logits(logits.detach(), y, x, cell).topk(2).values
        if first - second > 1e-3:
            compared += 1
            assert labels[y, x] == slow_logits(logits, y, x, cell).argmax()
    assert compared > 15


def test_a_cell_is_seen_at_its_pixels():
    """Features of one cell alone say class 1; at 20x27 pixels, three times as large in the result."""
    encoder = build_encoder("vit_nano_patch8_dinov3")
    model = segmentor(encoder).eval()
    cells = torch.zeros(1, encoder.embed_dim, 3, 4)
    cells[0, 0, 1, 2] = 1
    model.dense_maps = lambda x: cells
    nn.init.zeros_(model.sem_seg_head.predictor.weight)
    nn.init.zeros_(model.sem_seg_head.predictor.bias)
    with torch.no_grad():
        model.sem_seg_head.predictor.weight[1, 0] = 1
        model.sem_seg_head.predictor.bias[0] = 0.5
    inputs = {**labeled(20, 27), "height": 60, "width": 81}
    labels = model([inputs])[0]["sem_seg_labels"]
    rows, columns = (labels == 1).nonzero(as_tuple=True)
    # Cell (1, 2) of 8 pixels covers rows 24..47 and columns 48..71 of the result; half its score is within them.
    assert (rows.float().mean(), columns.float().mean()) == (35.5, 59.5)
    assert 24 <= rows.min() and rows.max() < 48 and 48 <= columns.min() and columns.max() < 72


@pytest.mark.slow
@pytest.mark.parametrize("kind", [SemanticSegmentor, ProbeSegmentor])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_probed_and_stays_frozen(family, kind):
    model = segmentor(example_encoder(family), kind).train()
    encoder = model.backbone.encoder
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    batch = [labeled(70, 101), labeled(64, 33, seed=1)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        (loss,) = model(batch).values()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not any(module.training for module in encoder.modules())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"sem_seg_head.{part}.{kind}" for part in ("norm", "predictor") for kind in ("weight", "bias")
    }
    assert all(p.grad is None for p in encoder.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    (output,) = model.eval()([batch[0]])
    labels = output["sem_seg_labels"] if kind is ProbeSegmentor else output["sem_seg"].argmax(0)
    assert labels.shape == (70, 101)


def test_the_encoder_can_be_trained_through_the_probe():
    model = segmentor(build_encoder("vit_nano_patch8_dinov3"), trainable="last_blocks:1").train()
    model([labeled(40, 40), labeled(40, 40, seed=1)])["loss_sem_seg"].backward()
    gradients = [p.grad for p in model.backbone.encoder.blocks[-1].parameters()]
    assert all(gradient is not None and gradient.any() for gradient in gradients)


def test_a_sliding_window_is_probed_as_the_teacher_sees():
    encoder = build_encoder("vit_nano_patch8_dinov3")
    model = segmentor(encoder, inference="sliding_window", window=32, stride=20)
    image = labeled(50, 70)["image"]
    x = model.encoder_input(image)
    assert torch.equal(model.dense_maps(x), SlidingWindowTeacher(encoder, 32, 20)(x))
    single = segmentor(encoder).dense_maps(x)
    assert not torch.allclose(single, model.dense_maps(x), atol=1e-3)


def test_precomputed_features_replace_images():
    model = segmentor(build_encoder("vit_nano_patch8_dinov3")).train()
    batch = [labeled(50, 70), labeled(33, 20, seed=1)]
    kept = [
        {"features": model.dense_maps(model.encoder_input(inputs["image"]))[0], "sem_seg": inputs["sem_seg"].byte()}
        for inputs in batch
    ]
    assert torch.equal(model(batch)["loss_sem_seg"], model(kept)["loss_sem_seg"])


def demo_config(*overrides):
    return load_config(str(ROOT / "configs/toy/linear_probe.yaml"), list(overrides))


def test_lazy_config_and_yaml_give_the_same_head():
    cfg = demo_config()
    shapes = {"dense": ShapeSpec(channels=128, stride=8)}
    lazy = instantiate(LazyCall(LinearProbe)(input_shape=shapes, num_classes=13, norm="BN", ignore_value=255))
    by_yaml = build_model(cfg).sem_seg_head
    lazy.load_state_dict(by_yaml.state_dict())
    same = ("in_feature", "stride", "num_classes", "ignore_value", "loss_weight")
    assert [getattr(lazy, name) for name in same] == [getattr(by_yaml, name) for name in same]
    assert repr(lazy) == repr(by_yaml)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 12], r"NUM_CLASSES must be 13, the .* of 'spar_scenes_train'; got 12"),
        (["DATASETS.TEST", "('voc21',)"], r"NUM_CLASSES must be 21, the number of classes of 'voc21'; got 13"),
        (["MODEL.SEM_SEG_HEAD.IN_FEATURES", "['p2']"], r"IN_FEATURES\) of LinearProbe .* one of dense; got 'p2'"),
        (["MODEL.SEM_SEG_HEAD.IN_FEATURES", "['dense', 'p2']"], r"IN_FEATURES of LinearProbe must be a list of one"),
        (["MODEL.SEM_SEG_HEAD.NORM", "LayerNorm"], r"MODEL\.SEM_SEG_HEAD\.NORM\) .*'BN'.*'LayerNorm'"),
        (["MODEL.SEM_SEG_HEAD.NAME", "SemSegFPNHead"], r"SEM_SEG_HEAD\.NAME .*LinearProbe for ProbeSegmentor"),
        (
            ["MODEL.BACKBONE.NAME", "SPARPyramid", "MODEL.SPAR.OUT_FEATURES", "['dense']"],
            r"BACKBONE\.NAME .*SPAR",
        ),
        (["MODEL.SPAR.OUTPUT", "features"], r"MODEL\.SPAR\.OUTPUT .*labels, scores; got 'features'"),
        (["MODEL.SPAR.INFERENCE", "tiles"], r"MODEL\.SPAR\.INFERENCE .*single_pass, sliding_window"),
        (["MODEL.SPAR.REFERENCE_COMPAT", True], r"MODEL\.SPAR\.REFERENCE_COMPAT .*False"),
        (
            ["MODEL.SPAR.INFERENCE", "sliding_window", "MODEL.SPAR.TRAINABLE", "all"],
            r'MODEL\.SPAR\.TRAINABLE .*"none" with MODEL\.SPAR\.INFERENCE sliding_window',
        ),
        (["SPAR.TEACHER.STRIDE", 0], r"SPAR\.TEACHER\.STRIDE"),
    ],
)
def test_wrong_keys_are_named(keys, message):
    with pytest.raises(ValueError, match=message):
        build_model(demo_config(*keys))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            torch.full((8, 8), CLASSES),
            r"labels .*0\.\.4 .*NUM_CLASSES 5\) or 255 .*IGNORE_VALUE\); got 5\.\.5",
        ),
        (torch.full((8, 8), -1), r"got -1\.\.-1"),
        (torch.zeros(9, 8, dtype=torch.long), r"labels of 9x8 pixels have 3x2 patches of 4 pixels, .* has 2x2"),
        (torch.zeros(4, 8, dtype=torch.long), r"labels of 4x8 pixels have 1x2 patches"),
    ],
)
def test_wrong_labels_are_named(labels, message):
    with pytest.raises(ValueError, match=message):
        head().train()({"dense": torch.randn(1, 64, 2, 2)}, labels[None])


def test_missing_labels_in_training_are_named():
    probe = head().train()
    with pytest.raises(ValueError, match='the inputs have no "sem_seg"'):
        probe({"dense": torch.randn(1, 64, 2, 2)})
    model = segmentor(build_encoder("vit_nano_patch8_dinov3")).train()
    with pytest.raises(ValueError, match=r'a\.jpg has no "sem_seg"'):
        model([{"image": labeled(9, 9)["image"], "file_name": "a.jpg"}])
    with pytest.raises(ValueError, match=r'"image" must be \(3, H, W\)'):
        model([{**labeled(9, 9), "image": torch.zeros(9, 9)}])
    with pytest.raises(ValueError, match=r'NORM "SyncBN" needs GPUs'):
        head(norm="SyncBN").train()({"dense": torch.randn(1, 64, 2, 2)}, torch.zeros(1, 8, 8).long())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda probe: probe.classify([]), "maps must have at least one .*, got none"),
        (lambda probe: probe.losses([], []), "logits and labels must be of the same images, at least one; got 0 and 0"),
        (lambda probe: probe.losses([torch.zeros(CLASSES, 2, 2)], []), "got 1 and 0"),
        (lambda probe: probe.losses([torch.zeros(CLASSES, 2, 2)], [torch.zeros(8, 8).long()] * 2), "got 1 and 2"),
    ],
)
def test_no_images_and_images_without_labels_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(head().train())


@pytest.mark.parametrize("shape", [ShapeSpec(channels=8), ShapeSpec(stride=4)])
def test_a_backbone_that_does_not_say_its_shape_is_named(shape):
    with pytest.raises(ValueError, match=r"IN_FEATURES\) of LinearProbe must be .* channels and a stride; .*'x'"):
        LinearProbe({"x": shape}, num_classes=2, in_feature="x")
