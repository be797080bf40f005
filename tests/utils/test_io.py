import fcntl
import json
import math
import multiprocessing
import os
import re
import socket
import stat
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from spar_d2.utils.io import atomic_write, file_lock, remove_leftovers, write_json


def test_the_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("content")
        assert temporary.suffix == ".txt"
        assert not path.exists()
    assert path.read_text() == "content"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_new_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "plain").touch()
    with atomic_write(tmp_path / "w.safetensors") as temporary:
        save_file({"a": torch.zeros(2)}, temporary)
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def kill_while_writing(path):
    """A process that is killed in the middle of a file."""
    process = multiprocessing.get_context("fork").Process(target=_write_and_wait, args=(path,))
    process.start()
    while not any(temporary.stat().st_size for temporary in path.parent.glob(".*.tmp*/.content*")):
        time.sleep(0.01)
    return process


def _write_and_wait(path):
    with atomic_write(path) as temporary:
        temporary.write_text("half")
        time.sleep(60)


def test_temporary_files_of_killed_writers_are_removed_and_those_of_running_ones_kept(tmp_path):
    path = tmp_path / "sub" / "file.txt"
    path.parent.mkdir()
    process = kill_while_writing(path)
    assert remove_leftovers(tmp_path) == [], "it still writes"
    process.kill()
    process.join()
    (left,) = path.parent.iterdir()
    foreign = left.with_name(".file.elsewhere-1-00000000.tmp.txt")
    foreign.mkdir()
    for name in ("plain", ".hidden", ".tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").mkdir()
    (tmp_path / left.name).symlink_to(tmp_path / "link")
    assert remove_leftovers(tmp_path) == [str(left)]
    os.utime(foreign, (0, 0))
    assert remove_leftovers(tmp_path) == [str(foreign)], "a day later nobody writes to it"
    assert sorted(os.listdir(tmp_path)) == sorted([".hidden", ".tmp", left.name, "link", "plain", "sub"])


def test_temporary_files_of_a_killed_process_with_the_same_id_are_removed(tmp_path):
    with atomic_write(tmp_path / "file.txt") as own:
        assert remove_leftovers(tmp_path) == []
    left = tmp_path / re.sub(r"-[0-9a-f]{8}\.tmp", "-00000000.tmp", own.parent.name)
    left.mkdir()  # killed before its first byte
    assert remove_leftovers(tmp_path) == [str(left)]


def test_files_of_writers_that_replace_them_are_kept(tmp_path):
    """safetensors and others write to a file of their own, and rename it."""
    with atomic_write(tmp_path / "file.safetensors") as temporary:
        other = temporary.with_name("other")
        save_file({"a": torch.zeros(2)}, other)
        other.replace(temporary)
        temporary.with_name("junk").touch()  # of a writer that was killed earlier
        assert remove_leftovers(tmp_path) == []
    assert os.listdir(tmp_path) == ["file.safetensors"]


def test_a_folder_removed_before_its_writer_locks_it_is_created_again(tmp_path, monkeypatch):
    lock, removed = fcntl.flock, []

    def lock_late(descriptor, operation):
        if not removed:
            removed.append(None)  # removing locks, too
            removed[:] = remove_leftovers(tmp_path)
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    with atomic_write(tmp_path / "file.txt") as temporary:
        temporary.write_text("whole")
        assert remove_leftovers(tmp_path) == []
    (gone,) = removed
    assert gone != str(temporary.parent)
    assert (tmp_path / "file.txt").read_text() == "whole"


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "file.txt"
    with atomic_write(path) as first, atomic_write(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first", "the last to end"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def _use_and_wait(folder):
    with file_lock(folder):
        (folder / "in").touch()
        time.sleep(60)


def test_a_folder_is_used_by_one_process_until_it_ends(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_use_and_wait, args=(tmp_path,))
    process.start()
    while not (tmp_path / "in").exists():
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match=f"OUTPUT_DIR {tmp_path} is in use by another run"), file_lock(tmp_path):
        pass
    process.kill()
    process.join()
    for _ in range(2):
        with file_lock(tmp_path):
            pass


