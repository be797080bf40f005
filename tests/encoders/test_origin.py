"""Metadata of weights: pixel statistics, activation and origin."""

import json

import open_clip
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from reference import ROOT, TINY_CONFIG
from spar_d2.checkpoint.export import export_student
from spar_d2.encoders import EncoderSpec, build_encoder, build_text_tower, describe_encoder
from spar_d2.encoders.convert import convert_weights, known_origin, write_weights
from spar_d2.encoders.registry import build
from spar_d2.encoders.weights import source_checksum
from spar_d2.modeling.words import text_embeddings
from spar_d2.text import TextEmbeddings, Vocabulary, load_templates

HALF = (0.5, 0.4, 0.3)
STD = (0.2, 0.25, 0.3)


def names(tmp_path):
    (tmp_path / "origin-tiny.json").write_text(json.dumps(TINY_CONFIG))
    return {
        "open_clip ViT": str(tmp_path / "origin-tiny.json"),
        "SigLIP": str(ROOT / "configs/toy/tiny_pooled.json"),
        "DINOv3": "vit_nano_patch8_dinov3",
    }


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("family", ["open_clip ViT", "SigLIP", "DINOv3"])
def test_statistics_and_activation_travel_with_the_weights(tmp_path, family, suffix):
    name = names(tmp_path)[family]
    choice = {"quick_gelu": True} if family == "open_clip ViT" else {}
    spec = EncoderSpec(name, pixel_mean=HALF, pixel_std=STD, **choice)
    student = build(spec)
    path = str(tmp_path / "student.safetensors")
    export_student(student, spec, path)
    if suffix != ".safetensors":
        source, path = EncoderSpec(name, path), str(tmp_path / f"student{suffix}")
        write_weights(convert_weights(source), path, known_origin(source))
    again, info = build_encoder(name, path), describe_encoder(name, path)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x), student(x))
    for told in (again, info):
        assert (told.pixel_mean, told.pixel_std) == (HALF, STD)
    if choice:
        assert info.quick_gelu is True
        with torch.no_grad():
            assert not torch.equal(build_encoder(name, path, quick_gelu=False)(x), student(x))
        words = ["a cat", "a dog"]
        tower = build_text_tower(name, path)
        model = open_clip.CLIP(**TINY_CONFIG, quick_gelu=True).eval()
        model.load_state_dict(tower.model.state_dict(), strict=False)
        tokens = open_clip.get_tokenizer("ViT-B-16")(words)
        with torch.no_grad():
            torch.testing.assert_close(tower.encode(words), model.encode_text(tokens))
    # The libraries read it as before.
    if suffix == ".safetensors":
        assert not {key for key in load_file(path) if "spar" in key}
        with safe_open(path, "pt") as file:
            said = json.loads(file.metadata()["spar_d2"])
        assert said["encoder"] == name.rpartition("/")[2]
        assert {"version", "date"} <= said.keys()
    else:
        assert all(isinstance(value, torch.Tensor) for value in torch.load(path, weights_only=True).values())


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("ViT-L-14", "laion2b_s32b_b82k"),
        ("ViT-H-14-CLIPA", "datacomp1b"),
        ("ViT-B-16", "openai"),
        ("ViT-B-16", "laion2b_s34b_b88k"),
        ("ViT-B-16-SigLIP", "webli"),
    ],
)
def test_tags_are_described_as_open_clip_does(name, tag):
    info, expected = describe_encoder(name, tag), open_clip.get_pretrained_cfg(name, tag)
    assert (info.pixel_mean, info.pixel_std) == (expected["mean"], expected["std"])
    if "SigLIP" not in name:
        assert info.quick_gelu is expected.get("quick_gelu", False)


@pytest.mark.slow
def test_a_tag_of_timms_is_described_as_timm_does():
    assert describe_encoder("vit_large_patch16_dinov3", "sat493m").pixel_mean == (0.43, 0.411, 0.296)
    assert describe_encoder("vit_large_patch16_dinov3", "lvd1689m").pixel_mean == (0.485, 0.456, 0.406)


