"""Training records of PanopticFPN, compared with Detectron2's own mapper and a loop over pixels."""

import json

import numpy as np
import pycocotools.mask
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper, build_detection_test_loader, build_detection_train_loader
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from detectron2.utils.events import EventStorage
from PIL import Image

from reference import SHARED, reference_image
from spar_d2.data.datasets.panoptic import load_panoptic
from spar_d2.data.datasets.scenes import SCENE_SPLITS
from spar_d2.data.mappers import PanopticMapper, read_segments

SAMPLE = SHARED / "data" / "coco_panoptic_sample"
SIZE = (70, 95)
VOID = 255


def make_record(folder, count: int, seed: int = 0, size: tuple[int, int] = SIZE) -> tuple[dict, np.ndarray]:
    """An image with ``count`` segments in blocks and some in single pixels; the dict and the ids, (H, W).

    The second is a crowd, the third is listed but has no pixel.
    """
    rng = np.random.default_rng(seed)
    numbers = rng.choice(np.arange(1, 2**24), count, replace=False)
    kept = np.delete(numbers, 2)
    ids = rng.choice([0, *kept], (size[0] // 5 + 1, size[1] // 5 + 1)).repeat(5, 0).repeat(5, 1)[: size[0], : size[1]]
    ids[rng.uniform(size=size) < 0.05] = 0
    places = rng.choice(ids.size, count - 1, replace=False)
    ids.ravel()[places] = kept
    segments = [
        {"id": int(number), "category_id": int(rng.integers(1, 9)), "isthing": bool(place % 3 != 0), "iscrowd": 0}
        for place, number in enumerate(numbers)
    ]
    segments[1]["iscrowd"] = 1
    rng.shuffle(segments)
    pixels = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=2).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "mask.png")
    Image.fromarray(reference_image(*size, seed)).save(folder / "image.png")
    record = {"file_name": str(folder / "image.png"), "image_id": "one", "height": size[0], "width": size[1]}
    return {**record, "pan_seg_file_name": str(folder / "mask.png"), "segments_info": segments}, ids


def expected(record: dict, ids: np.ndarray) -> tuple[list[list[int]], list[tuple[int, np.ndarray, list[int]]]]:
    """Pixel by pixel: the labels of stuff; and of every thing that is seen its class, mask and box."""
    segments = {segment["id"]: segment for segment in record["segments_info"]}
    labels = [[VOID] * ids.shape[1] for _ in range(ids.shape[0])]
    places: dict[int, list[tuple[int, int]]] = {}
    for y, x in np.ndindex(ids.shape):
        if number := int(ids[y, x]):
            labels[y][x] = 0 if segments[number]["isthing"] else segments[number]["category_id"]
            places.setdefault(number, []).append((y, x))
    things = []
    for segment in record["segments_info"]:
        if segment["isthing"] and not segment["iscrowd"] and segment["id"] in places:
            ys, xs = zip(*places[segment["id"]])
            mask = np.zeros(ids.shape, dtype=bool)
            for place in places[segment["id"]]:
                mask[place] = True
            things.append((segment["category_id"], mask, [min(xs), min(ys), max(xs) + 1, max(ys) + 1]))
    return labels, things


def check(result: dict, record: dict, ids: np.ndarray) -> None:
    """The result has the segments of ``ids``, which are those of the record after augmentation."""
    labels, things = expected(record, ids)
    instances = result["instances"]
    assert result["image"].shape == (3, *ids.shape)
    assert result["image"].dtype == torch.uint8
    assert result["sem_seg"].dtype == instances.gt_classes.dtype == torch.int64
    assert result["sem_seg"].tolist() == labels
    assert instances.image_size == ids.shape
    assert len(instances) == len(things)
    assert instances.gt_classes.tolist() == [category for category, _, _ in things]
    assert instances.gt_boxes.tensor.tolist() == [box for _, _, box in things]
    masks = instances.gt_masks.tensor.numpy()
    assert masks.dtype == bool
    assert all(np.array_equal(mask, other) for mask, (_, other, _) in zip(masks, things))


def resized(ids: np.ndarray, height: int, width: int) -> np.ndarray:
    """The nearest pixel by the middles of pixels."""
    ys = [int((y + 0.5) * ids.shape[0] / height) for y in range(height)]
    xs = [int((x + 0.5) * ids.shape[1] / width) for x in range(width)]
    return ids[ys][:, xs]


def padded(ids: np.ndarray, bottom: int, right: int) -> np.ndarray:
    return np.pad(ids, ((0, bottom), (0, right)))


