from importlib import import_module
from pathlib import Path

import pytest
import torch

from spar_d2.encoders import build_encoder


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["convert", *map(str, arguments)])
    import_module("spar_d2.cli.convert").main()


@pytest.mark.slow
def test_converts_a_file(monkeypatch, capsys, tmp_path, tiny_model, reference_clip):
    config, weights = tiny_model
    run(monkeypatch, "--encoder", config, "--input", weights, "--output", tmp_path / "a.pth", "--to", "authors")
    assert f"Wrote {len(reference_clip.state_dict())} tensors to" in capsys.readouterr().out
    assert all(key.startswith("model.") for key in torch.load(tmp_path / "a.pth", weights_only=True))
    run(monkeypatch, "--encoder", config, "--input", tmp_path / "a.pth", "--output", tmp_path / "b.safetensors")
    original, again = build_encoder(config, weights), build_encoder(config, str(tmp_path / "b.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(original.parameters(), again.parameters()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "nowhere.pt", "--output", "out.pt"], "--input: there is no file 'nowhere.pt'"),
        (["--output", "."], "--output must be a file"),
        (["--output", "out.pt", "--encoder", "vit_nano_patch8_dinov3", "--text", "x"], "--text: weights of vit_nano"),
        (["--output", "out.bin"], "--output must end in one of .safetensors, .pt, .pth"),
        (["--output", "out.safetensors", "--to", "authors"], "--output must end in one of .pt, .pth"),
        (["--output", "out.pt", "--to", "timm"], "--to must be one of open_clip, authors"),
        (["--output", "out.pt", "--encoder", "ViT-B16"], "did you mean"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, tmp_path, tiny_model, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--encoder", tiny_model[0], "--input", tiny_model[1], *arguments)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("out*"))


def test_the_input_is_never_overwritten(monkeypatch, capsys, tmp_path, tiny_model):
    before = Path(tiny_model[1]).read_bytes()
    with pytest.raises(SystemExit):
        run(monkeypatch, "--encoder", tiny_model[0], "--input", tiny_model[1], "--output", tiny_model[1])
    assert "--output must not overwrite" in capsys.readouterr().err
    assert Path(tiny_model[1]).read_bytes() == before
