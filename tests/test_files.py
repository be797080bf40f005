import multiprocessing
import os
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spar_d2 import files
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
    for name in ("plain.txt", ".hidden", ".tmp"):
        (tmp_path / name).touch()
    assert remove_leftovers(tmp_path) == [str(left)]
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [".hidden", ".tmp", "plain.txt"]


def test_a_file_that_is_written_stays_whatever_its_writer_is_called(tmp_path, monkeypatch):
    """In another container, a writer may have any number, also one that no process has here."""
    with replacing(tmp_path / "file.txt") as temporary:
        assert remove_leftovers(tmp_path) == []
        assert temporary.exists()
        # Writers that put a file of their own in its place.
        temporary.unlink()
        temporary.write_text("new")
    assert (tmp_path / "file.txt").read_text() == "new"


def test_without_locks_young_files_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    left = tmp_path / f".file.{'0' * 16}.tmp.txt"
    left.touch()
    assert remove_leftovers(tmp_path) == []
    os.utime(left, (0, 0))
    assert remove_leftovers(tmp_path) == [str(left)], "a day later nobody writes to it"


@pytest.mark.parametrize("name", ["n" * 250 + ".txt", "ü" * 125 + ".txt", "x." + "s" * 253, "." + "h" * 254])
def test_names_may_be_as_long_as_the_file_system_allows(tmp_path, name):
    with replacing(tmp_path / name) as temporary:
        temporary.write_text("content")
    assert (tmp_path / name).read_text() == "content"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_its_target_is_replaced(tmp_path, there):
    target, link = tmp_path / "real" / "target.txt", tmp_path / "link.txt"
    if there:
        target.parent.mkdir()
        target.write_text("old")
    link.symlink_to("real/target.txt")
    with replacing(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink() and target.read_text() == "new"
    assert len(list(target.parent.iterdir())) == 1


def test_a_pipe_is_written_through(tmp_path):
    pipe = tmp_path / "pipe.txt"
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as pool:
        reader = pool.submit(pipe.read_text)
        with replacing(pipe) as temporary:
            assert temporary.suffix == ".txt"
            temporary.write_text("content")
        assert reader.result() == "content"
    assert pipe.is_fifo()
    assert len(list(tmp_path.iterdir())) == 1


def test_devices_and_open_files_are_written_through(tmp_path):
    """As a user without rights to it would not see: /dev/null of a whole machine must never be replaced."""
    with replacing("/dev/null") as temporary:
        assert temporary.parent != Path("/dev")
        temporary.write_text("content")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    code = (
        "from spar_d2.files import replacing\nprint('before', flush=True)\n"
        "with replacing('/dev/stdout') as file:\n    file.write_text('content')"
    )
    with open(tmp_path / "output", "ab") as output:
        subprocess.run([sys.executable, "-c", code], check=True, stdout=output)
    assert (tmp_path / "output").read_text() == "before\ncontent"
    assert Path("/dev/stdout").is_symlink()


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"), replacing(tmp_path):
        pass


def test_an_earlier_file_keeps_who_may_read_it(tmp_path):
    (tmp_path / "secret").touch(0o600)
    with replacing(tmp_path / "secret") as temporary:
        temporary.write_text("content")
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


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
