import multiprocessing
import os
import re
import time

import pytest
import torch
from safetensors.torch import save_file

from spar_d2.files import remove_leftovers, replacing, used_by_one


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


def kill_while_writing(path):
    """A process that is killed in the middle of a file."""
    process = multiprocessing.get_context("fork").Process(target=_write_and_wait, args=(path,))
    process.start()
    while not list(path.parent.glob(".*.tmp*")):
        time.sleep(0.01)
    return process


def _write_and_wait(path):
    with replacing(path) as temporary:
        temporary.write_text("half")
        time.sleep(60)


def test_what_killed_writers_left_is_removed_and_what_others_write_is_not(tmp_path):
    path = tmp_path / "sub" / "file.txt"
    path.parent.mkdir()
    process = kill_while_writing(path)
    assert remove_leftovers(tmp_path) == [], "it still writes"
    process.kill()
    process.join()
    (left,) = path.parent.iterdir()
    foreign = left.with_name(".file.elsewhere-1-00000000.tmp.txt")
    foreign.touch()
    for name in ("plain.txt", ".hidden", ".tmp"):
        (tmp_path / name).touch()
    assert remove_leftovers(tmp_path) == [str(left)]
    os.utime(foreign, (0, 0))
    assert remove_leftovers(tmp_path) == [str(foreign)], "a day later nobody writes to it"
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [".hidden", ".tmp", "plain.txt"]


def test_a_process_with_the_number_of_the_killed_one_removes_what_that_left(tmp_path):
    with replacing(tmp_path / "file.txt") as own:
        assert remove_leftovers(tmp_path) == []
    left = tmp_path / re.sub(r"-[0-9a-f]{8}\.tmp", "-00000000.tmp", own.name)
    left.touch()
    os.utime(left, (time.time() - 3600,) * 2)
    assert remove_leftovers(tmp_path) == [str(left)]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "file.txt"
    with replacing(path) as first, replacing(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first", "the last to end"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def _use_and_wait(folder):
    with used_by_one(folder):
        (folder / "in").touch()
        time.sleep(60)


def test_a_folder_is_used_by_one_process_until_it_ends(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_use_and_wait, args=(tmp_path,))
    process.start()
    while not (tmp_path / "in").exists():
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match=f"OUTPUT_DIR {tmp_path} is in use by another run"), used_by_one(tmp_path):
        pass
    process.kill()
    process.join()
    for _ in range(2):
        with used_by_one(tmp_path):
            pass
