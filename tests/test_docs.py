"""Python examples of README and docs run, with a tiny model in place of the one that they download."""

import re

import numpy as np
import pytest
import rasterio
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from rasterio import Affine

from reference import ROOT, reference_image


def examples(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the files that examples name."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(reference_image(70, 100)).save("photo.jpg")
    georeference = {"crs": "EPSG:3857", "transform": Affine.translation(100, 900) @ Affine.scale(2, -2)}
    sizes = {"width": 100, "height": 70, "count": 3, "dtype": "uint8"}
    with rasterio.open("map.tif", "w", driver="GTiff", **sizes, **georeference) as raster:
        raster.write(reference_image(70, 100).transpose(2, 0, 1))
    return tmp_path


def with_tiny_model(code: str, tiny_model) -> str:
    config, weights = map(repr, tiny_model)
    code = code.replace('"ViT-B-16"', config)
    return re.sub(r'"(student\.safetensors|laion2b_s34b_b88k)"', weights, code)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "number"),
    [
        ("README.md", 0),
        ("README.md", 1),
        ("docs/segmenting.md", 0),
        ("docs/segmenting.md", 1),
        ("docs/segmenting.md", 2),
        ("docs/segmenting.md", 3),
        ("docs/elsewhere.md", 0),
        ("docs/deploying.md", 0),
    ],
)
def test_examples_run(page, number, here, tiny_model):
    found = {}
    exec(with_tiny_model(examples(page)[number], tiny_model), found)
    if "labels" in found:
        assert found["labels"].shape == (480, 640)
    if "picture" in found:
        assert found["picture"].dtype == np.uint8
    if "model" in found:
        assert type(found["model"].backbone).__name__ == "SPARPyramid"


def test_the_example_with_a_custom_data_set_is_evaluated(here, tiny_cfg):
    from spar_d2.engine.trainer import Trainer

    for folder in ("images", "labels"):
        (here / folder).mkdir()
    for number in range(2):
        Image.fromarray(reference_image(70, 100, number)).save(here / "images" / f"{number}.jpg")
        Image.fromarray(np.full((70, 100), number, dtype=np.uint8)).save(here / "labels" / f"{number}.png")
    (code,) = examples("docs/own_data.md")
    try:
        exec(code.replace("/path/to/my_data", str(here)), {})
        tiny_cfg.DATASETS.TEST = ("my_data",)
        scores = Trainer.test(tiny_cfg, Trainer.build_model(tiny_cfg).eval())["sem_seg"]
    finally:
        DatasetCatalog.remove("my_data")
        MetadataCatalog.remove("my_data")
    assert {"IoU-background", "IoU-road", "IoU-building"} <= scores.keys()
    assert 0 <= scores["mIoU"] <= 100