# Augmentations, and the expected ids.
CASES = {
    "nothing": ([], lambda ids: ids),
    "flip": ([T.RandomFlip(1.0)], lambda ids: ids[:, ::-1]),
    "flip down": ([T.RandomFlip(1.0, horizontal=False, vertical=True)], lambda ids: ids[::-1]),
    "larger": ([T.Resize((103, 131))], lambda ids: resized(ids, 103, 131)),
    "smaller": ([T.Resize((31, 40))], lambda ids: resized(ids, 31, 40)),
    "crop": ([T.CropTransform(11, 7, 30, 40)], lambda ids: ids[7:47, 11:41]),
    "crop to a pixel": ([T.CropTransform(11, 7, 1, 1)], lambda ids: ids[7:8, 11:12]),
    "pad": ([T.FixedSizeCrop((80, 100))], lambda ids: padded(ids, 10, 5)),
    "pad with 0": ([T.PadTransform(0, 0, 3, 4)], lambda ids: padded(ids, 4, 3)),
    "all": (
        # Of sizes where no middle of a pixel falls between two pixels.
        [T.CropTransform(3, 2, 59, 50), T.Resize((78, 88)), T.RandomFlip(1.0), T.FixedSizeCrop((90, 99))],
        lambda ids: padded(resized(ids[2:52, 3:62], 78, 88)[:, ::-1], 12, 11),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("count", [4, 254, 255, 256, 700])
@pytest.mark.parametrize("case", CASES)
def test_against_a_loop_over_pixels(tmp_path, case, count):
    augmentations, change = CASES[case]
    record, ids = make_record(tmp_path, count)
    check(PanopticMapper(True, augmentations=augmentations)(record), record, change(ids))


@pytest.fixture
def cfg():
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN = (50, 64, 110)
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.MODEL.MASK_ON = True
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("crop", ["", "relative_range", "absolute"])
def test_gives_the_same_as_detectron2s_mapper_with_separate_labels(tmp_path, cfg, crop, seed):
    record, ids = make_record(tmp_path, 40, seed)
    labels, things = expected(record, ids)
    Image.fromarray(np.array(labels, dtype=np.uint8)).save(tmp_path / "labels.png")
    annotations = [
        {
            "bbox": box,
            "bbox_mode": BoxMode.XYXY_ABS,
            "category_id": category,
            "segmentation": pycocotools.mask.encode(np.asfortranarray(mask)),
        }
        for category, mask, box in things
    ]
    plain = {key: record[key] for key in ("file_name", "image_id", "height", "width")}
    separate = {**plain, "sem_seg_file_name": str(tmp_path / "labels.png"), "annotations": annotations}
    cfg.INPUT.CROP.ENABLED = bool(crop)
    if crop:
        cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = crop, [0.5, 0.6] if crop == "relative_range" else [40, 33]
    results = []
    for mapper, given in ((PanopticMapper(cfg, True), record), (DatasetMapper(cfg, True), separate)):
        np.random.seed(seed)
        results.append(mapper(given))
    ours, theirs = results
    assert set(ours) == set(theirs)
    assert torch.equal(ours["image"], theirs["image"])
    assert torch.equal(ours["sem_seg"], theirs["sem_seg"])
    assert torch.equal(ours["instances"].gt_classes, theirs["instances"].gt_classes)
    assert torch.equal(ours["instances"].gt_masks.tensor, theirs["instances"].gt_masks.tensor)
    if crop:  # without it, theirs are scaled from the annotations, not taken from the masks
        assert torch.equal(ours["instances"].gt_boxes.tensor, theirs["instances"].gt_boxes.tensor)


def test_instances_of_an_image_without_things(tmp_path):
    record, ids = make_record(tmp_path, 9)
    for segment in record["segments_info"]:
        segment["isthing"] = False
    result = PanopticMapper(True, augmentations=[])(record)
    check(result, record, ids)
    assert result["instances"].gt_masks.tensor.shape == (0, *SIZE)


def test_an_image_of_no_segment(tmp_path):
    record, ids = make_record(tmp_path, 9)
    Image.new("RGB", SIZE[::-1]).save(record["pan_seg_file_name"])
    record["segments_info"] = []
    check(PanopticMapper(True, augmentations=[])(record), record, 0 * ids)


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_images_are_upright_and_in_the_order_of_the_config(tmp_path, cfg, image_format):
    record, _ = make_record(tmp_path, 9)
    image = Image.open(record["file_name"])
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(record["file_name"], exif=exif)
    cfg.INPUT.FORMAT, cfg.INPUT.MIN_SIZE_TEST = image_format, 0
    result = PanopticMapper(cfg, False)(record)["image"].permute(1, 2, 0).numpy()
    assert np.array_equal(result if image_format == "RGB" else result[..., ::-1], reference_image(*SIZE))


def test_in_testing_there_is_only_the_image(tmp_path, cfg):
    record, _ = make_record(tmp_path, 9)
    (tmp_path / "mask.png").unlink()
    cfg.INPUT.MIN_SIZE_TEST = 140
    cfg.INPUT.CROP.ENABLED = True
    result = PanopticMapper(cfg, False)(record)
    assert set(result) == {"file_name", "image_id", "height", "width", "image"}
    assert result["image"].shape == (3, 140, 190)
    assert (result["height"], result["width"]) == SIZE


def test_the_record_is_not_modified(tmp_path, cfg):
    record, _ = make_record(tmp_path, 9)
    before = json.dumps(record)
    PanopticMapper(cfg, True)(record)
    assert json.dumps(record) == before


def test_read_segments(tmp_path):
    record, ids = make_record(tmp_path, 300)
    assert np.array_equal(read_segments(record), ids)


def test_wrong_files_are_named(tmp_path):
    record, ids = make_record(tmp_path, 9)
    mapper = PanopticMapper(True, augmentations=[])
    with pytest.raises(ValueError, match="image.png"):
        mapper({**record, "height": 71})
    listed = [segment for segment in record["segments_info"] if segment["id"] != ids.max()]
    with pytest.raises(ValueError, match=f"mask.png has the segment {ids.max()}, which its data set does not list"):
        mapper({**record, "segments_info": listed})
    Image.new("RGB", (12, 10)).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=r"mask.png has 12x10 pixels, its image .*image.png has 95x70"):
        mapper(record)
    (tmp_path / "mask.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"mask.png"):
        mapper(record)


@pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"no photos of COCO in {SAMPLE}")
def test_photos_of_coco(tmp_path, monkeypatch):
    """The visible part of every segment has the area and box of COCO's annotations."""
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    for place, target in (
        ("val2017", "input_images"),
        ("panoptic_val2017", "panoptic_examples"),
        ("annotations/panoptic_val2017.json", "panoptic_examples.json"),
    ):
        (tmp_path / "coco" / place).symlink_to(SAMPLE / target)
    content = json.loads((SAMPLE / "panoptic_examples.json").read_text())
    things = {category["id"] for category in content["categories"] if category["isthing"]}
    for record, annotation in zip(load_panoptic("spar_coco_panoptic_val", tmp_path), content["annotations"]):
        result = PanopticMapper(True, augmentations=[])(record)
        segments = annotation["segments_info"]
        seen = [one for one in segments if one["category_id"] in things and not one["iscrowd"]]
        instances = result["instances"]
        assert instances.gt_masks.tensor.sum((1, 2)).tolist() == [one["area"] for one in seen]
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (one["bbox"] for one in seen)]
        assert instances.gt_boxes.tensor.tolist() == boxes
        stuff = [one for one in segments if one["category_id"] not in things]
        labels, counts = result["sem_seg"].unique(return_counts=True)
        assert sorted(counts[(labels > 0) & (labels < VOID)].tolist()) == sorted(one["area"] for one in stuff)
        assert (result["sem_seg"] == 0).sum() == sum(one["area"] for one in segments if one["category_id"] in things)


