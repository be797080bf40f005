"""On a GPU nothing mixes devices, attention never goes through a matrix of all pairs, and the CPU hardly ever waits.

On the pretended device of :mod:`pretended_cuda`; what it cannot tell is written there.
"""

import copy
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from PIL import Image

import spar_d2
from pretended_cuda import PretendedCuda
from reference import STAND_IN, example_encoder, reference_image
from small_trainers import as_tensor, trainer_for
from spar_d2.distillation import DistillationHook
from spar_d2.distillation.loss import distillation_loss, mean_cosine, sampled_distillation_loss
from spar_d2.encoders import FAMILIES
from spar_d2.engine.trainer import Trainer
from spar_d2.evaluation import FeatureEvaluator, PanopticEvaluator, SemanticEvaluator
from spar_d2.evaluation.panoptic.coco_png import write_ids
from spar_d2.modeling import banded_upsampling as bands
from spar_d2.modeling import segment_features
from spar_d2.modeling.backbone import SPARViT
from spar_d2.modeling.best_query import SWITCH
from spar_d2.modeling.linear_probe import LinearProbe
from spar_d2.modeling.postprocessing import class_probabilities, cosine_scores
from spar_d2.modeling.probe_segmentor import ProbeSegmentor
from spar_d2.modeling.test_time_augmentation import SegmentorWithTTA
from spar_d2.teacher import SlidingWindowTeacher
from spar_d2.utils.io import write_json

# How often the CPU may wait for the device where code of spar_d2 asks for it, itself or through a library. Waits of
# Detectron2's own code are not counted, and neither are those for text embeddings, which are computed once.
LIMITS = {
    "encoder": 0,
    # The dinov3 repository's own code computes them.
    "encoder, positions of a new grid of DINOv3.txt": 1,
    "teacher, any number of windows and images": 2,
    "loss": 0,
    "training step, two images": 3,
    # Losses and counts of the hook, once in 20 steps, and the two numbers of a gradient scaler.
    "last training step, with readings and a checkpoint": 3 + 2 + 2,
    "labels": 0,
    "labels with an area threshold": 1,
    "probabilities of a known number of classes": 0,
    "segmentor, from pixels on the CPU to labels on the device": 0,
    "segmentor, from pixels on the CPU to labels there": 2,
    "training step of a model around the pyramid": 0,
    "training step of a probe, two images": 1,
    "semantic evaluator, an image": 0,
    "feature evaluator, an image": 0,
    "panoptic evaluator, an image": 1,
    "scores at the end": 1,
}
SEGMENTED_ON_DEVICE = "segmentor, from pixels on the CPU to labels on the device"
PRECISIONS = ("float32", "bfloat16")
SIZES = ((96, 128), (70, 101))
WORDS = "cat, kitten; dog; sky"


@pytest.fixture
def gpu():
    with PretendedCuda() as pretended:
        yield pretended


def check(gpu, what: str) -> None:
    """No more waits than allowed since the last check, and no attention by a matrix of all pairs."""
    problem = complaint(gpu, what)
    assert not problem, problem


def complaint(gpu, what: str) -> str:
    """The problem that :func:`check` reports; "" for none."""
    found, written_out = gpu.waits_in("spar_d2"), gpu.attention_by("MATH")
    is_well = found <= LIMITS[what] and not written_out
    text = f"{what}: {found} waits, {LIMITS[what]} allowed; {written_out} x attention by MATH\n{gpu.report()}"
    gpu.reset()
    return "" if is_well else text


@functools.cache
def _example(family: str):
    return example_encoder(family)


def example(family: str):
    """A new encoder on the CPU."""
    return copy.deepcopy(_example(family))


def encode_new_grid(gpu, family: str, encoder, x: torch.Tensor) -> None:
    """A pass over images of a size that was not seen before."""
    gpu.reset()
    with torch.no_grad():
        encoder(x)
    check(gpu, "encoder, positions of a new grid of DINOv3.txt" if family == "DINOv3.txt" else "encoder")


