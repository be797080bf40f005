import io
import logging
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from reference import reference_image
from spar_d2.data.images import read_photo, read_rgb
from spar_d2.data.sources import find_photos

KEY = r"SPAR\.DATA\.IMAGES"


def jpeg(index: int = 0) -> bytes:
    content = io.BytesIO()
    Image.fromarray(reference_image(20, 30, index)).save(content, "JPEG")
    return content.getvalue()


def pixels(index: int) -> np.ndarray:
    return read_rgb(Image.open(io.BytesIO(jpeg(index))))


def write_tar(path, members: dict[str, bytes], **options):
    """A tar file of the members, in their order."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def names(sources) -> list[str]:
    return [record["name"] for record in find_photos(str(sources))]


@pytest.fixture
def shard(tmp_path):
    """A tar file as SA-1B's: an annotation beside each photo."""
    members = {}
    for index in (2, 1):
        members[f"./sa_{index}.jpg"] = jpeg(index)
        members[f"./sa_{index}.json"] = b"{}"
    return write_tar(tmp_path / "sa_000000.tar", members)


def test_folders_are_searched_through_and_sorted(photo_folder):
    (photo_folder / "notes.txt").write_text("no photo")
    (photo_folder / "d.WebP").write_bytes(b"")
    records = find_photos(str(photo_folder))
    assert [record["name"] for record in records] == ["a.jpg", "b.JPG", "d.WebP", "more/c.jpeg"]
    assert [record["image_id"] for record in records] == [0, 1, 2, 3]
    assert records[3] == {"file_name": str(photo_folder / "more/c.jpeg"), "name": "more/c.jpeg", "image_id": 3}
    assert find_photos(photo_folder) == records


def test_hidden_files_and_folders_are_left_out(photo_folder):
    for hidden in (".hidden.jpg", "._a.jpg", ".thumbnails/a.jpg"):
        path = photo_folder / hidden
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(jpeg())
    write_tar(photo_folder / "._t.tar", {"a.jpg": b""})
    write_tar(photo_folder / "t.tar", {"._a.jpg": b"", "x/.b.jpg": b"", ".c/d.jpg": b"", "./x/../e.jpg": b""})
    assert names(photo_folder) == ["a.jpg", "b.JPG", "more/c.jpeg", "t.tar/e.jpg"]


def test_links_are_followed_once_and_change_no_names(photo_folder, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "z.png").write_bytes(b"")
    before = names(photo_folder)
    (photo_folder / "more" / "loop").symlink_to(photo_folder)
    (photo_folder / "_alias").symlink_to(photo_folder / "more")
    (photo_folder / "0.jpg").symlink_to(photo_folder / "more" / "c.jpeg")
    (photo_folder / "self").symlink_to(photo_folder / "self")
    assert names(photo_folder) == before
    (photo_folder / "linked").symlink_to(outside)
    (photo_folder / "linked again").symlink_to(outside)
    assert names(photo_folder) == ["a.jpg", "b.JPG", "linked/z.png", "more/c.jpeg"]


def test_a_link_that_leads_nowhere_is_found_when_it_is_read(photo_folder):
    (photo_folder / "gone.jpg").symlink_to(photo_folder / "nowhere.jpg")
    record = next(record for record in find_photos(str(photo_folder)) if record["name"] == "gone.jpg")
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg"):
        read_photo(record)


def test_photos_in_a_tar_file_are_read_in_place(shard):
    records = find_photos(str(shard))
    assert [record["name"] for record in records] == ["sa_000000.tar/sa_1.jpg", "sa_000000.tar/sa_2.jpg"]
    assert records[0]["file_name"] == f"{shard}/sa_1.jpg"
    assert records[0]["tar"] == str(shard)
    for record, index in zip(records, (1, 2)):
        assert np.array_equal(read_photo(record), pixels(index))
    assert list(shard.parent.iterdir()) == [shard], "nothing is unpacked"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_names_in_other_scripts(tmp_path, format):
    members = {f"{'d' * 90}/{'n' * 60}é.jpg": jpeg(1), "写真.jpg": jpeg(2)}
    records = find_photos(str(write_tar(tmp_path / "t.tar", members, format=format, encoding="utf-8")))
    assert [record["name"] for record in records] == [f"t.tar/{name}" for name in members]
    assert np.array_equal(read_photo(records[0]), pixels(1))
    assert np.array_equal(read_photo(records[1]), pixels(2))


