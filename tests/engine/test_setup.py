import os
import subprocess
import sys
import urllib.request

import pytest

from reference import ROOT
from spar_d2.engine.launch import check_launch
from spar_d2.engine.setup import clean_start, load_config

CONFIG = str(ROOT / "configs" / "toy" / "distill.yaml")


@pytest.mark.parametrize("content", ["", "just text", "- a", "a: [1, 2", "\x00\x01", "_BASE_: none.yaml", "MODEL: 3"])
def test_files_that_are_no_config(tmp_path, content):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"c\.yaml"):
        load_config(str(tmp_path / "c.yaml"), [])


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefghi", "bcdefghij")
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"b\.yaml is empty, but .*lines of KEY: VALUE"),
        ("# nothing\n", r"b\.yaml is empty"),
        ("- SEED: 3\n", r"b\.yaml is a sequence, but must"),
        ("_BASE_: 3\n", r"_BASE_ in \S*b\.yaml .*got '3'"),
        ("_BASE_:\n", r"_BASE_ in \S*b\.yaml"),
        ("_BASE_: [a.yaml, 3]\n", r"_BASE_ in \S*b\.yaml"),
        ("_BASE_: {a: 3}\n", r"_BASE_ in \S*b\.yaml"),
        ("SEED: &a [*a]\n", r"an alias .* in \S*b\.yaml refers to a node that contains it"),
        ("SOLVER: &a {SOLVER: *a}\n", r"an alias .* in \S*b\.yaml refers to a node that contains it"),
        (f"{BOMB}OUTPUT_DIR: *j\n", r"b\.yaml .*at most 100000 values"),
        (f"OUTPUT_DIR: {'[' * 3000}\n", r"nested too deeply"),
        ("SOLVER: &a {<<: *a}\n", r"an alias .* in \S*b\.yaml refers to a node that contains it"),
        (BOMB.replace("[", "{<<: [").replace("]", "]}").replace("1", "{k: 1}"), r"at most 100000 values"),
        ("<<: 3\n", r"b\.yaml.*expected a mapping"),
        ("3: 4\n", r"keys .*strings \(\S*b\.yaml, line 1\), got '3'"),
        ("? [SEED]\n: 4\n", r"keys .*strings \(\S*b\.yaml, line 1\), got a sequence"),
        ("SOLVER: {null: 4}\n", r"keys .*strings \(\S*b\.yaml, line 1\), got 'null'"),
    ],
)
@pytest.mark.parametrize("inherited", [False, True])
def test_yaml_that_is_no_config_is_named_in_one_line(tmp_path, content, message, inherited):
    (tmp_path / "b.yaml").write_text(content)
    (tmp_path / "c.yaml").write_text("_BASE_: b.yaml\n")
    with pytest.raises(ValueError, match=message) as raised:
        load_config(str(tmp_path / ("c.yaml" if inherited else "b.yaml")), [])
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


def test_anchors_and_merge_keys_are_read(tmp_path):
    (tmp_path / "c.yaml").write_text("SOLVER: &a {MAX_ITER: 7}\nSPAR: {DISTILL: {<<: {WEIGHT: 2.0}, ENABLED: True}}\n")
    cfg = load_config(str(tmp_path / "c.yaml"), [])
    assert (cfg.SOLVER.MAX_ITER, cfg.SPAR.DISTILL.WEIGHT, cfg.SPAR.DISTILL.ENABLED) == (7, 2.0, True)


UNSAFE = "OUTPUT_DIR: !!python/object/apply:os.system ['touch {}/ran']\n"


@pytest.mark.parametrize("base", ["", "_BASE_: b.yaml\n", "_BASE_: [plain.yaml, b.yaml]\n", "_BASE_: below/c.yaml\n"])
def test_yaml_that_runs_code_is_refused(tmp_path, base):
    (tmp_path / "plain.yaml").write_text("SEED: 3\n")
    (tmp_path / "b.yaml").write_text(UNSAFE.format(tmp_path))
    (tmp_path / "below").mkdir()
    (tmp_path / "below/c.yaml").write_text("_BASE_: ../b.yaml\n")
    (tmp_path / "c.yaml").write_text(base or UNSAFE.format(tmp_path))
    with pytest.raises(ValueError, match=r"!!python/object/apply:os\.system \(.*yaml, line 1\) is not allowed"):
        load_config(str(tmp_path / "c.yaml"), [])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("tag", ["python/name:os.system", "python/module:os", "python/object/new:os.system []"])
