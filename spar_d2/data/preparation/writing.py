"""Writing prepared labels: what Detectron2 reads, one class number per pixel."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from spar_d2.data.benchmarks import BENCHMARKS
from spar_d2.data.images import DAMAGE
from spar_d2.data.preparation.common import Labels, datasets_root, relabel
from spar_d2.data.preparation.registry import find_preparation
from spar_d2.files import remove_leftovers, replacing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What :func:`prepare` did.

    Attributes:
        name: of the benchmark.
        images: validation images that have prepared labels now.
        written: label files written; all others were there.
        folder: where they are.
    """

    name: str
    images: int
    written: int
    folder: Path


@dataclass(frozen=True)
class _Task:
    """An image, its official label, and the prepared one to write."""

    image: Path
    source: Path
    target: Path


def prepare(
    name: str, root: str | os.PathLike | None = None, partial: bool = False, workers: int | None = None
) -> Summary:
    """Write the prepared labels of a benchmark.

    Labels that are there are kept, so that it can be stopped and called again.

    Args:
        name: of the benchmark.
        root: the folder of all data sets; default: ``$DETECTRON2_DATASETS``, or "datasets".
        partial: be content with a part of the validation images.
        workers: threads; default: one for each CPU.

    Raises:
        MissingArchive: official files are not there; says what to fetch.
        RuntimeError: they need a package that is not installed.
        ValueError: an argument that is not allowed; images or labels are missing, damaged, of different size, or have
            other values than the data set.
    """
    preparation, folder = find_preparation(name), datasets_root(root)
    workers = os.cpu_count() or 1 if workers is None else workers
    if workers < 1:
        raise ValueError(f"--workers must be at least 1, got {workers}")
    remove_leftovers(preparation.folder(folder))
    images = preparation.images(folder)
    left = {key: path for key, path in images.items() if not _is_ready(path, preparation.prepared(folder, key))}
    # Official labels may be gone once all are prepared.
    labels = preparation.labels(folder) if left or not images else None
    tasks, missing = [], []
    for key, image in left.items():
        task = _Task(image, labels.file(key), preparation.prepared(folder, key))
        lacking = [path for path in (task.image, task.source) if not path.is_file()]
        missing += lacking
        if not lacking:
            tasks.append(task)
    ready = len(images) - len(left)
    _check_count(name, ready + len(tasks), missing, folder, partial)
    _write_all(name, tasks, labels, workers, ready)
    return Summary(name, ready + len(tasks), len(tasks), preparation.folder(folder))


def _is_ready(image: Path, target: Path) -> bool:
    return image.is_file() and target.is_file()


def _check_count(name: str, found: int, missing: list[Path], root: Path, partial: bool) -> None:
    """Raise ``ValueError`` where images or labels are missing, unless a part of them is enough."""
    expected = BENCHMARKS[name].images
    if found > expected:
        logger.warning("%s has %d validation images, here are %d: scores will not compare.", name, expected, found)
    if found >= expected or (partial and found):
        return
    shown = f"; missing first: {', '.join(map(str, missing[:3]))}" if missing else ""
    hint = "; --partial prepares those that are there" if found else ""
    raise ValueError(f"{name} has {expected} validation images, with labels there are {found} in {root}{shown}{hint}")


def _write_all(name: str, tasks: list[_Task], labels: Labels | None, workers: int, ready: int) -> None:
    """Do all tasks in threads: nearly all of the time goes into decoding and encoding, which run side by side there."""
    total = ready + len(tasks)
    with (
        tqdm(total=total, initial=ready, desc=f"preparing {name}", unit="label", disable=None) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        futures = [pool.submit(_write, task, labels) for task in tasks]
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
        except BaseException:
            # After ctrl-C too, only the files that are being written are finished.
            pool.shutdown(cancel_futures=True)
            raise


def _write(task: _Task, labels: Labels) -> None:
    values = labels.read(task.source)
    try:
        prepared = relabel(values, labels.table)
    except ValueError as error:
        raise ValueError(f"the label file {task.source} has {error}") from error
    try:
        with Image.open(task.image) as header:
            size = header.size[::-1]
    except DAMAGE as error:
        raise ValueError(f"the image {task.image} cannot be read: {error}") from error
    if prepared.shape != size:
        sizes = f"{_shown(prepared.shape)} and {_shown(size)} pixels"
        raise ValueError(f"the label file {task.source} and its image {task.image} differ in size: {sizes}")
    with replacing(task.target) as temporary:
        Image.fromarray(prepared).save(temporary)


def _shown(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"