def test_tar_files_in_a_folder_take_their_place_among_the_photos(photo_folder, shard):
    shard.rename(photo_folder / "more" / "B.TAR")
    assert names(photo_folder) == ["a.jpg", "b.JPG", "more/B.TAR/sa_1.jpg", "more/B.TAR/sa_2.jpg", "more/c.jpeg"]


def test_only_regular_members_count_and_of_one_name_the_last(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for index, name in ((1, "twice.jpg"), (3, "once.jpg"), (2, "./twice.jpg")):
            member = tarfile.TarInfo(name)
            member.size = len(jpeg(index))
            tar.addfile(member, io.BytesIO(jpeg(index)))
        for name, kind in (
            ("folder.jpg", tarfile.DIRTYPE),
            ("link.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "once.jpg"
            tar.addfile(member)
    once, twice = find_photos(str(tmp_path / "t.tar"))
    assert (once["name"], twice["name"]) == ("t.tar/once.jpg", "t.tar/twice.jpg")
    assert np.array_equal(read_photo(twice), pixels(2))


def test_complete_images_of_a_truncated_tar_file_are_used(tmp_path, caplog):
    path = write_tar(tmp_path / "t.tar", {f"{index}.jpg": jpeg(index) for index in range(3)})
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    cuts = {
        "within a photo": (last.offset_data + last.size - 1, 2),
        "after its first byte": (last.offset_data + 1, 2),
        "after a header": (last.offset_data, 2),
        "within a header": (last.offset + 100, 2),
        "after the last photo": (last.offset_data + last.size, 3),
    }
    for place, (length, whole) in cuts.items():
        path.write_bytes(content[:length])
        caplog.clear()
        records = find_photos(str(path))
        assert len(records) == whole, place
        assert "t.tar is corrupt" in caplog.text, place
        for index, record in enumerate(records):
            assert np.array_equal(read_photo(record), pixels(index))


def test_a_tar_file_without_its_end_mark_is_complete(tmp_path, caplog):
    path = write_tar(tmp_path / "t.tar", {"a.jpg": jpeg()})
    path.write_bytes(path.read_bytes()[: 512 * (1 + -(-len(jpeg()) // 512))])
    assert len(find_photos(str(path))) == 1
    assert "corrupt" not in caplog.text


def test_damaged_tar_files_are_named(photo_folder, caplog):
    (photo_folder / "no.tar").write_bytes(b"not a tar file" * 100)
    (photo_folder / "empty.tar").write_bytes(b"")
    (photo_folder / "gone.tar").symlink_to(photo_folder / "nowhere")
    path = write_tar(photo_folder / "header.tar", {"1.jpg": b"x", "2.jpg": b"x", "3.jpg": b"x"})
    content = bytearray(path.read_bytes())
    content[1024 + 150] ^= 1  # in the checksum of the second header
    path.write_bytes(content)
    assert names(photo_folder) == ["a.jpg", "b.JPG", "header.tar/1.jpg", "more/c.jpeg"]
    for name in ("no.tar", "empty.tar", "gone.tar", "header.tar"):
        assert f"{name} is corrupt" in caplog.text


def test_compressed_tar_files(photo_folder, caplog):
    for name in ("x.tar.gz", "x.tgz", "x.tar.bz2", "more/x.TAR.XZ"):
        (photo_folder / name).write_bytes(b"")
        with pytest.raises(ValueError, match=rf"{KEY}.*decompress.*{name}"):
            find_photos(str(photo_folder / name))
    assert len(find_photos(str(photo_folder))) == 3
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "4 compressed tar files, decompress them" in warning
    assert "x.tar.bz2" in warning


def test_lists(photo_folder, shard):
    photos = photo_folder.name
    path = photo_folder.parent / "list.txt"
    lines = [f"{photos}/b.JPG", "", f"  {shard.name}", str(photo_folder / "a.jpg"), photos]
    path.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    records = find_photos(str(path))
    assert [record["name"] for record in records] == [
        f"{photos}/b.JPG",
        "sa_000000.tar/sa_1.jpg",
        "sa_000000.tar/sa_2.jpg",
        str(photo_folder / "a.jpg"),
        "more/c.jpeg",
    ], "what the last line has again is taken once"
    assert all(read_photo(record).shape[2] == 3 for record in records)


def test_lists_with_mistakes(photo_folder):
    path = photo_folder / "list.txt"
    (photo_folder / "other.txt").write_text("a.jpg")
    for content, error, message in (
        ("a.jpg\nnone.jpg", FileNotFoundError, r"none\.jpg .*\(line 2 of .*list\.txt\)"),
        ("other.txt", ValueError, r"a folder, a tar file, an image \(.*\), got .*other\.txt \(line 1 of"),
        ("a.jpg\n\nb\0.jpg", ValueError, r"cannot be read: .* \(line 3 of .*list\.txt\)$"),
        (f"{'b' * 300}.jpg\na.jpg", ValueError, r"cannot be read: .* \(line 1 of .*list\.txt\)$"),
        (
            "none.jpg\na.jpg\n\nnone\na.csv",
            FileNotFoundError,
            r"\(line 1 of .*list\.txt\); 2 more lines are wrong",
        ),
        ("\n\n", ValueError, "no images"),
        (b"\xff\xfe\x00", ValueError, r"list\.txt cannot be read"),
    ):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(error, match=f"{KEY}.*{message}"):
            find_photos(str(path))


def test_several_sources_keep_their_order_and_share_no_photo(photo_folder, shard, caplog):
    caplog.set_level(logging.INFO)
    sources = os.pathsep.join(map(str, (shard, photo_folder / "more" / "c.jpeg", "", photo_folder, shard)))
    assert names(sources) == ["sa_000000.tar/sa_1.jpg", "sa_000000.tar/sa_2.jpg", "c.jpeg", "a.jpg", "b.JPG"]
    counts = [record.getMessage().split(" images in")[0] for record in caplog.records]
    assert counts == ["2", "1", "2", "0"]


def test_a_path_with_the_separator_in_it_is_one_path(photo_folder):
    odd = photo_folder.rename(photo_folder.with_name(f"a{os.pathsep}b"))
    assert len(find_photos(str(odd))) == 3


def test_names_stay_when_the_source_moves_and_grows(photo_folder, shard):
    shard.rename(photo_folder / shard.name)
    before = names(photo_folder)
    moved = photo_folder.rename(photo_folder.with_name("moved"))
    (moved / "0.jpg").write_bytes(jpeg())
    assert names(moved) == ["0.jpg", *before]


def test_missing_empty_and_other_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{KEY}: .*none does not exist"):
        find_photos(str(tmp_path / "none"))
    for sources in ("", os.pathsep, str(tmp_path), str(write_tar(tmp_path / "t.tar", {"a.json": b"{}"}))):
        with pytest.raises(ValueError, match=f"{KEY}: there are no images"):
            find_photos(sources)
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(ValueError, match=rf"{KEY} must name a folder.*got .*a\.csv"):
        find_photos(str(tmp_path / "a.csv"))


@pytest.fixture
def locked(monkeypatch):
    """A set of paths that may not be read; the rights of files do not bind an administrator, who may run tests."""
    paths = set()
    scandir, open_file = os.scandir, open

    def guarded(function):
        def call(path, *args, **kwargs):
            if str(path) in paths:
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *args, **kwargs)

        return call

    monkeypatch.setattr(os, "scandir", guarded(scandir))
    monkeypatch.setattr("builtins.open", guarded(open_file))
    monkeypatch.setattr(tarfile, "bltn_open", guarded(open_file))
    return paths


def test_unreadable_files_of_a_source_are_named_and_skipped(photo_folder, shard, locked, caplog):
    tar = shard.rename(photo_folder / shard.name)
    locked.update((str(photo_folder / "more"), str(tar)))
    assert names(photo_folder) == ["a.jpg", "b.JPG"]
    for path in locked:
        assert any(path in record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)


def test_a_source_that_may_not_be_read_is_an_error(photo_folder, shard, locked):
    locked.update((str(photo_folder), str(shard)))
    for path in locked:
        with pytest.raises(ValueError, match=f"{KEY}.*{path} cannot be read: .*Permission denied"):
            find_photos(path)


AS_ANOTHER_USER = """
import os
from spar_d2.data.sources import find_photos
os.setuid(65534)
try:
    find_photos({folder!r})
except ValueError as error:
    print(error)
"""


@pytest.mark.processes
@pytest.mark.skipif(os.getuid() != 0, reason="needs to become another user")
def test_a_folder_of_another_user(photo_folder):
    photo_folder.chmod(0o700)
    code = AS_ANOTHER_USER.format(folder=str(photo_folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith(f"SPAR.DATA.IMAGES: {photo_folder} cannot be read"), done.stderr


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, sparse: bool = False) -> bytes:
    """A member's header, with any size."""
    member = tarfile.TarInfo(name)
    member.type = kind
    content = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    content[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    if sparse:  # one piece of 512 bytes of a file of 10 GB
        content[386:398], content[398:410] = b"00000000000\0", b"00000001000\0"
        content[483:495] = tarfile.itn(10 << 30, 12, tarfile.GNU_FORMAT)
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content)
    return bytes(content)


def whole(name: str) -> bytes:
    content = jpeg()
    return header(name, len(content)) + content + bytes(-len(content) % 512)


LONG_NAME = header("././@LongLink", 6, tarfile.GNUTYPE_LONGNAME) + b"x.jpg\0".ljust(512, b"\0")


@pytest.mark.parametrize(
    ("between", "message", "after"),
    [
        (header("n.jpg", -1024), "negative size", False),
        (header("n.jpg", -512), "negative size", False),
        (LONG_NAME * 3000, "nested", False),
        (header("././@LongLink", 8 << 30, tarfile.GNUTYPE_LONGNAME), "8589934592 bytes", False),
        (header("pax", 8 << 30, tarfile.XHDTYPE), "8589934592 bytes", False),
        (header("s.jpg", 512, tarfile.GNUTYPE_SPARSE, sparse=True) + bytes(512), "", True),
    ],
    ids=["back", "same place", "nested names", "long name", "long pax header", "sparse"],
)
def test_hostile_tar_files_end(tmp_path, caplog, between, message, after):
    path = tmp_path / "x.tar"
    path.write_bytes(whole("a.jpg") + between + whole("b.jpg") + bytes(1024))
    assert names(path) == ["x.tar/a.jpg"] + ["x.tar/b.jpg"] * after
    assert message in caplog.text and bool(message) == bool(caplog.text)


def test_a_photo_that_is_a_hole_in_a_file_is_not_read(tmp_path):
    path = tmp_path / "x.tar"
    with open(path, "wb") as file:
        file.write(whole("a.jpg") + header("b.jpg", 8 << 30))
        file.truncate(file.tell() + (8 << 30))
    first, second = find_photos(str(path))
    assert read_photo(first).shape == (20, 30, 3)
    with pytest.raises(ValueError, match=r"b\.jpg cannot be read: it has 8589934592 bytes, the limit is"):
        read_photo(second)


def test_members_with_impossible_names_are_left_out(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a.jpg", "b.jpg"):
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(jpeg()), {"path": "x\0y.jpg"} if name == "b.jpg" else {}
            tar.addfile(member, io.BytesIO(jpeg()))
    assert names(tmp_path / "x.tar") == ["x.tar/a.jpg"]