def test_the_activation_of_a_tag_is_used_for_images_and_text(monkeypatch):
    asked = []

    def no_network(*args, **kwargs):
        asked.append(kwargs)
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip, "create_model", no_network)
    for tag, activation in (("openai", True), ("laion2b_s34b_b88k", False)):
        for make in (build_encoder, build_text_tower):
            with pytest.raises(RuntimeError, match="no route to host"):
                make("ViT-B-16", tag)
            assert asked[-1]["quick_gelu"] is activation


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file", "words"),
    [
        ("ViT-L-14", "student.safetensors", ["laion2b_s32b_b82k would be pixel_mean (0.5, 0.5, 0.5)", "PIXEL_MEAN"]),
        ("ViT-B-16", "student.safetensors", ["quick_gelu True", "MODEL.SPAR.QUICK_GELU"]),
        ("vit_large_patch16_dinov3", "dinov3_vitl16_pretrain_sat493m-ea.pth", ["suggests sat493m", "PIXEL_STD"]),
    ],
)
def test_a_file_without_metadata_is_one_warning_if_tags_differ(tmp_path, caplog, name, file, words):
    path = tmp_path / file
    save_file({"a": torch.zeros(1)}, path) if path.suffix == ".safetensors" else torch.save({}, path)
    for _ in range(2):
        describe_encoder(name, str(path))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert all(word in told[0] for word in words), told
    caplog.clear()
    describe_encoder("ViT-B-16-SigLIP", str(path))  # all its tags are alike
    assert not caplog.records


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "7",
        '{"pixel_mean": [0.5, 0.5]}',
        '{"pixel_mean": [NaN, 0.5, 0.5]}',
        '{"pixel_mean": [1e999, 0.5, 0.5]}',
        '{"pixel_std": [0, 0.5, 0.5]}',
        '{"pixel_std": [true, 0.5, 0.5]}',
        '{"pixel_mean": "0.5"}',
        '{"pixel_mean": [127.5, 127.5, 127.5]}',
        '{"quick_gelu": "yes"}',
        '{"encoder": ["a"]}',
        '{"encoder": "\\u001b[31m"}',
        '{"window": -1}',
        "[" * 100_000,
    ],
)
def test_corrupt_metadata_is_ignored_with_a_warning(tiny_model, tmp_path, caplog, text):
    path = str(tmp_path / "w.safetensors")
    save_file(load_file(tiny_model[1]), path, {"spar_d2": text})
    usual = build_encoder(tiny_model[0], tiny_model[1])
    encoder = build_encoder(tiny_model[0], path)
    assert (encoder.pixel_mean, encoder.pixel_std) == (usual.pixel_mean, usual.pixel_std)
    assert "corrupt and ignored" in caplog.text


@pytest.mark.parametrize("metadata", [{"format": "pt"}, {"spar_d2": '{"unknown": 1}'}, None])
def test_metadata_of_other_programs_is_ignored(tiny_model, tmp_path, caplog, metadata):
    path = str(tmp_path / "w.safetensors")
    save_file(load_file(tiny_model[1]), path, metadata)
    build_encoder(tiny_model[0], path)
    assert not caplog.records


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pixel_mean": (0.5, 0.5)}, r"MODEL\.SPAR\.PIXEL_MEAN.*three numbers"),
        ({"pixel_mean": (127.5,) * 3}, r"of pixels in 0\.\.1"),
        ({"pixel_std": (0.5, 0.5, 0.0)}, r"MODEL\.SPAR\.PIXEL_STD.*three numbers above 0"),
        ({"pixel_std": (0.5, float("nan"), 0.5)}, r"MODEL\.SPAR\.PIXEL_STD"),
        ({"quick_gelu": 1}, r"MODEL\.SPAR\.QUICK_GELU.*True or False"),
    ],
)
def test_wrong_choices_are_named(tiny_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(*tiny_model, **arguments)
    with pytest.raises(ValueError, match="QUICK_GELU.*open_clip ViTs only"):
        build_encoder("vit_nano_patch8_dinov3", quick_gelu=True)


def test_keys_of_the_config_reach_the_encoder(tiny_cfg):
    from detectron2.modeling import build_model

    tiny_cfg.merge_from_list(["MODEL.SPAR.PIXEL_MEAN", "[0.5, 0.4, 0.3]", "MODEL.SPAR.QUICK_GELU", "True"])
    encoder = build_model(tiny_cfg).backbone.encoder
    assert encoder.pixel_mean == HALF
    assert type(encoder.blocks[0].mlp.gelu).__name__ == "QuickGELU"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["beside", "around", "folder"])
@pytest.mark.parametrize("pooled", [False, True])
def test_a_model_config_says_how_images_are_prepared(tmp_path, form, pooled):
    config = json.loads((ROOT / "configs/toy/tiny_pooled.json").read_text()) if pooled else TINY_CONFIG
    preprocess = {"mean": list(HALF), "std": list(STD), "size": 64}
    content = {**config, "preprocess_cfg": preprocess}
    if form != "beside":
        content = {"model_cfg": config, "preprocess_cfg": preprocess}
    folder = tmp_path / f"model-{form}-{pooled}"
    folder.mkdir()
    path = folder / ("open_clip_config.json" if form == "folder" else f"prepared-{form}-{pooled}.json")
    path.write_text(json.dumps(content))
    encoder, info = build_encoder(str(path)), describe_encoder(str(path))
    assert (encoder.pixel_mean, encoder.pixel_std) == (info.pixel_mean, info.pixel_std) == (HALF, STD)
    assert encoder.native_size == info.native_size == 64
    build_text_tower(str(path)).encode(["a cat"])


def test_cached_text_embeddings_depend_on_the_activation(tiny_model, tmp_path):
    """Entries of earlier versions are found; another activation has separate embeddings."""

    def files(embeddings) -> set[str]:
        embeddings(Vocabulary(["cat"]))
        return {path.name for path in (tmp_path / "text").iterdir()}

    def of_choice(**choice):
        return text_embeddings(EncoderSpec(*tiny_model, **choice), "simple", str(tmp_path / "text"), "cpu")

    (first,) = files(of_choice())
    assert files(of_choice(quick_gelu=False)) == {first} < files(of_choice(quick_gelu=True))
    identity = " ".join(map(source_checksum, tiny_model))
    # No tower is needed for what is cached.
    before = TextEmbeddings(None, identity, load_templates("simple"), tmp_path / "text")
    assert len(files(before)) == 2
