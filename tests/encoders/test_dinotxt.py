"""DINOv3.txt: by a stand-in that is always here, and by a clone of the dinov3 repository where there is one."""

import os
import sys

import pytest
import torch
import torch.nn.functional as F

from reference import STAND_IN
from spar_d2.encoders import DINOtxtEncoder, build_encoder, build_text_tower, describe_encoder
from spar_d2.encoders.weights import read_state_dict

NAME = "dinov3_vitl16_dinotxt_tet1280d20h24l"
CLONE = os.environ.get("DINOV3_REPO", "")
REPOS = [
    pytest.param(str(STAND_IN), id="stand-in"),
    pytest.param(
        CLONE,
        id="clone",
        marks=pytest.mark.skipif(not CLONE, reason="DINOV3_REPO names no clone of the dinov3 repository"),
    ),
]


@pytest.fixture(scope="module", params=REPOS)
def repo(request):
    yield request.param
    # The next repository has modules of the same names.
    for name in [name for name in sys.modules if name == "hubconf" or name.split(".")[0] == "dinov3"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def encoder(repo):
    built = build_encoder(NAME, dinov3_repo=repo)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(1.0)  # the initial 1e-5 would hide the effect of the blocks
    return built


@pytest.mark.parametrize("size", [(384, 384), (96, 160)])
@pytest.mark.parametrize("tokens", ["backbone", "head"])
def test_equals_the_librarys_patch_tokens(encoder, tokens, size):
    x = torch.randn(1, 3, *size)
    ours = DINOtxtEncoder(encoder.visual_model, tokens=tokens)
    with torch.no_grad():
        _, head, backbone = encoder.visual_model.get_class_and_patch_tokens(x)
        theirs = {"backbone": backbone, "head": head}[tokens]
        torch.testing.assert_close(ours(x).flatten(2).transpose(1, 2), theirs, rtol=1e-5, atol=1e-5)


def test_text_is_the_second_half_of_the_librarys(repo, encoder):
    tower = build_text_tower(NAME, dinov3_repo=repo)
    texts = ["a cat", "été"]
    with torch.no_grad():
        whole = tower.model.text_model(tower.tokenize(texts))
    assert whole.shape[1] == 2 * encoder.embed_dim
    assert torch.equal(tower.encode(texts), whole[:, encoder.embed_dim :])


@pytest.fixture
def stand_in():
    return build_encoder(NAME, dinov3_repo=str(STAND_IN))


def test_known_by_name():
    info = describe_encoder(NAME)
    assert (info.native_size, info.patch_size, info.pixel_mean) == (384, 16, (0.485, 0.456, 0.406))


def test_reference_compat_stretches_to_whole_patches(stand_in):
    x = torch.randn(1, 3, 70, 100)
    stretched = F.interpolate(x, size=(80, 112), mode="bicubic", align_corners=False)
    compat = DINOtxtEncoder(stand_in.visual_model, reference_compat=True)
    with torch.no_grad():
        assert torch.equal(compat(x), stand_in(stretched))
        assert not torch.equal(compat(x), stand_in(x))


def save_parts(model_state, folder):
    """The two files that Meta distributes: the backbone under its own names, and the rest."""
    prefix = "visual_model.backbone."
    backbone = {k.removeprefix(prefix): v for k, v in model_state.items() if k.startswith(prefix)}
    torch.save(backbone, folder / "backbone.pth")
    torch.save({k: v for k, v in model_state.items() if not k.startswith(prefix)}, folder / "rest.pth")
    return str(folder / "rest.pth"), str(folder / "backbone.pth")


@pytest.fixture
def whole_state(stand_in):
    text = build_text_tower(NAME, dinov3_repo=str(STAND_IN)).model.state_dict()
    return {key: tensor + 1 for key, tensor in {**text, **stand_in.state_dict()}.items()}


def test_the_backbone_and_head_files_of_meta_are_read(whole_state, tmp_path):
    rest, backbone = save_parts(whole_state, tmp_path)
    built = build_encoder(NAME, rest, dinov3_repo=str(STAND_IN), dinov3_backbone=backbone)
    for key, tensor in built.state_dict().items():
        assert torch.equal(tensor, whole_state[key]), key
    tower = build_text_tower(NAME, rest, dinov3_repo=str(STAND_IN))
    assert torch.equal(tower.model.logit_scale, whole_state["logit_scale"])
    with pytest.raises(RuntimeError, match=r"MODEL\.SPAR\.DINOV3_BACKBONE"):
        build_encoder(NAME, rest, dinov3_repo=str(STAND_IN))


def test_the_file_of_the_authors_is_read(whole_state, tmp_path):
    torch.save({f"model.{key}": tensor for key, tensor in whole_state.items()}, tmp_path / "spar.pth")
    built = build_encoder(NAME, str(tmp_path / "spar.pth"), dinov3_repo=str(STAND_IN))
    assert torch.equal(built.visual_model.backbone.cls_token, whole_state["visual_model.backbone.cls_token"])
    assert set(read_state_dict(tmp_path / "spar.pth")) == set(whole_state)


def test_a_repository_must_be_named_and_be_one(tmp_path):
    with pytest.raises(ValueError, match=r"MODEL\.SPAR\.DINOV3_REPO"):
        build_encoder(NAME)
    with pytest.raises(FileNotFoundError, match="not a clone of the dinov3 repository"):
        build_encoder(NAME, dinov3_repo=str(tmp_path))
    (tmp_path / "hubconf.py").write_text("dependencies = ['torch']\n")
    with pytest.raises(RuntimeError, match=rf"DINOV3_REPO: .* cannot build {NAME}"):
        build_encoder(NAME, dinov3_repo=str(tmp_path))


def test_missing_files_and_wrong_values_are_named():
    with pytest.raises(FileNotFoundError, match=r"MODEL\.SPAR\.PRETRAINED"):
        build_encoder(NAME, "nowhere.pth", dinov3_repo=str(STAND_IN))
    with pytest.raises(FileNotFoundError, match=r"MODEL\.SPAR\.DINOV3_BACKBONE"):
        build_encoder(NAME, dinov3_repo=str(STAND_IN), dinov3_backbone="nowhere.pth")
    with pytest.raises(ValueError, match=r"DINOV3_TOKENS\) .*backbone, head"):
        build_encoder(NAME, dinov3_repo=str(STAND_IN), dinov3_tokens="neck")
    with pytest.raises(ValueError, match="image tower of DINOv3.txt"):
        DINOtxtEncoder(torch.nn.Linear(2, 2))
