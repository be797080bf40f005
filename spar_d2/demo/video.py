"""Runs the demo on videos, frame by frame."""

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

# Suppress FFmpeg's own messages about corrupt files, because this module raises an error with one line.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

# Maximum number of classes for the legend of a video. It lists all classes in every frame, so that it does not move;
# with more classes, there is no legend.
_MAX_LISTED = 40
# Signatures of video files. Other files may be playlists, whatever their suffix. FFmpeg would open the files and URLs
# that a playlist names, which could expose private files.
_SIGNATURES = re.compile(
    rb"....(ftyp|moov|mdat|free|skip|wide|pnot)|RIFF....AVI |\x1aE\xdf\xa3|\x00\x00\x01|0&\xb2u|FLV\x01|OggS"
    rb"|\x47.{187}\x47|....\x47.{191}\x47",
    re.DOTALL,
)
# Frame rate of files that do not specify it.
_DEFAULT_RATE = 25.0


@dataclass(frozen=True)
class Video:
    """A video file.

    Attributes:
        path: path of the file.
        rate: frames per second.
        frames: number of frames that the header states; 0 if unknown.
    """

    path: str
    rate: float
    frames: int

    @classmethod
    def open(cls, path: str) -> Video:
        """Open a video. Raises ``ValueError`` if that fails."""
        with _capture(path) as capture:
            rate, frames = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
        rate = rate if math.isfinite(rate) and rate > 0 else _DEFAULT_RATE
        return cls(path, rate, max(int(frames), 0) if math.isfinite(frames) else 0)

    def read(self) -> Iterator[np.ndarray]:
        """Yield frames (H, W, 3) uint8 RGB. Raises ``ValueError`` if there are none."""
        with _capture(self.path) as capture:
            first = True
            while True:
                success, frame = capture.read()
                if not success:
                    break
                first = False
                yield np.ascontiguousarray(frame[:, :, ::-1])
            if first:
                raise ValueError(f"video: no frame of {self.path} can be decoded")


@contextlib.contextmanager
def _capture(path: str) -> Iterator[cv2.VideoCapture]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"video: {path} does not exist")
    with open(path, "rb") as file:
        is_video = _SIGNATURES.match(file.read(1024))
    # Absolute, because FFmpeg interprets a prefix with a colon as a protocol.
    capture = cv2.VideoCapture(os.path.abspath(path)) if is_video else cv2.VideoCapture()
    try:
        if not capture.isOpened():
            raise ValueError(
                f"video: {path} cannot be opened: it is corrupt, not a video (playlists are not supported), or in a "
                "format that OpenCV cannot read"
            )
        yield capture
    finally:
        capture.release()


class _Writer:
    """Writes frames to a video file.

    The video has the size of the first frame, padded to even sides, because common players require even sides.
    """

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
                wanted = f"{width}x{height} pixels at {self.rate:g} frames per second"
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
    """Segment all frames of a video, and write the result as a video.

    Args:
        demo: model, vocabulary and visualization.
        path: path of the video.
        target: output paths: of the video and, if requested, of the folder for the masks of all frames ("000001.png",
            "000002.png", ...) and of a JSON file with the area of every class in every frame.

    Returns:
        Run time of the model for each frame in seconds, and the mean area of every class as a fraction of the frame,
        0..1; the areas are empty if no labels were needed.

    Raises:
        FileNotFoundError: the video does not exist.
        ValueError: the video cannot be opened, or no frame can be decoded.
        OSError: the result cannot be written.
    """
    video = Video.open(path)
    listed = range(len(demo.names)) if len(demo.names) <= _MAX_LISTED else ()
    seconds, areas, coloring, size = [], [], None, (0, 0)
    with atomic_write(target.picture) as temporary:
        writer = _Writer(temporary, video.rate)
        try:
            bar = tqdm(video.read(), desc=Path(path).name, total=video.frames or None, unit="frame", leave=False)
            for number, frame in enumerate(bar, start=1):
                seen = demo.see(frame)
                if seen.features is not None and coloring is None:
                    # The projection is fitted once, so that colors do not flicker.
                    coloring = fit_pca_colors([seen.features])
                writer.write(demo.draw(frame, seen, coloring, listed))
                seconds.append(seen.seconds)
                size = frame.shape[:2]
                if seen.labels is not None or target.masks or target.record:
                    areas.append(_areas(demo, seen.needed_labels()))
                if target.masks:
                    write_mask(seen.needed_labels(), demo.colors, target.masks / f"{number:06d}.png", path)
        finally:
            writer.close()
    if target.masks:
        for number, mask in frame_masks(target.masks).items():
            # Delete masks of an earlier, longer video with the same name.
            if number > len(seconds) and is_mask_of(mask, path):
                mask.unlink()
    if target.record:
        write_record(_record(demo, size, video.rate, areas), target.record)
    return seconds, np.mean(areas, axis=0).tolist() if areas else []


def _areas(demo: Demo, labels: np.ndarray) -> np.ndarray:
    return np.bincount(labels.ravel(), minlength=len(demo.names)) / labels.size


def _record(demo: Demo, size: tuple[int, int], rate: float, areas: list[np.ndarray]) -> dict:
    found = [int(number) for number in np.flatnonzero(np.sum(areas, axis=0))]
    classes = [{"number": number, "name": demo.names[number], "color": demo.colors[number]} for number in found]
    frames = [{demo.names[n]: float(frame_areas[n]) for n in found if frame_areas[n]} for frame_areas in areas]
    return {
        "width": size[1],
        "height": size[0],
        "frames_per_second": rate,
        "classes": classes,
        "areas_by_frame": frames,
        "vocabulary": demo.words,
    }