def random_images() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, *size, generator=generator) for size in SIZES]


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_encoders(gpu, family, precision):
    encoder = example(family).accelerate(precision).to("cuda").train()
    x = torch.randn(2, 3, 33, 50, device="cuda")
    encode_new_grid(gpu, family, encoder, x)
    for checkpointing in (False, True):
        encoder.accelerate(precision, checkpointing=checkpointing).zero_grad()
        gpu.reset()
        features, first, last = encoder(x), *encoder.intermediates(x, [0, -1])
        (features.square().mean() + first.square().mean() + last.square().mean()).backward()
        assert features.is_cuda and features.dtype == last.dtype == torch.float32
        assert all(p.grad.is_cuda for p in encoder.blocks.parameters())
        assert gpu.attention_by("flash" if precision == "bfloat16" else "efficient") > 0
        check(gpu, "encoder")
    encode_new_grid(gpu, family, encoder.freeze(), x)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            gpu.reset()
            again, (last_again,) = encoder(x), encoder.intermediates(x, [-1])
        check(gpu, "encoder")
        assert again.dtype == last_again.dtype == torch.float32
        assert F.cosine_similarity(again, features).min() > 0.98


@pytest.mark.slow
@pytest.mark.parametrize(("windows", "precision"), [(0, "float32"), (0, "bfloat16"), (3, "bfloat16")])
@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_and_loss(gpu, family, precision, windows):
    on_cpu = example(family).accelerate(precision)
    student = copy.deepcopy(on_cpu).to("cuda")
    images = random_images()
    moved = [image.to("cuda") for image in images]
    teacher = SlidingWindowTeacher(student, stride=24)
    for teacher.batch_size in (0, 4):
        gpu.reset()
        targets = teacher.samples(moved, windows, torch.rand(2, 2)) if windows else teacher.targets(moved)
        check(gpu, "teacher, any number of windows and images")
    for image in moved:
        encode_new_grid(gpu, family, student, image[None])
    features = [student(image[None]) for image in moved]
    check(gpu, "encoder")
    loss = sampled_distillation_loss if windows else distillation_loss
    losses = [loss(one, target) for one, target in zip(features, targets)]
    cosines = [mean_cosine(one, target) for one, target in zip(features, targets)]
    torch.stack(losses).mean().backward()
    assert all(value.is_cuda and value.isfinite() for value in (*losses, *cosines))
    check(gpu, "loss")
    if precision == "float32" and not windows:
        for target, expected in zip(targets, SlidingWindowTeacher(on_cpu, stride=24).targets(images)):
            torch.testing.assert_close(target.cpu(), expected, rtol=1e-4, atol=1e-4)


class Steps(HookBase):
    """Looks at every step of a training, with all that hooks do before and after it."""

    def __init__(self, gpu, what: str = "training step, two images", last: str = ""):
        self.gpu, self.what, self.last = gpu, what, last or what
        self.complaints: list[str] = []

    def before_train(self):
        self.gpu.reset()

    def after_step(self):
        is_last = self.trainer.iter == self.trainer.max_iter - 1
        attention = self.gpu.attention_by("")
        found = complaint(self.gpu, self.last if is_last else self.what)
        self.complaints.append(found or ("" if attention else "no attention was seen"))

    def check(self, steps: int) -> None:
        assert self.complaints == [""] * steps, "\n".join(self.complaints)


@pytest.fixture
def cuda_cfg(tiny_cfg):
    tiny_cfg.MODEL.DEVICE = "cuda"
    tiny_cfg.MODEL.SPAR.VOCABULARY = WORDS
    return tiny_cfg


@pytest.mark.slow
@pytest.mark.parametrize(("windows", "precision"), [(0, "float32"), (2, "float32"), (2, "bfloat16")])
def test_hook_in_the_plain_trainer(gpu, cuda_cfg, windows, precision):
    cuda_cfg.MODEL.SPAR.PRECISION = precision
    cuda_cfg.SPAR.TEACHER.WINDOWS_PER_IMAGE = windows
    images = [as_tensor(reference_image(*size)) for size in SIZES]
    trainer = trainer_for(cuda_cfg, images, DistillationHook(cuda_cfg), lr=1e-3)
    steps = Steps(gpu)
    trainer.register_hooks([steps])
    trainer.train(0, 2)
    steps.check(2)
    assert np.isfinite(trainer.losses).all()


