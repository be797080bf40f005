"""The notebook runs from top to bottom, with the toy model in place of the one that it downloads."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from reference import ROOT, reference_image

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
TOY = ROOT / "configs" / "toy"


def test_it_is_stored_without_outputs():
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert "install" in cells[0]["metadata"]["tags"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    assert content["metadata"]["kernelspec"]["name"] == "python3", "as Colab expects"


@pytest.mark.slow
@pytest.mark.processes
def test_it_runs(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    for name, value in {
        "SPAR_ENCODER": TOY / "tiny_clip.json",
        "SPAR_PRETRAINED": TOY / "tiny_clip.safetensors",
        "PYTHONPATH": ROOT,
        "IPYTHONDIR": tmp_path / "ipython",
        "JUPYTER_RUNTIME_DIR": tmp_path / "runtime",
    }.items():
        monkeypatch.setenv(name, str(value))
    (tmp_path / "photos").mkdir()
    for number in range(2):
        Image.fromarray(reference_image(70, 100, number)).save(tmp_path / "photos" / f"{number}.jpg")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))))
        for output in outputs
        if "data" in output and "image/png" in output.data
    ]
    assert len(pictures) == 7, "scene, result, two photos, a region, features and a refined result"
    assert all(picture.std() > 5 for picture in pictures), "none is empty"
    assert COCO(str(tmp_path / "coco.json")).anns
    assert json.loads((tmp_path / "scene.json").read_text())["shapes"]
    assert "sliding_window" in outputs[-2].text
