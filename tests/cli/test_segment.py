"""The demo on photos and videos, as a user calls it, with tiny weights."""

import json
import shutil
from importlib import import_module

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image

import spar_d2
from reference import ROOT, reference_image
from spar_d2.demo.inputs import find_inputs
from spar_d2.demo.outputs import Target, write_mask
from spar_d2.demo.panoptic import PanopticDemo
from spar_d2.demo.predictor import Demo, Prediction
from spar_d2.demo.run import run
from spar_d2.engine.setup import load_config
from spar_d2.visualization import class_colors
from tool_modules import exit_code

CONFIG = ROOT / "configs" / "toy" / "distill.yaml"
MODEL = [str(ROOT / "configs/toy/tiny_clip.json"), str(ROOT / "configs/toy/tiny_clip.safetensors")]
WORDS = "grass, meadow; circle; star; été"


@pytest.fixture
def demo(monkeypatch, tmp_path):
    """Runs the command in an empty folder, and returns its exit code."""
    monkeypatch.chdir(tmp_path)
    tool = import_module("spar_d2.cli.segment")

    def call(*arguments, config=CONFIG):
        return exit_code(tool, monkeypatch, "--config-file", config, *arguments)

    return call


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(reference_image(71, 103)).save(path)
    return path


@pytest.fixture
def video(tmp_path):
    """Five frames, the scene moving."""
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 12.5, (70, 50))
    scene = reference_image(60, 90)
    for shift in range(5):
        writer.write(np.ascontiguousarray(scene[shift : shift + 50, shift : shift + 70, ::-1]))
    writer.release()
    return path


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
def test_a_photo_into_a_new_folder(demo, photo, tmp_path, capsys):
    output = tmp_path / "new" / "folder"
    arguments = ("--input", photo, "--vocabulary", f"{WORDS}; star", "--output", output, "--masks", "--json")
    assert demo(*arguments) == 0
    assert files_in(output) == ["photo.json", "photo.png", "photo_mask.png"]
    assert not (tmp_path / "output").exists()
    expected = spar_d2.segment(photo, WORDS, *MODEL, templates="simple")
    names = expected.names

    with Image.open(output / "photo_mask.png") as mask:
        assert mask.mode == "P"
        assert np.array_equal(np.asarray(mask), expected.labels)
        colors = np.array(class_colors(names))[expected.labels]
        assert np.array_equal(np.asarray(mask.convert("RGB")), colors)

    record = json.loads((output / "photo.json").read_text(encoding="utf-8"))
    assert (record["width"], record["height"]) == (103, 71)
    assert record["vocabulary"] == [["grass", "meadow"], ["circle"], ["star"], ["été"], []]
    pixels = {entry["number"]: entry["pixels"] for entry in record["classes"]}
    assert pixels == {k: int((expected.labels == k).sum()) for k in np.unique(expected.labels)}
    assert list(pixels.values()) == sorted(pixels.values(), reverse=True)
    for entry in record["classes"]:
        assert entry["name"] == names[entry["number"]]
        assert entry["area"] == pytest.approx(expected.areas[entry["name"]])
        assert tuple(entry["color"]) == class_colors(names)[entry["number"]]

    with Image.open(output / "photo.png") as picture:
        assert np.array_equal(np.asarray(picture), expected.draw(photo))

    printed = capsys.readouterr()
    assert "photo.png: 103x71, " in printed.out
    largest = record["classes"][0]
    assert f"  {largest['name']} {largest['area']:.1%}" in printed.out
    assert "1 image, median" in printed.out
    reason = "has no synonym of its own and is never predicted."
    assert printed.err == f"warning: Class 4 of the vocabulary, 'star', {reason}\n"


@pytest.mark.slow
def test_corrupt_images_in_a_folder_are_skipped(demo, photo_folder, tmp_path, capsys):
    (photo_folder / "bad.jpg").write_bytes(b"no photo")
    Image.open(photo_folder / "a.jpg").save(photo_folder / "a.png")
    assert demo("--input", photo_folder, "--vocabulary", WORDS, "--output", tmp_path / "out") == 0
    assert files_in(tmp_path / "out") == ["a.png", "a_2.png", "b.png", "more/c.png"]
    printed = capsys.readouterr()
    assert "4 images, median" in printed.out and "skipped 1: bad.jpg" in printed.out
    assert "skipped: image: " in printed.err and "bad.jpg cannot be read" in printed.err