TRAININGS = {
    "float32": ["MODEL.SPAR.PRECISION", "float32"],
    "bfloat16, checkpointing": ["MODEL.SPAR.PRECISION", "bfloat16", "MODEL.SPAR.CHECKPOINTING", True],
    "AMP": ["SOLVER.AMP.ENABLED", True, "MODEL.SPAR.PRECISION", "float16"],
    "accumulation, AMP in bfloat16": [
        *("SPAR.ACCUMULATION_STEPS", 2, "SOLVER.AMP.ENABLED", True, "MODEL.SPAR.PRECISION", "bfloat16")
    ],
    "average, clipping": [
        *("SPAR.EMA_DECAY", 0.9, "SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm")
    ],
    "cells, all windows": ["SPAR.DISTILL.AVERAGE", "cell", "SPAR.TEACHER.WINDOWS_PER_IMAGE", 0],
}


@pytest.mark.slow
@pytest.mark.parametrize("keys", TRAININGS.values(), ids=TRAININGS)
def test_trainer(gpu, photo_cfg, keys):
    photo_cfg.merge_from_list(["MODEL.DEVICE", "cuda", "SOLVER.MAX_ITER", 2, *keys])
    trainer = Trainer(photo_cfg)
    before = copy.deepcopy(trainer.model.state_dict())
    steps = Steps(gpu, last="last training step, with readings and a checkpoint")
    trainer.register_hooks([steps])
    trainer.train()
    steps.check(2)
    after = trainer.model.state_dict()
    assert all(tensor.is_cuda and tensor.isfinite().all() for tensor in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in after)


@pytest.fixture(params=[True, False], ids=["one kernel", "bands"])
def ways_to_label(request, monkeypatch):
    """Labels by one operator and, in many bands, without it."""
    monkeypatch.setenv(SWITCH, str(int(request.param)))
    monkeypatch.setitem(bands._BAND_BYTES, "other", 1 << 14)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("thresholds", "what"),
    [((0.0, None), "labels"), ((0.1, None), "labels"), ((0.1, 0.05), "labels with an area threshold")],
)
def test_labels(gpu, ways_to_label, thresholds, what, autocast):
    features, text = torch.randn(32, 8, 12), F.normalize(torch.randn(20, 32), dim=1)
    arguments = ((50, 48), (64, 96), 40.0, *thresholds)
    expected = segment_features(features, text, torch.arange(20), *arguments)
    moved = features.to("cuda"), text.to("cuda"), torch.arange(20, device="cuda")
    gpu.reset()
    with torch.autocast("cuda", autocast, enabled=autocast is not None):
        cosines = cosine_scores(*moved[:2])
        labels = segment_features(*moved, *arguments)
    check(gpu, what)
    assert labels.is_cuda and (labels.cpu() == expected).float().mean() > 0.99
    torch.testing.assert_close(cosines.cpu(), cosine_scores(features, text))


def test_probabilities(gpu, ways_to_label):
    features, text = torch.randn(32, 8, 12), F.normalize(torch.randn(20, 32), dim=1)
    classes = torch.arange(20) // 2
    expected = class_probabilities(features, text, classes, (50, 48))
    moved = features.to("cuda"), text.to("cuda"), classes.to("cuda")
    gpu.reset()
    found = class_probabilities(*moved, (50, 48), classes=10)
    check(gpu, "probabilities of a known number of classes")
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected)


SEGMENTORS = {
    "labels": ["MODEL.SPAR.PRECISION", "float32"],
    "bfloat16, thresholds": ["MODEL.SPAR.PRECISION", "bfloat16", "MODEL.SPAR.PROB_THRESHOLD", 0.1],
    "scores": ["MODEL.SPAR.OUTPUT", "scores"],
    "features": ["MODEL.SPAR.OUTPUT", "features"],
    "sliding window": ["MODEL.SPAR.INFERENCE", "sliding_window"],
    "bfloat16, sliding window": ["MODEL.SPAR.PRECISION", "bfloat16", "MODEL.SPAR.INFERENCE", "sliding_window"],
}


