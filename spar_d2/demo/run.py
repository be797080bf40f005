"""Runs the demo on all inputs and reports the results."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from spar_d2.data.images import read_photo
from spar_d2.demo.exports import Exports
from spar_d2.demo.inputs import Source
from spar_d2.demo.outputs import Target, write_mask, write_picture, write_record
from spar_d2.demo.predictor import Demo
from spar_d2.demo.video import segment_video
from spar_d2.results.geotiff import read_colors
from spar_d2.utils.errors import printable
from spar_d2.visualization.legend import percent

# Maximum number of classes in a printed line. The visualization and the JSON file have all.
_CLASSES_NAMED = 8
_SKIPPED_NAMED = 5


@dataclass
class RunSummary:
    """Summary of a run.

    Attributes:
        photos, frames: run time of the model in seconds for each image, and for each video frame.
        videos: number of videos.
        skipped: names of unreadable inputs.
    """

    photos: list[float] = field(default_factory=list)
    frames: list[float] = field(default_factory=list)
    videos: int = 0
    skipped: list[str] = field(default_factory=list)

    @property
    def done(self) -> int:
        return len(self.photos) + self.videos

    def __str__(self) -> str:
        parts = []
        if self.photos:
            parts.append(f"{_count(self.photos, 'image')}, median {statistics.median(self.photos):.3f} s per image")
        if self.videos:
            median = f"median {statistics.median(self.frames):.3f} s per frame"
            parts.append(f"{_count(range(self.videos), 'video')}, {_count(self.frames, 'frame')}, {median}")
        if self.skipped:
            named = ", ".join(self.skipped[:_SKIPPED_NAMED])
            parts.append(f"skipped {len(self.skipped)}: {named}{', ...' * (len(self.skipped) > _SKIPPED_NAMED)}")
        return "; ".join(parts)


def run(demo: Demo, sources: Sequence[Source], targets: Sequence[Target], exports: Exports | None = None) -> RunSummary:
    """Segment all inputs, write the results, and print a summary of each.

    If there are several inputs, unreadable ones are reported and skipped.

    Args:
        demo: demo to run.
        sources: images and videos.
        targets: output paths of each input.
        exports: results in other formats, whose files of all images are written at the end, even if the run is stopped.

    Raises:
        ValueError, FileNotFoundError: the only input cannot be read.
        OSError: a result cannot be written.
    """
    summary, several = RunSummary(), len(sources) > 1
    jobs = list(zip(sources, targets))
    bar = tqdm(jobs, desc="segmenting", unit="file", disable=None if several else True, leave=False)
    try:
        for source, target in bar:
            try:
                if source.is_video:
                    _video(demo, source, target, summary)
                else:
                    _photo(demo, source, target, summary, exports)
            except (ValueError, FileNotFoundError) as error:
                if not several:
                    raise
                tqdm.write(f"skipped: {printable(str(error))}", file=sys.stderr)
                summary.skipped.append(source.name)
    finally:
        for path in exports.write() if exports else ():
            _print(f"written: {path}")
    return summary


def _photo(demo: Demo, source: Source, target: Target, summary: RunSummary, exports: Exports | None) -> None:
    # In the format of a raster, which may have more bands than an image.
    image = read_colors(source.path) if target.geotiff else read_photo(source.record)
    seen = demo.see(image)
    if target.masks or target.record:
        seen.needed_labels()
    write_picture(demo.draw(image, seen), target.picture)
    if target.masks:
        write_mask(seen.needed_labels(), demo.colors, target.masks, source.path)
    if target.record:
        write_record(demo.record(seen.needed_labels()), target.record)
    if exports:
        exports.add(source, target, seen.needed_labels())
    summary.photos.append(seen.seconds)
    size = f"{image.shape[1]}x{image.shape[0]}"
    _print(f"{source.path}: {size}, {seen.seconds:.3f} s, written to {target.picture}")
    if seen.labels is not None:
        _print_classes((found.name, found.area) for found in demo.find(seen.labels))


def _video(demo: Demo, source: Source, target: Target, summary: RunSummary) -> None:
    seconds, areas = segment_video(demo, source.path, target)
    summary.frames += seconds
    summary.videos += 1
    median = f"median {statistics.median(seconds):.3f} s per frame"
    _print(f"{source.path}: {_count(seconds, 'frame')}, {median}, written to {target.picture}")
    _print_classes(sorted(((n, a) for n, a in zip(demo.names, areas) if a), key=lambda pair: -pair[1]))


def _print(line: str) -> None:
    # tqdm.write does not interfere with progress bars.
    tqdm.write(printable(line), file=sys.stdout)


def _print_classes(found: Iterable[tuple[str, float]]) -> None:
    """Print class names and areas, largest first."""
    parts = [f"{name} {percent(area)}" for name, area in found]
    if parts:
        _print(f"  {', '.join(parts[:_CLASSES_NAMED])}{', ...' if len(parts) > _CLASSES_NAMED else ''}")


def _count(things: Sequence, word: str) -> str:
    return f"{len(things)} {word}{'' if len(things) == 1 else 's'}"
