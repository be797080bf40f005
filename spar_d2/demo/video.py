"""Videos through the demo, a frame at a time."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from spar_d2.demo.outputs import Target, frame_masks, is_mask_of, write_mask, write_record
from spar_d2.demo.predictor import Demo
from spar_d2.utils.io import atomic_write
from spar_d2.visualization import fit_pca_colors

# Its readers print what they think of damaged files; here that is said in one line.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

# A legend lists all classes in every frame, so that it stands still; with more than these there is none.
_MOST_LISTED = 40
# How files of videos begin. Others may be playlists, whatever they are called: FFmpeg opens the files and addresses in
# them, and draws what may not be theirs.
_BEGINNINGS = re.compile(
    rb"....(ftyp|moov|mdat|free|skip|wide|pnot)|RIFF....AVI |\x1aE\xdf\xa3|\x00\x00\x01|0&\xb2u|FLV\x01|OggS"
    rb"|\x47.{187}\x47|....\x47.{191}\x47",
    re.DOTALL,
)
# Where a file does not say how many frames a second it has.
_USUAL_RATE = 25.0


@dataclass(frozen=True)
class Video:
    """A video to read.

    Attributes:
        path: of the file.
        rate: frames a second.
        frames: how many it says it has; 0 where it does not say.
    """

    path: str
    rate: float
    frames: int

    @classmethod
    def open(cls, path: str) -> Video:
        """Raises ``ValueError`` for what cannot be opened as a video."""
        with _capture(path) as capture:
            rate, frames = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
        rate = rate if math.isfinite(rate) and rate > 0 else _USUAL_RATE
        return cls(path, rate, max(int(frames), 0) if math.isfinite(frames) else 0)

    def read(self) -> Iterator[np.ndarray]:
        """Frames (H, W, 3) uint8 RGB, one at a time; raises ``ValueError`` where there is none."""
        with _capture(self.path) as capture:
            first = True
            while True:
                there, frame = capture.read()
                if not there:
                    break
                first = False
                yield np.ascontiguousarray(frame[:, :, ::-1])
            if first:
                raise ValueError(f"video: no frame of {self.path} can be decoded")


@contextlib.contextmanager
def _capture(path: str) -> Iterator[cv2.VideoCapture]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"video: there is no file {path}")
    with open(path, "rb") as file:
        is_video = _BEGINNINGS.match(file.read(1024))
    # Absolute, as FFmpeg takes what stands before a colon for a protocol.
    capture = cv2.VideoCapture(os.path.abspath(path)) if is_video else cv2.VideoCapture()
    try:
        if not capture.isOpened():
            raise ValueError(
                f"video: {path} cannot be opened: it is damaged, no video (playlists are none), or of a kind OpenCV "
                "cannot read"
            )
        yield capture
    finally:
        capture.release()


class _Writer:
    """Writes frames to a video, all of the size of the first, made even: the usual players ask for that."""

    def __init__(self, path: Path, rate: float) -> None:
        self.path, self.rate = path, rate
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)

    def write(self, picture: np.ndarray) -> None:
        if self._writer is None:
            height, width = picture.shape[:2]
            self._size = (width + width % 2, height + height % 2)
            self._writer = cv2.VideoWriter(str(self.path), cv2.VideoWriter.fourcc(*"mp4v"), self.rate, self._size)
            if not self._writer.isOpened():
                wanted = f"{width}x{height} pixels at {self.rate:g} frames a second"
                raise OSError(f"video: OpenCV cannot write a video of {wanted} to {self.path.parent}")
        width, height = self._size
        picture = picture[:height, :width]
        missing = ((0, height - picture.shape[0]), (0, width - picture.shape[1]), (0, 0))
        picture = np.pad(picture, missing, constant_values=255)
        self._writer.write(np.ascontiguousarray(picture[:, :, ::-1]))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.release()


def segment_video(demo: Demo, path: str, target: Target) -> tuple[list[float], list[float]]:
    """Segment all frames of a video, and write them as another.

    Args:
        demo: sees and draws frames.
        path: of the video.
        target: where the new one goes, and where asked for the masks of its frames, "000001.png" and so on, and a JSON
            file with the share of every class in every frame.

    Returns:
        Seconds of the model for each frame, and the mean share of every class.

    Raises:
        FileNotFoundError: no such video.
        ValueError: it cannot be opened, or nothing in it can be decoded.
        OSError: the new one cannot be written.
    """
    video = Video.open(path)
    listed = range(len(demo.names)) if len(demo.names) <= _MOST_LISTED else ()
    seconds, areas, coloring, size = [], [], None, (0, 0)
    with atomic_write(target.picture) as temporary:
        writer = _Writer(temporary, video.rate)
        try:
            bar = tqdm(video.read(), desc=Path(path).name, total=video.frames or None, unit="frame", leave=False)
            for number, frame in enumerate(bar, start=1):
                seen = demo.see(frame)
                if seen.features is not None and coloring is None:
                    # One projection for the whole video, so that its colors do not flicker.
                    coloring = fit_pca_colors([seen.features])
                writer.write(demo.draw(frame, seen, coloring, listed))
                seconds.append(seen.seconds)
                size = frame.shape[:2]
                if seen.labels is not None or target.masks or target.record:
                    areas.append(_shares(demo, seen.needed_labels()))
                if target.masks:
                    write_mask(seen.needed_labels(), demo.colors, target.masks / f"{number:06d}.png", path)
        finally:
            writer.close()
    if target.masks:
        for number, mask in frame_masks(target.masks).items():
            # Of an earlier, longer video of this name.
            if number > len(seconds) and is_mask_of(mask, path):
                mask.unlink()
    if target.record:
        write_record(_record(demo, size, video.rate, areas), target.record)
    return seconds, np.mean(areas, axis=0).tolist() if areas else []


def _shares(demo: Demo, labels: np.ndarray) -> np.ndarray:
    return np.bincount(labels.ravel(), minlength=len(demo.names)) / labels.size


def _record(demo: Demo, size: tuple[int, int], rate: float, areas: list[np.ndarray]) -> dict:
    found = [int(number) for number in np.flatnonzero(np.sum(areas, axis=0))]
    classes = [{"number": number, "name": demo.names[number], "color": demo.colors[number]} for number in found]
    frames = [{demo.names[n]: float(shares[n]) for n in found if shares[n]} for shares in areas]
    return {
        "width": size[1],
        "height": size[0],
        "frames_per_second": rate,
        "classes": classes,
        "areas_by_frame": frames,
        "vocabulary": demo.words,
    }
