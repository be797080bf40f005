"""The command line, as a user types it."""

import os
import signal
import sys
import time
from importlib import import_module

import pytest
import torch

from label_trees import tree
from processes import run_tool, start_tool
from reference import ROOT
from spar_d2.data.preparation import prepare

TOOL = str(ROOT / "tools" / "train_net.py")
CONFIG = str(ROOT / "configs" / "distill" / "Base-distill.yaml")


def arguments_for(tiny_model, photo_folder, output):
    return [
        "--config-file", CONFIG, "MODEL.DEVICE", "cpu", "MODEL.SPAR.ENCODER", tiny_model[0],
        "MODEL.SPAR.PRETRAINED", tiny_model[1], "SPAR.DATA.IMAGES", photo_folder, "SPAR.DATA.SCALE_BOX", "(192,96)",
        "SPAR.DATA.MIN_SHORT_SIDE", 64, "SPAR.DATA.CROP_MIN_SIDE", 48, "SPAR.TEACHER.WINDOWS_PER_IMAGE", 2,
        "SOLVER.MAX_ITER", 3, "DATALOADER.NUM_WORKERS", 2, "OUTPUT_DIR", output,
    ]  # fmt: skip


@pytest.mark.slow
def test_help_names_the_flags(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "--help"])
    with pytest.raises(SystemExit) as ended:
        import_module("spar_d2.cli.train").main()
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--config-file", "--resume", "--eval-only", "--num-gpus", "--num-machines", "--dist-url"):
        assert flag in text


@pytest.mark.processes
@pytest.mark.slow
def test_stops_at_ctrl_c_resumes_and_evaluates(tiny_model, photo_folder, tmp_path):
    output, log = tmp_path / "run", tmp_path / "log"
    arguments = arguments_for(tiny_model, photo_folder, output)
    # Long enough to be interrupted in the middle; the whole process group gets the signal, as from a terminal.
    process = start_tool(TOOL, [*arguments, "SOLVER.MAX_ITER", "100000"], log, {})
    deadline = time.time() + 200
    metrics = output / "metrics.json"
    while not (metrics.is_file() and metrics.stat().st_size) and time.time() < deadline:
        assert process.is_alive(), log.read_text()
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    process.join(100)
    text = log.read_text()
    assert process.exitcode == 0, text
    assert "Traceback" not in text
    assert "use --resume to continue" in text
    stopped = int((output / "last_checkpoint").read_text().removeprefix("model_").removesuffix(".pth"))

    code = run_tool(TOOL, ["--resume", *arguments, "SOLVER.MAX_ITER", stopped + 3], log)
    assert code == 0, log.read_text()
    assert f"Starting training from iteration {stopped + 1}" in log.read_text()
    student = output / "student.safetensors"
    assert student.is_file()

    datasets = tmp_path / "datasets"
    tree("voc21", datasets)
    prepare("voc21", datasets, partial=True)
    tested = ["MODEL.SPAR.TEMPLATES", "simple", "DATASETS.TEST", "('voc21',)"]
    code = run_tool(
        TOOL,
        ["--eval-only", *arguments, "MODEL.WEIGHTS", student, *tested],
        log,
        {"DETECTRON2_DATASETS": str(datasets)},
    )
    assert code == 0, log.read_text()
    assert "mIoU" in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["MODEL.SPAR.ENCODER", "ViT-B-61"], "did you mean ViT-B-16"),
        (["MODEL.SPAR.PRETRAINED", "nowhere.safetensors"], "MODEL.SPAR.PRETRAINED: 'nowhere.safetensors'"),
        (["MODEL.SPAR.PRETRAINED", "{corrupt}"], "MODEL.SPAR.PRETRAINED: {corrupt}"),
        (["SPAR.DATA.IMAGES", "{empty}"], "SPAR.DATA.IMAGES: "),
        (["SPAR.DATA.IMAGES", "{ruined}"], "SPAR.DATA.IMAGES: none of the 1 "),
        (["MODEL.SPAR.VOCABULARY", ";"], "vocabulary is empty"),
        (["SPAR.TEACHER.WINDOW", 8], "SPAR.TEACHER.WINDOW"),
        (["SPAR.TEACHER.STRIDE", 0], "SPAR.TEACHER.STRIDE"),
        (["SPAR.DATA.SCALE_BOX", "(-64,96)"], "SPAR.DATA.SCALE_BOX"),
        (["MODEL.SPAR.ENCODR", "x"], "MODEL.SPAR.ENCODR"),
        (["MODEL.WEIGHTS", "nowhere.pth"], "MODEL.WEIGHTS: "),
    ],
)
def test_bad_input_gives_one_message_and_no_debris(wrong, message, tiny_model, photo_folder, tmp_path, capsys):
    """In this process, which is faster: the function that the command calls."""
    from detectron2.engine import default_argument_parser

    places = {"empty": tmp_path / "empty", "ruined": tmp_path / "ruined", "corrupt": tmp_path / "corrupt.safetensors"}
    places["empty"].mkdir()
    places["ruined"].mkdir()
    (places["ruined"] / "a.jpg").write_bytes(b"ruined")
    places["corrupt"].write_bytes(b"corrupt")
    output = tmp_path / "run"
    arguments = [str(a) for a in arguments_for(tiny_model, photo_folder, output) + wrong]
    train = import_module("spar_d2.cli.train")
    with pytest.raises(SystemExit) as exit_:
        train.work(default_argument_parser().parse_args([a.format(**places) for a in arguments]))
    assert exit_.value.code == 1
    assert message.format(**places) in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.processes
def test_missing_config_file(tmp_path):
    assert run_tool(TOOL, ["--config-file", tmp_path / "none.yaml"], tmp_path / "log") == 1
    assert (tmp_path / "log").read_text().startswith("error: --config-file: ")


def test_missing_gpu(tmp_path, capsys):
    from detectron2.engine import default_argument_parser

    arguments = ["--config-file", CONFIG, "--eval-only", "MODEL.DEVICE", "cuda", "OUTPUT_DIR", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as exit_:
        import_module("spar_d2.cli.train").work(default_argument_parser().parse_args(arguments))
    assert exit_.value.code == 1
    errors = capsys.readouterr().err
    assert "DATASETS.TEST" in errors
    if not torch.cuda.is_available():
        assert "no GPU is available; using the CPU" in errors