@pytest.mark.slow
def test_again_into_a_folder_below_the_input(demo, photo_folder, tmp_path):
    output = photo_folder / "segmented"
    for _ in range(2):
        assert demo("--input", photo_folder, "--vocabulary", WORDS, "--output", output) == 0
        assert files_in(output) == ["a.png", "b.png", "more/c.png"]


@pytest.mark.slow
def test_patterns_and_files_of_the_same_name(demo, photo_folder, tmp_path):
    (photo_folder / "more" / "notes.md").write_text("no photo")
    other = tmp_path / "a.jpg"
    shutil.copy(photo_folder / "b.JPG", other)
    arguments = ("--input", f"{photo_folder}/**/*", other, "--output", tmp_path / "out", "--vocabulary", WORDS)
    assert demo(*arguments) == 0
    assert files_in(tmp_path / "out") == ["a.png", "a_2.png", "b.png", "c.png"]
    with Image.open(tmp_path / "out" / "a_2.png") as picture:
        assert picture.height >= 128, "that of b.JPG"


@pytest.mark.slow
def test_turned_photos_come_out_upright_and_jpeg_is_written(demo, tmp_path):
    image = Image.fromarray(reference_image(40, 80))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    output = tmp_path / "made" / "here.jpg"
    assert demo("--input", tmp_path / "turned.jpg", "--vocabulary", WORDS, "--output", output, "--masks") == 0
    assert files_in(tmp_path / "made") == ["here.jpg", "here_mask.png"]
    with Image.open(tmp_path / "made" / "here_mask.png") as mask, Image.open(output) as picture:
        assert mask.size == (40, 80)
        assert picture.format == "JPEG" and picture.height >= 80


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 1), (1, 333), (333, 1), (37, 211)])
def test_odd_sizes_are_resized_for_the_model_and_back(demo, size, tmp_path):
    Image.fromarray(reference_image(*size)).save(tmp_path / "odd.png")
    arguments = ("--input", "odd.png", "--vocabulary", WORDS, "--output", "out", "--show", "overlay", "pca", "--masks")
    resized = ("--opts", "INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "96")
    for options in ((), resized):
        assert demo(*arguments, *options) == 0
        with Image.open("out/odd_mask.png") as mask:
            assert mask.size == size[::-1]


@pytest.mark.slow
def test_size_and_channel_order_follow_the_config(demo, photo, monkeypatch):
    from spar_d2.modeling.open_vocabulary import OpenVocabularySegmentor

    given, forward = [], OpenVocabularySegmentor.forward

    def spy(self, batched_inputs):
        given.extend(batched_inputs)
        return forward(self, batched_inputs)

    monkeypatch.setattr(OpenVocabularySegmentor, "forward", spy)
    arguments = ("--input", photo, "--vocabulary", WORDS, "--output", "out")
    assert demo(*arguments) == 0
    assert demo(*arguments, "--opts", "INPUT.FORMAT", "BGR") == 0
    assert demo(*arguments, "--opts", "INPUT.MIN_SIZE_TEST", "142", "INPUT.MAX_SIZE_TEST", "180") == 0
    own, turned, small = given
    assert np.array_equal(own["image"].numpy().transpose(1, 2, 0), reference_image(71, 103))
    assert np.array_equal(turned["image"].numpy(), own["image"].numpy()[::-1])
    assert small["image"].shape == (3, 124, 180)
    assert {(x["height"], x["width"]) for x in given} == {(71, 103)}


@pytest.mark.slow
def test_the_weights_of_a_student_are_used(demo, photo, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(MODEL[1])
    tensors["visual.proj"] = -tensors["visual.proj"]
    save_file(tensors, tmp_path / "student.safetensors")
    arguments = ("--input", photo, "--vocabulary", WORDS, "--masks", "--output")
    assert demo(*arguments, "plain") == 0
    assert demo(*arguments, "student", "--weights", "student.safetensors") == 0
    assert demo(*arguments, "config", "--opts", "MODEL.WEIGHTS", "student.safetensors") == 0
    plain, student, config = (
        np.asarray(Image.open(tmp_path / name / "photo_mask.png")) for name in ("plain", "student", "config")
    )
    assert not np.array_equal(plain, student)
    assert np.array_equal(student, config)


@pytest.mark.slow
def test_more_classes_than_a_palette_holds(demo, photo, tmp_path):
    (tmp_path / "many.txt").write_text("\n".join(f"word {number}" for number in range(300)) + "\ncircle\n")
    assert demo("--input", photo, "--vocabulary", "many.txt", "--output", "out", "--masks", "--json") == 0
    with Image.open("out/photo_mask.png") as mask:
        assert mask.mode.startswith("I;16")
        numbers = np.asarray(mask)
    record = json.loads((tmp_path / "out" / "photo.json").read_text())
    assert {entry["number"] for entry in record["classes"]} == set(np.unique(numbers).tolist())


@pytest.mark.slow
def test_test_time_augmentation_by_the_config(demo, photo, tmp_path):
    def masks(output, *keys):
        assert demo("--input", photo, "--vocabulary", WORDS, "--output", output, "--masks", "--opts", *keys) == 0
        return np.asarray(Image.open(tmp_path / output / "photo_mask.png"))

    views = ["TEST.AUG.ENABLED", "True", "TEST.AUG.FLIP", "False", "TEST.AUG.MIN_SIZES", "(142,)"]
    twice = masks("twice", "INPUT.MIN_SIZE_TEST", "142")
    assert (masks("views", *views) == twice).mean() > 0.98
    assert (masks("plain") == twice).mean() < 0.98


def test_labels_are_refined_by_the_config(demo, photo, tmp_path, capfd):
    def masks(output, *keys):
        keys = ("MODEL.SPAR.PROB_THRESHOLD", "0.28", "INPUT.MIN_SIZE_TEST", "71", *keys)
        assert demo("--input", photo, "--vocabulary", WORDS, "--output", output, "--masks", "--opts", *keys) == 0
        return np.asarray(Image.open(tmp_path / output / "photo_mask.png"))

    assert (masks("plain") != masks("refined", "MODEL.SPAR.REFINE", "lposs,lposs+")).any()
    assert demo("--input", photo, "--vocabulary", WORDS, "--opts", "MODEL.SPAR.REFINE", "anyup") == 1
    assert "MODEL.SPAR.ANYUP" in capfd.readouterr().err


@pytest.mark.slow
def test_features_need_no_vocabulary(demo, photo, tmp_path, capsys):
    arguments = ("--input", photo, "--output", "out")
    assert demo(*arguments, "--show", "pca", config=ROOT / "configs/toy/distill_dinov3.yaml") == 0
    with Image.open("out/photo_pca.png") as picture:
        assert picture.size == (103, 71)
        assert len(picture.convert("RGB").getcolors()) > 20
    assert "weights are random" in capsys.readouterr().err
    assert demo(*arguments, "--show", "pca", "overlay", "--vocabulary", WORDS) == 0
    with Image.open("out/photo.png") as picture:
        assert picture.width >= 2 * 103


def test_a_video_and_back(demo, video, tmp_path, capsys):
    (tmp_path / "out" / "clip_masks").mkdir(parents=True)
    write_mask(np.zeros((2, 2), int), [(0, 0, 0)], tmp_path / "out" / "clip_masks" / "000099.png", str(video))
    arguments = ("--input", video, "--vocabulary", WORDS, "--output", "out", "--masks", "--json")
    assert demo(*arguments, "--show", "overlay", "pca") == 0
    masks = [f"clip_masks/{number:06d}.png" for number in range(1, 6)]
    assert files_in(tmp_path / "out") == ["clip.json", "clip.mp4", *masks]
    capture = cv2.VideoCapture("out/clip.mp4")
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(12.5)
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1])
    assert len(frames) == 5
    assert frames[0].shape[1] >= 140

    record = json.loads((tmp_path / "out" / "clip.json").read_text(encoding="utf-8"))
    assert (record["width"], record["height"], record["frames_per_second"]) == (70, 50, 12.5)
    names = {entry["name"]: entry["number"] for entry in record["classes"]}
    for name, areas in zip(masks, record["areas_by_frame"], strict=True):
        labels = np.asarray(Image.open(tmp_path / "out" / name))
        shares = {names[word]: area for word, area in areas.items()}
        assert shares == pytest.approx({k: (labels == k).mean() for k in np.unique(labels)})
    printed = capsys.readouterr()
    assert "clip.avi: 5 frames, median" in printed.out
    assert "1 video, 5 frames" in printed.out