def test_other_tags_of_python_are_refused(tmp_path, tag):
    (tmp_path / "c.yaml").write_text(f"SEED: 3\nOUTPUT_DIR: !!{tag}\n")
    with pytest.raises(ValueError, match=rf"!!{tag.split()[0]} \(.*, line 2\) is not allowed"):
        load_config(str(tmp_path / "c.yaml"), [])


@pytest.mark.parametrize(
    "base",
    ["http://localhost:9/a.yaml", "https://localhost:9/a.yaml", "ftp://localhost:9/a.yaml", "detectron2://a.yaml"],
)
@pytest.mark.parametrize("form", ["_BASE_: {}\n", "_BASE_: ['b.yaml', '{}']\n"])
def test_bases_are_never_fetched(tmp_path, monkeypatch, base, form):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(urllib.request.OpenerDirector, "open", lambda *_: pytest.fail("it was fetched"))
    (tmp_path / "b.yaml").write_text("SEED: 3\n")
    (tmp_path / "c.yaml").write_text(form.format(base))
    with pytest.raises(ValueError, match=f"_BASE_: {base} must be a local file"):
        load_config("c.yaml", [])


@pytest.mark.slow
def test_a_base_that_leads_back_is_named(tmp_path):
    (tmp_path / "c.yaml").write_text("_BASE_: d.yaml\n")
    (tmp_path / "d.yaml").write_text("_BASE_: c.yaml\n")
    with pytest.raises(ValueError, match="_BASE_ is circular"):
        load_config(str(tmp_path / "c.yaml"), [])


def test_bases_are_inherited(tmp_path):
    (tmp_path / "a.yaml").write_text("SEED: 3\nVERSION: 2\nSOLVER:\n  MAX_ITER: 7\n")
    (tmp_path / "c.yaml").write_text("_BASE_: a.yaml\nSEED: 4\n")
    cfg = load_config(str(tmp_path / "c.yaml"), [])
    assert (cfg.SEED, cfg.SOLVER.MAX_ITER) == (4, 7)


def test_no_config_and_a_missing_one(tmp_path):
    with pytest.raises(ValueError, match="--config-file is required"):
        load_config("", [])
    with pytest.raises(FileNotFoundError, match="--config-file: there is no file"):
        load_config(str(tmp_path / "none.yaml"), [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["MODEL.NO_KEY", 1], "MODEL.NO_KEY"),
        (["SOLVER.MAX_ITER", "many"], "many"),
        (["SOLVER.MAX_ITER"], "odd length"),
        (["SOLVER.MAX_ITER", 1, "--resume"], "--resume must be before the first KEY VALUE pair"),
        (["MODEL.BACKBONE.NAME", "SPARVit"], "MODEL.BACKBONE.NAME.*did you mean SPARViT"),
        (["MODEL.META_ARCHITECTURE", "Foo"], "MODEL.META_ARCHITECTURE"),
        (["DATASETS.TEST", "('spar_scenes_vall',)"], "DATASETS.TEST.*did you mean spar_scenes_val"),
        (["DATASETS.TRAIN", "('nope',)"], "DATASETS.TRAIN"),
        (["OUTPUT_DIR", ""], "OUTPUT_DIR"),
        (
            ["TEST.AUG.MIN_SIZES", "(400, 100000000)"],
            r"TEST\.AUG\.MIN_SIZES .*0\.\.16384 pixels, got 100000000",
        ),
        (["INPUT.MIN_SIZE_TEST", "100000000"], r"INPUT\.MIN_SIZE_TEST .*0\.\.16384 pixels"),
        (["INPUT.MIN_SIZE_TEST", "-1"], r"INPUT\.MIN_SIZE_TEST"),
        (["INPUT.MIN_SIZE_TRAIN", "(20000,)"], r"INPUT\.MIN_SIZE_TRAIN"),
        (["SPAR.DATA.SCALE_BOX", "(200000, 1024)"], r"SPAR\.DATA\.SCALE_BOX"),
        (["SPAR.TEACHER.WINDOW", "100000000"], r"SPAR\.TEACHER\.WINDOW"),
    ],
)
def test_wrong_overrides_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(CONFIG, overrides)


