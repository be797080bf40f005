"""`spar-d2 segment --export`, as a user calls it, with tiny weights."""

import json
import sys
import tarfile
from importlib import import_module

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from reference import ROOT, reference_image
from tool_modules import exit_code

WORDS = "grass, meadow; circle; star; été"
CONFIG = ROOT / "configs" / "toy" / "distill.yaml"


@pytest.fixture
def export(monkeypatch, tmp_path):
    """Runs the command in an empty folder with output to "out", and returns its exit code."""
    monkeypatch.chdir(tmp_path)
    tool = import_module("spar_d2.cli.segment")

    def call(*arguments, output="out"):
        arguments = ["--config-file", CONFIG, "--vocabulary", WORDS, "--output", output, *arguments]
        return exit_code(tool, monkeypatch, *arguments)

    return call


@pytest.fixture
def refusal(export, capsys):
    """Runs the command, which must fail, and returns its error message."""

    def call(*arguments):
        assert export(*arguments) == 1
        return capsys.readouterr().err

    return call


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def mask_of(path) -> np.ndarray:
    with Image.open(path) as mask:
        return np.asarray(mask).astype(int)


def test_a_folder_in_all_formats_of_annotation_programs(export, photo_folder, tmp_path, capsys):
    (photo_folder / "bad.jpg").write_bytes(b"no photo")
    assert export("--input", photo_folder, "--export", "coco", "labelme", "labelstudio", "masks") == 0
    own = [f"{stem}{ending}" for stem in ("a", "b", "more/c") for ending in (".json", ".png", "_mask.png")]
    assert files_in(tmp_path / "out") == sorted([*own, "coco.json", "labelstudio.json", "labelstudio.xml"])
    assert "written: out/coco.json" in capsys.readouterr().out

    coco = COCO(str(tmp_path / "out/coco.json"))
    assert [image["file_name"] for image in coco.imgs.values()] == ["a.jpg", "b.JPG", "more/c.jpeg"]
    assert [category["name"] for category in coco.cats.values()] == ["grass", "circle", "star", "été"]
    assert len(coco.anns) == len(coco.dataset["annotations"]), "ids are unique"
    tasks = json.loads((tmp_path / "out/labelstudio.json").read_text(encoding="utf-8"))
    assert [task["data"]["image"] for task in tasks] == [
        f"/data/local-files/?d={name}" for name in ("a.jpg", "b.JPG", "more/c.jpeg")
    ]
    for image, task, stem in zip(coco.imgs.values(), tasks, ("a", "b", "more/c")):
        labels = np.full((image["height"], image["width"]), -1)
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
        for annotation in annotations:
            labels[coco.annToMask(annotation) > 0] = annotation["category_id"] - 1
        assert np.array_equal(labels, mask_of(tmp_path / f"out/{stem}_mask.png"))
        own = json.loads((tmp_path / f"out/{stem}.json").read_text(encoding="utf-8"))
        photo = tmp_path / "out" / f"{stem}.json"
        assert (photo.parent / own["imagePath"]).resolve() == (photo_folder / image["file_name"]).resolve()
        assert len(own["shapes"]) == len(annotations) == len(task["predictions"][0]["result"])
        assert {shape["label"] for shape in own["shapes"]} <= {"grass", "circle", "star", "été"}


def test_files_of_a_user_are_not_replaced(export, refusal, photo_folder, tmp_path):
    arguments = ("--input", photo_folder / "a.jpg", "--export")
    assert export(*arguments, "coco", "labelstudio") == 0
    assert export(*arguments, "coco", "labelstudio", "--min-area", "30") == 0, "those of an earlier run are"
    few = json.loads((tmp_path / "out/coco.json").read_text())["annotations"]
    assert few and min(annotation["area"] for annotation in few) >= 30
    assert export(*arguments, "labelme") == 0
    assert "may have been edited in labelme" in refusal(*arguments, "labelme")
    (tmp_path / "out/labelstudio.json").unlink()
    assert "labelstudio.xml is not from an earlier run" in refusal(*arguments, "labelstudio")
    (tmp_path / "out/coco.json").write_text('{"images": []}')
    assert "coco.json is not from an earlier run" in refusal(*arguments, "coco")
    assert (tmp_path / "out/coco.json").read_text() == '{"images": []}'


def test_one_output_file(export, photo_folder, tmp_path):
    assert export("--input", photo_folder / "a.jpg", "--export", "coco", "labelme", output="new/x.jpg") == 0
    assert files_in(tmp_path / "new") == ["x.jpg", "x.json", "x_coco.json"]