@pytest.fixture
def scenes_cfg(panoptic_cfg, tmp_path, monkeypatch):
    """PanopticFPN with small heads for the classes of the drawn scenes, of which there are three."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setitem(SCENE_SPLITS, "tune", (202, 3))
    cfg = panoptic_cfg
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("spar_scenes_panoptic_tune",)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 8, 6
    cfg.MODEL.SPAR.OUT_CHANNELS = cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 32
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 64
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (128, 192), 0
    cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = 0, False
    cfg.SOLVER.IMS_PER_BATCH = 2
    return cfg


@pytest.mark.slow
def test_panoptic_fpn_trains_on_scenes(scenes_cfg):
    torch.manual_seed(0)
    model = build_model(scenes_cfg).train()
    batch = next(iter(build_detection_train_loader(scenes_cfg, mapper=PanopticMapper(scenes_cfg, True))))
    assert all(len(record["instances"]) for record in batch)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    totals = []
    with EventStorage():
        for _ in range(3):
            losses = model(batch)
            assert set(losses) >= {"loss_sem_seg", "loss_mask", "loss_cls", "loss_box_reg", "loss_rpn_cls"}
            assert all(loss.isfinite() for loss in losses.values())
            totals.append(sum(losses.values()))
            optimizer.zero_grad()
            totals[-1].backward()
            optimizer.step()
    assert totals[-1] < totals[0]


@pytest.mark.slow
def test_panoptic_fpn_predicts_at_the_size_of_the_truth(scenes_cfg):
    torch.manual_seed(0)
    model = build_model(scenes_cfg).eval()
    name = scenes_cfg.DATASETS.TEST[0]
    loader = build_detection_test_loader(scenes_cfg, name, mapper=PanopticMapper(scenes_cfg, False))
    records = load_panoptic(name)
    for batch, record in zip(loader, records):
        with torch.no_grad():
            ids, segments = model(batch)[0]["panoptic_seg"]
        assert batch[0]["image_id"] == record["image_id"]
        assert ids.shape == read_segments(record).shape
        assert all(one["category_id"] < (8 if one["isthing"] else 6) for one in segments)
