"""All inputs of the demo, one after another, with what is said about them."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from spar_d2.data.images import read_photo
from spar_d2.demo.inputs import Source
from spar_d2.demo.outputs import Target, write_mask, write_picture, write_record
from spar_d2.demo.predictor import Demo
from spar_d2.demo.video import segment_video
from spar_d2.utils.errors import printable
from spar_d2.visualization.legend import percent

# Named in a line; the picture and the JSON file have all.
_CLASSES_NAMED = 8
_SKIPPED_NAMED = 5


@dataclass
class RunSummary:
    """What was done.

    Attributes:
        photos, frames: the model's seconds for each photo, and for each frame of a video.
        videos: how many.
        skipped: names of what could not be read.
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
            parts.append(f"{_count(self.photos, 'photo')}, median {statistics.median(self.photos):.3f} s per image")
        if self.videos:
            median = f"median {statistics.median(self.frames):.3f} s per frame"
            parts.append(f"{_count(range(self.videos), 'video')}, {_count(self.frames, 'frame')}, {median}")
        if self.skipped:
            named = ", ".join(self.skipped[:_SKIPPED_NAMED])
            parts.append(f"skipped {len(self.skipped)}: {named}{', ...' * (len(self.skipped) > _SKIPPED_NAMED)}")
        return "; ".join(parts)


def run(demo: Demo, sources: Sequence[Source], targets: Sequence[Target]) -> RunSummary:
    """Segment all inputs, write what was asked for, and print a few lines on each.

    Of several inputs, one that cannot be read is named and skipped.

    Args:
        demo: sees and draws.
        sources: photos and videos.
        targets: where the results of each go.

    Raises:
        ValueError, FileNotFoundError: the only input cannot be read.
        OSError: a result cannot be written.
    """
    tally, many = RunSummary(), len(sources) > 1
    jobs = list(zip(sources, targets))
    for source, target in tqdm(jobs, desc="segmenting", unit="file", disable=None if many else True, leave=False):
        try:
            (_video if source.is_video else _photo)(demo, source, target, tally)
        except (ValueError, FileNotFoundError) as error:
            if not many:
                raise
            tqdm.write(f"skipped: {printable(str(error))}", file=sys.stderr)
            tally.skipped.append(source.name)
    return tally


def _photo(demo: Demo, source: Source, target: Target, tally: RunSummary) -> None:
    image = read_photo(source.record)
    seen = demo.see(image)
    if target.masks or target.record:
        seen.needed_labels()
    write_picture(demo.draw(image, seen), target.picture)
    if target.masks:
        write_mask(seen.needed_labels(), demo.colors, target.masks, source.path)
    if target.record:
        write_record(demo.record(seen.needed_labels()), target.record)
    tally.photos.append(seen.seconds)
    size = f"{image.shape[1]}x{image.shape[0]}"
    _say(f"{source.path}: {size}, {seen.seconds:.3f} s, written to {target.picture}")
    if seen.labels is not None:
        _say_classes((found.name, found.area) for found in demo.find(seen.labels))


def _video(demo: Demo, source: Source, target: Target, tally: RunSummary) -> None:
    seconds, areas = segment_video(demo, source.path, target)
    tally.frames += seconds
    tally.videos += 1
    median = f"median {statistics.median(seconds):.3f} s per frame"
    _say(f"{source.path}: {_count(seconds, 'frame')}, {median}, written to {target.picture}")
    _say_classes(sorted(((n, a) for n, a in zip(demo.names, areas) if a), key=lambda pair: -pair[1]))


def _say(line: str) -> None:
    # Beside a bar that may stand on the same screen.
    tqdm.write(printable(line), file=sys.stdout)


def _say_classes(found: Iterable[tuple[str, float]]) -> None:
    """Print names and shares, largest first."""
    parts = [f"{name} {percent(area)}" for name, area in found]
    if parts:
        _say(f"  {', '.join(parts[:_CLASSES_NAMED])}{', ...' if len(parts) > _CLASSES_NAMED else ''}")


def _count(things: Sequence, word: str) -> str:
    return f"{len(things)} {word}{'' if len(things) == 1 else 's'}"