def test_an_output_folder_that_is_a_file_is_left_alone(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("mine")
    for folder in (file, file / "below"):
        with pytest.raises(ValueError, match="OUTPUT_DIR must be a writable folder"):
            load_config(CONFIG, ["OUTPUT_DIR", str(folder)])
    assert file.read_text() == "mine"


def test_files_of_a_config_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = load_config(CONFIG, [])
    assert os.path.samefile(cfg.MODEL.SPAR.ENCODER, ROOT / "configs" / "toy" / "tiny_clip.json")
    assert os.path.isfile(cfg.MODEL.SPAR.PRETRAINED)
    long = "; ".join(f"word {number}" for number in range(500))
    assert load_config(CONFIG, ["MODEL.SPAR.VOCABULARY", long]).MODEL.SPAR.VOCABULARY == long
    assert load_config(CONFIG, ["MODEL.SPAR.ENCODER", "ViT-B-16"]).MODEL.SPAR.ENCODER == "ViT-B-16"


@pytest.mark.parametrize("flags", [(-1, 1, 0), (10_000, 1, 0), (1, 2, 5), (1, 1, -1)])
def test_wrong_numbers_of_processes_are_named(flags):
    with pytest.raises(ValueError, match="--num-gpus|--machine-rank"):
        check_launch(*flags)


def test_one_process_is_always_possible():
    check_launch(1, 1, 0)
    check_launch(0, 1, 0)


def test_integers_are_accepted_as_floats():
    config = str(ROOT / "configs" / "toy" / "distill.yaml")
    cfg = load_config(config, ["SPAR.EMA_DECAY", "0", "SPAR.DATA.CROP_PROB", "1", "SOLVER.MAX_ITER", "7"])
    assert (cfg.SPAR.EMA_DECAY, cfg.SPAR.DATA.CROP_PROB, cfg.SOLVER.MAX_ITER) == (0.0, 1.0, 7)
    assert isinstance(cfg.SPAR.EMA_DECAY, float)


@pytest.mark.parametrize(
    ("configured", "given", "expected"), [("[8, 16]", "32", 32), ("8", "[16, 32]", [16, 32]), ("[8, 16]", "[32]", [32])]
)
def test_channels_may_be_given_as_a_number_or_a_list(tmp_path, configured, given, expected):
    (tmp_path / "c.yaml").write_text(f"MODEL:\n  SPAR:\n    OUT_CHANNELS: {configured}\n")
    cfg = load_config(str(tmp_path / "c.yaml"), ["MODEL.SPAR.OUT_CHANNELS", given])
    assert cfg.MODEL.SPAR.OUT_CHANNELS == expected


def fail_in(folder, action=lambda: None):
    with pytest.raises(KeyError), clean_start(str(folder)):
        (folder / "log.txt").touch()
        (folder / "config.yaml").touch()
        action()
        raise KeyError


def test_a_failed_start_removes_the_folders_it_made(tmp_path):
    fail_in(tmp_path / "sweep" / "a")
    assert not list(tmp_path.iterdir())


def test_a_failed_start_removes_no_files_of_another_run(tmp_path):
    """Two runs begin side by side in a new folder, and one of them fails when the other has finished."""
    other = tmp_path / "sweep" / "b"

    def finish() -> None:
        with clean_start(str(other)):
            (other / "student.safetensors").touch()

    fail_in(tmp_path / "sweep" / "a", finish)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()] == ["sweep/b/student.safetensors"]
    assert not (tmp_path / "sweep" / "a").exists()
    # Nor where it has the same folder.
    fail_in(other)
    assert (other / "student.safetensors").exists() and (other / "log.txt").exists()


def test_a_failed_start_keeps_existing_files(tmp_path):
    folder = tmp_path / "run"
    fail_in(folder, lambda: (folder / "notes.md").touch())
    assert (folder / "notes.md").exists()


def test_a_failed_start_leaves_a_folder_that_another_run_has_begun_to_use(tmp_path):
    def begin() -> None:
        with clean_start(str(tmp_path / "run")):
            pass

    fail_in(tmp_path / "run", begin)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.yaml", "log.txt"]


def test_a_start_that_is_interrupted_leaves_no_folder(tmp_path):
    with pytest.raises(KeyboardInterrupt), clean_start(str(tmp_path / "run")):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.processes
def test_a_start_in_the_folder_of_a_running_training_changes_no_files(tmp_path):
    (tmp_path / "config.yaml").write_text("theirs")
    hold = f"with file_lock({str(tmp_path)!r}):\n    print(flush=True)\n    input()"
    code = f"from spar_d2.utils.io import file_lock\n{hold}"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(RuntimeError, match="in use by another run"), clean_start(str(tmp_path)):
            (tmp_path / "config.yaml").write_text("mine")
        with clean_start(str(tmp_path), trains=False):
            pass
        other.communicate(b"\n")
    assert (tmp_path / "config.yaml").read_text() == "theirs"


def test_a_failed_start_restores_an_earlier_config(tmp_path):
    (tmp_path / "config.yaml").write_text("theirs")
    with pytest.raises(KeyError), clean_start(str(tmp_path)):
        (tmp_path / "config.yaml").write_text("mine")
        raise KeyError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("config.yaml", "theirs")]
