import pytest
import torch
from safetensors.torch import save_file

from spar_d2.files import replacing


def test_the_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with replacing(path) as temporary:
        temporary.write_text("content")
        assert temporary.suffix == ".txt"
        assert not path.exists()
    assert path.read_text() == "content"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(KeyError), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_others_may_read_it_as_they_may_read_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    with replacing(tmp_path / "w.safetensors") as temporary:
        save_file({"a": torch.zeros(2)}, temporary)
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
