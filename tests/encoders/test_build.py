"""Encoders from names and files, and errors for wrong ones."""

import json

import open_clip
import pytest
import torch

from reference import TINY_CONFIG
from spar_d2.encoders import FAMILIES, build_encoder, build_text_tower, describe_encoder
from spar_d2.encoders.weights import read_state_dict, write_safetensors


def test_random_weights_are_the_same_every_time_and_leave_the_generator_alone(tiny_model):
    torch.manual_seed(5)
    first = build_encoder(tiny_model[0])
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    torch.manual_seed(6)
    second = build_encoder(tiny_model[0])
    for one, other in zip(first.parameters(), second.parameters()):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weight_files_of_torch(tiny_model, tmp_path, reference_clip, wrapper, prefix):
    state = {prefix + key: value for key, value in reference_clip.state_dict().items()}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "w.pt")
    encoder = build_encoder(tiny_model[0], str(tmp_path / "w.pt"))
    assert torch.equal(encoder.visual.proj, reference_clip.visual.proj)


def test_image_weights_alone_are_enough_for_the_encoder_but_not_for_the_text(tiny_model, tmp_path, reference_clip):
    visual = {key: value for key, value in reference_clip.state_dict().items() if key.startswith("visual.")}
    path = str(tmp_path / "visual.safetensors")
    write_safetensors(visual, path)
    build_encoder(tiny_model[0], path)
    with pytest.raises(RuntimeError, match="missing keys"):
        build_text_tower(tiny_model[0], path)


def test_text_tower_equals_the_librarys(tiny_model, reference_clip):
    tower = build_text_tower(*tiny_model)
    texts = ["a cat", "two dogs on grass", "été"]
    with torch.no_grad():
        expected = reference_clip.encode_text(open_clip.get_tokenizer("ViT-B-16")(texts))
    vectors = tower.encode(texts, batch_size=2)
    torch.testing.assert_close(vectors, expected)
    # They are cached on disk, so autocast around the first call must not change them.
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tower.encode(texts, batch_size=2), vectors)


def test_half_precision_files_are_loaded_as_float32(tiny_model, tmp_path, reference_clip):
    path = str(tmp_path / "half.safetensors")
    write_safetensors({k: v.half() for k, v in reference_clip.state_dict().items() if v.is_floating_point()}, path)
    assert build_encoder(tiny_model[0], path).visual.proj.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("name", ["roberta-ViT-B-32", "coca_roberta-ViT-B-32"])
def test_images_need_no_text_tower_that_is_elsewhere(name):
    """These models' text towers are built by another library, from a config that it downloads."""
    info = describe_encoder(name)
    encoder = build_encoder(name)
    assert (encoder.native_size, encoder.patch_size) == (info.native_size, info.patch_size) == (224, 32)


@pytest.mark.parametrize(("name", "near"), [("ViT-B16", "ViT-B-16"), ("vit-l-14", "ViT-L-14")])
def test_unknown_names_suggest_near_ones(name, near):
    with pytest.raises(ValueError, match=rf"MODEL\.SPAR\.ENCODER.*did you mean.*{near}"):
        build_encoder(name)


def test_names_elsewhere_are_refused_without_looking_there(monkeypatch):
    """The authors of SPAR name SigLIP2 by its place on a hub."""
    for family in FAMILIES.values():
        family.names()  # the near names, which need the configs of known models
    monkeypatch.setattr(open_clip, "get_model_config", None)
    with pytest.raises(
        ValueError, match="unknown encoder 'hf-hub:timm/ViT-B-16-SigLIP2-512'; did you mean.*ViT-B-16-SigLIP2-512"
    ):
        build_encoder("hf-hub:timm/ViT-B-16-SigLIP2-512")


