import json

import open_clip
import pytest
import torch
from detectron2.modeling import build_model

from reference import TINY_CONFIG
from spar_d2.checkpoint.checkpointer import Checkpointer
from spar_d2.checkpoint.export import export_student
from spar_d2.encoders import EncoderSpec, build_encoder
from spar_d2.encoders.weights import write_safetensors


@pytest.fixture
def model(tiny_cfg):
    return build_model(tiny_cfg)


def changed(encoder):
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return encoder


@pytest.mark.slow
def test_student_loads_in_open_clip_in_a_model_and_as_pretrained(model, tiny_model, tmp_path):
    student = changed(build_encoder(*tiny_model))
    path = str(tmp_path / "student.safetensors")
    export_student(student, EncoderSpec(*tiny_model), path)
    x = torch.randn(1, 3, 70, 100)
    with torch.no_grad():
        expected = student(x)

    (tmp_path / "student-tiny.json").write_text(json.dumps(TINY_CONFIG))
    open_clip.add_model_config(tmp_path / "student-tiny.json")
    library = open_clip.create_model("student-tiny", pretrained=path)
    assert torch.equal(library.visual.proj, student.visual.proj)
    original = build_encoder(*tiny_model)
    assert not torch.equal(library.visual.proj, original.visual.proj)

    Checkpointer(model).load(path)
    with torch.no_grad():
        assert torch.equal(model.backbone.encoder(x), expected)
        assert torch.equal(build_encoder(tiny_model[0], path)(x), expected)


def test_a_student_is_written_even_without_its_text_tower(tiny_model, tmp_path, caplog):
    path = tmp_path / "student.safetensors"
    export_student(build_encoder(*tiny_model), EncoderSpec(tiny_model[0], str(tmp_path / "deleted.safetensors")), path)
    assert path.is_file()
    assert "without a text tower" in caplog.text


def test_round_trip_of_a_whole_model(model, tmp_path):
    changed(model.backbone.encoder)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    folder = tmp_path / "output"
    checkpointer = Checkpointer(model, str(folder))
    checkpointer.save("one", iteration=4)
    changed(model.backbone.encoder)
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 4
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert sorted(path.name for path in folder.iterdir()) == ["last_checkpoint", "one.pth"]


def test_a_failed_save_leaves_the_old_checkpoint(model, tmp_path):
    folder = tmp_path / "output"
    checkpointer = Checkpointer(model, str(folder))
    checkpointer.save("one")
    before = (folder / "one.pth").read_bytes()
    with pytest.raises(Exception, match=r"pickle|lambda|local"):
        checkpointer.save("one", iteration=lambda: None)
    assert (folder / "one.pth").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["last_checkpoint", "one.pth"]


def test_wrong_files_are_named(model, tmp_path):
    checkpointer = Checkpointer(model)
    with pytest.raises(FileNotFoundError, match=r"MODEL\.WEIGHTS"):
        checkpointer.load(str(tmp_path / "none.pth"))
    for name in ("damaged.pth", "damaged.safetensors"):
        (tmp_path / name).write_bytes(b"damaged")
        with pytest.raises(RuntimeError, match=r"MODEL\.WEIGHTS.*cannot be read"):
            Checkpointer(model).load(str(tmp_path / name))
    (tmp_path / "zoo.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match="pickle"):
        Checkpointer(model).load(str(tmp_path / "zoo.pkl"))
    write_safetensors({"visual.proj": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(RuntimeError, match=r"MODEL\.WEIGHTS.*does not fit"):
        Checkpointer(model).load(str(tmp_path / "other.safetensors"))


def test_checkpoints_of_other_models_are_refused(model, tmp_path):
    state = model.state_dict()
    torch.save({"model": {"foo": torch.zeros(3)}}, tmp_path / "foreign.pth")
    smaller = {key: value[..., :1] for key, value in state.items()}
    torch.save({"model": smaller}, tmp_path / "smaller.pth")
    for name in ("foreign.pth", "smaller.pth"):
        with pytest.raises(RuntimeError, match=r"MODEL\.WEIGHTS: .*does not fit the model"):
            Checkpointer(model).load(str(tmp_path / name))
    torch.save(torch.zeros(3), tmp_path / "bare.pth")
    with pytest.raises(RuntimeError, match=r"must contain a state_dict\(\).*Tensor"):
        Checkpointer(model).load(str(tmp_path / "bare.pth"))


def test_a_deleted_checkpoint_is_an_error_with_instructions(model, tmp_path):
    checkpointer = Checkpointer(model, str(tmp_path))
    checkpointer.save("model_0000001")
    (tmp_path / "model_0000001.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"--resume: .*last_checkpoint names model_0000001\.pth.*another"):
        checkpointer.resume_or_load("", resume=True)
    checkpointer.save("model_0000002")
    checkpointer.save("model_0000003")
    (tmp_path / "model_0000003.pth").write_bytes((tmp_path / "model_0000003.pth").read_bytes()[:5000])
    with pytest.raises(
        RuntimeError, match=r"names model_0000003\.pth, which cannot.*available checkpoints: model_0000002\.pth"
    ):
        checkpointer.resume_or_load("", resume=True)
