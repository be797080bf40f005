"""Reading the videos of others."""

import cv2
import numpy as np
import pytest

from spar_d2.demo.video import Video


def write_video(path, codec: str) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 25, (64, 48))
    for number in range(3):
        writer.write(np.full((48, 64, 3), 60 * number, dtype=np.uint8))
    writer.release()


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "mp4v"), ("a.mov", "mp4v"), ("a.m4v", "mp4v"), ("a.3gp", "mp4v"), ("a.avi", "MJPG"), ("a.mkv", "mp4v")]
    + [("a.webm", "VP80"), ("a.wmv", "WMV2"), ("a.flv", "FLV1"), ("a.mpg", "mpg1"), ("concat:a.mp4|b.mp4", "mp4v")],
)
def test_videos_are_read(tmp_path, monkeypatch, name, codec):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / name, codec)
    assert len(list(Video.open(name).read())) == 3


@pytest.mark.parametrize(
    "text",
    [
        "ffconcat version 1.0\nfile mine.mp4\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nmine.mp4\n#EXT-X-ENDLIST\n",
        "#EXTM3U\nhttp://localhost:9/a.mp4\n",
        "[Reference]\nRef1=http://localhost:9/a.wmv\n",
        "",
    ],
)
@pytest.mark.parametrize("name", ["list.mp4", "list.avi", "list.webm"])
def test_playlists_that_name_other_files_are_refused(tmp_path, monkeypatch, text, name):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "mine.mp4", "mp4v")
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name} cannot be opened: .*playlists"):
        Video.open(name)