def test_a_name_must_be_a_text():
    with pytest.raises(ValueError, match=r"MODEL\.SPAR\.ENCODER.*got None"):
        build_encoder(None)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("RN50", "RN50.*open_clip is a ResNet"),
        ("ViTamin-B", "vitamin_base_224"),
        ("MobileCLIP-S1", "fastvit_mci1"),
        ("coca_ViT-B-32", "attentional pooling"),
        ("resnet50", r"resnet\.py.*vision_transformer\.py"),
        ("vit_relpos_small_patch16_224", r"vision_transformer_relpos\.py"),
        ("vit_small_patch14_dinov2.lvd142m", r"MODEL\.SPAR\.PRETRAINED to 'lvd142m'"),
        ("vit_small_patch16_rope_mixed_224", "rotations that differ between blocks"),
        ("vit_base_mci_224", r"vision_transformer_hybrid\.py"),
    ],
)
def test_models_without_one_feature_per_patch_are_refused_with_the_reason(name, reason):
    with pytest.raises(ValueError, match=reason):
        build_encoder(name)


def test_missing_weight_files_and_unknown_tags(tiny_model):
    with pytest.raises(FileNotFoundError, match="MODEL.SPAR.PRETRAINED"):
        build_encoder(tiny_model[0], "nowhere.pt")
    with pytest.raises(FileNotFoundError, match="laion2b_s34b_b88k"):
        build_encoder("ViT-B-16", "laion2b_s34b")


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", None], ids=["empty", "text", "truncated"])
def test_damaged_weight_files(tiny_model, tmp_path, name, content):
    path = tmp_path / name
    if content is None:
        whole = tmp_path / f"whole-{name}"
        if name.endswith(".pt"):
            torch.save({"a": torch.zeros(1000)}, whole)
        else:
            write_safetensors({"a": torch.zeros(1000)}, whole)
        content = whole.read_bytes()[:2000]
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match=r"MODEL\.SPAR\.PRETRAINED.*cannot be read as weights"):
        build_encoder(tiny_model[0], str(path))


def test_files_that_would_run_code_are_not_opened(tiny_model, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "evil"), "w"))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(RuntimeError, match="more than tensors"):
        build_encoder(tiny_model[0], str(tmp_path / "evil.pt"))
    assert not (tmp_path / "evil").exists()


def test_weights_of_another_model_name_a_few_keys(tiny_model, tmp_path):
    write_safetensors(
        {"visual.conv1.weight": torch.zeros(2, 3, 16, 16), "head.bias": torch.zeros(1)}, tmp_path / "w.safetensors"
    )
    with pytest.raises(RuntimeError, match=r"missing keys \(visual.*unknown keys \(head.bias\).*mismatched shapes"):
        build_encoder(tiny_model[0], str(tmp_path / "w.safetensors"))


def test_wrong_model_config_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model config file"):
        build_encoder(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        build_encoder(str(tmp_path / "bad.json"))
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="embed_dim, vision_cfg, text_cfg"):
        build_encoder(str(tmp_path / "other.json"))
    # Not that of open_clip, whose tags are of another model.
    (tmp_path / "ViT-B-16.json").write_text(json.dumps(TINY_CONFIG))
    assert build_encoder(str(tmp_path / "ViT-B-16.json")).native_size == TINY_CONFIG["vision_cfg"]["image_size"]
    with pytest.raises(FileNotFoundError, match="'openai' is neither a weight file nor a known tag; .* has no tags"):
        build_encoder(str(tmp_path / "ViT-B-16.json"), "openai")


def test_a_config_that_cannot_be_built_is_named(tmp_path):
    wrong = {**TINY_CONFIG, "vision_cfg": {**TINY_CONFIG["vision_cfg"], "no_such_option": 1}}
    (tmp_path / "wrong-option.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match=r"cannot build the model 'wrong-option'.*no_such_option"):
        build_encoder(str(tmp_path / "wrong-option.json"))


def test_a_tag_whose_download_fails_is_named(monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip, "create_model", no_network)
    with pytest.raises(
        RuntimeError, match=r"MODEL\.SPAR\.PRETRAINED: the weights 'openai' of ViT-B-16.*no route to host"
    ):
        build_encoder("ViT-B-16", "openai")


def test_prefixes_of_checkpoints_are_removed(tmp_path):
    torch.save({"model": {"module.backbone.encoder.visual.proj": torch.ones(2)}}, tmp_path / "c.pth")
    assert list(read_state_dict(tmp_path / "c.pth")) == ["visual.proj"]


def test_writing_fails_without_debris(tmp_path):
    target = tmp_path / "w.safetensors"
    target.mkdir()
    with pytest.raises(OSError):
        write_safetensors({"a": torch.zeros(2)}, target)
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]