def test_images_of_the_same_name_are_told_apart(export, photo_folder, tmp_path):
    (tmp_path / "b").mkdir()
    Image.fromarray(reference_image(40, 50)).save(tmp_path / "b" / "a.jpg")
    assert export("--input", photo_folder / "a.jpg", "b/a.jpg", "--export", "coco") == 0
    images = json.loads((tmp_path / "out/coco.json").read_text())["images"]
    assert [image["file_name"] for image in images] == [str(photo_folder / "a.jpg"), "b/a.jpg"]


def test_a_georeferenced_image(export, tmp_path, capsys):
    rasterio = pytest.importorskip("rasterio", reason="rasterio is not installed")
    pixels = reference_image(64, 80)
    options = {"driver": "GTiff", "width": 80, "height": 64, "count": 3, "dtype": "uint8", "crs": "EPSG:3857"}
    with rasterio.open("map.tif", "w", transform=rasterio.Affine(2, 0, 100, 0, -2, 900), **options) as raster:
        raster.write(pixels.transpose(2, 0, 1))
    Image.fromarray(pixels).save("plain.png")
    assert export("--input", "map.tif", "plain.png", "--export", "geotiff", "masks") == 0
    with rasterio.open("out/map.tif") as written:
        assert written.crs == "EPSG:3857" and written.transform.c == 100
        assert np.array_equal(written.read(1), mask_of(tmp_path / "out/map_mask.png"))
    printed = capsys.readouterr()
    assert "plain.png must have a CRS" in printed.err and "skipped 1: plain.png" in printed.out


def test_rasters_of_many_bands_and_large_values(export, refusal, tmp_path):
    rasterio = pytest.importorskip("rasterio", reason="rasterio is not installed")
    pixels = reference_image(64, 80).transpose(2, 0, 1)
    options = {"driver": "GTiff", "width": 80, "height": 64, "crs": "EPSG:3857"}
    options["transform"] = rasterio.Affine(2, 0, 100, 0, -2, 900)
    for count in (3, 4, 6):
        with rasterio.open(f"{count}.tif", "w", count=count, dtype="uint8", photometric="RGB", **options) as raster:
            raster.write(np.concatenate([pixels, 255 - pixels])[:count])
    # As segment_raster does, the fourth band is no opacity.
    assert export("--input", *(f"{count}.tif" for count in (3, 4, 6)), "--export", "geotiff", "masks") == 0
    expected = mask_of(tmp_path / "out/3_mask.png")
    for count in (4, 6):
        assert np.array_equal(mask_of(tmp_path / f"out/{count}_mask.png"), expected)
    with rasterio.open("16.tif", "w", count=3, dtype="uint16", **options) as raster:
        raster.write(pixels.astype(np.uint16) * 12)
    assert "16.tif must be uint8, got uint16; segment it with spar_d2.Predictor.segment_raster" in refusal(
        "--input", "16.tif", "--export", "geotiff"
    )


def test_inputs_and_options_that_do_not_fit_are_refused_at_once(export, refusal, photo_folder, tmp_path, monkeypatch):
    photo = photo_folder / "a.jpg"
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(photo, "a.jpg")
    writer = cv2.VideoWriter("clip.avi", cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    writer.write(reference_image(48, 64))
    writer.release()
    assert "clip.avi is a video, for which only masks" in refusal("--input", "clip.avi", "--export", "coco", "masks")
    assert "need image files, but photos.tar/a.jpg is in a tar file" in refusal(
        "--input", "photos.tar", "--export", "labelme"
    )
    assert "both write NAME.json" in refusal("--input", photo, "--export", "labelme", "--json")
    assert "--min-area must be at least 0" in refusal("--input", photo, "--export", "coco", "--min-area", "-1")
    (photo_folder / "coco.jpg").write_bytes(photo.read_bytes())
    assert "would be written twice" in refusal("--input", photo_folder, "--export", "coco", "--json")
    monkeypatch.setitem(sys.modules, "rasterio.windows", None)
    assert 'pip install "spar_d2[geo]"' in refusal("--input", photo, "--export", "geotiff")
    assert not (tmp_path / "out").exists()
    assert export("--input", "photos.tar", "--export", "coco") == 0
    assert json.loads((tmp_path / "out/coco.json").read_text())["images"][0]["file_name"].endswith("a.jpg")
    assert export("--input", "clip.avi", "--export", "masks") == 0
    assert (tmp_path / "out/clip_masks/000001.png").is_file()


def test_results_so_far_are_written_when_a_run_is_stopped(export, photo_folder, tmp_path, monkeypatch):
    from spar_d2.demo import run

    calls = []

    def stop_at_the_second(image):
        calls.append(image)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return image

    read = run.read_photo
    monkeypatch.setattr(run, "read_photo", lambda record: stop_at_the_second(read(record)))
    assert "stopped" in export("--input", photo_folder, "--export", "coco")
    assert len(COCO(str(tmp_path / "out/coco.json")).imgs) == 1