@pytest.mark.parametrize("name", ["000002.png", "000099.png"])
def test_existing_masks_are_never_removed_or_replaced(demo, video, tmp_path, capsys, name):
    """Also those of another video."""
    path = tmp_path / "out" / "clip_masks" / name
    write_mask(np.zeros((2, 2), int), [(0, 0, 0)], path, "other.avi")
    before = path.read_bytes()
    assert demo("--input", video, "--vocabulary", WORDS, "--output", "out", "--masks") == 1
    assert f"{name} is not from an earlier run on" in capsys.readouterr().err
    assert path.read_bytes() == before and files_in(tmp_path / "out") == [f"clip_masks/{name}"]


@pytest.mark.slow
def test_videos_in_folders_are_taken_too(demo, photo, video, tmp_path):
    folder = tmp_path / "mixed" / "clips"
    folder.mkdir(parents=True)
    shutil.copy(video, folder / "a.avi")
    arguments = ["--vocabulary", WORDS, "--output", "out", "--input"]
    assert demo(*arguments, "mixed") == 0
    assert files_in(tmp_path / "out") == ["clips/a.mp4"]
    shutil.copy(photo, tmp_path / "mixed")
    assert demo(*arguments, "mixed") == 0
    assert files_in(tmp_path / "out") == ["clips/a.mp4", "photo.png"]


