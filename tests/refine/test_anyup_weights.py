"""Weight files of AnyUp, good and bad."""

import math
import pickle

import pytest
import torch

from plain_anyup import reference_anyup
from spar_d2.refine import AnyUp, load_anyup, save_anyup


@pytest.fixture(scope="module")
def state():
    return dict(reference_anyup().state_dict())


def test_files_of_both_formats_are_read(tmp_path, state):
    torch.save(state, tmp_path / "anyup.pth")
    model = load_anyup(tmp_path / "anyup.pth")
    save_anyup(model, tmp_path / "anyup.safetensors")
    for path in ("anyup.pth", "anyup.safetensors"):
        model = load_anyup(tmp_path / path)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match=r"\.safetensors"):
        save_anyup(AnyUp(), tmp_path / "anyup.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope.freqs": None}, r"1 missing keys \(rope\.freqs\)"),
        ({"value_encoder.weight": torch.zeros(3)}, r"1 unknown keys \(value_encoder\.weight\)"),
        ({"rope.freqs": torch.zeros(2, 64)}, r"rope\.freqs \(2, 64\) instead of \(2, 128\)"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, state, change, message):
    changed = {key: value for key, value in {**state, **change}.items() if value is not None}
    torch.save(changed, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=rf"path: .*other\.pth .*{message}.*anyup_multi_backbone\.pth.*878080"):
        load_anyup(tmp_path / "other.pth")


@pytest.mark.parametrize("value", [torch.full((2, 128), math.nan), torch.zeros(2, 128, dtype=torch.int64)])
def test_invalid_numbers_are_refused(tmp_path, state, value):
    torch.save({**state, "rope.freqs": value}, tmp_path / "bad.pth")
    with pytest.raises(RuntimeError, match=r"MY\.KEY: rope\.freqs .*bad\.pth"):
        load_anyup(tmp_path / "bad.pth", key="MY.KEY")


class _Acts:
    def __reduce__(self):
        return print, ("executed",)


def test_files_that_are_no_weights_are_refused(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="path"):
        load_anyup(tmp_path / "none.pth")
    with open(tmp_path / "code.pth", "wb") as file:
        pickle.dump({"rope.freqs": _Acts()}, file)
    with pytest.raises(RuntimeError, match=r"path: .*code\.pth"):
        load_anyup(tmp_path / "code.pth")
    assert "executed" not in capsys.readouterr().out