@pytest.mark.slow
@pytest.mark.parametrize("keys", SEGMENTORS.values(), ids=SEGMENTORS)
def test_segmentor(gpu, cuda_cfg, keys):
    cuda_cfg.merge_from_list(keys)
    model = build_model(cuda_cfg).eval()
    inputs = [{"image": as_tensor(reference_image(*size)), "height": 120, "width": 90} for size in SIZES]
    model(inputs)  # class names are encoded once
    assert not gpu.attention_by("MATH"), gpu.report()
    gpu.reset()
    (first, second) = (next(iter(output.values())) for output in model(inputs))
    assert first.is_cuda and second.is_cuda
    sliding = cuda_cfg.MODEL.SPAR.INFERENCE == "sliding_window"
    check(gpu, "teacher, any number of windows and images" if sliding else SEGMENTED_ON_DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("output", ["labels", "scores"])
def test_several_views(gpu, cuda_cfg, output):
    cuda_cfg.MODEL.SPAR.OUTPUT = output
    cuda_cfg.TEST.AUG.MIN_SIZES, cuda_cfg.TEST.AUG.FLIP = (64, 90), True
    model = SegmentorWithTTA(cuda_cfg, build_model(cuda_cfg).eval())
    inputs = [{"image": as_tensor(reference_image(70, 101))}]
    model(inputs)
    gpu.reset()
    (found,) = model(inputs)[0].values()
    assert found.is_cuda and found.shape[-2:] == (70, 101)
    check(gpu, SEGMENTED_ON_DEVICE)


MODELS = {
    "OpenCLIP": None,
    "SigLIP": (str(STAND_IN.parents[1] / "configs/toy/tiny_pooled.json"), "", {}),
    "DINOv3.txt": (FAMILIES["DINOv3.txt"].names()[0], "", {"dinov3_repo": STAND_IN}),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "precision"),
    [("OpenCLIP", "float32"), ("OpenCLIP", "auto"), ("SigLIP", "auto"), ("DINOv3.txt", "bfloat16")],
)
def test_segment(gpu, tiny_model, model, precision):
    encoder, pretrained, options = MODELS[model] or (*tiny_model, {})
    options = {"templates": "simple", "device": "cuda", "precision": precision, **options}
    image = reference_image(70, 101)
    first = spar_d2.segment(image, WORDS, encoder, pretrained, **options)
    assert gpu.attention_by("MATH") == 0, gpu.report()
    gpu.reset()
    again = spar_d2.segment(image, WORDS, encoder, pretrained, **options)
    # All layers but the last of one family attend.
    assert gpu.attention_by("efficient" if precision == "float32" else "flash") > 0
    check(gpu, "segmentor, from pixels on the CPU to labels there")
    assert np.array_equal(first.labels, again.labels)


def labeled(number: int) -> dict:
    height, width = SIZES[number]
    masks = torch.zeros(1, height, width, dtype=torch.bool)
    masks[0, 10:60, 20:80] = True
    instances = Instances((height, width))
    instances.gt_boxes, instances.gt_classes = Boxes(torch.tensor([[20.0, 10, 80, 60]])), torch.tensor([3])
    instances.gt_masks = BitMasks(masks)
    labels = torch.randint(0, 5, (height, width), generator=torch.Generator().manual_seed(number))
    return {"image": as_tensor(reference_image(height, width)), "instances": instances, "sem_seg": labels}


@pytest.mark.slow
def test_pyramid_in_panoptic_fpn(gpu, panoptic_cfg):
    cfg = panoptic_cfg
    # Its own heads, narrower, for time.
    cfg.MODEL.SPAR.OUT_CHANNELS = cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 32
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM, cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 64, 16
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 50
    cfg.merge_from_list(["MODEL.DEVICE", "cuda", "MODEL.SPAR.PRECISION", "bfloat16"])
    model = build_model(cfg)
    trained = [p for p in model.parameters() if p.requires_grad]
    trainer = SimpleTrainer(model, [[labeled(0), labeled(1)]] * 3, torch.optim.SGD(trained, lr=1e-3))
    steps = Steps(gpu, "training step of a model around the pyramid")
    trainer.register_hooks([steps])
    trainer.train(0, 2)
    steps.check(2)
    assert np.isfinite(trainer.storage.latest()["total_loss"][0])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_linear_probe(gpu, family):
    encoder = example(family)
    pixels = {f"pixel_{name}": [255 * value for value in getattr(encoder, f"pixel_{name}")] for name in ("mean", "std")}
    backbone = SPARViT(encoder, **pixels, input_format="RGB", trainable="none", precision="bfloat16")
    probe = LinearProbe(backbone.output_shape(), num_classes=5)
    model = ProbeSegmentor(backbone=backbone, sem_seg_head=probe, **pixels).to("cuda").train()
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-2)
    for _ in range(2):
        gpu.reset()
        (loss,) = model([labeled(0), labeled(1)]).values()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    check(gpu, "training step of a probe, two images")
    assert loss.is_cuda and loss.isfinite() and probe.predictor.weight.grad.any()
    gpu.reset()
    (output,) = model.eval()([labeled(0)])
    check(gpu, SEGMENTED_ON_DEVICE)
    assert output["sem_seg_labels"].is_cuda