def test_the_vocabulary_comes_from_the_config_or_the_data_set(demo, photo, tmp_path):
    assert demo("--input", photo, "--output", "a", "--json", "--opts", "MODEL.SPAR.VOCABULARY", "cat; dog") == 0
    assert json.loads((tmp_path / "a" / "photo.json").read_text())["vocabulary"] == [["cat"], ["dog"]]
    assert demo("--input", photo, "--output", "b", "--json") == 0
    record = json.loads((tmp_path / "b" / "photo.json").read_text())
    assert ["moon"] in record["vocabulary"]
    colors = {name: tuple(color) for name, color in zip(*scene_classes())}
    assert all(tuple(entry["color"]) == colors[entry["name"]] for entry in record["classes"])


def scene_classes():
    from spar_d2.toy import scenes

    return scenes.SCENE_CLASSES, scenes.class_colors()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "nowhere.jpg"], "--input: nowhere.jpg does not exist"),
        (["--input", "nothing/*.jpg"], "--input: no image, video or folder matches nothing/*.jpg"),
        (["--input", "empty"], "--input: there are no images"),
        (["--input", "bad.jpg"], "image: bad.jpg cannot be read"),
        (["--input", "bad.mp4"], "video: bad.mp4 cannot be opened"),
        (["--input", "photo.png", "photo.png", "bad.jpg", "--output", "one.png"], "one.png is a file, and there are 2"),
        (["--output", "picture.tif"], "--output for an image must end in .png, .jpg, .jpeg, .webp"),
        (["--input", "bad.mp4", "--output", "picture.png"], "--output for a video must end in .mp4"),
        (["--output", "."], "photo.png is one of the inputs, which are never overwritten"),
        (["--output", "bad.jpg/more"], "bad.jpg is a file, but bad.jpg/more/photo.png needs a folder there"),
        (["--output", "taken"], "taken/photo.png is a folder and cannot be replaced"),
        (["--vocabulary", "none.txt"], "there is no vocabulary file none.txt"),
        (["--vocabulary", ";"], "the vocabulary is empty"),
        (["--vocabulary", "", "--opts", "DATASETS.TEST", "()"], 'for example --vocabulary "cat, kitten; dog; sky"'),
        (["--weights", "none.safetensors"], "--weights: there is no file none.safetensors"),
        (["--weights", "bad.jpg"], "bad.jpg cannot be read as weights"),
        (["--config-file", "none.yaml"], "--config-file: there is no file none.yaml"),
        (["--alpha", "2"], "alpha must be in 0..1, got 2.0"),
        (["--opts", "MODEL.SPAR.ENCODR", "x"], "MODEL.SPAR.ENCODR"),
        (["--opts", "INPUT.FORMAT", "RGB", "--masks", "1"], "--masks must be before the first KEY VALUE pair"),
    ],
)
def test_mistakes_are_one_line(demo, photo, tmp_path, capfd, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken" / "photo.png").mkdir(parents=True)
    (tmp_path / "bad.jpg").write_bytes(b"no photo")
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    before = files_in(tmp_path)
    assert demo("--input", "photo.png", "--vocabulary", WORDS, "--output", "out", *arguments) == 1
    # Including the output of libraries.
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("error: ") and message in lines[0]
    assert len(lines) == 2 and "SPAR_TRACEBACK" in lines[1]
    assert files_in(tmp_path) == before, "nothing is left"


def test_input_without_readable_images_is_a_failure(demo, tmp_path, capsys):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"no photo")
    assert demo("--input", "a.jpg", "b.jpg", "--vocabulary", WORDS) == 1
    assert "skipped 2: a.jpg, b.jpg" in capsys.readouterr().out