@pytest.mark.parametrize("name", ["link.txt", "chain.txt", "away/link.txt"])
@pytest.mark.parametrize("there", [True, False], ids=["", "dangling"])
def test_a_symbolic_link_stays_and_leads_to_the_new_file(tmp_path, name, there):
    (tmp_path / "away").mkdir()
    target = tmp_path / "elsewhere" / "file.data"
    if there:
        target.parent.mkdir()
        target.write_text("old")
        target.chmod(0o640)
    (tmp_path / "link.txt").symlink_to("elsewhere/file.data")
    (tmp_path / "chain.txt").symlink_to(tmp_path / "link.txt")
    (tmp_path / "away" / "link.txt").symlink_to("../link.txt")
    with atomic_write(tmp_path / name) as temporary:
        assert temporary.suffix == ".txt"
        temporary.write_text("new")
    assert target.read_text() == "new"
    assert not there or target.stat().st_mode & 0o777 == 0o640
    assert (tmp_path / name).is_symlink()
    assert [p.name for p in target.parent.iterdir()] == ["file.data"]


def test_links_in_a_circle_are_an_error(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"), atomic_write(tmp_path / "a"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("linked", [False, True])
def test_devices_are_written_to_and_stay(tmp_path, linked):
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices")
    path = device
    if linked:
        path = tmp_path / "link.json"
        path.symlink_to(device)
    with atomic_write(path) as temporary:
        assert temporary.suffix == path.suffix
        temporary.write_text("content")
    assert stat.S_ISCHR(device.lstat().st_mode)
    assert path.is_symlink() == linked


def test_a_named_pipe_is_written_to_where_somebody_reads(tmp_path):
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match=r"pipe\.json is a pipe .* without a reader"), atomic_write(pipe):
        pass
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with atomic_write(pipe) as temporary:
        temporary.write_text("content")
    assert os.read(reader, 100) == b"content"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.lstat().st_mode)


@pytest.mark.processes
@pytest.mark.parametrize("name", ["stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_files_can_be_written_to_standard_output(tmp_path, name, kind):
    code = (
        "import sys; from spar_d2.utils.io import atomic_write\n"
        "print('before', flush=True)\n"
        "with atomic_write(sys.argv[1]) as temporary: temporary.write_text('content\\n')\n"
        "print('after')"
    )
    # As /dev/stdout is, which a test that fails must not replace.
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    with open(tmp_path / "out", "w+") as out:
        target = subprocess.PIPE if kind == "pipe" else out
        command = [sys.executable, "-c", code, os.path.join(tmp_path, name)]
        result = subprocess.run(command, stdout=target, text=True, check=True)
        out.seek(0)
        assert (result.stdout if kind == "pipe" else out.read()) == "before\ncontent\nafter\n"
    assert sorted(os.listdir(tmp_path)) == ["out", "stdout"]


def test_folders_and_sockets_are_refused_before_anything_is_written(tmp_path):
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
        for name in ("folder", "socket"):
            refused = pytest.raises(OSError, match=f"{name} is a {name} and cannot be written to")
            with refused, atomic_write(tmp_path / name):
                raise AssertionError
    assert sorted(os.listdir(tmp_path)) == ["folder", "socket"]


@pytest.mark.parametrize("name", ["a" * 251 + ".txt", "ä" * 125 + ".png", "a." + "b" * 253, "." + "b" * 254])
def test_names_as_long_as_can_be(tmp_path, name):
    with atomic_write(tmp_path / name) as temporary:
        temporary.write_text("content")
    assert os.listdir(tmp_path) == [name]


def test_temporary_files_of_unknown_processes_are_kept(tmp_path):
    """Containers may share the name of the host but not its process ids, so that an id proves nothing."""
    process = kill_while_writing(tmp_path / "file.txt")
    (written,) = tmp_path.iterdir()
    unknown = written.with_name(re.sub(r"-\d+-", "-999999-", written.name))
    written.rename(unknown)
    os.utime(unknown, (0, 0))
    assert remove_leftovers(tmp_path) == []
    process.kill()
    process.join()
    assert remove_leftovers(tmp_path) == [str(unknown)]


def test_a_pipe_with_the_name_of_a_leftover_is_left_alone(tmp_path):
    pipe = tmp_path / ".file.elsewhere-1-00000000.tmp.txt"
    os.mkfifo(pipe)
    os.utime(pipe, (0, 0))
    assert remove_leftovers(tmp_path) == []


def test_numbers_that_json_has_not_become_null(tmp_path):
    content = {"a": [math.nan, 1.5, (math.inf, "NaN")], "b": {"c": -math.inf, "d": None, "é": True}}
    write_json(content, tmp_path / "a.json")
    read = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))
    assert read == {"a": [None, 1.5, [None, "NaN"]], "b": {"c": None, "d": None, "é": True}}
    write_json({"a": 1}, tmp_path / "a.json", indent=1)
    assert (tmp_path / "a.json").read_text() == '{\n "a": 1\n}'
