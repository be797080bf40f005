"""Exports other than features in float32: labels of pixels, smaller files, and programs of torch.export."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from reference import example_encoder
from spar_d2.export import check, compare, export_onnx, export_program
from spar_d2.export.modules import ExportedEncoder, ExportedLabels
from spar_d2.export.onnx_precision import reduce_precision
from spar_d2.modeling import segment_features

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra [export]")
SIZES = [(1, 1), (8, 8), (37, 53), (64, 64), (1, 200), (130, 70)]


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    encoder = example_encoder("open_clip ViT")
    del encoder.blocks[:-1]  # an export takes seconds for each block
    return encoder


def inputs(encoder, size: tuple[int, int], queries: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(size[0] + size[1])
    image = F.interpolate(torch.rand(2, 3, 5, 5, generator=generator) * 255, size=size, mode="bilinear")
    text = F.normalize(torch.randn(queries, encoder.embed_dim, generator=generator), dim=1)
    return {"image": image, "text": text, "query_class": torch.arange(queries) // 2}


@pytest.mark.parametrize("size", SIZES)
def test_exported_labels_are_those_of_the_segmentor(encoder, size):
    given = inputs(encoder, size)
    with torch.no_grad():
        labels = ExportedLabels(encoder)(**given)
        features = ExportedEncoder(encoder)(given["image"])
        covered = tuple(encoder.patch_size * side for side in features.shape[2:])
        arguments = {"text": given["text"], "query_class": given["query_class"], "size": size, "padded_size": covered}
        expected = torch.stack([segment_features(one, **arguments) for one in features])
    assert labels.shape == (2, *size) and len(labels.unique()) > 1 or max(size) <= encoder.patch_size
    assert (labels == expected).float().mean() > 0.999


@pytest.mark.slow
def test_labels_at_the_size_of_the_image(encoder, tmp_path):
    export_onnx(encoder, tmp_path / "labels.onnx", "labels")
    session = onnxruntime.InferenceSession(str(tmp_path / "labels.onnx"))
    for size in SIZES:
        given = inputs(encoder, size)
        (found,) = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
        with torch.no_grad():
            expected = ExportedLabels(encoder)(**given).numpy()
        assert found.dtype == np.int64 and found.shape == (2, *size)
        assert (found == expected).mean() > 0.999


@pytest.mark.slow
def test_smaller_files_are_close(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "_REPEATS", 0)
    files = [tmp_path / f"{precision}.onnx" for precision in ("float32", "float16", "int8")]
    export_onnx(encoder, files[0])
    for file, cosine, difference in zip(files[1:], (0.9999, 0.95), (0.02, 0.5)):
        shutil.copy(files[0], file)
        reduce_precision(file, file.stem)
        assert onnxruntime.InferenceSession(str(file)).get_outputs()[0].type == "tensor(float)"
        for found in compare(file, encoder, SIZES):
            assert cosine < found.cosine and 0 < found.difference < difference, found
    largest, middle, smallest = (file.stat().st_size for file in files)
    assert smallest < middle < 0.8 * largest


@pytest.mark.slow
def test_programs_of_torch_take_any_size(encoder, tmp_path):
    export_program(encoder, tmp_path / "labels.pt2", "labels")
    program = torch.export.load(tmp_path / "labels.pt2").module(check_guards=False)
    model = ExportedLabels(encoder)
    for size in SIZES:
        given = inputs(encoder, size)
        with torch.no_grad():
            assert torch.equal(program(*given.values()), model(**given)), size
    assert [file.name for file in tmp_path.iterdir()] == ["labels.pt2"]


def test_unknown_outputs_and_precisions_are_named(encoder, tmp_path):
    with pytest.raises(ValueError, match="output must be one of features, scores, labels; got 'masks'"):
        export_onnx(encoder, tmp_path / "a.onnx", "masks")
    with pytest.raises(ValueError, match="precision must be one of float32, float16, int8; got 'int4'"):
        export_onnx(encoder, tmp_path / "a.onnx", precision="int4")
    assert not list(tmp_path.iterdir())