@pytest.fixture
def named_set(tmp_path):
    """The name of a data set, not to be met again."""
    name = f"on_gpu_{tmp_path.name}"
    yield name
    MetadataCatalog.remove(name)


@pytest.mark.parametrize("output", ["sem_seg_labels", "sem_seg"])
def test_semantic_evaluator(gpu, named_set, tmp_path, output):
    MetadataCatalog.get(named_set).set(stuff_classes=["sky", "grass", "cat"], ignore_label=255)
    devices = {}
    for device in ("cuda", "cpu"):
        evaluator = SemanticEvaluator(named_set, distributed=False)
        generator = torch.Generator().manual_seed(0)
        for number, size in enumerate(SIZES):
            truth = torch.randint(0, 3, size, generator=generator, dtype=torch.uint8)
            truth[:9] = 255
            file = str(tmp_path / f"{number}.png")
            Image.fromarray(truth.numpy()).save(file)
            scores = torch.randn(3, *size, generator=generator).to(device)
            found = scores if output == "sem_seg" else scores.argmax(0)
            gpu.reset()
            evaluator.process([{"sem_seg_file_name": file}], [{output: found}])
            check(gpu, "semantic evaluator, an image")
        devices[device] = evaluator.evaluate()["sem_seg"]
        check(gpu, "scores at the end")
    assert devices["cuda"] == devices["cpu"] and 20 < devices["cpu"]["mIoU"] < 50


def test_feature_evaluator(gpu):
    target = torch.randn(6, 4, 5, device="cuda")
    evaluator = FeatureEvaluator(lambda: lambda image: target, distributed=False)
    for _ in range(2):  # sums are kept where the first image's are
        gpu.reset()
        evaluator.process([{"image": torch.zeros(1)}], [{"features": target + 0.1}])
    check(gpu, "feature evaluator, an image")
    assert evaluator.evaluate()["features"]["mse"] == pytest.approx(0.01, rel=1e-4)
    check(gpu, "scores at the end")


def test_panoptic_evaluator(gpu, named_set, tmp_path):
    ids = np.repeat([[1, 2]], 20, axis=0).repeat(15, axis=1)
    write_ids(ids, tmp_path / "truth" / "0.png")
    segments = [{"id": n, "category_id": c, "iscrowd": 0, "area": 300} for n, c in ((1, 3), (2, 40))]
    annotations = [{"image_id": 0, "file_name": "0.png", "segments_info": segments}]
    categories = [{"id": 3, "name": "cat", "isthing": 1}, {"id": 40, "name": "sky", "isthing": 0}]
    write_json({"categories": categories, "annotations": annotations}, tmp_path / "truth.json")
    MetadataCatalog.get(named_set).set(
        panoptic_json=str(tmp_path / "truth.json"),
        panoptic_root=str(tmp_path / "truth"),
        thing_dataset_id_to_contiguous_id={3: 0},
        stuff_dataset_id_to_contiguous_id={40: 1},
    )
    evaluator = PanopticEvaluator(named_set, distributed=False)
    found = [{"id": n, "category_id": c, "isthing": c == 0} for n, c in ((1, 0), (2, 1))]
    output = torch.from_numpy(ids).int().to("cuda")
    gpu.reset()
    evaluator.process([{"image_id": 0, "file_name": "0.jpg"}], [{"panoptic_seg": (output, found)}])
    check(gpu, "panoptic evaluator, an image")
    assert evaluator.evaluate()["panoptic_seg"]["PQ"] == 100