PANOPTIC = ROOT / "configs" / "toy" / "panoptic.yaml"


@pytest.fixture
def panoptic_model(tmp_path):
    """A checkpoint of a PanopticFPN with random heads."""
    model = build_model(load_config(str(PANOPTIC), ["MODEL.DEVICE", "cpu"]))
    torch.save({"model": model.state_dict()}, tmp_path / "panoptic.pth")
    return tmp_path / "panoptic.pth"


@pytest.mark.slow
def test_panoptic_models_are_drawn(demo, photo, video, panoptic_model, tmp_path, capsys):
    arguments = ["--weights", panoptic_model, "--masks", "--json", "--output", tmp_path / "out"]
    loose = ["MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT", 1, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    loose += ["MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH", 0.0]
    assert demo("--input", photo, video, *arguments, "--opts", *loose, config=PANOPTIC) == 0
    metadata = MetadataCatalog.get("spar_scenes_panoptic_val")
    names = ["background", *metadata.stuff_classes[1:], *metadata.thing_classes]
    colors = [*metadata.stuff_colors[1:], *metadata.thing_colors]
    record = json.loads((tmp_path / "out/photo.json").read_text())
    assert record["vocabulary"] == [[name] for name in names]
    mask = np.asarray(Image.open(tmp_path / "out/photo_mask.png"))
    assert mask.shape == (71, 103)
    assert {one["number"] for one in record["classes"]} == set(np.unique(mask).tolist())
    for one in record["classes"]:
        assert one["name"] == names[one["number"]]
        assert one["pixels"] == (mask == one["number"]).sum()
        assert one["number"] == 0 or one["color"] == colors[one["number"] - 1]
    assert any(one["number"] for one in record["classes"])
    assert np.asarray(Image.open(tmp_path / "out/photo.png")).shape[2] == 3
    assert (tmp_path / "out/clip.mp4").is_file()
    assert "random" not in capsys.readouterr().err


@pytest.mark.slow
def test_segments_of_one_class_are_outlined(panoptic_model):
    cfg = load_config(str(PANOPTIC), ["MODEL.DEVICE", "cpu"])
    demo = PanopticDemo(cfg, ["overlay"], str(panoptic_model))
    image, labels = np.full((60, 90, 3), 100, dtype=np.uint8), np.full((60, 90), 7)
    halves = np.repeat([[1] * 45 + [2] * 45], 60, axis=0)
    plain = demo.draw(image, Prediction(labels, None, (60, 90)), listed=())
    outlined = demo.draw(image, Prediction(labels, None, (60, 90), segments=halves), listed=())
    columns = np.flatnonzero((plain != outlined).any(axis=(0, 2)))
    assert set(columns) <= {43, 44, 45, 46} and len(columns)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocabulary", "cat; dog"], "--vocabulary: this PanopticFPN model has a fixed set of classes"),
        (["--show", "overlay", "pca"], "--show must be overlay for PanopticFPN"),
        (["--opts", "MODEL.META_ARCHITECTURE", "GeneralizedRCNN"], "must be OpenVocabularySegmentor or PanopticFPN"),
        (["--opts", "DATASETS.TEST", "()", "DATASETS.TRAIN", "()"], "DATASETS.TEST or DATASETS.TRAIN must name"),
    ],
)
def test_outputs_that_panoptic_models_do_not_have_are_an_error(demo, photo, capfd, arguments, message):
    assert demo("--input", photo, *arguments, config=PANOPTIC) == 1
    lines = capfd.readouterr().err.splitlines()
    assert any(line.startswith("error: ") and message in line for line in lines)
    assert not any("Traceback" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["masks", "record"])
@pytest.mark.parametrize("kind", ["photo", "video"])
def test_masks_of_a_demo_that_looks_for_no_labels_are_refused(kind, wanted, photo, video, tmp_path):
    cfg = load_config(str(CONFIG), ["MODEL.DEVICE", "cpu", "MODEL.SPAR.ENCODER", MODEL[0]])
    source = find_inputs([str(photo if kind == "photo" else video)], "output")[0]
    target = Target(tmp_path / f"out{'.png' if kind == 'photo' else '.mp4'}", **{wanted: tmp_path / "more"})
    with pytest.raises(ValueError, match="labels must be True for masks and records: the demo was"):
        run(Demo(cfg, ["pca"]), [source], [target])
    assert not list(tmp_path.glob("out*")) and not (tmp_path / "more").exists()
